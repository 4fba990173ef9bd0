# SPDX-License-Identifier: Apache-2.0
"""Where a LeRobot dataset keeps what: the files of v2.x (one per episode) and v3.0 (many episodes per
file)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lwd_learner.importers.mapping import lwd_topic, standard_streams
from lwd_learner.importers.source import ImportRefused, Reason
from lwd_learner.importers.video import Clip
from lwd_policy.observation import JOINT_POSITIONS, ObservationSpec, Stream

VERSIONS = ("v2.0", "v2.1", "v3.0")
_MAX_AGE_S = 0.2


@dataclass(frozen=True)
class EpisodeEntry:
    """One episode as the metadata describes it; its files may be absent."""

    index: int
    length: int
    first_frame: int  # global index of its first frame
    table: Path
    clips: dict[str, Clip]  # by feature


@dataclass(frozen=True)
class Dataset:
    """The metadata of a dataset."""

    root: Path
    version: str
    robot: str  # the robot type as a ROS name token
    fps: float
    joint_names: tuple[str, ...]
    cameras: dict[str, str]  # feature -> stream name
    tasks: dict[int, str]  # task_index -> instruction
    episodes: tuple[EpisodeEntry, ...]

    @property
    def step_ns(self) -> int:
        return round(1e9 / self.fps)

    def name_of(self, entry: EpisodeEntry) -> str:
        return f"{self.root.name} episode {entry.index}"

    def instruction(self, rows: pa.Table, name: str) -> str:
        """What the robot was told in this episode. Raises ImportRefused where that changes or is not written
        down."""
        indices = set(np.asarray(rows["task_index"].to_numpy()).tolist())
        if len(indices) != 1:
            raise ImportRefused(
                Reason.UNSUPPORTED, f"{name}: the task changes within the episode ({sorted(indices)})"
            )
        index = int(indices.pop())
        if index not in self.tasks:
            raise ImportRefused(
                Reason.BAD_METADATA, f"{name}: task_index {index} is not in the dataset's tasks"
            )
        return self.tasks[index]

    def task_name(self, instruction: str) -> str:
        """Short name of a task: its instruction in snake case, at most 40 characters."""
        return re.sub(r"[^a-z0-9]+", "_", instruction.lower()).strip("_")[:40].rstrip("_") or "task"

    def observation_spec(self, image_size: int = 96, history: int = 2) -> ObservationSpec:
        """Joints, cameras (resized to a square of `image_size` pixels on assembly), command and
        instruction."""
        joints = len(self.joint_names)
        streams = [Stream(JOINT_POSITIONS, "joint_states", "joints", (joints,), _MAX_AGE_S)]
        for name in self.cameras.values():
            streams.append(
                Stream(name, lwd_topic(name, "image"), "image", (image_size, image_size, 3), _MAX_AGE_S)
            )
        return ObservationSpec((*streams, *standard_streams(joints)), history=history)


def open_dataset(root: Path) -> Dataset:
    """Read `meta/`. Raises ImportRefused where it is absent, of an unknown version or inconsistent."""
    try:
        info = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))
        version = info["codebase_version"]
        if version not in VERSIONS:
            raise ImportRefused(
                Reason.UNSUPPORTED, f"{root.name}: LeRobot {version}; readable: {', '.join(VERSIONS)}"
            )
        features: dict[str, Any] = info["features"]
        tasks, episodes = (_v3 if version == "v3.0" else _v2)(root, info)
        return Dataset(
            root=root,
            version=version,
            robot=_token(info.get("robot_type") or "robot"),
            fps=float(info["fps"]),
            joint_names=_joint_names(features, root.name),
            cameras={key: f"camera_{_token(key.rsplit('.', 1)[-1])}" for key in _camera_features(features)},
            tasks=tasks,
            episodes=tuple(episodes),
        )
    except FileNotFoundError as error:
        raise ImportRefused(
            Reason.MISSING_FILE, f"{root.name}: {Path(error.filename).name} is absent"
        ) from error
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ImportRefused(Reason.BAD_METADATA, f"{root.name}/meta: {error!r}") from error


def find_dataset(folder: Path) -> Path:
    """The only dataset at or below a folder. Raises ImportRefused."""
    found = sorted(info.parent.parent for info in folder.rglob("meta/info.json"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ImportRefused(
            Reason.BAD_METADATA, f"{folder.name}: {len(found)} LeRobot datasets inside ({names})"
        )
    return found[0]


def read_rows(dataset: Dataset, entry: EpisodeEntry) -> pa.Table:
    """The frames of one episode, in order. Raises ImportRefused."""
    name = dataset.name_of(entry)
    if not entry.table.is_file():
        raise ImportRefused(Reason.MISSING_FILE, f"{name}: {entry.table.relative_to(dataset.root)} is absent")
    try:
        rows = pq.read_table(entry.table, filters=[("episode_index", "==", entry.index)]).sort_by(
            "frame_index"
        )
    except (pa.ArrowException, OSError) as error:
        raise ImportRefused(Reason.CORRUPT, f"{name}: {entry.table.name}: {error}") from error
    stills = dataset.cameras.keys() - entry.clips.keys()
    absent = {"observation.state", "action", "timestamp", "task_index", *stills} - set(rows.column_names)
    if absent:
        raise ImportRefused(
            Reason.BAD_METADATA, f"{name}: {entry.table.name} has no {', '.join(sorted(absent))}"
        )
    if rows.num_rows != entry.length:
        raise ImportRefused(
            Reason.COUNT_MISMATCH, f"{name}: {rows.num_rows} frames, the metadata declares {entry.length}"
        )
    return rows


def _v2(root: Path, info: dict[str, Any]) -> tuple[dict[int, str], Iterator[EpisodeEntry]]:
    tasks = {int(row["task_index"]): str(row["task"]) for row in _json_lines(root / "meta" / "tasks.jsonl")}
    episodes = _json_lines(root / "meta" / "episodes.jsonl")
    videos = _video_features(info["features"])

    def entries() -> Iterator[EpisodeEntry]:
        first_frame = 0
        for row in sorted(episodes, key=lambda row: int(row["episode_index"])):
            index, length = int(row["episode_index"]), int(row["length"])
            place = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
            clips = {key: Clip(root / info["video_path"].format(video_key=key, **place)) for key in videos}
            yield EpisodeEntry(index, length, first_frame, root / info["data_path"].format(**place), clips)
            first_frame += length

    return tasks, entries()


def _v3(root: Path, info: dict[str, Any]) -> tuple[dict[int, str], Iterator[EpisodeEntry]]:
    tasks = {}
    for row in pq.read_table(root / "meta" / "tasks.parquet").to_pylist():
        # The text is the index of a pandas frame, which Arrow calls like this where the index has no name.
        text = row["task"] if "task" in row else row["__index_level_0__"]
        tasks[int(row["task_index"])] = str(text)
    videos = _video_features(info["features"])
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise ImportRefused(Reason.MISSING_FILE, f"{root.name}: meta/episodes is absent or empty")

    def entries() -> Iterator[EpisodeEntry]:
        for file in files:
            wanted = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
            for row in pq.read_table(file, columns=wanted).to_pylist():
                place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
                yield EpisodeEntry(
                    index=int(row["episode_index"]),
                    length=int(row["length"]),
                    first_frame=int(row["dataset_from_index"]),
                    table=root / info["data_path"].format(**place),
                    clips={key: _v3_clip(root, info, row, key) for key in videos},
                )

    return tasks, entries()


def _v3_clip(root: Path, info: dict[str, Any], row: dict[str, Any], key: str) -> Clip:
    place = {"chunk_index": row[f"videos/{key}/chunk_index"], "file_index": row[f"videos/{key}/file_index"]}
    file = root / info["video_path"].format(video_key=key, **place)
    return Clip(file, float(row[f"videos/{key}/from_timestamp"]), float(row[f"videos/{key}/to_timestamp"]))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _camera_features(features: dict[str, Any]) -> list[str]:
    return [key for key, feature in features.items() if feature["dtype"] in ("image", "video")]


def _video_features(features: dict[str, Any]) -> list[str]:
    return [key for key, feature in features.items() if feature["dtype"] == "video"]


def _joint_names(features: dict[str, Any], dataset: str) -> tuple[str, ...]:
    """Names of the state's columns. They come as [..], [[..]] or {"motors": [..]}; absent ones are
    numbered."""
    width, action_width = int(features["observation.state"]["shape"][0]), int(features["action"]["shape"][0])
    if width != action_width:
        raise ImportRefused(
            Reason.BAD_JOINTS,
            f"{dataset}: state has {width} columns, action {action_width}; only joint actions work",
        )
    names: Any = features["observation.state"].get("names")
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    if not names:
        names = [f"joint_{index}" for index in range(width)]
    if not isinstance(names, list) or len(set(names)) != width:
        raise ImportRefused(Reason.BAD_JOINTS, f"{dataset}: {width} columns of state, named {names}")
    return tuple(map(str, names))


def _token(text: str) -> str:
    """A ROS name token: lower case, letters, digits and underscores, starting with a letter."""
    token = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    return token if token[:1].isalpha() else f"r_{token}"
