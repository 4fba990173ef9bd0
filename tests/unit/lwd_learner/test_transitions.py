# SPDX-License-Identifier: Apache-2.0
"""From messages to decisions: whose they were, what was seen, what followed and where credit begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from lwd_fleet.data.messages import create, to_stamp
from lwd_learner.importers.embodiment import embodiment_from_positions
from lwd_learner.transitions import (
    AUTHOR_EXPERT,
    AUTHOR_HOLD,
    AUTHOR_HUMAN,
    AUTHOR_POLICY,
    OUTCOME_FAILURE,
    OUTCOME_SUCCESS,
    OUTCOME_UNLABELLED,
    EpisodeTrace,
    EpisodeUnusable,
    ObservationPoint,
    chunk_transitions,
    raw_actions,
    read_trace,
)
from lwd_policy.action import ActionSpec
from lwd_policy.observation import COMMAND, INSTRUCTION, JOINT_POSITIONS, Observation, ObservationSpec, Stream

HOLD, POLICY, HUMAN, EXPERT = AUTHOR_HOLD, AUTHOR_POLICY, AUTHOR_HUMAN, AUTHOR_EXPERT
JOINTS = ("a", "b")
STEP_NS = 100_000_000
START_NS = 1_000_000_000_000
SPEC = ObservationSpec(
    (
        Stream(JOINT_POSITIONS, "joint_states", "joints", (2,), 0.25),
        Stream(COMMAND, "executed_action", "command", (2,), 0.0, required=False),
        Stream(INSTRUCTION, "task", "text", (), 0.0),
    )
)
Messages = list[tuple[str, int, Any]]


def header(time_ns: int) -> Any:
    return create("std_msgs/msg/Header", stamp=to_stamp(time_ns))


def end_of(step: int) -> int:
    """When a policy step is over; step -1 is the start of the episode."""
    return START_NS + (step + 1) * STEP_NS


def state(number: int, time_ns: int, episode: str = "e", outcome: int = 0) -> tuple[str, int, Any]:
    content = {"robot": "r1", "task": "place", "instruction": "put it there", "seed": 7, "outcome": outcome}
    kind = "lwd_msgs/msg/EpisodeState"
    message = create(kind, header=header(time_ns), state=number, episode_id=episode, **content)
    return "episode", time_ns, message


def joints(time_ns: int, value: float, late_ns: int = 0) -> tuple[str, int, Any]:
    positions = np.array([value, -value])
    message = create("sensor_msgs/msg/JointState", header=header(time_ns), name=[*JOINTS], position=positions)
    return "joint_states", time_ns + late_ns, message


def action(step: int, author: int | Sequence[int], number: int | None = None) -> tuple[str, int, Any]:
    """A step that commanded its own index (joint a); joints come in another order than the robot's."""
    authors = np.array([author] if isinstance(author, int) else author, np.uint8)
    message = create(
        "lwd_msgs/msg/ExecutedAction",
        header=header(end_of(step)),
        episode_id="e",
        step=step if number is None else number,
        joint_names=["b", "a"],
        positions=np.array([0.0, float(step)]),
        author=authors,
        policy_version=4 if author == POLICY else -1,
    )
    return "executed_action", end_of(step), message


def seen(time_ns: int, joint_stamp: int) -> Any:
    return create(
        "lwd_msgs/msg/ObservationStamps",
        stamp=to_stamp(time_ns),
        stream_names=[JOINT_POSITIONS, INSTRUCTION],
        stream_stamps=[to_stamp(joint_stamp), to_stamp(START_NS - 5)],
    )


def chunk(step: int, joint_stamp: int, after_ns: int = 1) -> tuple[str, int, Any]:
    """A chunk decided after `step` on the joints of that stamp."""
    message = create(
        "lwd_msgs/msg/ActionChunk",
        header=header(end_of(step) + after_ns),
        episode_id="e",
        chunk_id=step + 2,
        observation_step=step,
        observations=[seen(end_of(step), joint_stamp)] * 2,
    )
    return "policy/action_chunk", end_of(step) + after_ns, message


def episode(
    authors: Sequence[Any], outcome: int = OUTCOME_SUCCESS, chunks: Sequence[int] | None = None
) -> Messages:
    """Joints are measured twice per step: just before its end (their value: the step) and just after it (step +
    0.5). The policy decides on the later, at every second step unless `chunks` says after which."""
    messages = [
        ("task", START_NS - 10, create("std_msgs/msg/String", data="put it there")),
        state(1, START_NS - 9),
        joints(START_NS - 1, -1.0),
        state(2, START_NS),
    ]
    policy = [step - 1 for step, author in enumerate(authors) if author == POLICY and step % 2 == 0]
    deciding = policy if chunks is None else chunks
    for step in range(-1, len(authors)):
        if step >= 0:
            messages += [joints(end_of(step) - 1, float(step)), action(step, authors[step])]
        messages.append(joints(end_of(step) + 1, step + 0.5))
        if step in deciding:
            messages.append(chunk(step, end_of(step) + 1, after_ns=2))
    return [*messages, state(3, end_of(len(authors)), outcome=outcome)]


