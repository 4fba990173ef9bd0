# SPDX-License-Identifier: Apache-2.0
"""One policy in the same scenes, on robots made of real ROS 2 processes and on headless ones: does it succeed as often?

    scripts/run python experiments/ros_parity.py CHECKPOINT --tasks restock,correct --episodes 200

Each robot of the first kind is a simulator, an arbiter, a policy, an episode, a recorder and an uploader node, in real
time; headless ones run the same parts without ROS, as fast as they go. Scenes are paired; the policy's noise is not.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rclpy
import torch
import typer
import yaml
from lwd_msgs.action import RunEpisode
from lwd_msgs.msg import EpisodeState, PolicyStatus
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rich.console import Console

from lwd_fleet.deployment import FLEET_NAMESPACE, Deployment, lifecycle_manager, load_deployment, robot_nodes
from lwd_fleet.domain import PrivateDomain
from lwd_fleet.robot.arbiter import ArbiterTiming
from lwd_fleet.sim import robot
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_policy
from lwd_fleet.sim.shift import Shift
from lwd_fleet.supervisor import Supervisor
from lwd_policy import checkpoint
from lwd_policy.chunk_policy import ChunkPolicy
from lwd_policy.qos import LATCHED

VERSION = 1  # under which the robots know the policy
DRAWS = 4000  # of the bootstrap
PATIENCE_S = 120.0  # for robots to come up and load the policy
_TRIES = 3  # of an episode that could not be run

Scene = tuple[str, int]  # task, seed
Outcomes = dict[Scene, bool]

console = Console()


@dataclass
class _Worker:
    """One robot on the wire, and the scene that it is in."""

    name: str
    run_episode: ActionClient
    active: str = ""  # digest of the policy that it runs
    busy: bool = False


class Wire:
    """Robots of real processes; `run` gives them scenes until all are done."""

    def __init__(self, deployment: Deployment, path: Path, environment: dict[str, str]) -> None:
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=int(environment["ROS_DOMAIN_ID"]))
        self._node = rclpy.create_node("parity", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._path = path
        self._tries: dict[Scene, int] = {}
        self.outcomes: Outcomes = {}
        self._workers = [self._connect(one.name) for one in deployment.robots]

    def run(self, scenes: Sequence[Scene], supervisor: Supervisor) -> Outcomes:
        """Every scene once; one that could not be run is tried again. Raises RuntimeError."""
        self._load(supervisor)
        waiting = list(reversed(scenes))
        began = time.monotonic()
        while len(self.outcomes) < len(scenes):
            for worker in self._workers:
                if not worker.busy and waiting:
                    self._send(worker, waiting.pop(), waiting)
            before = len(self.outcomes)
            self._spin(supervisor)
            if len(self.outcomes) > before and len(self.outcomes) % 10 == 0:
                won = np.mean(list(self.outcomes.values()))
                console.print(
                    f"{len(self.outcomes)} of {len(scenes)}: {won:.2f} succeed, {time.monotonic() - began:.0f} s"
                )
        return self.outcomes

    def close(self) -> None:
        """Leave the domain."""
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _connect(self, name: str) -> _Worker:
        worker = _Worker(name, ActionClient(self._node, RunEpisode, f"/{name}/run_episode"))

        def note(message: PolicyStatus) -> None:
            worker.active = message.active_digest

        self._node.create_subscription(PolicyStatus, f"/{name}/policy/status", note, LATCHED)
        return worker

    def _load(self, supervisor: Supervisor) -> None:
        """Tell all robots which policy to run, and wait until they do."""
        values = {
            "policy.version": VERSION,
            "policy.uri": self._path.as_uri(),
            "policy.digest": self._path.name,
        }
        parameters = [Parameter(key, value=value).to_parameter_msg() for key, value in values.items()]
        until = time.monotonic() + PATIENCE_S
        for worker in self._workers:
            client = self._node.create_client(
                SetParametersAtomically, f"/{worker.name}/policy/set_parameters_atomically"
            )
            while worker.active != self._path.name:
                if time.monotonic() > until:
                    raise RuntimeError(f"{worker.name} does not run the policy after {PATIENCE_S:.0f} s")
                if client.service_is_ready():
                    client.call_async(SetParametersAtomically.Request(parameters=parameters))
                for _ in range(20):
                    self._spin(supervisor)
            while not worker.run_episode.server_is_ready():
                self._spin(supervisor)

    def _send(self, worker: _Worker, scene: Scene, waiting: list[Scene]) -> None:
        worker.busy = True
        self._tries[scene] = self._tries.get(scene, 0) + 1

        def failed(reason: str) -> None:
            worker.busy = False
            if self._tries[scene] >= _TRIES:
                raise RuntimeError(f"{worker.name}, {scene}: {reason}")
            console.print(f"{worker.name}, {scene}: {reason}; again")
            waiting.append(scene)

        def ended(future: Any) -> None:
            result = future.result().result
            if not result.success:
                failed(result.message)
                return
            worker.busy = False
            self.outcomes[scene] = result.outcome == EpisodeState.OUTCOME_SUCCESS

        def answered(future: Any) -> None:
            handle = future.result()
            if handle.accepted:
                handle.get_result_async().add_done_callback(ended)
            else:
                failed("it is busy or not ready")

        goal = RunEpisode.Goal(task=scene[0], seed=scene[1])
        worker.run_episode.send_goal_async(goal).add_done_callback(answered)

    def _spin(self, supervisor: Supervisor) -> None:
        supervisor.poll()
        self._executor.spin_once(timeout_sec=0.05)


def on_the_wire(path: Path, scenes: Sequence[Scene], shift: Shift, robots: int, work: Path) -> Outcomes:
    """Outcome of every scene on robots of real processes."""
    deployment = _deployment(work, path, sorted({task for task, _ in scenes}), shift, robots)
    specs = [spec for one in deployment.robots for spec in robot_nodes(deployment, one)]
    manager = lifecycle_manager(specs, FLEET_NAMESPACE, "lifecycle_manager")
    with (
        PrivateDomain() as domain,
        Supervisor([*specs, manager], work, domain.environment, console.print) as supervisor,
    ):
        wire = Wire(deployment, deployment.policies / path.name, domain.environment)
        try:
            return wire.run(scenes, supervisor)
        finally:
            wire.close()


def headless(path: Path, scenes: Sequence[Scene], shift: Shift) -> Outcomes:
    """Outcome of every scene without ROS."""
    policy, card = checkpoint.load(path)
    setup = HeadlessSetup(robot.embodiment(), ArbiterTiming(), card.observation_spec, shift)
    requests = [EpisodeRequest(task, seed) for task, seed in scenes]
    results = run_policy(setup, ChunkPolicy(policy), VERSION, card.digest, requests, robots=16)
    return {(result.request.task, result.request.seed): result.success for result in results}


def compare(wire: Outcomes, without: Outcomes) -> dict[str, Any]:
    """Success of both and the paired difference with its interval of 90 % (bootstrap over scenes)."""
    scenes = sorted(wire)
    difference = np.array([float(wire[scene]) - float(without[scene]) for scene in scenes])
    rng = np.random.default_rng(0)
    means = rng.choice(difference, (DRAWS, len(difference))).mean(axis=1)
    low, high = np.quantile(means, [0.05, 0.95])
    by_task = {
        task: [
            round(float(np.mean([side[scene] for scene in scenes if scene[0] == task])), 3)
            for side in (wire, without)
        ]
        for task in sorted({task for task, _ in scenes})
    }
    return {
        "scenes": len(scenes),
        "success_wire": round(float(np.mean([wire[scene] for scene in scenes])), 4),
        "success_headless": round(float(np.mean([without[scene] for scene in scenes])), 4),
        "difference": round(float(difference.mean()), 4),
        "interval_90": [round(float(low), 4), round(float(high), 4)],
        "wire_and_headless_by_task": by_task,
    }


def _deployment(work: Path, path: Path, tasks: list[str], shift: Shift, robots: int) -> Deployment:
    """Robots that look at keypoints only; robots load policies from their deployment's directory alone."""
    work.mkdir(parents=True, exist_ok=True)
    one = {
        "kind": "sim",
        "robot_file": str(robot.write(work)),
        "tasks": tasks,
        "shift": shift.to_json(),
        "camera_hz": 0.1,
    }
    content = {
        "name": "parity",
        "rates": {"policy_step_hz": 10.0, "output_hz": 50.0},
        "robots": [{"name": f"sim_r{number + 1}", **one} for number in range(robots)],
    }
    file = work / "deployment.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    deployment = load_deployment(file, work / "run")
    shutil.copytree(path, deployment.policies / path.name, dirs_exist_ok=True)
    return deployment


