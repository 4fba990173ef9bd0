# SPDX-License-Identifier: Apache-2.0
"""What a policy sees: streams, how their messages become values, and the observation at a time t.

The policy node assembles observations live and the learner from bags, both through `ObservationBuffer` and
`decode_message`: one code path, so that what is trained on is what was seen.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

KINDS = ("image", "joints", "command", "points", "text", "vector")
JOINT_POSITIONS = "joint_positions"
COMMAND = "command"
INSTRUCTION = "instruction"
KEYPOINTS = "keypoints"

_KEPT_S = 5.0  # samples older than this are forgotten; far more than any useful max_age


class ObservationError(Exception):
    """A message does not fit its stream; the text says how."""


class ObservationStale(Exception):
    """No observation can be assembled: a required stream has no sample that is new enough."""


@dataclass(frozen=True)
class Stream:
    """One input of the policy.

    topic: relative to the robot's namespace. shape: (height, width, 3) of an image, (n,) of joints and commands,
    (N, 3) of points, (d,) of a vector, () of text. max_age_s: an older sample is not used (0: any age will do,
    for latched topics).
    """

    name: str
    topic: str
    kind: str
    shape: tuple[int, ...]
    max_age_s: float
    required: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"stream {self.name}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == "image" and (len(self.shape) != 3 or self.shape[2] != 3):
            raise ValueError(f"stream {self.name}: an image has shape (height, width, 3), not {self.shape}")


@dataclass(frozen=True)
class ObservationSpec:
    """The streams of an observation. history: how many chunk boundaries (this one included) the policy remembers."""

    streams: tuple[Stream, ...]
    history: int = 2

    def __post_init__(self) -> None:
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names) or self.history < 1:
            raise ValueError("stream names must be unique and history at least 1")

    def stream(self, name: str) -> Stream:
        """The stream of that name. Raises KeyError naming those that exist."""
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise KeyError(f"no stream {name!r}; there are {', '.join(s.name for s in self.streams)}")

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ObservationSpec:
        """Inverse of `to_json`. Raises ValueError."""
        try:
            content = json.loads(text)
            streams = tuple(
                Stream(**{**entry, "shape": tuple(int(d) for d in entry["shape"])})
                for entry in content["streams"]
            )
            return cls(streams, int(content["history"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an observation spec: {error}") from error


@dataclass(frozen=True, eq=False)
class Observation:
    """All streams as of one moment. Values by stream name: images RGB uint8 [H, W, 3], joints and commands float64
    [n] in rad or m, points float32 [N, 3] in m (base_link), text str. stamps: of the samples used, ns."""

    time_ns: int
    values: dict[str, Any]
    stamps: dict[str, int]


def decode_message(stream: Stream, message: Any, joint_names: Sequence[str]) -> Any:
    """The value of a message, of rclpy or of a bag reader. Images stay encoded (bytes): most are never looked at.

    Raises ObservationError for missing joints, numbers that are not finite, or a wrong number of points.
    """
    if stream.kind == "image":
        return bytes(message.data)
    if stream.kind == "text":
        return str(message.data)
    if stream.kind == "joints":
        return _by_name(stream, message.name, message.position, joint_names)
    if stream.kind == "command":
        return _by_name(stream, message.joint_names, message.positions, joint_names)
    if stream.kind == "points":
        points = [(p.position.x, p.position.y, p.position.z) for p in message.poses]
        return _checked(stream, np.array(points, np.float32).reshape(-1, 3))
    return _checked(stream, np.asarray(message.data, np.float32))


class ObservationBuffer:
    """The newest samples of every stream. Not thread-safe: one thread adds and assembles."""

    def __init__(self, spec: ObservationSpec) -> None:
        self.spec = spec
        self._stamps: dict[str, list[int]] = {stream.name: [] for stream in spec.streams}
        self._values: dict[str, list[Any]] = {stream.name: [] for stream in spec.streams}

    def clear(self, *names: str) -> None:
        """Forget the samples of these streams, or of all."""
        for name in names or self._stamps:
            self._stamps[name].clear()
            self._values[name].clear()

    def add(self, name: str, stamp_ns: int, value: Any) -> None:
        """Add a sample. A sample older than the newest is put in its place; the same stamp replaces."""
        stamps, values = self._stamps[name], self._values[name]
        index = bisect_right(stamps, stamp_ns)
        if index and stamps[index - 1] == stamp_ns:
            values[index - 1] = value
            return
        stamps.insert(index, stamp_ns)
        values.insert(index, value)
        horizon = stamps[-1] - max(_KEPT_S, 2 * self.spec.stream(name).max_age_s) * 1e9
        forget = min(bisect_right(stamps, int(horizon)), len(stamps) - 1)
        del stamps[:forget], values[:forget]

    def moment(self, now_ns: int) -> int:
        """The time to observe at: when the newest images were taken, now where there are none.

        Joints of now beside images of a camera period ago would show a moving tool where it is not: what a camera
        at the tool sees would seem to have moved by centimetres.
        """
        newest = [
            self._stamps[stream.name][bisect_right(self._stamps[stream.name], now_ns) - 1]
            for stream in self.spec.streams
            if stream.kind == "image" and bisect_right(self._stamps[stream.name], now_ns)
        ]
        return min(newest, default=now_ns)

    def at(self, time_ns: int) -> Observation:
        """The observation at a time: of each stream the newest sample not after it. Raises ObservationStale."""
        chosen: dict[str, int] = {}
        for stream in self.spec.streams:
            stamps = self._stamps[stream.name]
            index = bisect_right(stamps, time_ns) - 1
            age_s = (time_ns - stamps[index]) / 1e9 if index >= 0 else None
            if age_s is not None and (stream.max_age_s == 0 or age_s <= stream.max_age_s):
                chosen[stream.name] = index
            elif stream.required:
                what = "has no sample" if age_s is None else f"is {age_s:.3f} s old"
                raise ObservationStale(
                    f"{stream.name} ({stream.topic}) {what}; at most {stream.max_age_s:g} s allowed"
                )
        return self._assemble(time_ns, chosen)

    def at_stamps(self, time_ns: int, stamps: Mapping[str, int]) -> Observation:
        """The observation of exactly these samples (text, which carries no stamp on the wire: the newest not after
        `time_ns`). Raises ObservationStale if one is not there."""
        chosen: dict[str, int] = {}
        for name, stamp in stamps.items():
            known = self._stamps[name]
            index = bisect_right(known, time_ns if self.spec.stream(name).kind == "text" else stamp) - 1
            if index < 0 or (known[index] != stamp and self.spec.stream(name).kind != "text"):
                raise ObservationStale(f"{name}: the sample of {stamp} ns is not there")
            chosen[name] = index
        return self._assemble(time_ns, chosen)

    def _assemble(self, time_ns: int, chosen: Mapping[str, int]) -> Observation:
        values = {
            name: decode_image(self.spec.stream(name), self._values[name][index])
            if self.spec.stream(name).kind == "image"
            else self._values[name][index]
            for name, index in chosen.items()
        }
        return Observation(
            time_ns, values, {name: self._stamps[name][index] for name, index in chosen.items()}
        )


def decode_image(stream: Stream, encoded: bytes) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of the stream's shape. Raises ObservationError if it is no image."""
    # cv2 answers most damaged data with None, but raises for none at all
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if encoded else None
    if image is None:
        raise ObservationError(f"{stream.name} ({stream.topic}): {len(encoded)} bytes that are no image")
    height, width, _ = stream.shape
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    rgb: NDArray[np.uint8] = np.ascontiguousarray(image[:, :, ::-1])
    return rgb


