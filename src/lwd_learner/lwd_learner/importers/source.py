# SPDX-License-Identifier: Apache-2.0
"""What every importer yields: the decoded streams of one recorded episode, in order of their stamps.

An importer knows a foreign format; nothing downstream does. `write_episode` (importers/write.py) turns any
`EpisodeSource` into an lwd episode bag, and from there on imported and own experience are the same thing.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

from lwd_policy.observation import ObservationSpec

# Episode ids of imports are UUIDv5 of the source digest in this namespace, so importing twice gives the same
# id. The namespace itself is UUIDv5(DNS, "import.lwd").
IMPORT_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "import.lwd")

# Part of every source digest: bump it when an importer starts to write different bags from the same source.
IMPORT_VERSION = 1


class Reason(str, Enum):
    """Why a source was refused; one word for a program, `ImportRefused.detail` is the sentence for a
    person."""

    NOT_A_BAG = "not_a_bag"
    MISSING_FILE = "missing_file"
    WRONG_SERIALIZATION = "wrong_serialization"
    UNSUPPORTED = "unsupported"
    TRUNCATED = "truncated"
    BAD_CRC = "bad_crc"
    CORRUPT = "corrupt"
    COUNT_MISMATCH = "count_mismatch"
    MISSING_TOPIC = "missing_topic"
    NO_MESSAGES = "no_messages"
    UNKNOWN_TYPE = "unknown_type"
    WRONG_TYPE = "wrong_type"
    WRONG_SHAPE = "wrong_shape"
    BAD_JOINTS = "bad_joints"
    NOT_FINITE = "not_finite"
    BAD_STAMPS = "bad_stamps"
    TOO_SHORT = "too_short"
    BAD_METADATA = "bad_metadata"
    MISSING_FRAME = "missing_frame"


class ImportRefused(Exception):
    """One source (one bag, one episode of a dataset) cannot be imported; the others can."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class Sample(NamedTuple):
    """One decoded value of one stream.

    value by the stream's kind: image bytes (encoded JPEG or PNG), joints and command float64[n] (rad or m,
    order of `SourceInfo.joint_names`), points float32[N, 3] (m), vector float64[k], text str.
    """

    stream: str
    stamp_ns: int
    value: Any


class Outcome(int, Enum):
    """Values of lwd_msgs/EpisodeState OUTCOME_*."""

    UNLABELLED = 0
    SUCCESS = 1
    FAILURE = 2


@dataclass(frozen=True)
class SourceInfo:
    """What is known about an episode beside its streams."""

    name: str  # for people: "so101_lerobot_v3 episode 3", a bag's file name; never a full path
    digest: str  # sha256 of content, importer version and import options, hex
    robot: str  # a valid ROS name token
    task: str  # short name
    instruction: str
    joint_names: tuple[str, ...]
    step_ns: int  # period of the "command" stream
    start_ns: int  # the episode starts running here
    end_ns: int  # and ends here: the stamp of the last command
    steps: int  # number of samples of the "command" stream
    outcome: Outcome = Outcome.UNLABELLED
    outcome_source: str = ""
    notes: tuple[str, ...] = ()  # what a careful person would want to know, e.g. "no CRC in the file"

    @property
    def episode_id(self) -> str:
        return str(uuid.uuid5(IMPORT_NAMESPACE, self.digest))


class EpisodeSource(Protocol):
    """One importable episode. `samples` may be called again and yields the same each time."""

    @property
    def info(self) -> SourceInfo: ...

    @property
    def spec(self) -> ObservationSpec: ...

    def samples(self) -> Iterator[Sample]:
        """All samples in non-decreasing stamp order. The "command" sample k is what was commanded over policy
        step k and carries the stamp of the step's end, so that no observation sees the action it has to
        predict."""
        ...
