# SPDX-License-Identifier: Apache-2.0
"""Which topics of somebody else's bag are which streams of an lwd episode: one YAML file per kind of robot.

robot: my_robot                    # a ROS name token; becomes the topic prefix of the episode
task: pick_place
instruction: put the cup on the tray      # or {topic: /task} with a std_msgs/String
step_hz: 10                        # rate of the actions that are cut out of the bag
joint_names: [shoulder, elbow, gripper]   # order of all joint columns
joint_names_in_bag: {shoulder: joint_1}   # only where the bag calls them otherwise
stamps: header                     # or log: the time of arrival, where headers are not set properly
outcome: unlabelled                # or success, failure: holds for all bags of this mapping
streams:
  joint_positions: {topic: /joint_states, kind: joints, max_age_s: 0.2}
  camera_top: {topic: /camera/image_raw/compressed, kind: image, shape: [96, 96, 3], max_age_s: 0.2}
action: {source: command_topic, topic: /arm_controller/joint_trajectory}
# or   {source: next_joint_state}  the joints reached one step later stand in for the unknown command
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from lwd_learner.importers.source import Outcome
from lwd_policy.observation import COMMAND, INSTRUCTION, JOINT_POSITIONS, ObservationSpec, Stream

_ROS_TOKEN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_KINDS = ("image", "joints", "points", "vector")
_REQUIRED_KEYS = {"robot", "task", "instruction", "step_hz", "joint_names", "streams", "action"}
_KEYS = _REQUIRED_KEYS | {"joint_names_in_bag", "stamps", "outcome"}
_STREAM_KEYS = {"topic", "kind", "shape", "max_age_s", "required"}


class MappingError(Exception):
    """The mapping file itself is wrong; the text names the file and the key."""


class ActionSource(str, Enum):
    COMMAND_TOPIC = "command_topic"
    NEXT_JOINT_STATE = "next_joint_state"


class StampSource(str, Enum):
    HEADER = "header"
    LOG = "log"


@dataclass(frozen=True)
class StreamMapping:
    name: str
    topic: str  # in the bag
    kind: str  # image, joints, points, vector
    shape: tuple[int, ...]
    max_age_s: float
    required: bool


@dataclass(frozen=True)
class BagMapping:
    robot: str
    task: str
    instruction: str  # empty where `instruction_topic` is given
    instruction_topic: str
    step_hz: float
    joint_names: tuple[str, ...]
    joint_names_in_bag: tuple[str, ...]  # same order
    stamps: StampSource
    outcome: Outcome
    streams: tuple[StreamMapping, ...]
    action_source: ActionSource
    action_topic: str  # empty for next_joint_state

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def joints(self) -> StreamMapping:
        return next(stream for stream in self.streams if stream.name == JOINT_POSITIONS)

    @property
    def step_ns(self) -> int:
        return round(1e9 / self.step_hz)

    @property
    def topics(self) -> tuple[str, ...]:
        """All topics of the bag that are needed."""
        extra = (self.action_topic, self.instruction_topic)
        return tuple(dict.fromkeys([s.topic for s in self.streams] + [topic for topic in extra if topic]))

    def observation_spec(self, history: int = 2) -> ObservationSpec:
        """The streams under their lwd topics, with the command and the instruction that every episode has."""
        joints = len(self.joint_names)
        streams = [
            Stream(s.name, lwd_topic(s.name, s.kind), s.kind, s.shape, s.max_age_s, s.required)
            for s in self.streams
        ]
        return ObservationSpec((*streams, *standard_streams(joints)), history=history)


def standard_streams(joints: int) -> tuple[Stream, Stream]:
    """The two streams that an episode has whatever the robot's sensors are."""
    return (
        Stream(COMMAND, "executed_action", "command", (joints,), 1.0, required=False),
        Stream(INSTRUCTION, "task", "text", (), 0.0),  # said once, at the start: of any age
    )


def lwd_topic(name: str, kind: str) -> str:
    """Relative topic of a stream in an lwd episode."""
    if kind == "image":
        return f"{name}/image_raw/compressed"
    return "joint_states" if name == JOINT_POSITIONS else name


