# SPDX-License-Identifier: Apache-2.0
"""Any `EpisodeSource` as an lwd episode bag, through the same writer that a robot uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lwd_fleet.data.bag import OfferedQos
from lwd_fleet.data.episode import EpisodeWriter
from lwd_fleet.data.messages import create, serialise, to_stamp
from lwd_fleet.data.summary import AUTHORS, STATES
from lwd_learner.importers.quarantine import Quarantine
from lwd_learner.importers.source import EpisodeSource, ImportRefused, Sample, SourceInfo

# Not `.partial`: a half-written import is thrown away and made anew from its source, never salvaged.
_SUFFIX = ".importing"
_RUNNING, _ENDED = STATES.index("running"), STATES.index("ended")
_HUMAN = AUTHORS.index("human")
_LATCHED = OfferedQos(latched=True, depth=1)
# The arm name of recordings whose robot is not described arm by arm.
WHOLE_ROBOT = "all"


@dataclass(frozen=True)
class ImportResult:
    """What became of one source: an episode, or a refusal with its reason."""

    name: str
    episode_id: str = ""
    path: Path | None = None
    steps: int = 0
    messages: int = 0  # 0 where the episode had been imported before
    notes: tuple[str, ...] = ()  # e.g. that the file carries no CRC
    refusal: ImportRefused | None = None

    @property
    def imported(self) -> bool:
        return self.refusal is None

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.name}: refused, {self.refusal}"
        state = f"{self.steps} steps, {self.messages} messages" if self.messages else "was imported before"
        return f"{self.name}: {self.episode_id}, {state}"


Progress = Callable[[ImportResult, int, int], None]  # result, sources done, sources in all


def import_all(
    sources: Iterable[tuple[str, Path, str, Callable[[], EpisodeSource]]],
    total: int,
    out_dir: Path,
    quarantine: Quarantine | None = None,
    progress: Progress | None = None,
) -> list[ImportResult]:
    """Import each `(name, path, part, open)`; one that is refused never stops the others."""
    results = []
    for name, path, part, open_source in sources:
        try:
            result = write_episode(open_source(), out_dir)
        except ImportRefused as refusal:
            result = ImportResult(name, refusal=refusal)
            if quarantine is not None:
                quarantine.add(path, refusal, part)
        results.append(result)
        if progress is not None:
            progress(result, len(results), total)
    return results


def write_episode(source: EpisodeSource, out_dir: Path) -> ImportResult:
    """Write and seal `<out_dir>/<episode_id>/`; the same source again is recognised and left alone.

    Log and publish times are the stamps. Raises ImportRefused if the source proves bad while it is read, and
    leaves nothing behind then.
    """
    info = source.info
    target = out_dir / info.episode_id
    if target.exists():
        return ImportResult(info.name, info.episode_id, target, info.steps, notes=info.notes)
    out_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(
        out_dir / f"{info.episode_id}{_SUFFIX}", ignore_errors=True
    )  # of an import that was interrupted
    writer = EpisodeWriter(out_dir, info.episode_id, info.robot, source="import", suffix=_SUFFIX)
    try:
        _write_samples(_Bag(writer, source), source)
        sealed = writer.seal()
    except BaseException:
        writer.abandon()
        shutil.rmtree(out_dir / f"{info.episode_id}{_SUFFIX}")
        raise
    messages = sum(sealed.summary.message_counts.values())
    return ImportResult(info.name, info.episode_id, sealed.path, info.steps, messages, info.notes)


class _Bag:
    """Samples and states to messages on the topics of the robot."""

    def __init__(self, writer: EpisodeWriter, source: EpisodeSource) -> None:
        self._writer, self._info = writer, source.info
        self._streams = {stream.name: stream for stream in source.spec.streams}
        self._step = 0

    def sample(self, sample: Sample) -> None:
        stream = self._streams[sample.stream]
        type_name, fields = _MESSAGES[stream.kind](sample.value, self._info)
        if stream.kind == "command":
            fields |= {"episode_id": self._info.episode_id, "step": self._step}
            self._step += 1
        self._put(stream.topic, type_name, sample.stamp_ns, fields, stream.kind == "text")

    def state(self, state: int, stamp_ns: int) -> None:
        info = self._info
        ended = state == _ENDED
        fields = {
            "state": state,
            "episode_id": info.episode_id,
            "robot": info.robot,
            "task": info.task,
            "instruction": info.instruction,
            "outcome": int(info.outcome) if ended else 0,
            "outcome_source": info.outcome_source if ended else "",
            "end_reason": f"end of the recording {info.digest[:12]}" if ended else "",
            "seed": -1,
        }
        self._put("episode", "lwd_msgs/msg/EpisodeState", stamp_ns, fields, latched=True)

    def _put(self, topic: str, type_name: str, stamp_ns: int, fields: dict[str, Any], latched: bool) -> None:
        if not type_name.startswith(
            "std_msgs/"
        ):  # String and the arrays have no header; their log time counts
            fields["header"] = create("std_msgs/msg/Header", stamp=to_stamp(stamp_ns))
        data = serialise(create(type_name, **fields))
        qos = _LATCHED if latched else OfferedQos()
        self._writer.write(f"/{self._info.robot}/{topic}", type_name, data, stamp_ns, stamp_ns, qos)


def _write_samples(bag: _Bag, source: EpisodeSource) -> None:
    """RUNNING comes after the first observation, as on a robot whose sensors run before the episode does."""
    info, running = source.info, False
    for sample in source.samples():
        if not running and sample.stamp_ns > info.start_ns:
            bag.state(_RUNNING, info.start_ns)
            running = True
        if sample.stamp_ns > info.end_ns:
            break
        bag.sample(sample)
    bag.state(_ENDED, info.end_ns)


def _image(value: bytes, info: SourceInfo) -> tuple[str, dict[str, Any]]:
    kind = "png" if value.startswith(b"\x89PNG") else "jpeg"
    return "sensor_msgs/msg/CompressedImage", {"format": kind, "data": np.frombuffer(value, np.uint8)}


def _joints(value: Any, info: SourceInfo) -> tuple[str, dict[str, Any]]:
    return "sensor_msgs/msg/JointState", {
        "name": list(info.joint_names),
        "position": np.asarray(value, np.float64),
    }


def _command(value: Any, info: SourceInfo) -> tuple[str, dict[str, Any]]:
    return "lwd_msgs/msg/ExecutedAction", {
        "joint_names": list(info.joint_names),
        "positions": np.asarray(value, np.float64),
        "arms": [WHOLE_ROBOT],
        "author": np.array([_HUMAN], np.uint8),
        "policy_version": -1,
        "chunk_index": -1,
    }


def _points(value: Any, info: SourceInfo) -> tuple[str, dict[str, Any]]:
    poses = []
    for x, y, z in np.asarray(value, np.float64):
        position = create("geometry_msgs/msg/Point", x=float(x), y=float(y), z=float(z))
        upright = create("geometry_msgs/msg/Quaternion", w=1.0)
        poses.append(create("geometry_msgs/msg/Pose", position=position, orientation=upright))
    return "geometry_msgs/msg/PoseArray", {"poses": poses}


def _vector(value: Any, info: SourceInfo) -> tuple[str, dict[str, Any]]:
    return "std_msgs/msg/Float64MultiArray", {"data": np.asarray(value, np.float64)}


def _text(value: str, info: SourceInfo) -> tuple[str, dict[str, Any]]:
    return "std_msgs/msg/String", {"data": value}


_MESSAGES: dict[str, Callable[[Any, SourceInfo], tuple[str, dict[str, Any]]]] = {
    "image": _image,
    "joints": _joints,
    "command": _command,
    "points": _points,
    "vector": _vector,
    "text": _text,
}