def read(messages: Messages, stride: int = 2) -> EpisodeTrace:
    return read_trace("e", messages, SPEC, JOINTS, stride)


def test_the_facts_of_an_episode_are_read() -> None:
    trace = read(episode([POLICY, POLICY, HUMAN]))
    assert (trace.robot, trace.task, trace.instruction, trace.seed) == ("r1", "place", "put it there", 7)
    assert trace.outcome == OUTCOME_SUCCESS
    np.testing.assert_array_equal(trace.positions, [[0, 0], [1, 0], [2, 0]])
    np.testing.assert_array_equal(trace.author, [POLICY, POLICY, HUMAN])
    np.testing.assert_array_equal(trace.policy_version, [4, 4, -1])


def test_the_policys_points_hold_the_samples_that_its_chunks_name() -> None:
    trace = read(episode([POLICY] * 4))
    assert [point.step for point in trace.points] == [-1, 1]
    observation = trace.points[1].observation
    assert observation.values[JOINT_POSITIONS][0] == 1.5, (
        "the later sample: named, though not the newest at the stamp"
    )
    assert observation.stamps[JOINT_POSITIONS] == end_of(1) + 1
    assert COMMAND not in observation.values, "what the chunk does not name was not seen"


def test_a_demonstrators_points_come_every_stride_on_the_newest_samples() -> None:
    trace = read(episode([EXPERT] * 5))
    assert [point.step for point in trace.points] == [-1, 1, 3]
    assert [point.observation.values[JOINT_POSITIONS][0] for point in trace.points] == [-1.0, 1.0, 3.0]
    assert trace.points[1].observation.values[COMMAND][0] == 1.0


def test_a_change_of_author_is_a_point_even_off_the_stride() -> None:
    trace = read(episode([EXPERT] * 3 + [HUMAN] * 4, chunks=[]), stride=4)
    assert [point.step for point in trace.points] == [-1, 2, 3]


def test_a_demonstrator_who_begins_after_a_hold_is_seen_there() -> None:
    trace = read(episode([POLICY, POLICY, HOLD, HUMAN, HUMAN], chunks=[-1]), stride=4)
    assert [point.step for point in trace.points] == [-1, 2, 3]


def test_with_two_arms_the_step_belongs_to_the_person() -> None:
    assert list(read(episode([(POLICY, HUMAN), (HOLD, POLICY)], chunks=[-1])).author) == [HUMAN, POLICY]


def test_samples_that_were_recorded_after_the_chunk_are_still_found() -> None:
    messages = [m for m in episode([POLICY] * 4) if m[0] != "joint_states" or m[1] != end_of(1) + 1]
    at = next(i for i, m in enumerate(messages) if m[0] == "policy/action_chunk" and m[1] > end_of(1))
    messages.insert(at + 1, joints(end_of(1) + 1, 1.5, late_ns=5))
    assert read(messages).points[1].observation.values[JOINT_POSITIONS][0] == 1.5


def test_a_latched_message_of_the_episode_before_is_not_part_of_it() -> None:
    before = state(3, START_NS - 100, episode="before", outcome=OUTCOME_FAILURE)
    trace = read([before, *episode([EXPERT] * 3)])
    assert trace.outcome == OUTCOME_SUCCESS and len(trace.author) == 3


def test_steps_lost_while_the_arbiter_was_away_do_not_shift_what_was_decided_on() -> None:
    messages = episode([POLICY] * 6)
    for topic, _, message in messages:  # the fourth step is numbered 13, and what was decided after it
        if topic == "executed_action" and message.step >= 3:
            message.step += 10
        if topic == "policy/action_chunk" and message.observation_step >= 3:
            message.observation_step += 10
    assert [point.step for point in read(messages).points] == [-1, 1, 3]


@pytest.mark.parametrize(
    ("drop", "reason"),
    [
        ("episode", "no"),
        ("executed_action", "no executed action"),
        ("task", "no moment at which every stream"),
    ],
)
def test_an_episode_that_lacks_something_is_unusable_and_says_so(drop: str, reason: str) -> None:
    with pytest.raises(EpisodeUnusable, match=f"e: .*{reason}"):
        read([message for message in episode([EXPERT] * 4) if message[0] != drop])


