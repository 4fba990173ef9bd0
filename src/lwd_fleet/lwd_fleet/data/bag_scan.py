# SPDX-License-Identifier: Apache-2.0
"""One pass over the bag of an episode: everything that can be wrong with its bytes, and what it says."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml
import zstandard
from mcap.exceptions import McapError
from mcap.records import Channel, Footer, Header, Message, Metadata, Schema, Statistics
from mcap.stream_reader import StreamReader
from rosbags.serde import SerdeError

from lwd_fleet.data import messages
from lwd_fleet.data.bag import TopicInfo
from lwd_fleet.data.summary import FORMAT_VERSION, SummaryBuilder

PROFILE = "ros2"
ORIGIN_RECORD = "lwd_episode"  # MCAP metadata record: who recorded what
TRUNCATED_RECORD = "lwd_truncated"  # MCAP metadata record: why the recording is incomplete

_MAGIC_BYTES = 8
_CRC_BYTES = 4
BROKEN = (McapError, zstandard.ZstdError, struct.error, ValueError, KeyError, MemoryError, OverflowError)
"""What the MCAP reader raises on damaged bytes (its CRC error is a `ValueError`)."""


class EpisodeRejected(Exception):
    """A recording is not a sealed, undamaged episode; the text says which and why, for a person."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a bag found."""

    topics: tuple[TopicInfo, ...]
    builder: SummaryBuilder
    truncated: str


def scan(file: Path) -> Scan:
    """Read every byte of a bag once. Raises `EpisodeRejected`."""
    name = file.parent.name
    try:
        return _scan_records(file)
    except EpisodeRejected:
        raise
    except BROKEN as error:
        raise EpisodeRejected(f"{name}: {file.name} is damaged: {type(error).__name__}: {error}") from error
    except SerdeError as error:
        raise EpisodeRejected(f"{name}: a message does not fit its type: {error}") from error


def _scan_records(file: Path) -> Scan:
    name = file.parent.name
    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    counts: Counter[int] = Counter()
    records: dict[str, dict[str, str]] = {}
    statistics: Statistics | None = None
    footer: Footer | None = None
    builder: SummaryBuilder | None = None
    with file.open("rb") as stream:
        reader = StreamReader(stream, validate_crcs=True, record_size_limit=file.stat().st_size)
        for record in reader.records:
            if builder is None and isinstance(record, (Schema, Channel, Message)):
                raise EpisodeRejected(f"{name}: not a bag of this project: it starts without {ORIGIN_RECORD}")
            if isinstance(record, Message) and builder is not None:
                channel = channels[record.channel_id]
                counts[record.channel_id] += 1
                builder.add(channel.topic, schemas[channel.schema_id].name, record.data, record.log_time)
            elif isinstance(record, Schema):
                schemas[record.id] = record
            elif isinstance(record, Channel):
                if record.id not in channels:
                    _check_type(name, record, schemas[record.schema_id])
                channels[record.id] = record
            elif isinstance(record, Metadata):
                records[record.name] = record.metadata
                if record.name == ORIGIN_RECORD:
                    builder = _builder(name, record.metadata)
            elif isinstance(record, Statistics):
                statistics = record
            elif isinstance(record, Footer):
                footer = record
            elif isinstance(record, Header) and record.profile != PROFILE:
                raise EpisodeRejected(f"{name}: MCAP profile {record.profile!r}, not {PROFILE!r}")
        if stream.read(1):
            raise EpisodeRejected(f"{name}: {file.name} goes on after its end")
    if footer is None or statistics is None or builder is None:
        raise EpisodeRejected(f"{name}: {file.name} lacks its footer, its statistics or its origin")
    _check_summary_crc(file, footer)
    recorded = {channel: number for channel, number in statistics.channel_message_counts.items() if number}
    if dict(counts) != recorded or statistics.message_count != sum(counts.values()):
        raise EpisodeRejected(
            f"{name}: {sum(counts.values())} messages in the file, "
            f"{statistics.message_count} in its statistics"
        )
    topics = tuple(
        TopicInfo(
            name=channel.topic,
            type=schemas[channel.schema_id].name,
            type_hash=channel.metadata.get("topic_type_hash", ""),
            qos=yaml.safe_load(channel.metadata.get("offered_qos_profiles", "[]")),
            messages=counts[channel.id],
        )
        for channel in channels.values()
    )
    return Scan(topics, builder, records.get(TRUNCATED_RECORD, {}).get("reason", ""))


def _builder(name: str, origin: dict[str, str]) -> SummaryBuilder:
    if origin.get("format_version") != str(FORMAT_VERSION):
        raise EpisodeRejected(
            f"{name}: episode format {origin.get('format_version')}; this program reads {FORMAT_VERSION}"
        )
    return SummaryBuilder(origin["episode_id"], origin["robot"], origin["source"])


def _check_type(name: str, channel: Channel, schema: Schema) -> None:
    recorded = channel.metadata.get("topic_type_hash", "")
    try:
        installed = messages.type_hash(schema.name)
    except messages.InterfacesMissing:
        return  # a vendor's type that only its robot knows: carried along, decoded by nobody here
    if recorded != installed:
        raise EpisodeRejected(
            f"{name}: {channel.topic} was recorded with another definition of {schema.name} "
            f"({recorded[:15]}..., here {installed[:15]}...)"
        )


def _check_summary_crc(file: Path, footer: Footer) -> None:
    """The stream reader checks chunks and the data section, not the summary behind them."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(footer.summary_start)
        summary = stream.read(size - footer.summary_start - _MAGIC_BYTES - _CRC_BYTES)
    if zlib.crc32(summary) != footer.summary_crc:
        raise EpisodeRejected(f"{file.parent.name}: {file.name} is damaged: CRC of the summary section")
