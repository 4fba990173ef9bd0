# SPDX-License-Identifier: Apache-2.0
"""Bags of somebody else's robot as episodes, given a mapping (importers/mapping.py).

A bag is read twice: the survey checks every message that the mapping needs and cuts the actions, `samples`
then streams the rest, so that memory holds joints and commands but never the images.

Actions are cut on a grid of `step_hz`. The command of a step is the last one sent by the end of the step;
with `next_joint_state` it is where the joints are at that time, a stand-in for commands nobody recorded.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.serde import SerdeError

from lwd_learner.importers.container import Container, open_container, read_messages
from lwd_learner.importers.decode import Decoder, Deserialiser, decoder, deserialiser, header_stamp_ns
from lwd_learner.importers.mapping import ActionSource, BagMapping, StampSource
from lwd_learner.importers.quarantine import Quarantine
from lwd_learner.importers.source import IMPORT_VERSION, ImportRefused, Reason, Sample, SourceInfo
from lwd_learner.importers.write import ImportResult, Progress, import_all
from lwd_policy.observation import COMMAND, INSTRUCTION, JOINT_POSITIONS, ObservationSpec

# How far a message may arrive behind newer stamps of other streams. Cameras deliver up to some 0.3 s late; a
# lag of more than this means another clock, and streams on different clocks cannot be put side by side.
MAX_LAG_NS = 2_000_000_000


class BagSource:
    """An `EpisodeSource` over one bag. Made by `open_bag`."""

    def __init__(
        self, container: Container, mapping: BagMapping, channels: _Channels, survey: _Survey
    ) -> None:
        self._container, self._mapping, self._channels = container, mapping, channels
        self._commands = _cut_actions(container.name, mapping, survey)
        self.spec: ObservationSpec = mapping.observation_spec()
        content = f"{IMPORT_VERSION} {container.digest} {mapping.digest}"
        self.info = SourceInfo(
            name=container.name,
            digest=hashlib.sha256(content.encode()).hexdigest(),
            robot=mapping.robot,
            task=mapping.task,
            instruction=mapping.instruction or survey.instruction,
            joint_names=mapping.joint_names,
            step_ns=mapping.step_ns,
            start_ns=self._commands[0].stamp_ns - mapping.step_ns,
            end_ns=self._commands[-1].stamp_ns,
            steps=len(self._commands),
            outcome=mapping.outcome,
            outcome_source="mapping" if mapping.outcome else "",
            notes=container.notes,
        )

    def samples(self) -> Iterator[Sample]:
        """See `EpisodeSource.samples`. Raises ImportRefused if the file changed since it was opened."""
        instruction = [Sample(INSTRUCTION, self.info.start_ns, self.info.instruction)]
        measured = in_stamp_order(
            sample
            for sample in _decoded(self._container, self._mapping, self._channels)
            if sample.stream not in (COMMAND, INSTRUCTION)
        )
        # Of equal stamps the first iterable goes first: what was measured at t is known before the step
        # ending at t.
        return heapq.merge(instruction, measured, self._commands, key=lambda sample: sample.stamp_ns)


def open_bag(path: Path, mapping: BagMapping) -> BagSource:
    """Read, check and survey one bag. Raises ImportRefused."""
    container = open_container(path)
    channels = _channels(container, mapping)
    return BagSource(container, mapping, channels, _survey(container, mapping, channels))


def import_bags(
    paths: Sequence[Path],
    mapping: BagMapping,
    out_dir: Path,
    quarantine: Quarantine | None = None,
    progress: Progress | None = None,
) -> list[ImportResult]:
    """One lwd episode per bag; those that are refused are noted in the quarantine and never stop the rest."""
    sources = ((path.name, path, "", partial(open_bag, path, mapping)) for path in paths)
    return import_all(sources, len(paths), out_dir, quarantine, progress)


def find_bags(root: Path) -> list[Path]:
    """Bags below a folder: directories with a metadata.yaml or with splits `<directory>_<n>`, and lone
    storage files."""
    if root.is_file() or (root / "metadata.yaml").is_file():
        return [root]
    if any(re.fullmatch(rf"{re.escape(root.name)}_\d+\.(mcap|db3)", entry.name) for entry in root.iterdir()):
        return [root]
    bags: list[Path] = []
    for entry in sorted(root.iterdir()):
        if entry.is_dir():
            bags += find_bags(entry)
        elif entry.suffix in (".mcap", ".db3"):
            bags.append(entry)
    return bags


def in_stamp_order(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Sort samples that arrive at most MAX_LAG_NS late. Raises ImportRefused for any that is later."""
    waiting: list[tuple[int, int, Sample]] = []
    newest = -1
    for order, sample in enumerate(samples):
        newest = max(newest, sample.stamp_ns)
        lag = newest - sample.stamp_ns
        if lag > MAX_LAG_NS:
            raise ImportRefused(
                Reason.BAD_STAMPS,
                f"{sample.stream}: a stamp {lag / 1e9:.3f} s behind the other streams; "
                "another clock? `stamps: log` in the mapping uses the time of arrival",
            )
        heapq.heappush(waiting, (sample.stamp_ns, order, sample))
        while newest - waiting[0][0] > MAX_LAG_NS:
            yield heapq.heappop(waiting)[2]
    while waiting:
        yield heapq.heappop(waiting)[2]


