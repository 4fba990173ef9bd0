# SPDX-License-Identifier: Apache-2.0
"""From an episode to chunk transitions (algorithm.md 2.1, 2.2).

Three plain steps, each usable alone: `read_trace` replays the messages of an episode through the same
`ObservationBuffer` that the policy node uses, `chunk_transitions` cuts the executed actions into chunks,
`episode_rows` adds trunk features and normalised actions. A row is one decision of whoever was in charge.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import (
    Observation,
    ObservationBuffer,
    ObservationSpec,
    ObservationStale,
    Stream,
    decode_message,
    reference_position,
)
from lwd_policy.step_clock import StepClock, from_step_grid

OUTCOME_UNLABELLED, OUTCOME_SUCCESS, OUTCOME_FAILURE = 0, 1, 2
AUTHOR_HOLD, AUTHOR_POLICY, AUTHOR_HUMAN, AUTHOR_EXPERT, AUTHOR_RAMP = range(5)
STATE_RUNNING, STATE_ENDED = 2, 3


_SETTLED_NS = 1_000_000_000  # samples are recorded no later than this after their stamp
_FRAMES_KEPT_S = 10.0


class EpisodeUnusable(Exception):
    """An episode cannot be turned into transitions; the text says what is missing in it."""


@dataclass(frozen=True)
class ObservationPoint:
    """Observations on which a chunk was, or could have been, decided: the last of them taken after policy step `step`
    (-1: before the first), when `phase` in [0, 1) of the next one had passed."""

    step: int
    context: tuple[Observation, ...]  # [history], oldest first
    phase: float = 0.0

    @property
    def observation(self) -> Observation:
        """The one that actions are relative to."""
        return self.context[-1]


@dataclass
class EpisodeTrace:
    """What happened in one episode, in the units of the wire. T executed policy steps, n joints."""

    episode_id: str
    robot: str = ""
    task: str = ""
    instruction: str = ""
    seed: int = -1
    outcome: int = OUTCOME_UNLABELLED
    unseen: int = 0  # decisions of the policy that are left out, as a sample they saw was not recorded
    points: list[ObservationPoint] = field(default_factory=list)
    positions: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))  # [T, n]
    author: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # [T] the arm furthest from the policy
    policy_version: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [T]
    cameras: tuple[str, ...] = ()  # whose images are kept
    images: dict[tuple[str, int], bytes] = field(default_factory=dict)  # by camera and stamp, as recorded


@dataclass(frozen=True)
class ChunkTransition:
    """One decision of one author.

    point, next_point: indices into `EpisodeTrace.points` of the observation decided on and of the one after (-1:
    none). first: trace index of the first executed step; executed: steps until the next decision (L); planned: steps of the same author that followed,
    up to the horizon (what cloning may imitate). done: the labelled end was reached; cut: somebody else took
    over in between; reward: 1 on the last step of a success.
    """

    point: int
    next_point: int
    first: int
    executed: int
    planned: int
    done: bool
    cut: bool
    reward: float
    author: int
    policy_version: int


@dataclass(frozen=True)
class EpisodeRows:
    """One episode as arrays, ready for the replay. K observations, in the order of time; R transitions, whose `point` and
    `next_point` are here rows of `features`."""

    trace: EpisodeTrace
    features: NDArray[np.float32]  # [K, F]
    previous: NDArray[np.int64]  # [K] row of the observation before in a context; itself at the start of one
    actions: NDArray[np.float32]  # [R, H, A] normalised; zero beyond `planned`
    transitions: list[ChunkTransition]
    images: list[list[bytes]]  # [K][cameras], as recorded; empty without cameras


def read_trace(
    episode_id: str,
    messages: Iterable[tuple[str, int, Any]],
    spec: ObservationSpec,
    joint_names: Sequence[str],
    stride: int,
    cameras: Sequence[str] = (),
) -> EpisodeTrace:
    """Replay `(topic without robot prefix, log time in ns, message)` in log order into a trace.

    Where the policy decided, its chunk names the very samples it saw (`ObservationStamps`); where a demonstrator
    did, a point is placed every `stride` steps on what a policy would have seen then. cameras: streams whose images are
    kept, too, of what points are placed on. Raises EpisodeUnusable.
    """
    streams = {stream.topic: stream for stream in spec.streams}
    buffer = ObservationBuffer(spec)
    trace = EpisodeTrace(episode_id, cameras=tuple(cameras))
    executed: list[_Step] = []
    frames = _Frames([spec.stream(name) for name in cameras])
    points = _Points(buffer, frames)
    due: list[
        tuple[int, int]
    ] = []  # (step, stamp) of points to place once every sample about the stamp was read
    decisions: list[_Decision] = []  # of the policy, whose samples may be recorded after the chunk
    running = False
    for topic, log_time, message in messages:
        stamp = _stamp_ns(message, log_time)
        while due and log_time > due[0][1] + _SETTLED_NS:
            points.place(*due.pop(0))
        if getattr(message, "episode_id", episode_id) != episode_id:
            continue  # a latched message of the episode before
        if topic == "episode":
            _read_state(trace, message)
            if message.state == STATE_RUNNING and not running:
                due.append((-1, stamp))
            running = message.state == STATE_RUNNING
        elif topic == "executed_action" and running:
            step = _Step.of(message, joint_names, stamp)
            previous = executed[-1] if executed else step
            # The policy says by its chunk when it comes back after a hold; a person begins unannounced.
            announced = step.author == AUTHOR_POLICY and previous.author == AUTHOR_HOLD
            if step.author not in (AUTHOR_HOLD, previous.author) and not announced:
                due.append((previous.number, previous.stamp))
            executed.append(step)
            points.clock.add(step.number, stamp)
        elif topic == "policy/action_chunk" and running:
            decisions.append(_Decision.of(message))
        stream = streams.get(topic)
        if stream is not None:
            value = decode_message(stream, message, joint_names)
            buffer.add(stream.name, stamp, value)
            frames.add(stream.name, stamp, value)
            decisions = [decision for decision in decisions if not points.resolve(decision)]
        demonstrated = executed and executed[-1].author not in (AUTHOR_POLICY, AUTHOR_HOLD)
        if topic == "executed_action" and demonstrated and len(executed) % stride == 0:
            due.append((executed[-1].number, stamp))
    for point in due:
        points.place(*point)
    trace.unseen = len(decisions)
    trace.images = frames.kept
    if not trace.robot:
        raise EpisodeUnusable(
            f"{episode_id}: no message on `episode`, nothing says when it ran and how it ended"
        )
    if not executed:
        raise EpisodeUnusable(f"{episode_id}: no executed action while the episode ran")
    if not points.found:
        raise EpisodeUnusable(f"{episode_id}: no moment at which every stream of the observation was there")
    trace.positions = np.stack([step.positions for step in executed])
    trace.author = np.array([step.author for step in executed])
    trace.policy_version = np.array([step.policy_version for step in executed])
    numbers = [step.number for step in executed]  # with a gap where the arbiter was away
    trace.points = [
        replace(points.found[number], step=bisect_right(numbers, number) - 1)
        for number in sorted(points.found)
        if number <= numbers[-1]
    ]
    return trace


def chunk_transitions(trace: EpisodeTrace, horizon: int, execute_steps: int) -> list[ChunkTransition]:
    """Cut a trace at its observation points. Steps that were only held are nobody's decision and are left out.

    The policy's decisions last until its next observation. A demonstrator decides all the time: each of their
    points starts a window of `execute_steps`, and windows overlap where the points are denser.
    """
    total = len(trace.author)
    labelled = trace.outcome != OUTCOME_UNLABELLED
    steps = [point.step for point in trace.points]
    transitions = []
    for k, step in enumerate(steps):
        acting = np.flatnonzero(trace.author[step + 1 :] != AUTHOR_HOLD)
        if len(acting) == 0:
            break
        first = step + 1 + int(acting[0])
        by_policy = trace.author[first] == AUTHOR_POLICY
        following = k + 1 if by_policy else bisect_left(steps, step + execute_steps)
        if following < len(steps) and steps[following] < first:
            continue  # held until a later observation
        end = steps[following] + 1 if following < len(steps) else total
        executed = min(_run_length(trace.author, first, end), horizon)
        terminal = not np.any(trace.author[first + executed :] != AUTHOR_HOLD)
        following = bisect_left(steps, first + executed - 1)  # nearer where the window was cut
        if following == len(steps) and not (terminal and labelled):
            continue  # nothing was seen after it: there is no state to bootstrap from
        terminal = terminal and labelled
        transitions.append(
            ChunkTransition(
                point=k,
                next_point=-1 if terminal else following,
                first=first,
                executed=executed,
                planned=_run_length(trace.author, first, min(first + horizon, total)),
                done=terminal,
                cut=not terminal and first + executed != end,
                reward=1.0 if terminal and trace.outcome == OUTCOME_SUCCESS else 0.0,
                author=int(trace.author[first]),
                policy_version=int(trace.policy_version[first]),
            )
        )
    return transitions


def episode_rows(trace: EpisodeTrace, policy: FlowPolicy, batch: int = 64) -> EpisodeRows:
    """Trunk features of every observation and normalised action chunks of every transition."""
    observations, rows, previous = _distinct(trace.points)
    features = [
        policy.feature(observations[i : i + batch]).cpu().numpy() for i in range(0, len(observations), batch)
    ]
    action = policy.action_spec
    raw, planned = raw_actions(trace, action)
    valid = np.arange(action.horizon) < planned[:, None]
    actions = np.where(valid[..., None], action.normalise(raw), 0.0).astype(np.float32)
    transitions = [
        replace(one, point=rows[one.point], next_point=rows[one.next_point] if one.next_point >= 0 else -1)
        for one in chunk_transitions(trace, action.horizon, action.execute_steps)
    ]
    images = [_recorded_images(trace, observation) for observation in observations] if trace.cameras else []
    return EpisodeRows(
        trace, np.concatenate(features).astype(np.float32), previous, actions, transitions, images
    )


def raw_actions(trace: EpisodeTrace, action: ActionSpec) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Chunks [R, H, A] of every transition in the raw representation, each relative to its own observation, and how
    many steps of each are there [R]; the last of them is repeated beyond."""
    transitions = chunk_transitions(trace, action.horizon, action.execute_steps)
    raw = np.zeros((len(transitions), action.horizon, action.dim))
    for chunk, transition in zip(raw, transitions, strict=True):
        point = trace.points[transition.point]
        length = _run_length(
            trace.author, transition.first, min(transition.first + action.horizon + 1, len(trace.author))
        )
        taken = trace.positions[transition.first : transition.first + length]
        padded = np.concatenate([taken, np.repeat(taken[-1:], action.horizon + 1 - len(taken), axis=0)])
        seen = from_step_grid(padded, point.phase)[: action.horizon]
        chunk[:] = action.encode(seen, reference_position(point.observation))
    return raw, np.array([transition.planned for transition in transitions], np.int64)