def main(
    policy: Annotated[Path, typer.Argument(help="A checkpoint's directory")],
    tasks: Annotated[str, typer.Option(help="Separated by commas; scenes take turns")],
    episodes: Annotated[int, typer.Option(help="Scenes in all", min=1)] = 200,
    first_seed: Annotated[int, typer.Option(help="Of the scenes; of none that was trained on")] = 600_000,
    shift: Annotated[str, typer.Option(help="A name or JSON; empty: none")] = "",
    robots: Annotated[int, typer.Option(help="On the wire at once", min=1)] = 2,
    work: Annotated[Path, typer.Option(help="Where logs and recordings go")] = Path("runs/ros_parity"),
    out: Annotated[Path, typer.Option(help="JSON with the result")] = Path(
        "experiments/results/ros_parity.json"
    ),
) -> None:
    """Compare, print and write the result."""
    torch.set_num_threads(1)
    path, names, chosen = policy.absolute(), tasks.split(","), Shift.parse(shift)
    scenes = [(names[number % len(names)], first_seed + number) for number in range(episodes)]
    without = headless(path, scenes, chosen)
    wire = on_the_wire(path, scenes, chosen, robots, work.absolute())
    result = {"policy": path.name, "shift": chosen.to_json(), "robots": robots, **compare(wire, without)}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print_json(data=result)


if __name__ == "__main__":
    typer.run(main)