def load_mapping(path: Path) -> BagMapping:
    """Read a mapping. Raises MappingError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise MappingError(f"{path.name} cannot be read: {error}") from error
    try:
        return parse_mapping(document)
    except MappingError as error:
        raise MappingError(f"{path.name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MappingError(f"{path.name}: {error!r}") from error


def parse_mapping(document: dict[str, Any]) -> BagMapping:
    """A mapping from its parsed YAML. Raises MappingError."""
    _check_keys("the mapping", document, _REQUIRED_KEYS, _KEYS)
    robot = str(document["robot"])
    if not _ROS_TOKEN.fullmatch(robot):
        raise MappingError(f"robot: {robot!r} is not a ROS name token (letters, digits, underscore)")
    joint_names = tuple(map(str, document["joint_names"]))
    if not joint_names or len(set(joint_names)) != len(joint_names):
        raise MappingError("joint_names: needs at least one name and no name twice")
    renamed = document.get("joint_names_in_bag", {})
    _check_keys("joint_names_in_bag", renamed, set(), set(joint_names))
    step_hz = float(document["step_hz"])
    if not step_hz > 0.0:
        raise MappingError("step_hz: must be positive")
    streams = tuple(_stream(name, entry, len(joint_names)) for name, entry in document["streams"].items())
    if JOINT_POSITIONS not in {stream.name for stream in streams}:
        raise MappingError(
            f"streams: {JOINT_POSITIONS} is missing; without measured joints there is no reference"
        )
    instruction = document["instruction"]
    spoken = isinstance(instruction, str)
    action = document["action"]
    _check_keys("action", action, {"source"}, {"source", "topic"})
    source = ActionSource(action["source"])
    if (source is ActionSource.COMMAND_TOPIC) != ("topic" in action):
        raise MappingError("action: command_topic needs a topic, next_joint_state has none")
    return BagMapping(
        robot=robot,
        task=str(document["task"]),
        instruction=instruction if spoken else "",
        instruction_topic="" if spoken else str(instruction["topic"]),
        step_hz=step_hz,
        joint_names=joint_names,
        joint_names_in_bag=tuple(str(renamed.get(name, name)) for name in joint_names),
        stamps=StampSource(document.get("stamps", "header")),
        outcome=Outcome[str(document.get("outcome", "unlabelled")).upper()],
        streams=streams,
        action_source=source,
        action_topic=str(action.get("topic", "")),
    )


def _stream(name: str, entry: dict[str, Any], joints: int) -> StreamMapping:
    if name in (COMMAND, INSTRUCTION):
        raise MappingError(
            f"streams: {name} comes from `{'action' if name == COMMAND else name}`, not from here"
        )
    if not _ROS_TOKEN.fullmatch(name):
        raise MappingError(f"streams: {name!r} is not a ROS name token")
    _check_keys(f"streams.{name}", entry, {"topic", "kind", "max_age_s"}, _STREAM_KEYS)
    kind = str(entry["kind"])
    if kind not in _KINDS or (kind == "joints") != (name == JOINT_POSITIONS):
        raise MappingError(
            f"streams.{name}: kind {kind!r}; {JOINT_POSITIONS} is joints, others {', '.join(_KINDS)}"
        )
    if kind != "joints" and "shape" not in entry:
        raise MappingError(f"streams.{name}: a stream of kind {kind} needs its shape")
    shape = (joints,) if kind == "joints" else tuple(map(int, entry["shape"]))
    return StreamMapping(
        name, str(entry["topic"]), kind, shape, float(entry["max_age_s"]), bool(entry.get("required", True))
    )


def _check_keys(where: str, entry: Any, required: set[str], known: set[str]) -> None:
    if not isinstance(entry, dict):
        raise MappingError(f"{where}: expected keys and values, found {type(entry).__name__}")
    missing, unknown = required - entry.keys(), entry.keys() - known
    if missing or unknown:
        # A misspelt optional key would otherwise be ignored, and the bag imported with the default.
        raise MappingError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")
