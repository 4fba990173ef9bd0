# SPDX-License-Identifier: Apache-2.0
"""The episode on disk: one directory, one rosbag2 bag, sealed by one rename. See docs/episode_format.md."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mcap.reader import make_reader
from mcap.writer import CompressionType, Writer

from lwd_fleet.data import messages
from lwd_fleet.data.bag import METADATA_FILE, OfferedQos, TopicInfo, bag_information, dump, metadata_yaml
from lwd_fleet.data.bag_scan import ORIGIN_RECORD, PROFILE, TRUNCATED_RECORD, EpisodeRejected, Scan
from lwd_fleet.data.bag_scan import scan as scan_bag
from lwd_fleet.data.files import sha256_of, sync_directory, write_atomically
from lwd_fleet.data.summary import (
    FORMAT_VERSION,
    EpisodeSummary,
    FileEntry,
    SummaryBuilder,
    relative_topic,
)

__all__ = [
    "EpisodeReader",
    "EpisodeRejected",
    "EpisodeWriter",
    "RecordedMessage",
    "SealedInfo",
    "bag_file",
    "episode_digest",
    "mint_episode_id",
    "rebuild_episode_json",
    "rebuild_metadata",
]
PARTIAL_SUFFIX = ".partial"
EPISODE_FILE = "episode.json"
CHUNK_BYTES = 512 * 1024
DEFAULT_QOS = OfferedQos()


def mint_episode_id(now_ns: int | None = None) -> str:
    """A UUIDv7 (RFC 9562): 48 bits of milliseconds, then random bits, so that names sort by time."""
    milliseconds = (time.time_ns() if now_ns is None else now_ns) // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (1 << 48) - 1) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    value = value & ~(0x3 << 62) | 0x2 << 62  # variant
    return str(uuid.UUID(int=value))


def bag_file(episode_id: str) -> str:
    """Name of the bag's only file."""
    return f"{episode_id}_0.mcap"


@dataclass(frozen=True)
class SealedInfo:
    """A sealed episode: its directory and its summary."""

    path: Path
    summary: EpisodeSummary

    @property
    def episode_id(self) -> str:
        return self.summary.episode_id

    @property
    def digest(self) -> str:
        return self.summary.digest


