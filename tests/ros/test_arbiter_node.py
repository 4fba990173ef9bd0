# SPDX-License-Identifier: Apache-2.0
"""The arbiter as a process: it holds when anything dies, says why, and obeys the e-stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lwd_msgs.msg import ActionChunk, ControlMode, EpisodeState, ExecutedAction
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from lwd_fleet.deployment import NodeSpec
from lwd_policy.embodiment import Embodiment
from lwd_policy.qos import COMMAND, EVENTS, LATCHED

ROBOT_FILE = Path(__file__).parents[2] / "config" / "robots" / "sim_dual_arm.yaml"
HOLD, POLICY, ESTOP = ControlMode.MODE_HOLD, ControlMode.MODE_POLICY, ControlMode.MODE_ESTOP


class Robot:
    """Everything around an arbiter: a driver that follows commands at once, a policy, an episode."""

    def __init__(self, stage, namespace: str = "/sim_r1", **parameters) -> None:
        self.stage = stage
        self.body = Embodiment.load(ROBOT_FILE)
        self.positions = np.array(self.body.home)
        self.namespace = namespace
        self.spec = NodeSpec(
            "lwd_fleet",
            "arbiter_node",
            "arbiter",
            namespace,
            {"robot_file": str(ROBOT_FILE), "auto_arm": True, **parameters},
        )
        node = stage.node
        self.commands = stage.collect(JointTrajectory, f"{namespace}/joint_command", COMMAND)
        self.executed = stage.collect(ExecutedAction, f"{namespace}/executed_action", EVENTS)
        self.modes = stage.collect(ControlMode, f"{namespace}/control_mode", LATCHED)
        self._joints = node.create_publisher(JointState, f"{namespace}/joint_states", COMMAND)
        self._chunks = node.create_publisher(ActionChunk, f"{namespace}/policy/action_chunk", COMMAND)
        self._episode = node.create_publisher(EpisodeState, f"{namespace}/episode", LATCHED)
        self.estop = node.create_publisher(Bool, f"{namespace}/estop", EVENTS)
        self.driver_alive = self.policy_alive = True

    @property
    def mode(self) -> tuple[int, str]:
        return (self.modes[-1].mode[0], self.modes[-1].reason[0]) if self.modes else (-1, "")

    def start(self):
        return self.stage.bring_up([self.spec])

    def live(self) -> None:
        """One moment of the robot's life: measure, and sometimes think."""
        if self.driver_alive:
            if self.commands:
                self.positions = np.array(self.commands[-1].points[0].positions)
            message = JointState(
                name=list(self.body.joint_names)[::-1], position=self.positions[::-1].tolist()
            )
            message.header.stamp = self.stage.node.get_clock().now().to_msg()
            self._joints.publish(message)
        if self.policy_alive and (not self.executed or self.executed[-1].step % 3 == 0):
            self.think()

    def think(self, **changes) -> None:
        targets = np.tile(self.body.home, (10, 1))
        targets[:, 0] += 0.1
        message = ActionChunk(
            episode_id="e1",
            chunk_id=1,
            policy_version=5,
            policy_digest="d",
            observation_step=self.executed[-1].step if self.executed else -1,
            step_s=0.1,
            horizon=10,
            joint_names=list(self.body.joint_names),
            positions=targets.ravel().tolist(),
        )
        for name, value in changes.items():
            setattr(message, name, value)
        self._chunks.publish(message)

    def run_episode(self) -> None:
        message = EpisodeState(state=EpisodeState.STATE_RUNNING, episode_id="e1")
        message.header.stamp = self.stage.node.get_clock().now().to_msg()
        self._episode.publish(message)

    def until(self, condition, what: str) -> None:
        self.stage.until(condition, f"{what}; mode is {self.mode}", self.live)

    def until_mode(self, mode: int, reason: str = "") -> None:
        self.until(lambda: self.mode[0] == mode and reason in self.mode[1], f"mode {mode} ({reason})")


