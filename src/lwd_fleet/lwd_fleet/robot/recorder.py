# SPDX-License-Identifier: Apache-2.0
"""What a robot records: which topics, whether they arrive as they should, and into which episode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lwd_fleet.data.bag import OfferedQos
from lwd_fleet.data.episode import EpisodeWriter, SealedInfo

STANDARD = "standard"
_UNKNOWN_RATE_DEPTH = 60  # two seconds of images at 30 Hz
_BUFFER_S = 2.0
NANOSECONDS = 1_000_000_000


class RecordingFailed(Exception):
    """A recording could not be opened, continued or sealed; the text says why."""


@dataclass(frozen=True)
class TopicSpec:
    """A topic to record, relative to the robot's namespace.

    `rate_hz`: expected rate; 0 where there is none (events) or it is unknown. `latched`: its last message
    is written again at the start of every episode. `required`: an episode cannot start without its publisher.
    """

    name: str
    type: str
    rate_hz: float = 0.0
    latched: bool = False
    required: bool = True
    reliable: bool = True

    @property
    def qos(self) -> OfferedQos:
        """Depth covers two seconds of data."""
        if self.latched:
            return OfferedQos(self.reliable, True, 10)
        depth = math.ceil(_BUFFER_S * self.rate_hz) if self.rate_hz else _UNKNOWN_RATE_DEPTH
        return OfferedQos(self.reliable, False, max(depth, 10))


def parse_topics(
    lines: Iterable[str],
    cameras: Iterable[str],
    camera_hz: float = 0.0,
    output_hz: float = 0.0,
    policy_step_hz: float = 0.0,
) -> tuple[TopicSpec, ...]:
    """Topics from text: "name type [rate=HZ] [latched] [optional] [best_effort]" or "standard" (which stands
    for the topics every robot of the project has, with these cameras). Raises `ValueError` naming the line."""
    specs: list[TopicSpec] = []
    for line in lines:
        if line.strip() == STANDARD:
            specs += standard_topics(cameras, camera_hz, output_hz, policy_step_hz)
        elif line.strip():
            specs.append(_parse(line))
    names = [spec.name for spec in specs]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"topics listed twice: {', '.join(doubled)}")
    if not specs:
        raise ValueError("no topics to record")
    return tuple(specs)


def standard_topics(
    cameras: Iterable[str], camera_hz: float, output_hz: float, policy_step_hz: float
) -> list[TopicSpec]:
    """The topics of docs/episode_format.md. What a robot may lack (a policy, keypoints) is optional."""
    specs = [
        TopicSpec("episode", "lwd_msgs/msg/EpisodeState", latched=True),
        TopicSpec("task", "std_msgs/msg/String", latched=True),
        TopicSpec("control_mode", "lwd_msgs/msg/ControlMode", latched=True),
        TopicSpec("policy/status", "lwd_msgs/msg/PolicyStatus", latched=True, required=False),
        TopicSpec("policy/action_chunk", "lwd_msgs/msg/ActionChunk", required=False),
        TopicSpec("executed_action", "lwd_msgs/msg/ExecutedAction", policy_step_hz),
        TopicSpec("joint_command", "trajectory_msgs/msg/JointTrajectory", output_hz),
        TopicSpec("joint_states", "sensor_msgs/msg/JointState", output_hz),
        TopicSpec("keypoints", "geometry_msgs/msg/PoseArray", required=False),
    ]
    for camera in cameras:
        if camera:
            image = TopicSpec(f"{camera}/image_raw/compressed", "sensor_msgs/msg/CompressedImage", camera_hz)
            specs += [image, TopicSpec(f"{camera}/camera_info", "sensor_msgs/msg/CameraInfo", required=False)]
    return specs


def _parse(line: str) -> TopicSpec:
    name, *rest = line.split()
    if not rest or "/msg/" not in rest[0]:
        raise ValueError(f"topic {line!r}: expected 'name package/msg/Type [options]'")
    rate_hz, flags = 0.0, set()
    for option in rest[1:]:
        key, _, value = option.partition("=")
        if key == "rate":
            rate_hz = float(value)
        elif option in ("latched", "optional", "best_effort"):
            flags.add(option)
        else:
            raise ValueError(f"topic {line!r}: unknown option {option!r}")
    return TopicSpec(
        name=name,
        type=rest[0],
        rate_hz=rate_hz,
        latched="latched" in flags,
        required="optional" not in flags,
        reliable="best_effort" not in flags,
    )


class Matching:
    """Decides when every topic flows: its publisher is matched, and either a message came through or the
    match is old enough. After one end sees the other, volatile messages can still be lost for a while."""

    def __init__(self, specs: Sequence[TopicSpec], settle_s: float) -> None:
        self._specs = specs
        self._settle_s = settle_s
        self._since: dict[str, float] = {}

    def missing(self, publishers: Mapping[str, int], received: Mapping[str, int], now_s: float) -> list[str]:
        """Topics that are not ready, given matched publishers and messages received per topic so far."""
        result = []
        for spec in self._specs:
            if publishers.get(spec.name, 0) == 0:
                self._since.pop(spec.name, None)
                if spec.required:
                    result.append(spec.name)
                continue
            since = self._since.setdefault(spec.name, now_s)
            if received.get(spec.name, 0) == 0 and now_s - since < self._settle_s:
                result.append(spec.name)
        return result


@dataclass
class Meter:
    """Counts the messages of one topic. Times in ns, steady."""

    rate_hz: float
    received: int = 0
    written: int = 0
    gaps: int = 0
    _last_ns: int | None = None
    _recent: list[int] = field(default_factory=list)

    def arrived(self, now_ns: int, recording: bool) -> None:
        """A message came; while recording, an interval of more than twice the expected period is a gap."""
        self.received += 1
        if recording:
            self.written += 1
            if self.rate_hz and self._last_ns is not None:
                self.gaps += now_ns - self._last_ns > 2 * NANOSECONDS / self.rate_hz
        self._last_ns = now_ns
        self._recent.append(now_ns)
        if len(self._recent) > 2 and self._recent[-1] - self._recent[0] > 2 * NANOSECONDS:
            self._forget(now_ns)

    def measured_hz(self, now_ns: int) -> float:
        """Messages within the last second."""
        self._forget(now_ns)
        return float(len(self._recent))

    def begin(self) -> None:
        """A new recording starts."""
        self.written = self.gaps = 0
        self._last_ns = None

    def _forget(self, now_ns: int) -> None:
        self._recent = [time_ns for time_ns in self._recent if now_ns - time_ns < NANOSECONDS]


@dataclass(frozen=True)
class _Latched:
    cdr: bytes
    publish_time_ns: int


class Recorder:
    """Takes every message of the robot and writes those of the running episode.

    A write that fails ends the recording, not the recorder: `failure` says why, `stop` raises it, and the
    partial directory stays for `salvage`.
    """

    def __init__(self, spool: Path, robot: str, specs: Sequence[TopicSpec]) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.meters = {spec.name: Meter(spec.rate_hz) for spec in specs}
        self.episode_id = ""  # of the running recording
        self.failure = ""
        self._spool = spool
        self._robot = robot
        self._latched: dict[str, _Latched] = {}
        self._writer: EpisodeWriter | None = None

    @property
    def recording(self) -> bool:
        """Whether an episode is open, even if writing has failed since."""
        return self.episode_id != ""

    @property
    def outcome_recorded(self) -> bool:
        """Whether the running episode's final state is in the bag."""
        return self._writer is not None and self._writer.ended

    @property
    def size_bytes(self) -> int:
        """Bytes of the running recording on disk."""
        return self._writer.size_bytes if self._writer else 0

    def start(self, episode_id: str, now_ns: int) -> None:
        """Open the recording and write what is latched, with log time `now_ns`. Raises `RecordingFailed`."""
        if self.recording:
            raise RecordingFailed(f"{self.episode_id} is still being recorded; stop it first")
        try:
            self._writer = EpisodeWriter(self._spool, episode_id, self._robot)
        except OSError as error:
            raise RecordingFailed(f"cannot open {episode_id} in {self._spool}: {error}") from error
        self.episode_id, self.failure = episode_id, ""
        for meter in self.meters.values():
            meter.begin()
        for name, latched in self._latched.items():
            self._write(name, latched.cdr, now_ns, latched.publish_time_ns)
        if self.failure:
            self.episode_id = ""
            raise RecordingFailed(self.failure)

    def receive(self, name: str, cdr: bytes, log_time_ns: int, publish_time_ns: int, steady_ns: int) -> None:
        """Take a message of topic `name`. Never raises for a failing disk."""
        self.meters[name].arrived(steady_ns, self.recording)
        if self.specs[name].latched:
            self._latched[name] = _Latched(cdr, publish_time_ns)
        if self.recording:
            self._write(name, cdr, log_time_ns, publish_time_ns)

    def flush(self) -> None:
        """Make what was written so far survive a killed process."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._fail(error)

    def stop(self, truncated: str = "") -> SealedInfo:
        """Seal the running recording. Raises `RecordingFailed`; nothing is being recorded afterwards."""
        if not self.recording:
            raise RecordingFailed("nothing is being recorded")
        self.episode_id = ""
        if self._writer is None:
            raise RecordingFailed(self.failure)
        try:
            sealed = self._writer.seal(truncated)
        except OSError as error:
            self._fail(error)
            raise RecordingFailed(self.failure) from error
        self._writer = None
        return sealed

    def _write(self, name: str, cdr: bytes, log_time_ns: int, publish_time_ns: int) -> None:
        if self._writer is None:
            return
        spec = self.specs[name]
        topic = f"/{self._robot}/{name}"
        try:
            self._writer.write(topic, spec.type, cdr, log_time_ns, publish_time_ns, spec.qos)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        self.failure = f"writing failed: {error}; what was written is salvaged when the recorder starts again"