def _distinct(points: Sequence[ObservationPoint]) -> tuple[list[Observation], list[int], NDArray[np.int64]]:
    """All observations of all contexts, each once, in the order of time [K]; which of them each point was decided on;
    and which is the one before each in its context [K]."""
    by_key = {_key(observation): observation for point in points for observation in point.context}
    order = sorted(by_key)
    row = {key: index for index, key in enumerate(order)}
    previous = np.arange(len(order), dtype=np.int64)
    for point in points:
        rows = [row[_key(observation)] for observation in point.context]
        for earlier, later in pairwise(rows):
            previous[later] = earlier
    return [by_key[key] for key in order], [row[_key(point.observation)] for point in points], previous


def _recorded_images(trace: EpisodeTrace, observation: Observation) -> list[bytes]:
    missing = [camera for camera in trace.cameras if camera not in observation.stamps]
    if missing:
        raise EpisodeUnusable(f"{trace.episode_id}: an observation without an image of {', '.join(missing)}")
    return [trace.images[camera, observation.stamps[camera]] for camera in trace.cameras]


def _key(observation: Observation) -> tuple[int, tuple[tuple[str, int], ...]]:
    return observation.time_ns, tuple(observation.stamps.items())


@dataclass(frozen=True)
class _Step:
    number: int
    stamp: int
    positions: NDArray[np.float64]
    author: int
    policy_version: int

    @staticmethod
    def of(message: Any, joint_names: Sequence[str], stamp: int) -> _Step:
        column = {name: i for i, name in enumerate(message.joint_names)}
        missing = [name for name in joint_names if name not in column]
        if missing:
            raise EpisodeUnusable(f"executed_action lacks the joints {missing}")
        positions = np.asarray(message.positions, np.float64)[[column[name] for name in joint_names]]
        # With two arms in different hands the step belongs to the person: cloning and credit follow them.
        author = max(int(a) for a in message.author)
        return _Step(int(message.step), stamp, positions, author, int(message.policy_version))