class EpisodeWriter:
    """Writes one episode into `<spool>/<episode_id>.partial` and seals it as `<spool>/<episode_id>`.

    Whatever `flush` has returned for survives a killed process. After an `OSError` (disk full) the writer
    takes no more messages and cannot be sealed: what is on disk is for `salvage`.
    """

    def __init__(
        self, spool: Path, episode_id: str, robot: str, source: str = "robot", suffix: str = PARTIAL_SUFFIX
    ) -> None:
        """`source` says what recorded ("robot", "headless", "import"). Raises `FileExistsError` if the
        episode exists in the spool, sealed or not."""
        self.path = spool / episode_id
        if self.path.exists():
            raise FileExistsError(f"{self.path} is sealed already")
        self._partial = spool / f"{episode_id}{suffix}"
        self._partial.mkdir(parents=True)
        self._episode_id = episode_id
        self._builder = SummaryBuilder(episode_id, robot, source)
        self._topics: dict[str, tuple[int, str, OfferedQos]] = {}
        self._schemas: dict[str, int] = {}
        self._broken = False
        self._stream = (self._partial / bag_file(episode_id)).open("wb")
        self._writer = Writer(
            self._stream, chunk_size=CHUNK_BYTES, compression=CompressionType.ZSTD, enable_data_crcs=True
        )
        self._writer.start(profile=PROFILE, library="lwd")
        self._writer.add_metadata(
            ORIGIN_RECORD,
            {
                "format_version": str(FORMAT_VERSION),
                "episode_id": episode_id,
                "robot": robot,
                "source": source,
            },
        )
        self.flush()

    @property
    def message_count(self) -> int:
        """Messages written so far."""
        return sum(self._builder.message_counts.values())

    @property
    def size_bytes(self) -> int:
        """Bytes in the file so far; those of the open chunk are not counted."""
        return 0 if self._stream.closed else self._stream.tell()

    @property
    def ended(self) -> bool:
        """Whether the episode's outcome (EpisodeState ENDED) has been written."""
        return self._builder.ended

    def write(
        self,
        topic: str,
        type_name: str,
        cdr: bytes,
        log_time_ns: int,
        publish_time_ns: int,
        qos: OfferedQos = DEFAULT_QOS,
    ) -> None:
        """Append a message; `topic` is the full name. `qos` counts at the topic's first message.

        Raises `ValueError` if the topic had another type, `InterfacesMissing`, or `OSError`.
        """
        self._check_usable()
        channel, known_type, _ = self._topics.get(topic) or self._register(topic, type_name, qos)
        if known_type != type_name:
            raise ValueError(f"{topic} was {known_type} and is now {type_name}")
        self._guarded(lambda: self._writer.add_message(channel, log_time_ns, cdr, publish_time_ns))
        self._builder.add(topic, type_name, cdr, log_time_ns)

    def flush(self) -> None:
        """Hand everything written so far to the operating system, as a complete chunk."""
        self._check_usable()
        self._guarded(self._writer.flush)

    def seal(self, truncated: str = "") -> SealedInfo:
        """Finish the bag, write the caches, fsync and rename. `truncated` says why the recording is
        incomplete. A crash before the rename leaves `.partial`, after it a complete episode."""
        self._check_usable()
        self._guarded(lambda: self._finish(truncated))
        self._stream.close()
        name = bag_file(self._episode_id)
        file = self._partial / name
        files = (FileEntry(name, sha256_of(file), file.stat().st_size),)
        summary = self._builder.build(files, episode_digest(files), truncated)
        write_atomically(self._partial / METADATA_FILE, metadata_yaml(self._information()).encode())
        write_atomically(self._partial / EPISODE_FILE, summary.text().encode())
        self._partial.rename(self.path)
        sync_directory(self.path.parent)
        return SealedInfo(self.path, summary)

    def abandon(self) -> None:
        """Close the file as it is; the `.partial` directory stays for `salvage`. Never raises `OSError`."""
        self._broken = True
        try:
            self._stream.close()
        except OSError:
            # The disk that refused the last write refuses this one too; salvage reads what is there.
            return

    def _register(self, topic: str, type_name: str, qos: OfferedQos) -> tuple[int, str, OfferedQos]:
        if type_name not in self._schemas:
            text = messages.schema_text(type_name).encode()
            self._schemas[type_name] = self._writer.register_schema(type_name, messages.SCHEMA_ENCODING, text)
        metadata = {"offered_qos_profiles": qos.as_text(), "topic_type_hash": messages.type_hash(type_name)}
        channel = self._writer.register_channel(topic, "cdr", self._schemas[type_name], metadata)
        self._topics[topic] = (channel, type_name, qos)
        return self._topics[topic]

    def _finish(self, truncated: str) -> None:
        self._writer.flush()
        if truncated:
            self._writer.add_metadata(TRUNCATED_RECORD, {"reason": truncated})
        self._writer.add_metadata("rosbag2", {"serialized_metadata": dump(self._information()).strip()})
        self._writer.finish()
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _information(self) -> dict[str, Any]:
        counts = self._builder.message_counts
        topics = [
            TopicInfo(topic, type_name, messages.type_hash(type_name), qos.as_list(), counts[topic])
            for topic, (_, type_name, qos) in self._topics.items()
        ]
        return bag_information(
            bag_file(self._episode_id), topics, self._builder.start_ns, self._builder.end_ns
        )

    def _check_usable(self) -> None:
        if self._broken or self._stream.closed:
            raise OSError(f"{self._partial.name} was closed or failed before; it can only be salvaged")

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError:
            # Half a record may be in the file: anything appended now would be unreadable.
            self._broken = True
            raise


@dataclass(frozen=True, slots=True)
class RecordedMessage:
    """A message of a bag. `topic` without the robot's prefix; `log_time_ns` when received, `publish_time_ns`
    when sent."""

    topic: str
    type: str
    log_time_ns: int
    publish_time_ns: int
    cdr: bytes

    @property
    def message(self) -> Any:
        """The message, decoded at each access."""
        return messages.deserialise(self.cdr, self.type)


