# SPDX-License-Identifier: Apache-2.0
"""The policy node as a process: chunks on demand, versions swapped between episodes, refusals that stop nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point, Pose, PoseArray
from lwd_msgs.msg import ActionChunk, EpisodeState, ExecutedAction, PolicyStatus
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter
from rclpy.time import Time
from sensor_msgs.msg import JointState
from std_msgs.msg import Header, String

from lwd_fleet.deployment import NodeSpec
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_policy import checkpoint
from lwd_policy.action import ActionSpec
from lwd_policy.embodiment import Embodiment
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.qos import COMMAND, EVENTS, IMAGE_PUBLISH, LATCHED
from lwd_policy.trunk import build_trunk

ROBOT_FILE = Path(__file__).parents[2] / "config" / "robots" / "sim_dual_arm.yaml"
HORIZON, EXECUTE = 6, 3


class Robot:
    """Everything around a policy node: sensors, an episode, and an arbiter that plays each chunk from its start."""

    def __init__(self, stage: Any, folder: Path) -> None:
        self.stage = stage
        self.body = Embodiment.load(ROBOT_FILE)
        self.folder = folder
        parameters = {"robot_file": str(ROBOT_FILE), "uri_allow": [str(folder)]}
        self.spec = NodeSpec("lwd_policy", "policy_node", "policy", "/sim_r1", parameters)
        self.chunks: list[ActionChunk] = stage.collect(ActionChunk, "/sim_r1/policy/action_chunk", EVENTS)
        self.status: list[PolicyStatus] = stage.collect(PolicyStatus, "/sim_r1/policy/status", LATCHED)
        self.diagnostics: list[DiagnosticArray] = stage.collect(DiagnosticArray, "/diagnostics", EVENTS)

        def publisher(kind: Any, topic: str, qos: Any) -> Any:
            return stage.node.create_publisher(kind, f"/sim_r1/{topic}", qos)

        self._joints = publisher(JointState, "joint_states", COMMAND)
        self._keypoints = publisher(PoseArray, "keypoints", IMAGE_PUBLISH)
        self._task = publisher(String, "task", LATCHED)
        self._episode = publisher(EpisodeState, "episode", LATCHED)
        self._executed = publisher(ExecutedAction, "executed_action", EVENTS)
        self.command = np.array(self.body.home)
        self.episode_id, self.step, self.sees = "", 0, True
        self._task.publish(String(data="put the cube into the bowl"))
        self.end_episode()

    # Policies ----------------------------------------------------------------------------------------

    def save(self, seed: int, embodiment: Embodiment | None = None, step_s: float = 0.1) -> Path:
        torch.manual_seed(seed)
        body = embodiment or self.body
        action = ActionSpec.unnormalised(body, "joint_relative", HORIZON, step_s, EXECUTE)
        policy = FlowPolicy(
            build_trunk(trunk_config("keypoints"), body), observation_spec("keypoints"), action
        )
        return checkpoint.save(self.folder, policy)

    def want(self, version: int, path: Path, **changes: Any) -> Any:
        """Set the desired version as a coordinator does; returns the node's answer."""
        values = {
            "policy.version": version,
            "policy.uri": path.as_uri(),
            "policy.digest": path.name,
            **changes,
        }
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParametersAtomically.Request(parameters=[p for p in parameters if p.value.type])
        return self.stage.call(
            SetParametersAtomically, "/sim_r1/policy/set_parameters_atomically", request, again_s=5.0
        ).result

    @property
    def active(self) -> int:
        return self.status[-1].active_version if self.status else -2

    def until_active(self, version: int) -> None:
        self.until(lambda: self.active == version, f"version {version}; status is {self.status[-1:]}")

    # Life --------------------------------------------------------------------------------------------

    def run_episode(self, episode_id: str) -> None:
        self.episode_id, self.step = episode_id, 0
        self._emit_state(EpisodeState.STATE_RUNNING)

    def end_episode(self) -> None:
        self.episode_id = ""
        self._emit_state(EpisodeState.STATE_IDLE)

    def _emit_state(self, state: int) -> None:
        self._episode.publish(EpisodeState(state=state, episode_id=self.episode_id, header=self._header()))

    def sense(self) -> None:
        # Another order than the embodiment's: names decide.
        names, positions = list(self.body.joint_names)[::-1], self.command[::-1].tolist()
        self._joints.publish(JointState(header=self._header(), name=names, position=positions))
        if self.sees:
            poses = [
                Pose(position=Point(x=0.01 * i, y=0.2, z=0.0)) for i in range(trunk_config("keypoints").slots)
            ]
            self._keypoints.publish(PoseArray(header=self._header(), poses=poses))

    def execute(self, author: int, chunk: ActionChunk | None = None, index: int = -1) -> None:
        """Report the next policy step as executed."""
        if chunk is not None:
            self.command = np.reshape(chunk.positions, (HORIZON, 14))[index]
        message = ExecutedAction(
            header=self._header(),
            episode_id=self.episode_id,
            step=self.step,
            joint_names=list(self.body.joint_names),
            positions=self.command.tolist(),
            arms=["left", "right"],
            author=[author, author],
            policy_version=-1 if chunk is None else chunk.policy_version,
            chunk_id=0 if chunk is None else chunk.chunk_id,
            chunk_index=index,
        )
        self._executed.publish(message)
        self.step += 1

    def play(self, chunk: ActionChunk, steps: int) -> None:
        for index in range(steps):
            self.sense()
            self.stage.spin(0.02)
            self.execute(ExecutedAction.AUTHOR_POLICY, chunk, index)

    def hold(self) -> None:
        self.execute(ExecutedAction.AUTHOR_HOLD)

    def until(self, condition: Any, what: str) -> None:
        self.stage.until(condition, what, self.sense)

    def next_chunk(self, count: int | None = None, holding: bool = False) -> ActionChunk:
        """The newest chunk once there is one more than `count`."""
        count = len(self.chunks) if count is None else count

        def live() -> None:
            self.sense()
            if holding:
                self.hold()
                self.stage.spin(0.1)

        self.stage.until(lambda: len(self.chunks) > count, "a chunk", live)
        return self.chunks[-1]

    def quiet(self, seconds: float = 0.5) -> None:
        """Live on for a while; no chunk may come."""
        count = len(self.chunks)
        for _ in range(round(seconds / 0.02)):
            self.sense()
            self.stage.spin(0.02)
        assert len(self.chunks) == count

    def diagnosis(self, name: str) -> str:
        found = [s for message in self.diagnostics for s in message.status if s.name.endswith(f": {name}")]
        return found[-1].message if found else ""

    def _header(self) -> Any:
        return Header(stamp=self.stage.node.get_clock().now().to_msg())