def test_it_follows_the_policy_and_records_each_step_once(stage):
    robot = Robot(stage)
    robot.start()
    robot.until_mode(HOLD, "no episode is running")
    robot.run_episode()
    robot.until_mode(POLICY)
    robot.until(lambda: len(robot.executed) >= 12, "twelve steps")
    steps = [message.step for message in robot.executed]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    followed = [message for message in robot.executed if message.author[0] == ExecutedAction.AUTHOR_POLICY]
    assert followed and followed[-1].policy_version == 5 and list(followed[-1].arms) == ["left", "right"]
    np.testing.assert_allclose(followed[-1].positions[0], robot.body.home[0] + 0.1, atol=1e-9)
    assert robot.commands[-1].joint_names == list(robot.body.joint_names)


def test_a_silent_policy_and_silent_joints_lead_to_a_hold_with_the_reason(stage):
    robot = Robot(stage)
    robot.start()
    robot.run_episode()
    robot.until_mode(POLICY)
    robot.policy_alive = False
    robot.until_mode(HOLD, "the last chunk is exhausted")
    robot.policy_alive = True
    robot.until_mode(POLICY)
    robot.driver_alive = False
    robot.until_mode(HOLD, "joint states are stale: none for 0.2 s")
    count = len(robot.commands)
    robot.until(lambda: len(robot.commands) > count + 5, "commands that hold")
    assert robot.commands[-1].points[0].positions == robot.commands[-2].points[0].positions
    robot.driver_alive = True
    robot.until_mode(POLICY)


def test_the_estop_wins_and_only_reset_and_arm_lead_out_of_it(stage):
    robot = Robot(stage)
    robot.start()
    robot.run_episode()
    robot.until_mode(POLICY)
    robot.estop.publish(Bool(data=True))
    robot.until_mode(ESTOP, "e-stop pressed")
    assert not robot.modes[-1].armed
    reset = stage.call(Trigger, "/sim_r1/reset_estop", Trigger.Request())
    assert (reset.success, reset.message) == (False, "the e-stop is still pressed")
    armed = stage.call(SetBool, "/sim_r1/arm", SetBool.Request(data=True))
    assert (armed.success, armed.message) == (False, "the e-stop is latched; reset it first")
    robot.estop.publish(Bool(data=False))
    robot.until(
        lambda: stage.call(Trigger, "/sim_r1/reset_estop", Trigger.Request()).success,
        "a reset that is accepted",
    )
    robot.until_mode(HOLD, "disarmed")
    assert stage.call(SetBool, "/sim_r1/arm", SetBool.Request(data=True)).success
    robot.until_mode(POLICY)


def test_an_arbiter_killed_in_an_episode_starts_in_hold_and_counts_on(stage):
    robot = Robot(stage)
    supervisor = robot.start()
    robot.run_episode()
    robot.until(lambda: len(robot.executed) >= 15, "fifteen steps")
    before = robot.executed[-1].step
    robot.modes.clear()
    process = supervisor.status()[0]
    subprocess.run(["kill", "-9", str(process.pid)], check=True)
    robot.until(lambda: robot.executed[-1].step > before + 5, "steps after the restart")
    steps = [message.step for message in robot.executed]
    assert len(set(steps)) == len(steps), "a step number came twice"
    assert robot.modes[0].mode[0] == HOLD


def test_a_dry_run_decides_and_records_but_commands_nothing(stage):
    robot = Robot(stage, namespace="/r1", auto_arm=False, dry_run=True)
    robot.start()
    robot.run_episode()
    robot.until_mode(HOLD, "disarmed; waiting to be armed")
    assert stage.call(SetBool, "/r1/arm", SetBool.Request(data=True)).success
    robot.until_mode(POLICY)
    robot.until(lambda: len(robot.executed) >= 3, "recorded steps")
    assert not robot.commands


def test_only_a_simulated_robot_can_arm_itself(stage):
    robot = Robot(stage, namespace="/r1")
    supervisor = stage.start([robot.spec])
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
    assert not stage.call(ChangeState, "/r1/arbiter/change_state", request).success
    stage.until(
        lambda: "auto_arm is for simulated robots" in supervisor.status()[0].log_file.read_text(),
        "the reason",
    )


@pytest.mark.parametrize("module", ["torch", "cv2"])
def test_the_arbiter_never_loads_heavy_libraries(module):
    program = f"import sys, lwd_fleet.robot.arbiter_node; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
