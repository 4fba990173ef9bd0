# SPDX-License-Identifier: Apache-2.0
"""What a crash leaves in the spool: sealed as far as it can be read, or set aside with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from mcap.records import Channel, Footer, Message, Metadata, Schema
from mcap.stream_reader import StreamReader

from lwd_fleet.data.bag import OfferedQos
from lwd_fleet.data.bag_scan import BROKEN, ORIGIN_RECORD
from lwd_fleet.data.episode import (
    PARTIAL_SUFFIX,
    EpisodeWriter,
    SealedInfo,
    bag_file,
)
from lwd_fleet.data.files import sync_directory, write_atomically
from lwd_fleet.data.messages import InterfacesMissing

SALVAGE_SUFFIX = ".salvage"
QUARANTINE = "quarantine"
REASON_FILE = "reason.txt"


@dataclass(frozen=True)
class Salvage:
    """What became of a `.partial` directory: `sealed`, or `quarantined` at a path, for a reason."""

    episode_id: str
    sealed: SealedInfo | None
    quarantined: Path | None
    reason: str


def salvage_spool(spool: Path) -> list[Salvage]:
    """Deal with every leftover in the spool; only sealed episodes and the quarantine remain. To be called
    before anything records into this spool. A crash in the middle is repeated by the next call."""
    for leftover in spool.glob(f"*{SALVAGE_SUFFIX}"):
        shutil.rmtree(leftover)
    return [salvage(partial) for partial in sorted(spool.glob(f"*{PARTIAL_SUFFIX}"))]


def salvage(partial: Path) -> Salvage:
    """Rewrite a `.partial` recording as a sealed episode, flagged truncated unless nothing was missing.

    Every chunk that was completely written and whose CRC holds is kept. With no readable message, or an
    interface that is not installed here, the directory goes to the quarantine beside it.
    """
    episode_id = partial.name.removesuffix(PARTIAL_SUFFIX)
    if (partial.parent / episode_id).exists():
        # The crash came after the seal and before the leftover was removed.
        return quarantine(partial, "sealed under the same name already")
    reading = _Reading(partial / bag_file(episode_id))
    writer: EpisodeWriter | None = None
    try:
        for topic, type_name, qos, message in reading.messages():
            if writer is None:
                origin = reading.origin
                writer = EpisodeWriter(
                    partial.parent, episode_id, origin["robot"], origin["source"], suffix=SALVAGE_SUFFIX
                )
            writer.write(topic, type_name, message.data, message.log_time, message.publish_time, qos)
    except InterfacesMissing as error:
        if writer is not None:
            writer.abandon()
            shutil.rmtree(partial.parent / f"{episode_id}{SALVAGE_SUFFIX}")
        return quarantine(partial, str(error))
    if writer is None:
        return quarantine(partial, f"no message can be read: {reading.end}")
    kept = writer.message_count
    reason = "" if reading.complete else f"recording was cut off, {kept} messages salvaged: {reading.end}"
    sealed = writer.seal(truncated=reading.truncated or reason)
    shutil.rmtree(partial)
    return Salvage(episode_id, sealed, None, reason or "complete, only the seal was missing")


def quarantine(directory: Path, reason: str) -> Salvage:
    """Move a directory to `<spool>/quarantine/`, with the reason beside its files. Nothing is deleted."""
    episode_id = directory.name.removesuffix(PARTIAL_SUFFIX)
    folder = directory.parent / QUARANTINE
    folder.mkdir(exist_ok=True)
    target, number = folder / directory.name, 1
    while target.exists():
        number += 1
        target = folder / f"{directory.name}.{number}"
    write_atomically(directory / REASON_FILE, f"{reason}\n".encode())
    directory.rename(target)
    sync_directory(folder)
    return Salvage(episode_id, None, target, reason)


class _Reading:
    """Reads a bag as far as it goes; `end` says why it ended there, `complete` whether at its footer."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.origin: dict[str, str] = {}
        self.truncated = ""
        self.complete = False
        self.end = ""

    def messages(self) -> Iterator[tuple[str, str, OfferedQos, Message]]:
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        offered: dict[int, OfferedQos] = {}
        try:
            with self._file.open("rb") as stream:
                limit = self._file.stat().st_size
                for record in StreamReader(stream, validate_crcs=True, record_size_limit=limit).records:
                    if isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                        offered[record.id] = _qos(record)
                    elif isinstance(record, Metadata) and record.name == ORIGIN_RECORD:
                        self.origin = record.metadata
                    elif isinstance(record, Message) and self.origin:
                        channel = channels[record.channel_id]
                        yield channel.topic, schemas[channel.schema_id].name, offered[channel.id], record
                    elif isinstance(record, Footer):
                        self.complete = True
        except (*BROKEN, OSError) as error:
            self.end = f"{type(error).__name__}: {error}"


def _qos(channel: Channel) -> OfferedQos:
    profile = yaml.safe_load(channel.metadata["offered_qos_profiles"])[0]
    return OfferedQos(
        reliable=profile["reliability"] == "reliable",
        latched=profile["durability"] == "transient_local",
        depth=profile["depth"],
    )