@dataclass(frozen=True)
class _Decision:
    """A chunk of the policy and the samples it was made from. Topics are recorded in the order of arrival, which is
    not that of their causes."""

    step: int
    seen: tuple[tuple[int, dict[str, int]], ...]  # time and stamps of each observation, oldest first

    @staticmethod
    def of(message: Any) -> _Decision:
        seen = (
            (
                _nanoseconds(one.stamp),
                dict(zip(one.stream_names, map(_nanoseconds, one.stream_stamps), strict=True)),
            )
            for one in message.observations
        )
        return _Decision(int(message.observation_step), tuple(seen))


class _Frames:
    """Images as they were recorded: those of the last seconds, and for good those that were asked to be kept. The rest of
    an episode, gigabytes of it, is forgotten while it is read."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.kept: dict[tuple[str, int], bytes] = {}
        self._recent: dict[str, dict[int, bytes]] = {stream.name: {} for stream in streams}
        # Longer than the buffer that observations are assembled from.
        self._horizon_ns = round(1e9 * max([_FRAMES_KEPT_S, *(2 * stream.max_age_s for stream in streams)]))

    def add(self, name: str, stamp: int, encoded: Any) -> None:
        recent = self._recent.get(name)
        if recent is None:
            return
        recent[stamp] = encoded
        while (oldest := next(iter(recent))) < stamp - self._horizon_ns:
            del recent[oldest]

    def keep(self, context: Sequence[Observation]) -> None:
        for observation in context:
            for name, recent in self._recent.items():
                stamp = observation.stamps.get(name)
                if stamp in recent:
                    self.kept[name, stamp] = recent[stamp]


class _Points:
    """The observation points of an episode while it is read."""

    def __init__(self, buffer: ObservationBuffer, frames: _Frames) -> None:
        self._frames = frames
        self.clock = StepClock()
        self.found: dict[int, ObservationPoint] = {}  # by the number of the step before
        self._buffer = buffer
        self._first_ns: int | None = None

    def place(self, step: int, stamp: int) -> None:
        """Put a point where the first images after the end of `step` were taken, unless one is there; a stale stream
        means that nobody could have decided."""
        time_ns = self._buffer.next_moment(stamp)
        seen_after, phase = self.clock.place(time_ns) or (step, 0.0)
        if seen_after in self.found:
            return
        try:
            context = self._buffer.context(time_ns, time_ns if self._first_ns is None else self._first_ns)
        except ObservationStale:
            return
        self._put(ObservationPoint(seen_after, tuple(context), phase))

    def resolve(self, decision: _Decision) -> bool:
        """Put the policy's decision at its place if every sample that it saw is there by now."""
        try:
            context = tuple(self._buffer.at_stamps(time_ns, stamps) for time_ns, stamps in decision.seen)
        except ObservationStale:
            return False
        place = self.clock.place(context[-1].time_ns)
        self._put(ObservationPoint(decision.step, context, place[1] if place else 0.0))
        return True

    def _put(self, point: ObservationPoint) -> None:
        self.found[point.step] = point
        self._frames.keep(point.context)
        if self._first_ns is None:
            self._first_ns = point.observation.time_ns


def _read_state(trace: EpisodeTrace, message: Any) -> None:
    trace.robot = message.robot
    trace.task = message.task
    trace.instruction = message.instruction
    trace.seed = int(message.seed)
    if message.state == STATE_ENDED:
        trace.outcome = int(message.outcome)


def _run_length(author: NDArray[np.int64], first: int, end: int) -> int:
    """Steps from `first` on, before `end`, that have the author of `first`."""
    other = np.flatnonzero(author[first:end] != author[first])
    return int(other[0]) if len(other) else end - first


def _stamp_ns(message: Any, log_time: int) -> int:
    header = getattr(message, "header", None)
    return log_time if header is None else _nanoseconds(header.stamp)


def _nanoseconds(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)