# --- the topics ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Channel:
    deserialise: Deserialiser
    decode: list[tuple[str, Decoder]]  # stream name, decoder; one topic may feed several streams


_Channels = dict[str, _Channel]


def _channels(container: Container, mapping: BagMapping) -> _Channels:
    wanted = [(stream.topic, stream.name, stream.kind, stream.required) for stream in mapping.streams]
    if mapping.action_topic:
        wanted.append((mapping.action_topic, COMMAND, "command", True))
    if mapping.instruction_topic:
        wanted.append((mapping.instruction_topic, INSTRUCTION, "text", True))
    channels: _Channels = {}
    for topic, stream, kind, required in wanted:
        found = container.topics.get(topic)
        if found is None and not required:
            continue
        if found is None:
            present = ", ".join(sorted(container.topics)) or "none"
            raise ImportRefused(
                Reason.MISSING_TOPIC, f"{container.name}: {topic} ({stream}) is absent; topics: {present}"
            )
        if found.serialization != "cdr":
            raise ImportRefused(
                Reason.WRONG_SERIALIZATION, f"{container.name}: {topic} is {found.serialization}, not cdr"
            )
        if not found.count and required:
            raise ImportRefused(
                Reason.NO_MESSAGES, f"{container.name}: {topic} ({stream}) is there but has no message"
            )
        known = channels.get(topic) or _Channel(deserialiser(found.type, found.definition), [])
        channels[topic] = _Channel(known.deserialise, [*known.decode, (stream, decoder(kind, found.type))])
    return channels


def _decoded(container: Container, mapping: BagMapping, channels: _Channels) -> Iterator[Sample]:
    """Samples of all mapped topics in order of arrival."""
    shapes = {stream.name: stream.shape for stream in mapping.streams if stream.kind in ("points", "vector")}
    for raw in read_messages(container, channels.keys()):
        channel = channels[raw.topic]
        try:
            message = channel.deserialise(raw.data)
        except (SerdeError, ValueError, UnicodeDecodeError, AssertionError) as error:
            raise ImportRefused(
                Reason.CORRUPT,
                f"{raw.topic} at {raw.log_time_ns}: {len(raw.data)} bytes are no such message: {error!r}",
            ) from error
        stamp = _stamp(raw.topic, message, raw.log_time_ns, mapping.stamps)
        for stream, decode in channel.decode:
            try:
                value = decode(message, mapping.joint_names_in_bag)
                _require_shape(stream, value, shapes)
                yield Sample(stream, stamp, value)
            except ImportRefused as refusal:
                raise ImportRefused(refusal.reason, f"{raw.topic} at {stamp}: {refusal.detail}") from refusal


