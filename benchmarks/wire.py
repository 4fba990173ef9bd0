# SPDX-License-Identifier: Apache-2.0
"""What another process sees of two working robots over real DDS: rates, gaps, and a version swapped meanwhile.

    scripts/run python benchmarks/wire.py [--quick]

Writes benchmarks/results/wire.json. The policy has random weights: what it does is of no interest here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import rclpy
import results_file
import torch
from lwd_msgs.msg import ActionChunk, ExecutedAction, PolicyStatus
from sensor_msgs.msg import CompressedImage
from trajectory_msgs.msg import JointTrajectory

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.deployment import load_deployment, node_specs
from lwd_fleet.domain import PrivateDomain
from lwd_fleet.sim import robot
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_fleet.supervisor import Supervisor
from lwd_policy import checkpoint
from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.qos import EVENTS, LATCHED
from lwd_policy.trunk import build_trunk

ROOT = Path(__file__).parents[1]
ROBOTS = ("sim_r1", "sim_r2")
TICK_S = 0.02


class Observer:
    """Notes what arrives, per robot and topic: time of arrival and a sequence number where the message has one."""

    def __init__(self) -> None:
        self.arrivals: dict[str, list[float]] = defaultdict(list)
        self.steps: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.inference_s: list[float] = []
        self.active: dict[str, int] = {}
        self.node = rclpy.create_node("wire_observer")
        for name in ROBOTS:
            self._listen(name, JointTrajectory, "joint_command")
            self._listen(name, ExecutedAction, "executed_action")
            self._listen(name, ActionChunk, "policy/action_chunk")
            for camera in ("top", "wrist_left", "wrist_right"):
                self._listen(name, CompressedImage, f"camera_{camera}/image_raw/compressed")
            self.node.create_subscription(
                PolicyStatus,
                f"/{name}/policy/status",
                lambda message, name=name: self.active.__setitem__(name, message.active_version),
                LATCHED,
            )

    def _listen(self, name: str, kind: type, topic: str) -> None:
        def note(message: object) -> None:
            self.arrivals[f"{name}/{topic}"].append(time.monotonic())
            if isinstance(message, ExecutedAction):
                self.steps[name][message.episode_id].append(message.step)
            elif isinstance(message, ActionChunk):
                self.inference_s.append(message.inference_s)

        self.node.create_subscription(kind, f"/{name}/{topic}", note, EVENTS)

    def spin(self, seconds: float) -> None:
        """Listen for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            rclpy.spin_once(self.node, timeout_sec=0.05)


def publish(run: Path, seed: int) -> int:
    """A new policy version with random weights becomes the active one."""
    torch.manual_seed(seed)
    body = robot.embodiment()
    action = ActionSpec.unnormalised(body, "ee_relative", 10, 0.1, 5)
    policy = FlowPolicy(build_trunk(trunk_config("images"), body), observation_spec("images"), action)
    path = checkpoint.save(run / "policies", policy)
    with Catalog(str(run / "catalog.db")) as catalog:
        version = catalog.register_policy(path.name, path.as_uri(), (0, 0))
        catalog.set_policy_state(version, "active")
    return version


def measure(seconds: float) -> dict[str, float]:
    """Two robots work for `seconds`; half-way they are told to run another version."""
    with tempfile.TemporaryDirectory() as folder, PrivateDomain() as domain:
        os.environ.update(domain.environment)
        run = Path(folder)
        publish(run, 0)
        deployment = load_deployment(ROOT / "config/deployments/sim_two_robots.yaml", run)
        rclpy.init()
        observer = Observer()
        with Supervisor(node_specs(deployment), run, domain.environment) as fleet:
            while len(observer.steps) < len(ROBOTS):
                fleet.poll()
                observer.spin(0.2)
            observer.spin(5.0)  # discovery and start-up are not the subject
            observer.arrivals.clear()
            observer.steps.clear()
            began = time.monotonic()
            observer.spin(seconds / 2)
            second = publish(run, 1)
            observer.spin(seconds / 2)
            took = time.monotonic() - began
        rclpy.shutdown()
    gaps = np.concatenate([np.diff(observer.arrivals[f"{name}/joint_command"]) for name in ROBOTS])
    missing = sum(
        max(steps) - min(steps) + 1 - len(set(steps))
        for episodes in observer.steps.values()
        for steps in episodes.values()
    )
    images = [len(v) / took for k, v in observer.arrivals.items() if "camera" in k]
    return {
        "robots": len(ROBOTS),
        "command_rate_hz": float(
            np.mean([len(observer.arrivals[f"{name}/joint_command"]) / took for name in ROBOTS])
        ),
        "command_gap_p50_ms": float(np.median(gaps) * 1e3),
        "command_gap_p99_ms": float(np.quantile(gaps, 0.99) * 1e3),
        "command_gap_max_ms": float(gaps.max() * 1e3),
        "command_gaps_over_two_ticks": int((gaps > 2 * TICK_S).sum()),
        "commands": len(gaps),
        "executed_steps_missing": int(missing),
        "image_rate_min_hz": float(min(images)),
        "image_rate_mean_hz": float(np.mean(images)),
        "inference_p50_ms": float(np.median(observer.inference_s) * 1e3),
        "inference_p99_ms": float(np.quantile(observer.inference_s, 0.99) * 1e3),
        "robots_on_second_version": sum(version == second for version in observer.active.values()),
    }


def main() -> None:
    began = time.monotonic()
    metrics = measure(20.0 if "--quick" in sys.argv else 120.0)
    results_file.write("wire", metrics, began, seeds=(0, 1))
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
