# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file by their times (AV1, H.264, whatever PyAV decodes)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from lwd_learner.importers.source import ImportRefused, Reason


@dataclass(frozen=True)
class Clip:
    """The part of a video file that shows one episode. `end_s` None: to the end of the file."""

    file: Path
    start_s: float = 0.0
    end_s: float | None = None


def frames_at(clip: Clip, times_s: Sequence[float], tolerance_s: float) -> Iterator[NDArray[np.uint8]]:
    """The frame shown at each time (seconds from the clip's start, increasing), uint8 [H, W, 3] BGR.

    Raises ImportRefused where no frame lies within the tolerance: a decoder that skips damaged frames must
    not shift the images against the joints.
    """
    try:
        with av.open(str(clip.file)) as container:
            frames = _decode(container, clip.start_s)
            shown_s, frame = -1.0, None
            for index, time_s in enumerate(times_s):
                wanted_s = clip.start_s + time_s
                while frame is None or shown_s < wanted_s - tolerance_s:
                    found = next(frames, None)
                    if found is None:
                        raise ImportRefused(
                            Reason.MISSING_FRAME, f"{clip.file.name} ends before frame {index}"
                        )
                    shown_s, frame = found
                if shown_s > wanted_s + tolerance_s:
                    raise ImportRefused(
                        Reason.MISSING_FRAME,
                        f"{clip.file.name}: no frame at {wanted_s:.3f} s (frame {index})",
                    )
                yield frame.to_ndarray(format="bgr24")
    except FFmpegError as error:
        raise ImportRefused(Reason.CORRUPT, f"{clip.file.name}: {error}") from error


def clip_digest(clip: Clip, margin_s: float) -> str:
    """sha256 over the encoded packets of a clip, hex: stays the same when episodes are appended to the
    file."""
    digest = hashlib.sha256()
    low = clip.start_s - margin_s
    high = float("inf") if clip.end_s is None else clip.end_s - margin_s
    try:
        with av.open(str(clip.file)) as container:
            for packet in container.demux(video=0):
                if packet.pts is not None and low <= float(packet.pts * packet.time_base) < high:
                    digest.update(bytes(packet))
    except FFmpegError as error:
        raise ImportRefused(Reason.CORRUPT, f"{clip.file.name}: {error}") from error
    return digest.hexdigest()


def _decode(container: Any, start_s: float) -> Iterator[tuple[float, Any]]:
    stream = container.streams.video[0]
    if start_s > 0.0:
        container.seek(int(start_s / stream.time_base), stream=stream)  # to the key frame before it
    for frame in container.decode(stream):
        yield float(frame.pts * stream.time_base), frame