class EpisodeReader:
    """A sealed episode, checked as a whole when opened: every CRC, the footer, the message counts against
    the statistics and `metadata.yaml`, the type hashes against the interfaces installed here, and the digest
    in `episode.json` where that file exists. Raises `EpisodeRejected`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = _payload(self.path)
        scan = scan_bag(self._file)
        if self.path.name != scan.builder.episode_id:
            raise EpisodeRejected(f"{self.path.name}: the bag inside is of episode {scan.builder.episode_id}")
        _check_metadata(self.path, scan)
        self.summary = _summary(self._file, scan)
        _check_cache(self.path, self.summary)
        self.types = {relative_topic(topic.name): topic.type for topic in scan.topics}

    def __iter__(self) -> Iterator[RecordedMessage]:
        return self.messages()

    def messages(self, *topics: str) -> Iterator[RecordedMessage]:
        """The messages of the given topics (names without prefix; none given: all) in order of log time."""
        return bag_messages(self._file, *topics)


def bag_messages(file: Path, *topics: str) -> Iterator[RecordedMessage]:
    """The messages of a bag that is known to be good (`EpisodeReader`, or a blob with the right digest), of the
    given topics (names without prefix; none given: all), in order of log time."""
    with file.open("rb") as stream:
        reader = make_reader(stream)
        summary = reader.get_summary()
        known = [] if summary is None else [channel.topic for channel in summary.channels.values()]
        names = [name for name in known if not topics or relative_topic(name) in topics]
        for schema, channel, message in reader.iter_messages(topics=names):
            yield RecordedMessage(
                topic=relative_topic(channel.topic),
                type=schema.name if schema else "",
                log_time_ns=message.log_time,
                publish_time_ns=message.publish_time,
                cdr=message.data,
            )


def episode_digest(files: Iterable[FileEntry]) -> str:
    """Digest of an episode: SHA-256 of what `sha256sum *.mcap` prints for its payload files."""
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def rebuild_episode_json(path: Path) -> EpisodeSummary:
    """Write `episode.json` anew from the bag. Raises `EpisodeRejected` if the bag is damaged."""
    file = _payload(path)
    scan = scan_bag(file)
    summary = _summary(file, scan)
    write_atomically(path / EPISODE_FILE, summary.text().encode())
    return summary


def rebuild_metadata(path: Path) -> None:
    """Write `metadata.yaml` anew from the bag. Raises `EpisodeRejected` if the bag is damaged."""
    scan = scan_bag(_payload(path))
    builder = scan.builder
    information = bag_information(bag_file(builder.episode_id), scan.topics, builder.start_ns, builder.end_ns)
    write_atomically(path / METADATA_FILE, metadata_yaml(information).encode())


def _payload(path: Path) -> Path:
    if path.name.endswith(PARTIAL_SUFFIX):
        raise EpisodeRejected(f"{path.name}: not sealed, it is still being recorded or has to be salvaged")
    found = sorted(path.glob("*.mcap"))
    if len(found) != 1:
        raise EpisodeRejected(f"{path.name}: {len(found)} .mcap files where one is expected")
    return found[0]


def _check_metadata(path: Path, scan: Scan) -> None:
    try:
        text = (path / METADATA_FILE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EpisodeRejected(f"{path.name}: no {METADATA_FILE}; rebuild_metadata writes it anew") from error
    try:
        information = yaml.safe_load(text)["rosbag2_bagfile_information"]
        listed = {
            (entry["topic_metadata"]["name"], entry["topic_metadata"]["type"]): entry["message_count"]
            for entry in information["topics_with_message_count"]
        }
        total = information["message_count"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise EpisodeRejected(f"{path.name}: {METADATA_FILE} cannot be read: {error}") from error
    found = {(topic.name, topic.type): topic.messages for topic in scan.topics}
    if listed.keys() != found.keys():
        difference = sorted(topic for topic, _ in listed.keys() ^ found.keys())
        raise EpisodeRejected(
            f"{path.name}: {METADATA_FILE} and the bag differ in topics {', '.join(difference)}"
        )
    if listed != found or total != sum(found.values()):
        wrong = sorted(topic for (topic, kind), number in found.items() if listed[topic, kind] != number)
        raise EpisodeRejected(
            f"{path.name}: {METADATA_FILE} and the bag differ in message counts of "
            f"{', '.join(wrong) or 'the total'}"
        )


def _summary(file: Path, scan: Scan) -> EpisodeSummary:
    files = (FileEntry(file.name, sha256_of(file), file.stat().st_size),)
    return scan.builder.build(files, episode_digest(files), scan.truncated)


def _check_cache(path: Path, summary: EpisodeSummary) -> None:
    cache = path / EPISODE_FILE
    if not cache.exists():
        return
    try:
        sealed = json.loads(cache.read_text(encoding="utf-8"))["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise EpisodeRejected(f"{path.name}: {EPISODE_FILE} cannot be read: {error}") from error
    if sealed != summary.digest:
        raise EpisodeRejected(
            f"{path.name}: sealed with digest {sealed[:12]}, the files have {summary.digest[:12]}"
        )