def test_joints_that_were_not_commanded_make_an_episode_unusable() -> None:
    with pytest.raises(EpisodeUnusable, match="lacks the joints"):
        read_trace("e", episode([EXPERT] * 2), ObservationSpec(()), ("a", "b", "c"), 2)


def test_a_policys_context_is_what_its_chunk_names_and_the_phase_is_that_of_the_observation() -> None:
    messages = episode([POLICY] * 6, chunks=[-1, 1])
    decided = next(m for t, _, m in messages if t == "policy/action_chunk" and m.observation_step == 1)
    decided.observation_step = 0  # made after the second step, from images taken within it
    decided.observations = [seen(START_NS, START_NS - 1), seen(end_of(0) + STEP_NS // 4, end_of(0) + 1)]
    point = read(messages).points[1]
    assert [one.values[JOINT_POSITIONS][0] for one in point.context] == [-1.0, 0.5]
    assert (point.step, point.phase) == (0, 0.25)


def test_a_demonstrators_point_is_where_images_are_and_looks_back_by_time() -> None:
    camera = Stream("top", "camera_top/image_raw/compressed", "image", (2, 2, 3), 0.3)
    spec = ObservationSpec((*SPEC.streams, camera), history=2, spacing_s=0.2)
    messages = [
        *episode([EXPERT] * 8),
        *(image(START_NS + k * STEP_NS + STEP_NS // 5) for k in range(-1, 9)),
    ]
    messages.sort(key=lambda message: message[1])
    points = read_trace("e", messages, spec, JOINTS, 2).points
    assert [point.step for point in points] == [-1, 1, 3, 5, 7]
    assert [point.phase for point in points] == pytest.approx([0, 0.2, 0.2, 0.2, 0]), (
        "known between two steps only"
    )
    times = [[(one.time_ns - START_NS) / STEP_NS for one in point.context] for point in points]
    assert times == [[0.2, 0.2], [0.2, 2.2], [2.2, 4.2], [4.2, 6.2], [6.2, 8.2]]
    assert points[2].observation.values[COMMAND][0] == pytest.approx(3.2), (
        "between the third step and the fourth"
    )


def image(time_ns: int) -> tuple[str, int, Any]:
    encoded = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].reshape(-1)
    message = create("sensor_msgs/msg/CompressedImage", header=header(time_ns), format="png", data=encoded)
    return "camera_top/image_raw/compressed", time_ns, message


# What follows needs no messages: a trace is its authors and where its points are.

HORIZON, EXECUTE = 4, 2


def trace_of(authors: Sequence[int], points: Sequence[int], outcome: int = OUTCOME_SUCCESS) -> EpisodeTrace:
    decided = [ObservationPoint(step, (Observation(step, {}, {}),)) for step in points]
    trace = EpisodeTrace("e", outcome=outcome, points=decided, positions=np.zeros((len(authors), 2)))
    trace.author = np.array(authors)
    trace.policy_version = np.where(trace.author == POLICY, 4, -1)
    return trace


def cut_up(*arguments: Any) -> list[Any]:
    return chunk_transitions(trace_of(*arguments), HORIZON, EXECUTE)


def spans(*arguments: Any) -> list[tuple[int, int, int]]:
    """(point, first step, steps executed) of every decision."""
    return [(t.point, t.first, t.executed) for t in cut_up(*arguments)]


def test_decisions_of_the_policy_tile_the_episode() -> None:
    rows = cut_up([POLICY] * 6, [-1, 1, 3])
    assert [(t.point, t.next_point) for t in rows] == [(0, 1), (1, 2), (2, -1)]
    assert [(t.first, t.executed, t.planned) for t in rows] == [(0, 2, 4), (2, 2, 4), (4, 2, 2)]
    assert all((t.author, t.policy_version) == (POLICY, 4) for t in rows)
    assert not any(t.cut for t in rows)


@pytest.mark.parametrize(("outcome", "reward"), [(OUTCOME_SUCCESS, 1.0), (OUTCOME_FAILURE, 0.0)])
def test_only_the_last_decision_is_done_and_only_success_is_rewarded(outcome: int, reward: float) -> None:
    rows = cut_up([POLICY] * 6, [-1, 1, 3], outcome)
    assert [t.done for t in rows] == [False, False, True]
    assert [t.reward for t in rows] == [0.0, 0.0, reward]


def test_the_last_decision_of_an_unlabelled_episode_is_dropped_for_lack_of_a_state_after_it() -> None:
    rows = cut_up([POLICY] * 6, [-1, 1, 3], OUTCOME_UNLABELLED)
    assert [(t.next_point, t.done, t.reward) for t in rows] == [(1, False, 0.0), (2, False, 0.0)]


def test_an_unlabelled_end_that_was_seen_is_a_state_like_any_other() -> None:
    rows = cut_up([POLICY] * 4, [-1, 1, 3], OUTCOME_UNLABELLED)
    assert [(t.next_point, t.done) for t in rows] == [(1, False), (2, False)]


def test_steps_that_were_held_are_nobodys() -> None:
    assert spans([HOLD, POLICY, POLICY, HOLD, POLICY, POLICY, HOLD], [-1, 2, 3]) == [(0, 1, 2), (2, 4, 2)]


def test_a_hold_at_the_end_does_not_take_the_reward() -> None:
    rows = cut_up([POLICY] * 4 + [HOLD] * 3, [-1, 1, 3])
    assert [(t.done, t.reward) for t in rows] == [(False, 0.0), (True, 1.0)]


def test_an_episode_that_was_only_held_has_no_decision() -> None:
    assert cut_up([HOLD] * 5, [-1, 1, 3]) == []


def test_a_demonstrators_windows_overlap_where_points_are_denser() -> None:
    rows = cut_up([EXPERT] * 4, [-1, 0, 1, 2, 3])
    assert [(t.first, t.executed, t.next_point) for t in rows] == [
        (0, 2, 2),
        (1, 2, 3),
        (2, 2, -1),
        (3, 1, -1),
    ]


def test_a_take_over_cuts_the_decision_and_its_value_continues_from_where_it_was_cut() -> None:
    rows = cut_up([POLICY] * 3 + [HUMAN] * 3, [-1, 1, 2, 3, 5])
    assert [(t.first, t.executed, t.author) for t in rows[:2]] == [(0, 2, POLICY), (2, 1, POLICY)]
    assert rows[1].next_point == 2 and rows[1].planned == 1


def test_a_demonstration_that_is_cut_is_bootstrapped_at_the_cut_not_later() -> None:
    """The discount counts the executed steps: the state has to be the one after just these."""
    rows = cut_up([HUMAN] * 3 + [POLICY] * 4, [-1, 1, 2, 4])
    window = rows[1]
    assert (window.first, window.executed, window.author) == (2, 1, HUMAN)
    assert (window.next_point, window.cut) == (2, True)


@pytest.mark.parametrize("outcome", [OUTCOME_SUCCESS, OUTCOME_UNLABELLED])
@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_credit_is_consistent(outcome: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    runs = random.integers(1, 5, 5)
    authors = [int(author) for author in np.repeat(random.integers(0, 4, 5), runs)]
    changes = [i - 1 for i in range(1, len(authors)) if authors[i] not in (HOLD, authors[i - 1])]
    points = sorted({-1, *changes, *random.choice(len(authors), len(authors) // 2, replace=False)})
    trace = trace_of(authors, points, outcome)
    steps = [point.step for point in trace.points]
    for row in chunk_transitions(trace, HORIZON, EXECUTE):
        assert 1 <= row.executed <= min(row.planned, HORIZON)
        assert set(authors[row.first : row.first + row.executed]) == {row.author} and row.author != HOLD
        assert steps[row.point] < row.first
        assert row.done == (row.next_point == -1) and not (row.done and row.cut)
        assert row.done <= (outcome != OUTCOME_UNLABELLED) and row.reward == float(row.done)
        if not row.done:
            assert steps[row.next_point] >= row.first + row.executed - 1
            between = authors[row.first + row.executed : steps[row.next_point] + 1]
            assert set(between) <= {HOLD} or row.executed == HORIZON


@pytest.mark.parametrize(("authors", "last"), [([POLICY] * 6, 0.425), ([POLICY] * 5 + [HUMAN], 0.4)])
def test_actions_are_seen_from_when_the_observation_was_made(authors: list[int], last: float) -> None:
    """At 0.1 per step, seen at a quarter of the second: the command is at 0.125 then, at 0.225 a step later."""
    trace = trace_of(authors, [])
    trace.positions = np.stack([0.1 * np.arange(1, 7), np.zeros(6)], axis=1)
    seen_at = Observation(0, {JOINT_POSITIONS: np.array([0.125, 0.0])}, {})
    trace.points = [ObservationPoint(step, (seen_at,), 0.25) for step in (0, 4)]
    body = embodiment_from_positions("r1", JOINTS, [trace.positions], 0.1)
    action = ActionSpec.unnormalised(body, "joint_relative", HORIZON, 0.1, EXECUTE)
    raw, planned = raw_actions(trace, action)
    assert planned[0] == HORIZON
    np.testing.assert_allclose(raw[0, :, 0], [0.1, 0.2, 0.3, last - 0.025], atol=1e-9)
