# SPDX-License-Identifier: Apache-2.0
"""LeRobot datasets (v2.0, v2.1, v3.0) as episodes: `observation.state` -> joint_states, `action` ->
executed_action by a human, every image feature -> a camera, the task's text -> the instruction.

Time. A dataset has no absolute time; its timestamps start at 0 in every episode. Frame k of an episode is
stamped `EPOCH_NS + first global frame index / fps + timestamp[k]`: deterministic, and the episodes of a
dataset do not overlap. Action k is stamped with the time of frame k + 1, the end of the step over which it
was commanded.

Values are taken over as they are: whether a dataset's joints are in radians, degrees or percent, it does not
say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lwd_learner.importers.decode import encode_jpeg, finite
from lwd_learner.importers.lerobot_layout import Dataset, EpisodeEntry, open_dataset, read_rows
from lwd_learner.importers.quarantine import Quarantine
from lwd_learner.importers.source import IMPORT_VERSION, ImportRefused, Outcome, Reason, Sample, SourceInfo
from lwd_learner.importers.video import Clip, clip_digest, frames_at
from lwd_learner.importers.write import ImportResult, Progress, import_all
from lwd_policy.observation import COMMAND, INSTRUCTION, JOINT_POSITIONS, ObservationSpec

EPOCH_NS = 946_684_800_000_000_000  # 2000-01-01T00:00:00Z, so that nobody takes it for the time of recording


def import_lerobot(
    dataset_dir: Path,
    out_dir: Path,
    robot: str | None = None,
    progress: Progress | None = None,
    *,
    episodes: Sequence[int] | None = None,
    quarantine: Quarantine | None = None,
) -> list[ImportResult]:
    """One lwd episode per episode that the dataset's metadata describes (or of those in `episodes`).

    `robot` names the topics' prefix, by default after the dataset's robot type. Episodes that cannot be
    imported are refused one by one, in the results and in the quarantine; a dataset whose metadata cannot be
    read raises ImportRefused.
    """
    dataset = open_dataset(dataset_dir)
    entries = [entry for entry in dataset.episodes if episodes is None or entry.index in episodes]
    sources = (
        (
            dataset.name_of(entry),
            dataset.root,
            f"episode {entry.index}",
            partial(open_episode, dataset, entry, robot),
        )
        for entry in entries
    )
    return import_all(sources, len(entries), out_dir, quarantine, progress)


def open_episode(dataset: Dataset, entry: EpisodeEntry, robot: str | None = None) -> LeRobotEpisode:
    """Read the tables of one episode and check them; its images are decoded in `samples`. Raises
    ImportRefused."""
    return LeRobotEpisode(dataset, entry, robot or dataset.robot)


class LeRobotEpisode:
    """An `EpisodeSource` over one episode of a dataset."""

    def __init__(self, dataset: Dataset, entry: EpisodeEntry, robot: str) -> None:
        name = dataset.name_of(entry)
        rows = read_rows(dataset, entry)
        self._dataset, self._entry, self._rows = dataset, entry, rows
        self.spec: ObservationSpec = dataset.observation_spec()
        self._state = columns_of(rows, "observation.state", dataset.joint_names, name)
        self._action = columns_of(rows, "action", dataset.joint_names, name)
        self._times_s = np.asarray(rows["timestamp"].to_numpy(), np.float64)  # [K]
        _check_times(self._times_s, dataset.fps, name)
        outcome = _outcome(rows)
        start_ns = EPOCH_NS + round(entry.first_frame / dataset.fps * 1e9)
        stamps = [start_ns + round(time_s * 1e9) for time_s in self._times_s]
        self._stamps = [*stamps, stamps[-1] + dataset.step_ns]  # [K + 1]
        instruction = dataset.instruction(rows, name)
        self.info = SourceInfo(
            name=name,
            digest=self._digest(robot, instruction),
            robot=robot,
            task=dataset.task_name(instruction),
            instruction=instruction,
            joint_names=dataset.joint_names,
            step_ns=dataset.step_ns,
            start_ns=self._stamps[0],
            end_ns=self._stamps[-1],
            steps=len(stamps),
            outcome=outcome,
            outcome_source="dataset" if outcome else "",
            notes=() if np.ptp(self._state, axis=0).any() else (f"no joint moves over {len(stamps)} frames",),
        )

    def samples(self) -> Iterator[Sample]:
        """See `EpisodeSource.samples`."""
        with ExitStack() as stack:
            cameras = [
                (stream, stack.enter_context(closing(self._images(feature))))
                for feature, stream in self._dataset.cameras.items()
            ]
            yield Sample(INSTRUCTION, self._stamps[0], self.info.instruction)
            for frame, stamp in enumerate(self._stamps[:-1]):
                yield Sample(JOINT_POSITIONS, stamp, self._state[frame])
                for stream, images in cameras:
                    yield Sample(stream, stamp, next(images))
                if frame:
                    yield Sample(COMMAND, stamp, self._action[frame - 1])
            yield Sample(COMMAND, self._stamps[-1], self._action[-1])

    def _images(self, feature: str) -> Generator[bytes, None, None]:
        clip = self._clip(feature)
        if clip is not None:
            for frame in frames_at(clip, self._times_s.tolist(), 0.5 / self._dataset.fps):
                yield encode_jpeg(frame)
            return
        for index, cell in enumerate(self._rows[feature]):
            bgr = cv2.imdecode(np.frombuffer(_still(cell, feature, index), np.uint8), cv2.IMREAD_COLOR)
            if bgr is None:
                raise ImportRefused(
                    Reason.CORRUPT, f"{self.info.name}: {feature} of frame {index} is no image"
                )
            yield encode_jpeg(np.asarray(bgr, np.uint8))

    def _clip(self, feature: str) -> Clip | None:
        clip = self._entry.clips.get(feature)
        if clip is not None and not clip.file.is_file():
            missing = clip.file.relative_to(self._dataset.root)
            raise ImportRefused(
                Reason.MISSING_FILE, f"{self._dataset.name_of(self._entry)}: {missing} is absent"
            )
        return clip

    def _digest(self, robot: str, instruction: str) -> str:
        """Over everything that ends up in the episode, so that equal content has one id wherever the file
        lies."""
        dataset = self._dataset
        head = [IMPORT_VERSION, robot, instruction, list(dataset.joint_names), dataset.fps, self._stamps]
        digest = hashlib.sha256(json.dumps(head).encode())
        digest.update(self._state.tobytes() + self._action.tobytes())
        for feature, stream in dataset.cameras.items():
            digest.update(stream.encode())
            clip = self._clip(feature)
            if clip is not None:
                digest.update(clip_digest(clip, 0.5 / dataset.fps).encode())
            else:
                for index, cell in enumerate(self._rows[feature]):
                    digest.update(_still(cell, feature, index))
        return digest.hexdigest()


def _still(cell: pa.StructScalar, feature: str, index: int) -> bytes:
    """Encoded image of an image feature that is stored in the table itself."""
    value = cell.as_py()
    if not isinstance(value, dict) or not value.get("bytes"):
        raise ImportRefused(Reason.CORRUPT, f"{feature} of frame {index} holds no encoded image")
    return bytes(value["bytes"])


def columns_of(rows: pa.Table, column: str, names: tuple[str, ...], episode: str) -> NDArray[np.float64]:
    """[K, n], finite."""
    values = np.array(rows[column].to_pylist(), np.float64)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ImportRefused(
            Reason.BAD_JOINTS, f"{episode}: {column} is {values.shape}, expected [K, {len(names)}]"
        )
    for frame in np.flatnonzero(~np.isfinite(values).all(axis=1))[:1]:
        finite(values[frame], names, f"{episode}: {column} of frame {frame}")
    return values


def _check_times(times_s: NDArray[np.float64], fps: float, episode: str) -> None:
    if len(times_s) < 2:
        raise ImportRefused(Reason.TOO_SHORT, f"{episode}: {len(times_s)} frames")
    gaps = np.diff(times_s)
    bad = np.flatnonzero(~(np.abs(gaps - 1.0 / fps) < 0.5 / fps))
    if bad.size:
        frame = int(bad[0])
        raise ImportRefused(
            Reason.BAD_STAMPS,
            f"{episode}: {gaps[frame]:.4f} s from frame {frame} to the next, the dataset says {fps:g} fps",
        )


def _outcome(rows: pa.Table) -> Outcome:
    """`next.success` of LeRobot's own environments; most datasets of demonstrations do not say."""
    if "next.success" not in rows.column_names:
        return Outcome.UNLABELLED
    flat = np.array(rows["next.success"].to_pylist(), bool)
    return Outcome.SUCCESS if flat.any() else Outcome.FAILURE