@pytest.fixture
def robot(stage: Any, tmp_path: Path) -> Robot:
    robot = Robot(stage, tmp_path / "policies")
    robot.supervisor = stage.bring_up([robot.spec])  # type: ignore[attr-defined]
    return robot


def start(robot: Robot, seed: int = 1, version: int = 5, episode: str = "e1") -> tuple[Path, ActionChunk]:
    """Make a policy active and begin an episode with it."""
    path = robot.save(seed)
    assert robot.want(version, path).successful
    robot.until_active(version)
    robot.quiet(0.2)  # sensors are heard before the episode begins
    robot.run_episode(episode)
    return path, robot.next_chunk(0, holding=True)


def test_a_chunk_comes_at_the_start_of_an_episode_and_whenever_one_is_about_to_end(robot: Robot) -> None:
    path = robot.save(1)
    assert robot.want(5, path).successful
    robot.until_active(5)
    robot.quiet()  # no episode, no chunk
    robot.run_episode("e1")
    chunk = robot.next_chunk(0)  # the first needs no held step to be asked for
    assert (chunk.episode_id, chunk.policy_version, chunk.policy_digest) == ("e1", 5, path.name)
    assert (chunk.chunk_id, chunk.observation_step, chunk.horizon, chunk.step_s) == (1, -1, HORIZON, 0.1)
    assert list(chunk.joint_names) == list(robot.body.joint_names)
    assert np.shape(chunk.positions) == (HORIZON * 14,) and np.isfinite(chunk.positions).all()
    assert np.isnan(chunk.value) and chunk.inference_s > 0
    assert len(chunk.observations) == 2 and chunk.observations[0].stamp == chunk.observations[1].stamp
    for seen in chunk.observations:
        assert set(seen.stream_names) == {"joint_positions", "instruction", "keypoints"}, (
            "no command before the first"
        )
        stamps = [Time.from_msg(stamp).nanoseconds for stamp in seen.stream_stamps]
        assert max(stamps) <= Time.from_msg(seen.stamp).nanoseconds

    robot.quiet()  # one chunk, one question
    robot.play(chunk, EXECUTE - 1)
    robot.quiet()
    robot.execute(ExecutedAction.AUTHOR_POLICY, chunk, EXECUTE - 1)
    following = robot.next_chunk(1)
    assert (following.chunk_id, following.observation_step) == (2, EXECUTE - 2), (
        "points came within the last step"
    )
    assert "command" in following.observations[-1].stream_names

    robot.execute(ExecutedAction.AUTHOR_HUMAN)
    robot.quiet()  # a person moves the robot: nobody asks
    robot.hold()
    assert robot.next_chunk(2).observation_step == EXECUTE