def reference_position(observation: Observation) -> NDArray[np.float64]:
    """Joint positions [n] that actions are relative to: the last command, or the measured joints before the first.

    The command and not the measurement, as the difference between the two (gravity, lag) would be added anew
    with every chunk and the arm would sink.
    """
    command = observation.values.get(COMMAND)
    position: NDArray[np.float64] = observation.values[JOINT_POSITIONS] if command is None else command
    return position


def _by_name(
    stream: Stream, names: Sequence[str], positions: Sequence[float], joint_names: Sequence[str]
) -> NDArray[np.float64]:
    column = {name: index for index, name in enumerate(names)}
    missing = [name for name in joint_names if name not in column]
    if missing or len(positions) != len(column):
        raise ObservationError(
            f"{stream.name} ({stream.topic}): {len(positions)} positions for {len(column)} joints, lacks {missing}"
        )
    return _checked(stream, np.asarray(positions, np.float64)[[column[name] for name in joint_names]])


def _checked(stream: Stream, values: NDArray[Any]) -> NDArray[Any]:
    if values.shape != stream.shape:
        raise ObservationError(
            f"{stream.name} ({stream.topic}): shape {values.shape}, expected {stream.shape}"
        )
    if not np.isfinite(values).all():
        raise ObservationError(f"{stream.name} ({stream.topic}): a number is not finite")
    return values
