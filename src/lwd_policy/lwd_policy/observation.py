# SPDX-License-Identifier: Apache-2.0
"""What a policy sees: streams, how their messages become values, and the observation at a time t.

The policy node assembles observations live and the learner from bags, both through `ObservationBuffer` and
`decode_message`: one code path, so that what is trained on is what was seen.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

KINDS = ("image", "joints", "command", "points", "text", "vector")
JOINT_POSITIONS = "joint_positions"
_SIGHTS = ("image", "points")  # kinds that come at a pace of their own
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
    """The streams of an observation. history: how many observations (the present one included) the policy decides on;
    spacing_s: the time between them.

    The spacing is a time and not the distance of decisions, which varies with latency: a policy reads speeds from
    two observations, and one that was trained on 0.5 s and given 0.4 s lost a quarter of its success.
    """

    streams: tuple[Stream, ...]
    history: int = 2
    spacing_s: float = 0.5

    def __post_init__(self) -> None:
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names) or self.history < 1:
            raise ValueError("stream names must be unique and history at least 1")
        if not 0 < self.spacing_s < _KEPT_S / self.history:
            raise ValueError(
                f"spacing_s is {self.spacing_s}; {self.history} observations lie within {_KEPT_S:g} s"
            )

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
            return cls(streams, int(content["history"]), float(content["spacing_s"]))
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

    def moment(self, time_ns: int, latest_ns: int | None = None) -> int:
        """The time to observe at for `time_ns`: when the nearest images (points) were taken, no later than `latest_ns`
        (default: `time_ns`) and than the newest command; the earlier of these where the spec has no images.

        Joints of now beside images of a camera period ago would show a moving tool where it is not: what a camera
        at the tool sees would seem to have moved by centimetres.
        """
        latest_ns = time_ns if latest_ns is None else latest_ns
        for stream in self.spec.streams:
            if stream.kind == "command" and self._stamps[stream.name]:
                latest_ns = min(latest_ns, self._stamps[stream.name][-1])
        nearest = []
        for stream in self.spec.streams:
            stamps = self._stamps[stream.name] if stream.kind in _SIGHTS else []
            if usable := stamps[: bisect_right(stamps, latest_ns)]:
                nearest.append(min(usable, key=lambda stamp: abs(stamp - time_ns)))
        return min(nearest, default=min(time_ns, latest_ns))

    def next_moment(self, time_ns: int) -> int:
        """The first time from `time_ns` on at which every camera (detector) had a new image (points), as far as they
        come within their `max_age_s`; else `time_ns`. For whoever looks back on samples that are all there."""
        first = [time_ns]
        for stream in self.spec.streams:
            stamps = self._stamps[stream.name]
            index = bisect_left(stamps, time_ns)
            following = stamps[index : index + 1] if stream.kind in _SIGHTS else []
            first += [stamp for stamp in following if stamp <= time_ns + stream.max_age_s * 1e9]
        return max(first)

    def context(self, time_ns: int, since_ns: int) -> list[Observation]:
        """What a decision at `time_ns` is made on: `history` observations, oldest first, `spacing_s` apart.

        since_ns: the time of the episode's first observation, which stands in for what would lie before it.
        Raises ObservationStale.
        """
        spacing_ns = round(self.spec.spacing_s * 1e9)
        past = [time_ns - back * spacing_ns for back in range(self.spec.history - 1, 0, -1)]
        return [*(self.at(max(self.moment(time, time_ns), since_ns)) for time in past), self.at(time_ns)]

    def require_fresh(self, time_ns: int) -> None:
        """Raises ObservationStale if a required stream has no sample that is new enough at that time."""
        self._newest(time_ns)

    def at(self, time_ns: int) -> Observation:
        """The observation at a time: of each stream the newest sample not after it; a command is interpolated between
        two samples, as an arbiter moves in straight lines. Raises ObservationStale."""
        return self._assemble(time_ns, self._newest(time_ns))

    def at_stamps(self, time_ns: int, stamps: Mapping[str, int]) -> Observation:
        """The observation of exactly these samples (text, which carries no stamp on the wire: the newest not after
        `time_ns`), and of the command after the named one. Raises ObservationStale if one is not there."""
        chosen: dict[str, int] = {}
        for name, stamp in stamps.items():
            known = self._stamps[name]
            index = bisect_right(known, time_ns if self.spec.stream(name).kind == "text" else stamp) - 1
            if index < 0 or (known[index] != stamp and self.spec.stream(name).kind != "text"):
                raise ObservationStale(f"{name}: the sample of {stamp} ns is not there")
            if self.spec.stream(name).kind == "command" and stamp < time_ns and index + 1 == len(known):
                raise ObservationStale(f"{name}: the sample after {stamp} ns is not there")
            chosen[name] = index
        return self._assemble(time_ns, chosen)

    def _newest(self, time_ns: int) -> dict[str, int]:
        """Index of the newest sample of each stream that has one."""
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
        return chosen

    def _assemble(self, time_ns: int, chosen: Mapping[str, int]) -> Observation:
        values = {name: self._value(self.spec.stream(name), index, time_ns) for name, index in chosen.items()}
        return Observation(
            time_ns, values, {name: self._stamps[name][index] for name, index in chosen.items()}
        )

    def _value(self, stream: Stream, index: int, time_ns: int) -> Any:
        stamps, values = self._stamps[stream.name], self._values[stream.name]
        if stream.kind == "image" and isinstance(values[index], bytes):
            values[index] = decode_image(
                stream, values[index]
            )  # it will be looked at again as another's past
        if stream.kind == "command" and stamps[index] < time_ns and index + 1 < len(stamps):
            passed = (time_ns - stamps[index]) / (stamps[index + 1] - stamps[index])
            return (1 - passed) * values[index] + passed * values[index + 1]
        return values[index]


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