def test_an_episode_does_not_start_from_the_last_command_of_the_one_before(robot: Robot) -> None:
    _, chunk = start(robot)
    robot.play(chunk, EXECUTE)
    assert "command" in robot.next_chunk(len(robot.chunks)).observations[-1].stream_names
    robot.end_episode()
    robot.quiet(0.3)
    robot.command = np.array(robot.body.home)
    count = len(robot.chunks)
    robot.run_episode("e2")
    first = robot.next_chunk(count)
    assert (first.episode_id, first.observation_step) == ("e2", -1)
    assert "command" not in first.observations[-1].stream_names


def test_versions_change_between_episodes_only_and_may_go_back(robot: Robot) -> None:
    old, chunk = start(robot)
    new = robot.save(2)
    assert robot.want(6, new).successful
    robot.until(lambda: robot.status[-1].desired_version == 6, "the wish to be noted")
    for _ in range(4):
        count = len(robot.chunks)
        robot.play(chunk, EXECUTE)
        chunk = robot.next_chunk(count, holding=True)  # asked again, should a busy machine starve the sensors
        assert (chunk.policy_version, chunk.policy_digest) == (5, old.name)
    assert robot.active == 5
    robot.end_episode()
    robot.until_active(6)
    assert robot.status[-1].active_digest == new.name and robot.status[-1].load_s > 0
    count = len(robot.chunks)
    robot.run_episode("e2")
    assert robot.next_chunk(count, holding=True).policy_version == 6
    robot.end_episode()
    assert robot.want(5, old).successful
    robot.until_active(5)


