# SPDX-License-Identifier: Apache-2.0
"""Reads event files as TensorBoard does: records in the order of files, without what a later start takes back."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog


def read_events(folder: Path) -> dict[str, dict[int, Any]]:
    """By tag and step: numbers of scalars, HistogramProto of histograms."""
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in _records(path.read_bytes()):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                for points in found.values():
                    for step in [step for step in points if step >= event.step]:
                        del points[step]
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                found[value.tag][event.step] = getattr(value, kind)
    return dict(found)


def _records(data: bytes) -> Iterator[Event]:
    """A file of records: length, its checksum, the bytes, their checksum. A torn last one is left out."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
