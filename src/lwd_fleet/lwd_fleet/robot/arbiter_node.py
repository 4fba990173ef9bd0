# SPDX-License-Identifier: Apache-2.0
"""Runs `Arbiter` at a fixed rate and speaks ROS for it. All decisions are in `arbiter.py`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
from lwd_msgs.msg import ActionChunk, ControlMode, EpisodeState, ExecutedAction
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.time import Time
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from lwd_fleet.robot.arbiter import Arbiter, ArbiterTiming, Chunk, ExecutedStep, Output, State
from lwd_policy.embodiment import Embodiment, EmbodimentError
from lwd_policy.managed_node import (
    ERROR,
    OK,
    WARN,
    Check,
    ConfigurationError,
    ManagedNode,
    parameter,
    run_node,
)
from lwd_policy.qos import COMMAND, EVENTS, LATCHED

_MODES = {
    State.HOLD: ControlMode.MODE_HOLD,
    State.POLICY: ControlMode.MODE_POLICY,
    State.ESTOP: ControlMode.MODE_ESTOP,
}
_EPISODE_JUST_STARTED_S = 1.0  # an older start was published before this node was there


@dataclass(frozen=True)
class ArbiterParameters:
    """Parameters of the arbiter node."""

    robot_file: str = parameter("", "YAML file that describes the robot")
    policy_step_hz: float = parameter(10.0, "rate of the actions in a chunk", unit="Hz", low=0.1, high=1000.0)
    output_hz: float = parameter(
        50.0, "rate of the commands; an integer multiple of policy_step_hz", unit="Hz", low=0.1, high=1000.0
    )
    joint_timeout_s: float = parameter(
        0.2, "hold when joint states are older than this", unit="s", low=0.01, high=10.0
    )
    max_jump: float = parameter(
        0.5,
        "a command never leads the measured joint by more than this",
        unit="rad or m",
        low=0.001,
        high=7.0,
    )
    auto_arm: bool = parameter(False, "start armed; simulated robots (namespace sim_...) only")
    dry_run: bool = parameter(False, "decide and record, but publish nothing to the driver")


class ArbiterNode(ManagedNode):
    """Subscribes chunks, joint states, episode and e-stop; publishes commands, executed actions and the mode."""

    parameters_type = ArbiterParameters

    def __init__(self) -> None:
        super().__init__("arbiter")
        self._arbiter: Arbiter | None = None
        self._timer = None
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)

    # Lifecycle ---------------------------------------------------------------------------------------

    def configure(self) -> None:
        options: ArbiterParameters = self.parameters
        if options.auto_arm and not self.get_namespace().startswith("/sim_"):
            raise ConfigurationError(
                f"auto_arm is for simulated robots; {self.get_namespace()} does not start with /sim_: "
                "remove auto_arm and call the service `arm`"
            )
        try:
            self._embodiment = Embodiment.load(options.robot_file)
            timing = ArbiterTiming(
                options.policy_step_hz, options.output_hz, options.joint_timeout_s, options.max_jump
            )
        except (EmbodimentError, OSError, ValueError) as error:
            raise ConfigurationError(f"robot_file or rates: {error}") from error
        self._arbiter = Arbiter(self._embodiment, timing, auto_arm=options.auto_arm)
        self._timing = timing
        self._joint_names = list(self._embodiment.joint_names)
        self._arms = [arm.name for arm in self._embodiment.arms]
        self._columns: tuple[list[str], list[int]] | None = None
        self._refused = 0
        self._last_refusal = ""
        self._shown: tuple[State, str, bool] | None = None
        self._last_tick_ns = 0
        self._longest_gap_s = 0.0

        self._command = self.create_publisher(JointTrajectory, "joint_command", COMMAND)
        self._executed = self.create_publisher(ExecutedAction, "executed_action", EVENTS)
        self._mode = self.create_publisher(ControlMode, "control_mode", LATCHED)
        self._inputs = [
            self.create_subscription(ActionChunk, "policy/action_chunk", self._on_chunk, COMMAND),
            self.create_subscription(JointState, "joint_states", self._on_joints, COMMAND),
            self.create_subscription(EpisodeState, "episode", self._on_episode, LATCHED),
            self.create_subscription(Bool, "estop", self._on_estop, EVENTS),
        ]
        self._served = [
            self.create_service(SetBool, "arm", self._on_arm),
            self.create_service(Trigger, "reset_estop", self._on_reset_estop),
        ]
        self._show_mode()

    def activate(self) -> None:
        assert self._arbiter is not None
        self._arbiter.restart()
        if self.parameters.auto_arm:
            self._arbiter.arm()
        self._last_tick_ns = 0
        self._timer = self.create_timer(self._timing.tick_s, self._on_tick, clock=self._steady)

    def deactivate(self) -> None:
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None
        if self._arbiter is not None:
            self._arbiter.disarm()
            self._publish_mode(
                State.ESTOP if self._arbiter.state == State.ESTOP else State.HOLD, "the arbiter is not active"
            )

    def cleanup(self) -> None:
        if self._arbiter is None:
            return
        self._arbiter = None
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        for service in self._served:
            self.destroy_service(service)
        for publisher in (self._command, self._executed, self._mode):
            self.destroy_publisher(publisher)

    def diagnose(self) -> list[Check]:
        arbiter = self._arbiter
        if arbiter is None:
            return []
        level = ERROR if arbiter.state == State.ESTOP else OK
        gap, self._longest_gap_s = self._longest_gap_s, 0.0
        late = gap > 2 * self._timing.tick_s
        return [
            Check("control", level, f"{arbiter.state.value}: {arbiter.reason}", {"armed": arbiter.armed}),
            Check("chunks", OK, self._last_refusal or "none refused", {"refused": self._refused}),
            Check(
                "output", WARN if late else OK, "late" if late else "in time", {"longest_gap_s": f"{gap:.4f}"}
            ),
        ]

    # Inputs ------------------------------------------------------------------------------------------

    def _on_chunk(self, message: ActionChunk) -> None:
        assert self._arbiter is not None
        columns = max(1, len(message.joint_names))
        if len(message.positions) != message.horizon * columns:
            refusal: str | None = (
                f"chunk {message.chunk_id} refused: {len(message.positions)} positions are not "
                f"{message.horizon} x {columns}"
            )
        else:
            refusal = self._arbiter.offer(
                Chunk(
                    episode_id=message.episode_id,
                    chunk_id=message.chunk_id,
                    policy_version=message.policy_version,
                    policy_digest=message.policy_digest,
                    observation_step=message.observation_step,
                    step_s=message.step_s,
                    joint_names=tuple(message.joint_names),
                    positions=np.array(message.positions, dtype=np.float64).reshape(-1, columns),
                )
            )
        if refusal is not None:
            self._refused += 1
            self._last_refusal = refusal
            self.get_logger().warning(refusal, throttle_duration_sec=1.0)

    def _on_joints(self, message: JointState) -> None:
        assert self._arbiter is not None
        names = list(message.name)
        if self._columns is None or self._columns[0] != names:
            missing = [name for name in self._joint_names if name not in names]
            if missing:
                self.get_logger().error(f"joint_states lacks the joints {missing}", throttle_duration_sec=1.0)
                return
            self._columns = (names, [names.index(name) for name in self._joint_names])
        positions = np.array(message.position, dtype=np.float64)
        refusal = (
            f"joint state has {len(positions)} positions for {len(names)} names"
            if len(positions) != len(names)
            else self._arbiter.joints(positions[self._columns[1]], self._now_ns())
        )
        if refusal is not None:
            self.get_logger().error(refusal, throttle_duration_sec=1.0)

    def _on_episode(self, message: EpisodeState) -> None:
        assert self._arbiter is not None
        if message.state == EpisodeState.STATE_RUNNING:
            self._arbiter.episode_started(message.episode_id, self._first_step(message))
        elif message.state == EpisodeState.STATE_PREPARING:
            self._arbiter.scene_prepared()
        else:
            self._arbiter.episode_ended()

    def _first_step(self, message: EpisodeState) -> int:
        """0, or for an episode that ran before this process did a number that no step of it has had."""
        elapsed_s = (self.get_clock().now() - Time.from_msg(message.header.stamp)).nanoseconds * 1e-9
        return (
            0
            if elapsed_s < _EPISODE_JUST_STARTED_S
            else math.ceil(elapsed_s * self._timing.policy_step_hz) + 1
        )

    def _on_estop(self, message: Bool) -> None:
        assert self._arbiter is not None
        if message.data:
            self._arbiter.press_estop()
        else:
            self._arbiter.release_estop()
        self._show_mode()

    def _on_arm(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        assert self._arbiter is not None
        if not request.data:
            self._arbiter.disarm()
            response.success, response.message = True, "disarmed"
        elif not self.active:
            response.success, response.message = False, "the arbiter is not active"
        else:
            refusal = self._arbiter.arm()
            response.success, response.message = refusal is None, refusal or "armed"
        self._show_mode()
        return response

    def _on_reset_estop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self._arbiter is not None
        refusal = self._arbiter.reset_estop()
        response.success, response.message = refusal is None, refusal or "reset; call `arm` to move again"
        self._show_mode()
        return response

    # Outputs -----------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        assert self._arbiter is not None
        now_ns = self._now_ns()
        if self._last_tick_ns:
            self._longest_gap_s = max(self._longest_gap_s, (now_ns - self._last_tick_ns) * 1e-9)
        self._last_tick_ns = now_ns
        output = self._arbiter.tick(now_ns)
        if output.positions is not None and not self.parameters.dry_run:
            self._command.publish(self._command_message(output))
        if output.executed is not None:
            self._executed.publish(self._executed_message(output.executed))
        self._show_mode()

    def _command_message(self, output: Output) -> JointTrajectory:
        assert output.positions is not None
        message = JointTrajectory(joint_names=self._joint_names)
        message.header.stamp = self.get_clock().now().to_msg()
        reach_in = Duration(seconds=self._timing.tick_s).to_msg()
        message.points = [JointTrajectoryPoint(positions=output.positions.tolist(), time_from_start=reach_in)]
        return message

    def _executed_message(self, step: ExecutedStep) -> ExecutedAction:
        message = ExecutedAction(
            episode_id=step.episode_id,
            step=step.step,
            joint_names=self._joint_names,
            positions=step.positions.tolist(),
            arms=self._arms,
            author=[int(step.author)] * len(self._arms),
            policy_version=step.policy_version,
            policy_digest=step.policy_digest,
            chunk_id=step.chunk_id,
            chunk_index=step.chunk_index,
            clipped=step.clipped,
            proposed_policy=[] if step.proposed is None else step.proposed.tolist(),
        )
        message.header.stamp = self.get_clock().now().to_msg()
        return message

    def _show_mode(self) -> None:
        """Publish the mode when it, its reason or the arming has changed."""
        assert self._arbiter is not None
        shown = (self._arbiter.state, self._arbiter.reason, self._arbiter.armed)
        if shown != self._shown:
            if self._shown is None or shown[0] != self._shown[0]:
                self.get_logger().info(f"{shown[0].value}: {shown[1]}")
            self._publish_mode(self._arbiter.state, self._arbiter.reason)
            self._shown = shown

    def _publish_mode(self, state: State, reason: str) -> None:
        assert self._arbiter is not None
        arms = len(self._arms)
        message = ControlMode(
            arms=self._arms, mode=[_MODES[state]] * arms, reason=[reason] * arms, armed=self._arbiter.armed
        )
        message.header.stamp = self.get_clock().now().to_msg()
        self._mode.publish(message)
        self._shown = None

    def _now_ns(self) -> int:
        nanoseconds: int = self._steady.now().nanoseconds
        return nanoseconds


def main(args: list[str] | None = None) -> int:
    return run_node(ArbiterNode, args)


if __name__ == "__main__":
    sys.exit(main())