def test_a_version_that_cannot_be_used_is_refused_with_its_reason_while_the_old_one_runs(
    robot: Robot,
) -> None:
    _, chunk = start(robot)
    damaged = robot.save(2)
    weights = bytearray((damaged / checkpoint.WEIGHTS).read_bytes())
    weights[-5] ^= 1
    (damaged / checkpoint.WEIGHTS).write_bytes(weights)
    assert robot.want(6, damaged).successful, "its form is right"
    robot.until(lambda: robot.status[-1].refused_version == 6, "the refusal")
    assert "damaged" in robot.status[-1].refused_reason and robot.status[-1].desired_version == 6
    robot.until(lambda: "version 5; version 6 refused" in robot.diagnosis("version"), "a diagnosis")

    wider = Embodiment.from_json(robot.body.to_json().replace("0.04", "0.05"))
    foreign = robot.save(3, wider)
    assert robot.want(7, foreign).successful
    robot.until(lambda: robot.status[-1].refused_version == 7, "the refusal")
    assert "other joint limits" in robot.status[-1].refused_reason

    assert robot.want(9, robot.save(3, step_s=0.05)).successful
    robot.until(lambda: robot.status[-1].refused_version == 9, "the refusal")
    assert "made for steps of 0.05 s, the robot's are 0.1 s" in robot.status[-1].refused_reason

    robot.play(chunk, EXECUTE)
    assert robot.next_chunk(len(robot.chunks)).policy_version == 5
    robot.end_episode()
    robot.quiet(0.3)
    assert robot.active == 5
    good = robot.save(4)
    assert robot.want(8, good).successful
    robot.until_active(8)
    robot.until(lambda: robot.diagnosis("version") == "version 8", "a diagnosis without complaint")


def test_a_wish_whose_form_is_wrong_is_rejected_at_once(robot: Robot, tmp_path: Path) -> None:
    path = robot.save(1)
    outside = (tmp_path / "else" / path.name).as_uri()
    dots = f"{path.parent.as_uri()}/../else/{path.name}"
    for changes, reason in [
        ({"policy.uri": outside}, "outside of uri_allow"),
        ({"policy.uri": dots}, "outside of uri_allow"),
        ({"policy.uri": "http://host/policy"}, "only file:///directory is served"),
        ({"policy.digest": "abc"}, "not a SHA-256"),
        ({"policy.digest": None}, "together"),
        ({"policy.version": -1}, "negative"),
    ]:
        answer = robot.want(5, path, **changes)
        assert not answer.successful and reason in answer.reason, (changes, answer.reason)
    assert robot.status[-1].desired_version == -1
    assert robot.want(5, path).successful
    robot.until_active(5)


def test_without_a_fresh_observation_there_is_no_chunk_and_the_stream_is_named(robot: Robot) -> None:
    _, chunk = start(robot)
    robot.sees = False
    robot.quiet()
    robot.hold()
    robot.quiet()
    robot.until(lambda: "keypoints (keypoints) is" in robot.diagnosis("inference"), "a diagnosis")
    assert "s old; at most 0.3 s allowed" in robot.diagnosis("inference")
    robot.sees = True
    count = len(robot.chunks)
    assert robot.next_chunk(count, holding=True).policy_version == 5
    robot.until(lambda: robot.diagnosis("inference") == "ok", "a diagnosis without complaint")


def test_after_its_death_it_goes_on_in_the_episode_that_runs(robot: Robot) -> None:
    path, chunk = start(robot)
    robot.play(chunk, 2)
    step = robot.step
    process = next(one for one in robot.supervisor.status() if one.name == "/sim_r1/policy")  # type: ignore[attr-defined]
    os.kill(process.pid, signal.SIGKILL)
    robot.until(lambda: robot.status[-1].active_version == -1, "a new process without a policy")
    assert robot.want(5, path).successful
    robot.until_active(5)
    robot.quiet()  # it has not heard which step is under way, and does not pretend that none was executed
    count = len(robot.chunks)
    again = robot.next_chunk(count, holding=True)
    assert again.episode_id == "e1" and again.observation_step >= step - 1 and again.chunk_id == 1


def test_samples_that_cannot_be_used_are_reported_and_survived(robot: Robot) -> None:
    _, chunk = start(robot)
    stage, good = robot.stage, robot.command
    robot.command = np.full(14, np.nan)
    robot.until(lambda: "a number is not finite" in robot.diagnosis("inference"), "a diagnosis")
    robot.command = good
    stage.spin(0.1)
    assert robot.next_chunk(len(robot.chunks), holding=True).policy_version == 5
