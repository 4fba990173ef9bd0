# SPDX-License-Identifier: Apache-2.0
"""What an episode was, read from its own messages: the content of `episode.json`.

The messages are the truth. The same builder runs while an episode is written and when its summary is
rebuilt from a bag, so the two cannot disagree.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lwd_fleet.data.messages import deserialise

FORMAT_VERSION = 1
EPISODE_TOPIC = "episode"
ACTION_TOPIC = "executed_action"
STATES = ("idle", "preparing", "running", "ended")  # index: EpisodeState STATE_*
OUTCOMES = ("unlabelled", "success", "failure")  # index: EpisodeState OUTCOME_*
AUTHORS = ("hold", "policy", "human", "expert", "ramp")  # index: ExecutedAction AUTHOR_*
_ENDED, _POLICY = STATES.index("ended"), AUTHORS.index("policy")


@dataclass(frozen=True)
class FileEntry:
    """A payload file of an episode. `sha256` in hex, `size` in bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class PolicyInterval:
    """A run of consecutive policy steps authored by one policy version; both ends inclusive."""

    version: int
    digest: str
    first_step: int
    last_step: int


@dataclass(frozen=True)
class EpisodeSummary:
    """The content of `episode.json`. Everything here can be rebuilt from the bag.

    `steps` counts policy steps; `authors` counts, per author, the steps in which it moved at least one arm;
    `message_counts` is by full topic name; times are receive times in ns.
    """

    format_version: int
    episode_id: str
    robot: str
    source: str
    truncated: str  # why the recording is incomplete; empty: it is complete
    task: str
    instruction: str
    outcome: str
    outcome_source: str
    end_reason: str
    sub_step_scores: tuple[float, ...]
    seed: int
    steps: int
    authors: dict[str, int]
    policy_intervals: tuple[PolicyInterval, ...]
    message_counts: dict[str, int]
    start_ns: int
    end_ns: int
    digest: str
    files: tuple[FileEntry, ...]

    @property
    def message_count(self) -> int:
        """Messages in all topics."""
        return sum(self.message_counts.values())

    @property
    def size_bytes(self) -> int:
        """Size of the payload files."""
        return sum(file.size for file in self.files)

    @property
    def policy_version(self) -> int:
        """The newest policy version that acted; -1 if none did."""
        return max((interval.version for interval in self.policy_intervals), default=-1)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EpisodeSummary:
        """Inverse of `to_json`. Raises `ValueError` naming what is wrong."""
        try:
            converted = dict(values)
            converted["sub_step_scores"] = tuple(values["sub_step_scores"])
            converted["policy_intervals"] = tuple(
                PolicyInterval(**entry) for entry in values["policy_intervals"]
            )
            converted["files"] = tuple(FileEntry(**entry) for entry in values["files"])
            return cls(**converted)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an episode summary of format {FORMAT_VERSION}: {error}") from error

    def text(self) -> str:
        """Text of `episode.json`."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n"


@dataclass
class SummaryBuilder:
    """Reads the messages of one episode in the order of recording and remembers what its summary needs.

    Messages that speak of another episode (a latched state from before) count, but say nothing.
    """

    episode_id: str
    robot: str
    source: str
    message_counts: Counter[str] = field(default_factory=Counter)
    authors: Counter[str] = field(default_factory=Counter)
    intervals: list[PolicyInterval] = field(default_factory=list)
    steps: int = 0
    start_ns: int = 0
    end_ns: int = 0
    ended: bool = False
    _state: Any = None

    def add(self, topic: str, type_name: str, cdr: bytes, log_time_ns: int) -> None:
        """Take one message into account; `topic` is the full name."""
        if not self.message_counts:
            self.start_ns = self.end_ns = log_time_ns
        self.start_ns = min(self.start_ns, log_time_ns)
        self.end_ns = max(self.end_ns, log_time_ns)
        self.message_counts[topic] += 1
        name = relative_topic(topic)
        if name == EPISODE_TOPIC:
            self._episode(deserialise(cdr, type_name))
        elif name == ACTION_TOPIC:
            self._action(deserialise(cdr, type_name))

    def build(self, files: tuple[FileEntry, ...], digest: str, truncated: str) -> EpisodeSummary:
        """The summary of all messages added so far."""
        state = self._state
        outcome = OUTCOMES[state.outcome] if self.ended and state.outcome < len(OUTCOMES) else OUTCOMES[0]
        return EpisodeSummary(
            format_version=FORMAT_VERSION,
            episode_id=self.episode_id,
            robot=self.robot,
            source=self.source,
            truncated=truncated,
            task=state.task if state else "",
            instruction=state.instruction if state else "",
            outcome=outcome,
            outcome_source=state.outcome_source if self.ended else "",
            end_reason=state.end_reason if self.ended else "",
            sub_step_scores=tuple(float(score) for score in state.sub_step_scores) if self.ended else (),
            seed=int(state.seed) if state else -1,
            steps=self.steps,
            authors=dict(sorted(self.authors.items())),
            policy_intervals=tuple(self.intervals),
            message_counts=dict(sorted(self.message_counts.items())),
            start_ns=self.start_ns,
            end_ns=self.end_ns,
            digest=digest,
            files=files,
        )

    def _episode(self, state: Any) -> None:
        if state.episode_id == self.episode_id:
            self._state = state
            self.ended = state.state == _ENDED

    def _action(self, action: Any) -> None:
        if action.episode_id != self.episode_id:
            return
        self.steps += 1
        authors = {int(author) for author in action.author}
        for author in authors:
            self.authors[AUTHORS[author] if author < len(AUTHORS) else str(author)] += 1
        if _POLICY not in authors:
            return
        version, digest, step = int(action.policy_version), str(action.policy_digest), int(action.step)
        last = self.intervals[-1] if self.intervals else None
        if last and (last.version, last.digest) == (version, digest) and step == last.last_step + 1:
            self.intervals[-1] = dataclasses.replace(last, last_step=step)
        else:
            self.intervals.append(PolicyInterval(version, digest, step, step))


def relative_topic(topic: str) -> str:
    """`/r1/camera_top/camera_info` -> `camera_top/camera_info`; a name outside any robot stays as it is."""
    _, _, rest = topic.lstrip("/").partition("/")
    return rest or topic
