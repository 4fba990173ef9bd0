# SPDX-License-Identifier: Apache-2.0
"""Subscribes the robot's topics as raw bytes and hands them to `Recorder`, which decides everything."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwd_msgs.msg import RecorderStatus, SealedEpisode
from lwd_msgs.srv import StartRecording, StopRecording
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.task import Future

from lwd_fleet.data.episode import SealedInfo
from lwd_fleet.data.messages import InterfacesMissing, schema_text
from lwd_fleet.data.salvage import salvage_spool
from lwd_fleet.robot.recorder import Matching, Recorder, RecordingFailed, TopicSpec, parse_topics
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
from lwd_policy.qos import LATCHED

_POLL_S = 0.05


@dataclass(frozen=True)
class RecorderParameters:
    """Parameters of the recorder node."""

    spool: str = parameter("", "directory of this robot's recordings")
    topics: tuple[str, ...] = parameter(
        ("standard",),
        "lines 'name type [rate=HZ] [latched] [optional] [best_effort]', names relative to the namespace; "
        "'standard' stands for the topics of docs/episode_format.md",
    )
    cameras: tuple[str, ...] = parameter(
        ("camera_top", "camera_wrist_left", "camera_wrist_right"), "cameras of the standard topics"
    )
    camera_hz: float = parameter(
        0.0, "expected rate of images; 0: not known", unit="Hz", low=0.0, high=1000.0
    )
    output_hz: float = parameter(
        0.0, "expected rate of joint states and commands; 0: not known", unit="Hz", low=0.0, high=1000.0
    )
    policy_step_hz: float = parameter(
        0.0, "expected rate of executed actions; 0: not known", unit="Hz", low=0.0, high=1000.0
    )
    match_timeout_s: float = parameter(
        10.0, "how long a start waits for the topics' publishers", unit="s", low=0.0, high=600.0
    )
    settle_s: float = parameter(
        0.7, "age of a match from which a silent topic counts as flowing", unit="s", low=0.0, high=60.0
    )
    flush_s: float = parameter(
        0.25, "a killed process loses at most this much", unit="s", low=0.01, high=60.0
    )
    outcome_timeout_s: float = parameter(
        1.0, "how long a stop waits for the outcome to be in the bag", unit="s", low=0.0, high=60.0
    )


class RecorderNode(ManagedNode):
    """Serves `recorder/start` and `recorder/stop`; publishes `recorder/status` and latched `recorder/sealed`."""

    parameters_type = RecorderParameters

    def __init__(self) -> None:
        super().__init__("recorder")
        self._recorder: Recorder | None = None
        self._inputs: dict[str, Any] = {}
        self._owned: list[tuple[Callable[[Any], Any], Any]] = []
        self._busy = False
        self._salvaged = 0
        self._timers: list[Any] = []

    # Lifecycle ---------------------------------------------------------------------------------------

    def configure(self) -> None:
        options: RecorderParameters = self.parameters
        robot = self.get_namespace().strip("/")
        if not robot or "/" in robot:
            raise ConfigurationError(f"run in the robot's namespace, one name deep, not in /{robot}")
        if not options.spool:
            raise ConfigurationError("parameter spool: name a directory for the recordings")
        try:
            specs = parse_topics(
                options.topics, options.cameras, options.camera_hz, options.output_hz, options.policy_step_hz
            )
            for spec in specs:
                schema_text(spec.type)
            spool = Path(options.spool)
            spool.mkdir(parents=True, exist_ok=True)
            self._tidy(spool)
        except (ValueError, InterfacesMissing, OSError) as error:
            raise ConfigurationError(f"topics or spool: {error}") from error
        self._recorder = Recorder(spool, robot, specs)
        self._matching = Matching(specs, options.settle_s)
        self._status = self.create_publisher(RecorderStatus, "recorder/status", 10)
        self._sealed = self.create_publisher(SealedEpisode, "recorder/sealed", LATCHED)
        self._own(self.destroy_publisher, self._status, self._sealed)
        for spec in specs:
            self._inputs[spec.name] = self._subscribe(spec)
        self._own(self.destroy_subscription, *self._inputs.values())
        waits = ReentrantCallbackGroup()  # in the default group, an answer that waits would block all else
        self._own(
            self.destroy_service,
            self.create_service(StartRecording, "recorder/start", self._on_start, callback_group=waits),
            self.create_service(StopRecording, "recorder/stop", self._on_stop, callback_group=waits),
        )

    def activate(self) -> None:
        self._timers = [
            self.create_timer(self.parameters.flush_s, self._flush),
            self.create_timer(1.0, self._publish_status),
        ]

    def deactivate(self) -> None:
        for timer in self._timers:
            self.destroy_timer(timer)
        self._timers = []
        if self._recorder is not None and self._recorder.recording:
            self._seal("the recorder was stopped before the episode ended")

    def cleanup(self) -> None:
        for destroy, entity in self._owned:
            destroy(entity)
        self._owned, self._inputs, self._recorder = [], {}, None

    def diagnose(self) -> list[Check]:
        recorder = self._recorder
        if recorder is None:
            return []
        if recorder.failure:
            return [Check("recording", ERROR, recorder.failure)]
        gaps = {name: meter.gaps for name, meter in recorder.meters.items() if meter.gaps}
        level = WARN if recorder.recording and gaps else OK
        text = f"recording {recorder.episode_id}" if recorder.recording else "idle"
        return [Check("recording", level, text, {"salvaged_at_start": self._salvaged, **gaps})]

    # Recording ---------------------------------------------------------------------------------------

    async def _on_start(
        self, request: StartRecording.Request, response: StartRecording.Response
    ) -> StartRecording.Response:
        recorder = self._recorder
        if not self.active or recorder is None:
            response.message = "the recorder is not active"
        elif self._busy:
            response.message = "the recorder is starting or stopping already"
        else:
            self._busy = True
            try:
                response.message = await self._start(recorder, request.episode_id)
            finally:
                self._busy = False
        response.success = response.message == ""
        if response.success:
            response.message = "recording"
        else:
            self.get_logger().error(f"cannot record {request.episode_id}: {response.message}")
        return response

    async def _start(self, recorder: Recorder, episode_id: str) -> str:
        """Wait for the publishers, then open the recording. Returns what is wrong, empty if nothing.

        A recording that is still open has lost the episode node that began it: it is sealed as it is.
        """
        if recorder.episode_id == episode_id:
            return recorder.failure  # a request sent twice
        missing = await self._wait(self._not_flowing, self.parameters.match_timeout_s)
        if missing:
            return f"nothing comes from {', '.join(missing)}"
        if not self.active:
            return "the recorder was stopped"
        if recorder.recording:
            self._seal("the next episode began before this one ended")
        try:
            recorder.start(episode_id, self.get_clock().now().nanoseconds)
        except (RecordingFailed, ValueError) as error:
            return str(error)
        return ""

    async def _on_stop(
        self, request: StopRecording.Request, response: StopRecording.Response
    ) -> StopRecording.Response:
        recorder = self._recorder
        if recorder is None or not recorder.recording or self._busy:
            response.message = "nothing is being recorded"
            return response
        self._busy = True
        try:
            late = await self._wait(self._outcome_missing, self.parameters.outcome_timeout_s)
        finally:
            self._busy = False
        if not recorder.recording:
            response.message = "the recorder was stopped"
            return response
        sealed = self._seal("stopped before the episode ended" if late else "")
        response.success = sealed is not None
        if sealed is None:
            response.message = recorder.failure
        else:
            response.path, response.digest = str(sealed.path), sealed.digest
        return response

    def _seal(self, truncated: str) -> SealedInfo | None:
        """Seal and announce. It reads the file once for its digest: between episodes there is time for that."""
        assert self._recorder is not None
        episode_id = self._recorder.episode_id
        try:
            sealed = self._recorder.stop(truncated)
        except RecordingFailed as error:
            self.get_logger().error(f"{episode_id} is not sealed: {error}")
            return None
        self._announce(sealed)
        return sealed

    def _tidy(self, spool: Path) -> None:
        """Deal with what a crash has left, before anything new is recorded. The uploader's scan finds it."""
        for result in salvage_spool(spool):
            self._salvaged += 1
            self.get_logger().warning(f"left by a crash: {result.episode_id}: {result.reason}")

    def _announce(self, sealed: SealedInfo) -> None:
        message = SealedEpisode(episode_id=sealed.episode_id, path=str(sealed.path), digest=sealed.digest)
        message.header.stamp = self.get_clock().now().to_msg()
        message.messages, message.bytes = sealed.summary.message_count, sealed.summary.size_bytes
        self._sealed.publish(message)
        self.get_logger().info(f"sealed {sealed.path} ({message.messages} messages)")

    # Messages ----------------------------------------------------------------------------------------

    def _subscribe(self, spec: TopicSpec) -> Any:
        package, _, name = spec.type.partition("/msg/")
        kind = getattr(importlib.import_module(f"{package}.msg"), name)
        reliable, latched = ReliabilityPolicy.RELIABLE, DurabilityPolicy.TRANSIENT_LOCAL
        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=spec.qos.depth,
            reliability=reliable if spec.reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=latched if spec.latched else DurabilityPolicy.VOLATILE,
        )

        def received(cdr: bytes, info: dict[str, int]) -> None:
            if self._recorder is not None:
                log_time_ns = info["received_timestamp"] or self.get_clock().now().nanoseconds
                sent_ns = info["source_timestamp"] or log_time_ns
                self._recorder.receive(spec.name, cdr, log_time_ns, sent_ns, time.monotonic_ns())

        return self.create_subscription(kind, spec.name, received, profile, raw=True)

    def _flush(self) -> None:
        recorder = self._recorder
        if recorder is not None and recorder.recording and not recorder.failure:
            recorder.flush()
            if recorder.failure:
                self.get_logger().error(recorder.failure)

    def _publish_status(self) -> None:
        recorder = self._recorder
        if recorder is None:
            return
        now_ns, meters = time.monotonic_ns(), recorder.meters
        message = RecorderStatus(
            episode_id=recorder.episode_id, topics=list(meters), bytes=recorder.size_bytes
        )
        message.header.stamp = self.get_clock().now().to_msg()
        message.rate_hz = [meter.measured_hz(now_ns) for meter in meters.values()]
        message.messages = [meter.written for meter in meters.values()]
        message.gaps = [meter.gaps for meter in meters.values()]
        self._status.publish(message)

    # Waiting -----------------------------------------------------------------------------------------

    def _not_flowing(self) -> list[str]:
        if self._recorder is None:
            return ["the recorder, which was stopped"]
        publishers = {name: entity.get_publisher_count() for name, entity in self._inputs.items()}
        received = {name: meter.received for name, meter in self._recorder.meters.items()}
        return self._matching.missing(publishers, received, time.monotonic())

    def _outcome_missing(self) -> list[str]:
        recorder = self._recorder
        waiting = recorder is not None and recorder.recording and not recorder.failure
        return ["episode"] if waiting and recorder is not None and not recorder.outcome_recorded else []

    async def _wait(self, missing: Callable[[], list[str]], timeout_s: float) -> list[str]:
        """Poll until nothing is missing or the time is up, without holding the executor; returns the rest."""
        deadline = time.monotonic() + timeout_s
        while (rest := missing()) and time.monotonic() < deadline:
            await self._pause()
        return rest

    async def _pause(self) -> None:
        future = Future()
        timer = self.create_timer(_POLL_S, lambda: future.done() or future.set_result(None))
        try:
            await future
        finally:
            self.destroy_timer(timer)

    def _own(self, destroy: Callable[[Any], Any], *entities: Any) -> None:
        self._owned += [(destroy, entity) for entity in entities]


def main(args: list[str] | None = None) -> int:
    return run_node(RecorderNode, args)


if __name__ == "__main__":
    sys.exit(main())