def _require_shape(stream: str, value: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    if stream in shapes and value.shape != shapes[stream]:
        raise ImportRefused(
            Reason.WRONG_SHAPE, f"{stream} is {value.shape}, the mapping says {shapes[stream]}"
        )


def _stamp(topic: str, message: object, log_time_ns: int, source: StampSource) -> int:
    if source is StampSource.LOG:
        return log_time_ns
    stamp = header_stamp_ns(message)
    if stamp == 0:
        raise ImportRefused(
            Reason.BAD_STAMPS, f"{topic}: header.stamp is not set; use `stamps: log` in the mapping"
        )
    return log_time_ns if stamp is None else stamp


# --- survey and actions -------------------------------------------------------------------------------------


@dataclass
class _Series:
    stamps: list[int] = field(default_factory=list)
    values: list[NDArray[np.float64]] = field(default_factory=list)

    def newest(self, time_ns: int) -> NDArray[np.float64]:
        """Value of the newest sample not after the time, which is not before the first."""
        return self.values[int(np.searchsorted(self.stamps, time_ns, side="right")) - 1]

    def between(self, time_ns: int) -> NDArray[np.float64]:
        """Linear interpolation at a time from the first to the last sample. The newest sample would be up to
        one period old, a whole step where joints come at the rate of the steps."""
        after = max(1, int(np.searchsorted(self.stamps, time_ns, side="left")))
        early, late = self.stamps[after - 1], self.stamps[after]
        weight = (time_ns - early) / (late - early) if late > early else 1.0
        return (1.0 - weight) * self.values[after - 1] + weight * self.values[after]


@dataclass
class _Survey:
    first: dict[str, int] = field(default_factory=dict)  # stream -> stamp
    joints: _Series = field(default_factory=_Series)
    commands: _Series = field(default_factory=_Series)
    instruction: str = ""


def _survey(container: Container, mapping: BagMapping, channels: _Channels) -> _Survey:
    survey = _Survey()
    for sample in in_stamp_order(_decoded(container, mapping, channels)):
        survey.first.setdefault(sample.stream, sample.stamp_ns)
        if sample.stream in (JOINT_POSITIONS, COMMAND):
            series = survey.joints if sample.stream == JOINT_POSITIONS else survey.commands
            series.stamps.append(sample.stamp_ns)
            series.values.append(sample.value)
        elif sample.stream == INSTRUCTION:
            if survey.instruction not in ("", sample.value):
                raise ImportRefused(
                    Reason.UNSUPPORTED,
                    f"{container.name}: the instruction changes; cut the bag into one episode each",
                )
            survey.instruction = sample.value
    return survey


def _cut_actions(name: str, mapping: BagMapping, survey: _Survey) -> list[Sample]:
    """Samples of the command on the grid, from the first complete observation to the last measured joints."""
    step, joints = mapping.step_ns, survey.joints
    start = max(
        survey.first[stream.name]
        for stream in mapping.streams
        if stream.required or stream.name == JOINT_POSITIONS
    )
    value_at = joints.between
    if mapping.action_source is ActionSource.COMMAND_TOPIC:
        value_at = survey.commands.newest
        start = max(start, survey.commands.stamps[0] - step)
    samples = [
        Sample(COMMAND, end, value_at(end)) for end in range(start + step, joints.stamps[-1] + 1, step)
    ]
    if not samples:
        seconds = (joints.stamps[-1] - start) / 1e9
        raise ImportRefused(
            Reason.TOO_SHORT,
            f"{name}: {seconds:.3f} s from the first complete observation to the last joints; "
            f"one step takes {step / 1e9:.3f} s",
        )
    return samples
