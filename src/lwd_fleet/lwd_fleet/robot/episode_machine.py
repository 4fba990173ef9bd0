# SPDX-License-Identifier: Apache-2.0
"""The course of one episode: prepared, running, ended with an outcome. The table says what can happen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto


class State(IntEnum):
    """Values of EpisodeState STATE_*."""

    IDLE = 0
    PREPARING = 1
    RUNNING = 2
    ENDED = 3


class Outcome(IntEnum):
    """Values of EpisodeState OUTCOME_*. Unlabelled is not a failure."""

    UNLABELLED = 0
    SUCCESS = 1
    FAILURE = 2


class Event(Enum):
    """What can happen to an episode."""

    GOAL = auto()  # somebody wants an episode
    READY = auto()  # the scene is reset and everything is being recorded
    REFUSED = auto()  # it cannot be prepared
    VERDICT = auto()  # the detector or an operator has decided
    TIME_UP = auto()
    ABORT = auto()
    CLOSED = auto()  # the recording is sealed, or has failed


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.IDLE, Event.GOAL): State.PREPARING,
    (State.PREPARING, Event.READY): State.RUNNING,
    (State.PREPARING, Event.REFUSED): State.IDLE,
    (State.PREPARING, Event.ABORT): State.IDLE,
    (State.RUNNING, Event.VERDICT): State.ENDED,
    (State.RUNNING, Event.TIME_UP): State.ENDED,
    (State.RUNNING, Event.ABORT): State.ENDED,
    (State.ENDED, Event.CLOSED): State.IDLE,
}


class NotNow(Exception):
    """An event that the state of the episode does not allow."""


@dataclass(frozen=True)
class Episode:
    """What is known of the current episode; all empty while idle. Times in s of the machine's clock."""

    episode_id: str = ""
    task: str = ""
    instruction: str = ""
    seed: int = -1
    time_limit_s: float = 0.0
    started_s: float = 0.0
    outcome: Outcome = Outcome.UNLABELLED
    outcome_source: str = ""
    sub_step_scores: tuple[float, ...] = ()
    end_reason: str = ""
    judged: bool = False  # whether a detector has looked at it at least once


class EpisodeMachine:
    """Holds the state and the episode. `clock` is steady, in seconds; `changed` is called after each change
    of state, with nothing else to do than to tell others."""

    def __init__(self, clock: Callable[[], float], changed: Callable[[], None] = lambda: None) -> None:
        self.state = State.IDLE
        self.episode = Episode()
        self._clock = clock
        self._changed = changed

    @property
    def elapsed_s(self) -> float:
        """Since the episode started running; 0 before."""
        return self._clock() - self.episode.started_s if self.state is State.RUNNING else 0.0

    def begin(self, episode_id: str, task: str, instruction: str) -> None:
        """Start to prepare an episode. `instruction` may be empty until `describe`."""
        self._happened(Event.GOAL, Episode(episode_id, task, instruction))

    def describe(self, instruction: str, seed: int, time_limit_s: float) -> None:
        """What the prepared scene says. Only while preparing."""
        if self.state is not State.PREPARING:
            raise NotNow(f"describe while {self.state.name}")
        self.episode = dataclasses.replace(
            self.episode, instruction=instruction, seed=seed, time_limit_s=time_limit_s
        )
        self._changed()

    def run(self) -> None:
        """Everything is ready: time runs from now."""
        self._happened(Event.READY, dataclasses.replace(self.episode, started_s=self._clock()))

    def refuse(self) -> None:
        """The episode cannot be prepared."""
        self._happened(Event.REFUSED, Episode())

    def judge(self, done: bool, sub_step_scores: Sequence[float]) -> None:
        """The detector's opinion: `done` ends the episode as a success, anything else is remembered."""
        if self.state is not State.RUNNING:
            raise NotNow(f"a judgement while {self.state.name}")
        self.episode = dataclasses.replace(
            self.episode, sub_step_scores=tuple(float(score) for score in sub_step_scores), judged=True
        )
        if done:
            self._end(Event.VERDICT, Outcome.SUCCESS, "detector", "success")

    def decide(self, outcome: Outcome, sub_step_scores: Sequence[float], source: str) -> None:
        """An operator's verdict on the running episode ends it."""
        scores = tuple(float(score) for score in sub_step_scores) or self.episode.sub_step_scores
        self._end(Event.VERDICT, outcome, source, f"verdict of {source}", scores)

    def check_time(self) -> None:
        """End a running episode whose time is up: a failure if a detector was watching, else unlabelled."""
        limit_s = self.episode.time_limit_s
        if self.state is State.RUNNING and 0 < limit_s <= self.elapsed_s:
            if self.episode.judged:
                outcome, source = Outcome.FAILURE, "detector"
            else:
                outcome, source = Outcome.UNLABELLED, ""
            self._end(Event.TIME_UP, outcome, source, f"time limit of {limit_s:g} s")

    def abort(self, reason: str) -> None:
        """Break off: back to idle while preparing, ended without an outcome while running."""
        if self.state is State.PREPARING:
            self._happened(Event.ABORT, Episode())
        else:
            self._end(Event.ABORT, Outcome.UNLABELLED, "", f"aborted: {reason}")

    def close(self) -> None:
        """The recording is closed."""
        self._happened(Event.CLOSED, Episode())

    def _end(
        self,
        event: Event,
        outcome: Outcome,
        source: str,
        reason: str,
        scores: tuple[float, ...] | None = None,
    ) -> None:
        ended = dataclasses.replace(
            self.episode,
            outcome=outcome,
            outcome_source=source,
            end_reason=reason,
            sub_step_scores=self.episode.sub_step_scores if scores is None else scores,
        )
        self._happened(event, ended)

    def _happened(self, event: Event, episode: Episode) -> None:
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise NotNow(f"{event.name} while {self.state.name}")
        self.state, self.episode = following, episode
        self._changed()
