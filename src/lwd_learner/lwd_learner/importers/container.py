# SPDX-License-Identifier: Apache-2.0
"""Raw messages of a rosbag2 recording (MCAP or SQLite), with everything checked that can be checked.

The storage files themselves are read, never through metadata.yaml: readers that match topics by the QoS text
of metadata.yaml yield zero messages without an error where the two copies of that text differ (rosbag2's own
`talker` and `convert_a` bags are such). metadata.yaml only says which files belong together and how many
messages there should be.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import yaml
import zstandard
from mcap.exceptions import InvalidMagic, McapError, UnsupportedCompressionError
from mcap.records import Channel, Chunk, Header, McapRecord, Message, Schema, Statistics
from mcap.stream_reader import CRCValidationError, StreamReader, breakup_chunk

from lwd_learner.importers.source import ImportRefused, Reason

STORAGE_SUFFIXES = (".mcap", ".db3")
MCAP_MAGIC = b"\x89MCAP0\r\n"  # first and last bytes of a complete file


class RawMessage(NamedTuple):
    topic: str
    log_time_ns: int  # when the recorder received it
    data: bytes  # CDR


@dataclass
class Topic:
    type: str  # "sensor_msgs/msg/JointState"
    serialization: str  # "cdr"
    definition: str  # ros2msg text from the file; empty where the file holds none
    count: int = 0


@dataclass(frozen=True)
class Container:
    """A recording that was read from end to end once."""

    name: str
    files: tuple[Path, ...]
    topics: dict[str, Topic]
    message_count: int
    digest: str  # sha256 over the storage files in order, hex
    notes: tuple[str, ...]


def open_container(path: Path) -> Container:
    """Read all of a bag (a directory, an .mcap or a .db3 file), verify CRCs and counts. Raises
    ImportRefused."""
    declared, files, notes = _storage_files(path)
    tally = _Tally()
    for file in files:
        before = tally.messages
        statistics = (
            sum(1 for _ in _read(file, None, tally)) if file.suffix == ".db3" else _scan_mcap(file, tally)
        )
        if tally.messages - before != statistics:
            raise ImportRefused(
                Reason.COUNT_MISMATCH,
                f"{file.name}: the file declares {statistics} messages, {tally.messages - before} were read",
            )
    _require_cdr(path.name, tally)
    if declared is not None and declared != tally.messages:
        raise ImportRefused(
            Reason.COUNT_MISMATCH,
            f"{path.name}: metadata.yaml declares {declared} messages, its files hold {tally.messages}",
        )
    if not tally.crc_seen:
        notes.append("the file carries no CRC (default of rosbag2): flipped bits cannot be seen")
    return Container(path.name, tuple(files), tally.topics, tally.messages, _digest(files), tuple(notes))


def read_messages(container: Container, topics: Collection[str]) -> Iterator[RawMessage]:
    """Messages of the given topics in the order of the files (order of arrival). Raises ImportRefused."""
    for file in container.files:
        yield from _read(file, frozenset(topics), _Tally())


# --- which files --------------------------------------------------------------------------------------------


def _storage_files(path: Path) -> tuple[int | None, list[Path], list[str]]:
    """Message count that metadata.yaml declares (None without one), files in order of time, notes."""
    if path.is_file():
        if path.suffix not in STORAGE_SUFFIXES:
            raise ImportRefused(Reason.NOT_A_BAG, f"{path.name}: neither .mcap nor .db3")
        return None, [path], []
    if not path.is_dir():
        raise ImportRefused(Reason.MISSING_FILE, f"{path.name}: no such bag")
    found = sorted((f for f in path.iterdir() if f.suffix in STORAGE_SUFFIXES), key=_split_order)
    if not (path / "metadata.yaml").is_file():
        if not found:
            raise ImportRefused(
                Reason.NOT_A_BAG, f"{path.name}: no metadata.yaml, no .mcap and no .db3 inside"
            )
        _require_one_recording(path, found)
        return (
            None,
            found,
            ["no metadata.yaml: the recording was not closed properly, or only its files were kept"],
        )
    try:
        information = yaml.safe_load((path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
        declared = int(information["message_count"])
        listed = [path / Path(name).name for name in information["relative_file_paths"]]
        mode = (information.get("compression_mode") or "").upper()
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ImportRefused(
            Reason.BAD_METADATA, f"{path.name}/metadata.yaml cannot be read: {error}"
        ) from error
    if mode in ("FILE", "MESSAGE"):
        raise ImportRefused(
            Reason.UNSUPPORTED,
            f"{path.name}: rosbag2 compression mode {mode}; convert it first (`ros2 bag convert`); "
            "compression inside MCAP chunks needs no conversion",
        )
    for file in listed:
        if not file.is_file():
            raise ImportRefused(Reason.MISSING_FILE, f"{path.name}: {file.name} of metadata.yaml is absent")
    unlisted = [file.name for file in found if file not in listed]
    return declared, listed, [f"not in metadata.yaml, not read: {', '.join(unlisted)}"] if unlisted else []


def _require_one_recording(path: Path, found: list[Path]) -> None:
    """Without metadata.yaml only the names tell which files belong together: <bag>_0, <bag>_1 and so on."""
    keys = [_split_order(file) for file in found]
    if len(found) > 1 and len({(key[0], file.suffix) for key, file in zip(keys, found, strict=True)}) > 1:
        raise ImportRefused(
            Reason.NOT_A_BAG, f"{path.name}: no metadata.yaml and files of several recordings inside"
        )
    numbers = [number for _, number in keys]
    if len(found) > 1 and numbers != list(range(len(found))):
        raise ImportRefused(Reason.MISSING_FILE, f"{path.name}: splits {numbers}; one is absent")


def _split_order(file: Path) -> tuple[str, int]:
    """bag_2.mcap before bag_10.mcap."""
    match = re.fullmatch(r"(.*?)_?(\d*)", file.stem)
    assert match is not None  # both groups may be empty, so everything matches
    return match[1], int(match[2] or -1)


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    topics: dict[str, Topic] = field(default_factory=dict)
    messages: int = 0
    crc_seen: bool = False
    statistics: int | None = None

    def declare(self, topic: str, type_name: str, serialization: str, definition: str) -> None:
        known = self.topics.setdefault(topic, Topic(type_name, serialization, definition))
        if known.type != type_name:
            raise ImportRefused(
                Reason.WRONG_TYPE, f"{topic} is both {known.type} and {type_name} in this bag"
            )
        known.definition = known.definition or definition

    def count(self, topic: str) -> None:
        self.topics[topic].count += 1
        self.messages += 1


def _scan_mcap(file: Path, tally: _Tally) -> int:
    read = sum(1 for _ in _read(file, None, tally))
    return tally.statistics if tally.statistics is not None else read


def _read(file: Path, topics: frozenset[str] | None, tally: _Tally) -> Iterator[RawMessage]:
    if file.suffix == ".db3":
        yield from _read_sqlite(file, topics, tally)
    else:
        yield from _read_mcap(file, topics, tally)


def _read_mcap(file: Path, topics: frozenset[str] | None, tally: _Tally) -> Iterator[RawMessage]:
    """The streaming reader looks at every record up to the footer; the seeking one trusts the index
    instead."""
    schemas: dict[int, Schema] = {}
    channels: dict[int, str] = {}
    try:
        with file.open("rb") as stream:
            for record in _mcap_records(stream, tally):
                if isinstance(record, Schema):
                    schemas[record.id] = record
                elif isinstance(record, Channel):
                    schema = schemas.get(record.schema_id)
                    known = schema is not None and schema.encoding == "ros2msg"
                    definition = schema.data.decode() if known and schema is not None else ""
                    tally.declare(
                        record.topic, schema.name if schema else "", record.message_encoding, definition
                    )
                    channels[record.id] = record.topic
                elif isinstance(record, Statistics):
                    tally.statistics = record.message_count
                elif isinstance(record, Message):
                    topic = channels[record.channel_id]
                    tally.count(topic)
                    if topics is None or topic in topics:
                        yield RawMessage(topic, record.log_time, record.data)
    except CRCValidationError as error:
        raise ImportRefused(Reason.BAD_CRC, f"{file.name}: {error}") from error
    except (InvalidMagic, UnsupportedCompressionError) as error:
        raise ImportRefused(Reason.UNSUPPORTED, f"{file.name}: {error}") from error
    except (
        McapError,
        struct.error,
        zstandard.ZstdError,
        ValueError,
        KeyError,
        MemoryError,
        OverflowError,
    ) as error:
        if not _has_end(file):
            raise ImportRefused(
                Reason.TRUNCATED, f"{file.name} ends after {tally.messages} messages, without a footer"
            ) from error
        raise ImportRefused(
            Reason.CORRUPT, f"{file.name} after {tally.messages} messages: {error!r}"
        ) from error


def _has_end(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-min(len(MCAP_MAGIC), file.stat().st_size), os.SEEK_END)
        return stream.read() == MCAP_MAGIC


def _mcap_records(stream: IO[bytes], tally: _Tally) -> Iterator[McapRecord]:
    for record in StreamReader(stream, emit_chunks=True, validate_crcs=True).records:
        if isinstance(record, Chunk):
            tally.crc_seen = tally.crc_seen or record.uncompressed_crc != 0
            yield from breakup_chunk(record, validate_crc=True)
        elif isinstance(record, Header) and record.profile not in ("ros2", ""):
            raise ImportRefused(Reason.WRONG_SERIALIZATION, f"MCAP profile {record.profile!r} is not ros2")
        else:
            yield record


def _read_sqlite(file: Path, topics: frozenset[str] | None, tally: _Tally) -> Iterator[RawMessage]:
    # A database left in WAL mode cannot be opened from a read-only directory unless it is declared immutable.
    pending = file.with_name(f"{file.name}-wal")
    access = "mode=ro" if pending.is_file() and pending.stat().st_size else "immutable=1"
    connection = sqlite3.connect(f"{file.resolve().as_uri()}?{access}", uri=True)
    try:
        definitions = {}
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'message_definitions'").fetchone():
            query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
            definitions = {
                name: text for name, encoding, text in connection.execute(query) if encoding == "ros2msg"
            }
        names = {}
        for key, topic, type_name, serialization in connection.execute(
            "SELECT id, name, type, serialization_format FROM topics"
        ):
            tally.declare(topic, type_name, serialization, definitions.get(type_name, ""))
            names[key] = topic
        for key, stamp, data in connection.execute(
            "SELECT topic_id, timestamp, data FROM messages ORDER BY id"
        ):
            topic = names[key]
            tally.count(topic)
            if topics is None or topic in topics:
                yield RawMessage(topic, stamp, data)
    except (sqlite3.DatabaseError, KeyError) as error:
        size = file.stat().st_size
        raise ImportRefused(Reason.CORRUPT, f"{file.name} ({size} bytes) as SQLite: {error!r}") from error
    finally:
        connection.close()


def _require_cdr(name: str, tally: _Tally) -> None:
    """A bag holds one serialization format as a rule; a single odd topic that no stream needs is not a
    reason."""
    formats = {topic.serialization for topic in tally.topics.values()}
    if formats and "cdr" not in formats:
        raise ImportRefused(
            Reason.WRONG_SERIALIZATION,
            f"{name}: written with serialization format {', '.join(sorted(formats))}; only cdr can be read",
        )
