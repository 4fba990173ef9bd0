# SPDX-License-Identifier: Apache-2.0
"""From an episode to chunk transitions (algorithm.md 2.1, 2.2).

Three plain steps, each usable alone: `read_trace` replays the messages of an episode through the same
`ObservationBuffer` that the policy node uses, `chunk_transitions` cuts the executed actions into chunks,
`episode_rows` adds trunk features and normalised actions. A row is one decision of whoever was in charge.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
    decode_message,
    reference_position,
)

OUTCOME_UNLABELLED, OUTCOME_SUCCESS, OUTCOME_FAILURE = 0, 1, 2
AUTHOR_HOLD, AUTHOR_POLICY, AUTHOR_HUMAN, AUTHOR_EXPERT, AUTHOR_RAMP = range(5)
STATE_RUNNING, STATE_ENDED = 2, 3


class EpisodeUnusable(Exception):
    """An episode cannot be turned into transitions; the text says what is missing in it."""


@dataclass(frozen=True)
class ObservationPoint:
    """An observation on which a chunk was, or could have been, decided: taken after policy step `step` (-1: before the first)."""

    step: int
    observation: Observation


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


@dataclass(frozen=True)
class ChunkTransition:
    """One decision of one author.

    point, history_point, next_point: indices into `EpisodeTrace.points` of the observation decided on, of the
    decision before it (itself at the start) and of the one after (-1: none). first: trace index of the first
    executed step; executed: steps until the next decision (L); planned: steps of the same author that followed,
    up to the horizon (what cloning may imitate). done: the labelled end was reached; cut: somebody else took
    over in between; reward: 1 on the last step of a success.
    """

    point: int
    history_point: int
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
    """One episode as arrays, ready for the replay. K observation points, R transitions."""

    trace: EpisodeTrace
    features: NDArray[np.float32]  # [K, F]
    actions: NDArray[np.float32]  # [R, H, A] normalised; zero beyond `planned`
    transitions: list[ChunkTransition]


def read_trace(
    episode_id: str,
    messages: Iterable[tuple[str, int, Any]],
    spec: ObservationSpec,
    joint_names: Sequence[str],
    stride: int,
) -> EpisodeTrace:
    """Replay `(topic without robot prefix, log time in ns, message)` in log order into a trace.

    Where the policy decided, its chunk names the very samples it saw (`stream_stamps`); where a demonstrator
    did, a point is placed every `stride` steps on the newest samples. Raises EpisodeUnusable.
    """
    streams = {stream.topic: stream for stream in spec.streams}
    buffer = ObservationBuffer(spec)
    trace = EpisodeTrace(episode_id)
    executed: list[_Step] = []
    points: dict[int, Observation] = {}  # by the number of the step before
    due: list[
        tuple[int, int]
    ] = []  # (step, stamp) of points to place once every sample up to the stamp was read
    decisions: list[_Decision] = []  # of the policy, whose samples may be recorded after the chunk
    running = False
    for topic, log_time, message in messages:
        stamp = _stamp_ns(message, log_time)
        while due and log_time > due[0][1]:
            _place(points, buffer, *due.pop(0))
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
        elif topic == "policy/action_chunk" and running:
            decisions.append(_Decision.of(message))
        stream = streams.get(topic)
        if stream is not None:
            buffer.add(stream.name, stamp, decode_message(stream, message, joint_names))
            decisions = [decision for decision in decisions if not decision.resolve(points, buffer)]
        demonstrated = executed and executed[-1].author not in (AUTHOR_POLICY, AUTHOR_HOLD)
        if topic == "executed_action" and demonstrated and len(executed) % stride == 0:
            due.append((executed[-1].number, stamp))
    for point in due:
        _place(points, buffer, *point)
    trace.unseen = len(decisions)
    if not trace.robot:
        raise EpisodeUnusable(
            f"{episode_id}: no message on `episode`, nothing says when it ran and how it ended"
        )
    if not executed:
        raise EpisodeUnusable(f"{episode_id}: no executed action while the episode ran")
    if not points:
        raise EpisodeUnusable(f"{episode_id}: no moment at which every stream of the observation was there")
    trace.positions = np.stack([step.positions for step in executed])
    trace.author = np.array([step.author for step in executed])
    trace.policy_version = np.array([step.policy_version for step in executed])
    numbers = [step.number for step in executed]  # with a gap where the arbiter was away
    trace.points = [
        ObservationPoint(bisect_right(numbers, number) - 1, points[number])
        for number in sorted(points)
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
                history_point=max(k - 1 if by_policy else bisect_left(steps, step - execute_steps), 0),
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
    """Trunk features of every observation point and normalised action chunks of every transition."""
    observations = [point.observation for point in trace.points]
    features = [
        policy.feature(observations[i : i + batch]).cpu().numpy() for i in range(0, len(observations), batch)
    ]
    action = policy.action_spec
    raw, planned = raw_actions(trace, action)
    valid = np.arange(action.horizon) < planned[:, None]
    actions = np.where(valid[..., None], action.normalise(raw), 0.0).astype(np.float32)
    transitions = chunk_transitions(trace, action.horizon, action.execute_steps)
    return EpisodeRows(trace, np.concatenate(features).astype(np.float32), actions, transitions)


def raw_actions(trace: EpisodeTrace, action: ActionSpec) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Chunks [R, H, A] of every transition in the raw representation, each relative to its own observation, and how
    many steps of each are there [R]; the last of them is repeated beyond."""
    transitions = chunk_transitions(trace, action.horizon, action.execute_steps)
    raw = np.zeros((len(transitions), action.horizon, action.dim))
    for chunk, transition in zip(raw, transitions, strict=True):
        taken = trace.positions[transition.first : transition.first + transition.planned]
        padded = np.concatenate([taken, np.repeat(taken[-1:], action.horizon - len(taken), axis=0)])
        chunk[:] = action.encode(padded, reference_position(trace.points[transition.point].observation))
    return raw, np.array([transition.planned for transition in transitions], np.int64)


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
    time_ns: int
    stamps: dict[str, int]

    @staticmethod
    def of(message: Any) -> _Decision:
        stamps = dict(zip(message.stream_names, map(_nanoseconds, message.stream_stamps), strict=True))
        return _Decision(int(message.observation_step), _nanoseconds(message.observation_stamp), stamps)

    def resolve(self, points: dict[int, Observation], buffer: ObservationBuffer) -> bool:
        """Put the observation into `points` if every sample is there by now."""
        try:
            points[self.step] = buffer.at_stamps(self.time_ns, self.stamps)
        except ObservationStale:
            return False
        return True


def _place(points: dict[int, Observation], buffer: ObservationBuffer, step: int, stamp: int) -> None:
    """Put a decision after `step` unless one is there; a stale stream means that nobody could have decided."""
    if step not in points:
        try:
            points[step] = buffer.at(stamp)
        except ObservationStale:
            return


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
