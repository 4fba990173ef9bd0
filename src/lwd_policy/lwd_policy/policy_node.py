# SPDX-License-Identifier: Apache-2.0
"""The policy on a robot: observations in, action chunks out; loads and swaps versions (`policy_slot.py`).

The executor's thread collects samples and publishes, one worker thread infers and another loads: neither delays a
subscription, and a version is checked and warmed up beside the one that runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from geometry_msgs.msg import PoseArray
from lwd_msgs.msg import ActionChunk, EpisodeState, ExecutedAction, ObservationStamps, PolicyStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import Float32MultiArray, String

from lwd_policy.checkpoint import CheckpointRefused
from lwd_policy.chunk_policy import PolicyChunk
from lwd_policy.embodiment import Embodiment, EmbodimentError
from lwd_policy.managed_node import OK, WARN, Check, ConfigurationError, ManagedNode, parameter, run_node
from lwd_policy.observation import (
    Observation,
    ObservationBuffer,
    ObservationError,
    ObservationStale,
    Stream,
    decode_message,
    reference_position,
)
from lwd_policy.policy_slot import LoadedPolicy, PolicySlot, PolicyVersion, check_form, load_policy
from lwd_policy.qos import COMMAND, EVENTS, IMAGE_LATEST, LATCHED
from lwd_policy.step_clock import StepClock, to_step_grid
from lwd_policy.worker import Worker

_STREAM_TYPES: dict[str, tuple[Any, QoSProfile]] = {
    "image": (CompressedImage, IMAGE_LATEST),
    "joints": (JointState, COMMAND),
    "command": (ExecutedAction, EVENTS),
    "points": (PoseArray, IMAGE_LATEST),
    "text": (String, LATCHED),
    "vector": (Float32MultiArray, IMAGE_LATEST),
}
_DESIRED = ("policy.version", "policy.uri", "policy.digest")


@dataclass(frozen=True)
class PolicyParameters:
    """Parameters of the policy node. The desired version is set in one atomic call."""

    robot_file: str = parameter("", "YAML file that describes the robot")
    policy_step_hz: float = parameter(
        10.0, "rate at which the robot plays the actions of a chunk", unit="Hz", low=0.1, high=1000.0
    )
    device: str = parameter("cpu", "torch device that runs the policy, e.g. cpu or cuda:0")
    uri_allow: tuple[str, ...] = parameter((), "directories below which policies may lie")
    version: int = parameter(
        -1, "desired policy version; -1: none", name="policy.version", low=-1, read_only=False
    )
    uri: str = parameter("", "file:// URI of its directory", name="policy.uri", read_only=False)
    digest: str = parameter("", "its SHA-256 in hex", name="policy.digest", read_only=False)


class PolicyNode(ManagedNode):
    """Publishes a chunk every `execute_steps` policy steps while the policy acts, and while nothing is played."""

    parameters_type = PolicyParameters

    def __init__(self) -> None:
        super().__init__("policy")
        self._slot = PolicySlot()
        self._worker: Worker | None = None
        self._loader: Worker | None = None
        self._problem = ""
        self._chunk_id = 0
        self.add_on_set_parameters_callback(self._check_desired)

    # Lifecycle ---------------------------------------------------------------------------------------

    def configure(self) -> None:
        try:
            self._embodiment = Embodiment.load(self.parameters.robot_file)
        except (EmbodimentError, OSError) as error:
            raise ConfigurationError(f"robot_file: {error}") from error
        self._slot = PolicySlot()
        self._buffer: ObservationBuffer | None = None
        self._streams: list[Any] = []
        self._episode_id = ""
        self._between_episodes = True
        self._episodes_seen = False
        self._step: int | None = (
            None  # last policy step executed in this episode, -1 before the first; None: unknown
        )
        self._asked_at_step: int | None = None
        self._step_clock = StepClock()
        self._first_observed_ns: int | None = None  # in this episode
        self._load_s = 0.0
        self._wake = self.create_guard_condition(self._collect)
        self._worker = Worker("inference", self._wake.trigger)
        self._loader = Worker("loader", self._wake.trigger)
        self._chunks = self.create_publisher(ActionChunk, "policy/action_chunk", COMMAND)
        self._status = self.create_publisher(PolicyStatus, "policy/status", LATCHED)
        self._inputs = [
            self.create_subscription(EpisodeState, "episode", self._on_episode, LATCHED),
            self.create_subscription(ExecutedAction, "executed_action", self._on_executed, EVENTS),
        ]
        self._publish_status()
        self._load_desired()

    def activate(self) -> None:
        self._asked_at_step = None
        self._ask()

    def cleanup(self) -> None:
        if self._worker is None or self._loader is None:
            return
        self._worker.stop()
        self._loader.stop()
        self._worker = self._loader = None
        for subscription in (*self._inputs, *self._streams):
            self.destroy_subscription(subscription)
        for publisher in (self._chunks, self._status):
            self.destroy_publisher(publisher)
        self.destroy_guard_condition(self._wake)

    def diagnose(self) -> list[Check]:
        active, refused = self._slot.active, self._slot.refused
        text = "no policy" if active is None else f"version {active.version.version}"
        unmet = refused is not None and refused[0] == self._slot.desired  # else another was asked for since
        if refused is not None and unmet:
            text += f"; version {refused[0].version} refused: {refused[1]}"
        return [
            Check("version", WARN if active is None or unmet else OK, text),
            Check(
                "inference", WARN if self._problem else OK, self._problem or "ok", {"chunks": self._chunk_id}
            ),
        ]

    # Desired version ---------------------------------------------------------------------------------

    def _check_desired(self, changes: list[Parameter]) -> SetParametersResult:
        values = {change.name: change.value for change in changes if change.name in _DESIRED}
        if not values:
            return SetParametersResult(successful=True)
        if len(values) != len(_DESIRED):
            reason = f"set {', '.join(_DESIRED)} together, in one atomic call"
            return SetParametersResult(successful=False, reason=reason)
        try:
            check_form(PolicyVersion(*(values[name] for name in _DESIRED)), self.parameters.uri_allow)
        except CheckpointRefused as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _parameters_changed(self, changed: list[Parameter]) -> None:
        # Not a callback of its own: rclpy calls the newest first, before `parameters` has the new values.
        super()._parameters_changed(changed)
        if any(change.name in _DESIRED for change in changed):
            self._load_desired()

    def _load_desired(self) -> None:
        options: PolicyParameters = self.parameters
        if options.version < 0 or self._loader is None:
            return
        wanted = PolicyVersion(options.version, options.uri, options.digest)
        if self._slot.want(wanted):
            started = time.monotonic()
            allowed, step_hz, device = options.uri_allow, options.policy_step_hz, options.device
            embodiment = self._embodiment
            self._loader.submit(
                lambda: load_policy(wanted, allowed, embodiment, step_hz, device),
                lambda loaded: self._loaded(loaded, time.monotonic() - started),
                lambda error: self._refused(wanted, error),
            )
        self._publish_status()

    def _loaded(self, loaded: LoadedPolicy, load_s: float) -> None:
        self._load_s = load_s
        self._slot.loaded(loaded)
        self._swap()

    def _refused(self, wanted: PolicyVersion, error: Exception) -> None:
        reason = str(error) if isinstance(error, CheckpointRefused) else f"{type(error).__name__}: {error}"
        self._slot.refuse(wanted, reason)
        self.get_logger().error(f"policy {wanted.version} refused: {reason}")
        self._publish_status()

    def _swap(self) -> None:
        if self._slot.swap(self._between_episodes):
            assert self._slot.active is not None
            self._subscribe(self._slot.active)
            self.get_logger().info(f"policy {self._slot.active.version.version} is active")
            if self._episode_id:
                self._begin_episode()
        self._publish_status()

    def _subscribe(self, active: LoadedPolicy) -> None:
        """Listen to the streams of the active policy; samples of streams that stay are kept."""
        spec = active.card.observation_spec
        if self._buffer is not None and self._buffer.spec == spec:
            return
        for subscription in self._streams:
            self.destroy_subscription(subscription)
        self._buffer = ObservationBuffer(spec)
        self._streams = [
            self.create_subscription(
                _STREAM_TYPES[stream.kind][0],
                stream.topic,
                self._sampler(stream),
                _STREAM_TYPES[stream.kind][1],
            )
            for stream in spec.streams
            if stream.kind != "command"  # comes with `executed_action`, in one order with the step counter
        ]

    def _sampler(self, stream: Stream) -> Callable[[Any], None]:
        return lambda message: self._sample(stream, message)

    def _sample(self, stream: Stream, message: Any) -> None:
        assert self._buffer is not None
        header = getattr(message, "header", None)
        stamp = self.get_clock().now() if header is None else Time.from_msg(header.stamp)
        try:
            value = decode_message(stream, message, self._embodiment.joint_names)
        except ObservationError as error:
            self._warn(str(error))
            return
        self._buffer.add(stream.name, stamp.nanoseconds, value)

    # Inference ---------------------------------------------------------------------------------------

    def _on_episode(self, message: EpisodeState) -> None:
        running = message.state == EpisodeState.STATE_RUNNING
        self._between_episodes = message.state in (EpisodeState.STATE_IDLE, EpisodeState.STATE_ENDED)
        if running and message.episode_id != self._episode_id:
            self._episode_id = message.episode_id
            # The first state of all was latched: the episode may have begun long before this process did.
            self._step = -1 if self._episodes_seen else None
            self._asked_at_step = self._first_observed_ns = None
            self._step_clock.clear()
            self._forget_commands()
            self._begin_episode()
        elif not running:
            self._episode_id = ""
            self._swap()
        self._episodes_seen = True

    def _begin_episode(self) -> None:
        active = self._slot.active
        if active is not None and self._worker is not None:
            self._worker.submit(active.policy.begin_episode, lambda _: self._ask(), self._inference_failed)

    def _forget_commands(self) -> None:
        """The last command of the episode before says nothing about where this one starts."""
        if self._buffer is not None:
            self._buffer.clear(
                *(stream.name for stream in self._buffer.spec.streams if stream.kind == "command")
            )

    def _on_executed(self, message: ExecutedAction) -> None:
        if message.episode_id != self._episode_id:
            return
        self._step = int(message.step)
        self._step_clock.add(self._step, Time.from_msg(message.header.stamp).nanoseconds)
        if self._buffer is not None:
            for stream in self._buffer.spec.streams:
                if stream.kind == "command":
                    self._sample(stream, message)
        active = self._slot.active
        if active is None:
            return
        authors = list(message.author)
        asked_at = -1 if self._asked_at_step is None else self._asked_at_step
        due = self._step - asked_at >= active.card.action_spec.execute_steps
        if ExecutedAction.AUTHOR_HOLD in authors or (due and ExecutedAction.AUTHOR_POLICY in authors):
            self._ask()

    def _ask(self) -> None:
        """Request a chunk for now, once per policy step and only while none is being computed."""
        active = self._slot.active
        if not (self.active and self._episode_id and active and self._buffer and self._worker):
            return
        if self._worker.busy or self._step is None or self._asked_at_step == self._step:
            return
        now_ns = self.get_clock().now().nanoseconds
        time_ns = self._buffer.moment(now_ns)
        since_ns = time_ns if self._first_observed_ns is None else self._first_observed_ns
        try:
            self._buffer.require_fresh(now_ns)
            context = self._buffer.context(time_ns, since_ns)
        except (ObservationStale, ObservationError) as error:
            self._warn(f"no chunk: {error}")
            return
        self._asked_at_step, self._first_observed_ns = self._step, since_ns
        episode, started = self._episode_id, time.monotonic()
        step, phase = self._step_clock.place(time_ns) or (self._step, 0.0)
        self._worker.submit(
            lambda: active.policy.chunk([context])[0],
            lambda chunk: self._publish_chunk(
                active, episode, step, phase, context, chunk, time.monotonic() - started
            ),
            self._inference_failed,
        )

    def _publish_chunk(
        self,
        active: LoadedPolicy,
        episode_id: str,
        step: int,
        phase: float,
        context: Sequence[Observation],
        chunk: PolicyChunk,
        inference_s: float,
    ) -> None:
        self._problem = ""
        if episode_id != self._episode_id or not self.active:
            return
        self._chunk_id += 1
        positions = to_step_grid(chunk.positions, reference_position(context[-1]), phase)
        message = ActionChunk(
            episode_id=episode_id,
            chunk_id=self._chunk_id,
            policy_version=active.version.version,
            policy_digest=active.version.digest,
            observations=[_stamps(observation) for observation in context],
            observation_step=step,
            step_s=active.card.action_spec.step_s,
            horizon=len(positions),
            joint_names=list(self._embodiment.joint_names),
            positions=positions.reshape(-1).tolist(),
            value=chunk.value,
            inference_s=inference_s,
        )
        message.header.stamp = self.get_clock().now().to_msg()
        self._chunks.publish(message)

    def _inference_failed(self, error: Exception) -> None:
        """The arbiter holds while no chunk comes; the node stays to say why."""
        self._warn(f"inference failed: {type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        self._problem = text
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    # Shared ------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        for worker in (self._worker, self._loader):
            if worker is not None:
                worker.collect()

    def _publish_status(self) -> None:
        slot = self._slot
        message = PolicyStatus(desired_version=-1, active_version=-1, refused_version=-1)
        message.header.stamp = self.get_clock().now().to_msg()
        if slot.desired is not None:
            message.desired_version, message.desired_digest = slot.desired.version, slot.desired.digest
        if slot.active is not None:
            message.active_version, message.active_digest = (
                slot.active.version.version,
                slot.active.version.digest,
            )
            message.load_s = self._load_s
        if slot.refused is not None:
            message.refused_version, message.refused_reason = slot.refused[0].version, slot.refused[1]
        self._status.publish(message)


def _stamps(observation: Observation) -> ObservationStamps:
    return ObservationStamps(
        stamp=Time(nanoseconds=observation.time_ns).to_msg(),
        stream_names=list(observation.stamps),
        stream_stamps=[Time(nanoseconds=stamp).to_msg() for stamp in observation.stamps.values()],
    )


def main(args: list[str] | None = None) -> int:
    return run_node(PolicyNode, args)


if __name__ == "__main__":
    sys.exit(main())
