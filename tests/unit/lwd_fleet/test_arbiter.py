# SPDX-License-Identifier: Apache-2.0
"""The arbiter's promises: a table without holes, commands inside the limits, a reason for every hold."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwd_fleet.robot.arbiter import (
    TRANSITIONS,
    Arbiter,
    ArbiterTiming,
    Author,
    Chunk,
    Event,
    ExecutedStep,
    State,
)

NAMES = ("shoulder", "elbow", "gripper")
TICK_NS = 20_000_000  # 50 Hz
TIMING = ArbiterTiming(policy_step_hz=10.0, output_hz=50.0, joint_timeout_s=0.2, max_jump=0.5)
ROBOT = SimpleNamespace(
    joint_names=NAMES,
    lower=np.array([-1.0, -2.0, 0.0]),
    upper=np.array([1.0, 2.0, 0.04]),
    max_velocity=np.array([2.0, 3.0, 0.1]),
)
MAX_STEP = ROBOT.max_velocity * 0.02


def chunk(positions, episode="e1", observation_step=-1, chunk_id=1, version=3, **changes) -> Chunk:
    fields = {
        "episode_id": episode,
        "chunk_id": chunk_id,
        "policy_version": version,
        "policy_digest": f"digest-{version}",
        "observation_step": observation_step,
        "step_s": 0.1,
        "joint_names": NAMES,
        "positions": np.asarray(positions, dtype=np.float64),
    }
    return Chunk(**{**fields, **changes})


class Bench:
    """An arbiter, a clock, and a robot that follows every command at once."""

    def __init__(self, armed: bool = True, measured=(0.0, 0.0, 0.02)) -> None:
        self.arbiter = Arbiter(ROBOT, TIMING, auto_arm=armed)
        self.now = 0
        self.measured = np.array(measured)
        self.driver_alive = True
        self.outputs = []
        self.steps: list[ExecutedStep] = []
        self.arbiter.joints(self.measured, self.now)

    def ticks(self, count: int = 1):
        for _ in range(count):
            self.now += TICK_NS
            if self.driver_alive:
                self.arbiter.joints(self.measured, self.now)
            output = self.arbiter.tick(self.now)
            self.measured = output.positions
            self.outputs.append(output)
            if output.executed is not None:
                self.steps.append(output.executed)
        return self.outputs[-1]


def running(**options) -> Bench:
    bench = Bench(**options)
    bench.arbiter.episode_started("e1")
    return bench


def test_the_table_knows_every_event_in_every_state():
    assert set(TRANSITIONS) == set(itertools.product(State, Event))


def test_only_a_due_action_leads_to_motion_and_only_a_reset_leads_out_of_the_estop():
    for (state, event), target in TRANSITIONS.items():
        if state != State.POLICY and target == State.POLICY:
            assert (state, event) == (State.HOLD, Event.ACTION_DUE)
        if state == State.ESTOP and target != State.ESTOP:
            assert (event, target) == (Event.ESTOP_RESET, State.HOLD)
        if event == Event.ESTOP_PRESSED:
            assert target == State.ESTOP


def test_it_starts_disarmed_and_holds_the_measured_joints():
    bench = Bench(armed=False, measured=(0.3, -0.4, 0.01))
    output = bench.ticks(3)
    assert output.state == State.HOLD and not bench.arbiter.armed
    np.testing.assert_array_equal(output.positions, [0.3, -0.4, 0.01])


def test_nothing_is_commanded_before_the_first_joint_state():
    arbiter = Arbiter(ROBOT, TIMING)
    output = arbiter.tick(0)
    assert output.positions is None and output.reason == "no joint state received yet"


def test_an_action_is_reached_in_a_straight_line_over_the_ticks_of_its_step():
    bench = running()
    assert bench.arbiter.offer(chunk([[0.1, -0.2, 0.03], [0.2, -0.4, 0.03]])) is None
    bench.ticks(10)
    path = np.array([output.positions for output in bench.outputs])
    np.testing.assert_allclose(path[:, 0], np.linspace(0.02, 0.2, 10), atol=1e-12)
    np.testing.assert_allclose(path[:, 1], np.linspace(-0.04, -0.4, 10), atol=1e-12)
    assert [(s.step, s.author, s.chunk_id, s.chunk_index, s.clipped) for s in bench.steps] == [
        (0, Author.POLICY, 1, 0, False),
        (1, Author.POLICY, 1, 1, False),
    ]
    np.testing.assert_allclose(bench.steps[1].positions, [0.2, -0.4, 0.03])
    assert bench.steps[0].policy_version == 3 and bench.steps[0].policy_digest == "digest-3"


def test_an_exhausted_chunk_holds_its_last_command_and_the_next_one_goes_on():
    bench = running()
    bench.arbiter.offer(chunk([[0.1, 0.0, 0.02]]))
    output = bench.ticks(10)
    assert output.state == State.HOLD and "exhausted" in output.reason
    assert bench.steps[1].author == Author.HOLD and bench.steps[1].policy_version == -1
    assert bench.arbiter.offer(chunk([[0.2, 0.0, 0.02]], observation_step=1, chunk_id=2)) is None
    bench.ticks(5)
    np.testing.assert_allclose(bench.steps[2].positions, [0.2, 0.0, 0.02])


def test_a_chunk_expires_with_its_own_horizon():
    bench = running(armed=False)
    bench.arbiter.offer(chunk([[0.1, 0.0, 0.02]] * 3))
    bench.ticks(20)  # disarmed for four steps: the three actions belong to the past
    assert bench.arbiter.arm() is None
    assert bench.ticks(5).state == State.HOLD


def test_the_step_keeps_what_the_policy_proposed_and_says_when_a_limit_changed_it():
    bench = running()
    bench.arbiter.offer(chunk([[5.0, 0.0, 0.02]]))
    bench.ticks(5)
    step = bench.steps[0]
    assert step.clipped and step.author == Author.POLICY
    np.testing.assert_array_equal(step.proposed, [5.0, 0.0, 0.02])
    np.testing.assert_allclose(step.positions, [5 * MAX_STEP[0], 0.0, 0.02])


def test_a_command_never_leads_a_blocked_joint_by_more_than_the_jump_limit():
    bench = running()
    bench.arbiter.offer(chunk([[0.2 * k, 0.0, 0.02] for k in range(1, 6)]))
    for _ in range(25):
        bench.measured = np.array([0.0, 0.0, 0.02])  # blocked
        output = bench.ticks()
        bench.measured = np.array([0.0, 0.0, 0.02])
        assert abs(output.positions[0]) <= TIMING.max_jump + 1e-12
    assert bench.steps[-1].clipped


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"episode": "e0"}, "it belongs to episode e0, running is e1"),
        ({"joint_names": ("elbow", "shoulder", "gripper")}, "are not the robot's"),
        ({"positions": np.full((2, 3), np.nan)}, "not finite"),
        ({"positions": np.zeros((2, 4))}, r"shape \(2, 4\), not \[H, 3\]"),
        ({"positions": np.zeros((0, 3))}, "shape"),
        ({"step_s": 1 / 30}, "its step is 0.0333333 s, the robot's 0.1 s"),
        ({"step_s": float("nan")}, "its step is nan"),
        ({"observation_step": 0}, "not executed yet"),
    ],
)
def test_a_foreign_chunk_is_refused_with_the_reason(changes, reason):
    bench = running()
    refusal = bench.arbiter.offer(chunk(**{"positions": np.zeros((2, 3)), **changes}))
    assert refusal is not None and refusal.startswith("chunk 1 refused: ")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal)
    assert bench.ticks(5).state == State.HOLD


def test_an_episode_keeps_the_policy_version_it_started_with():
    bench = running()
    assert bench.arbiter.offer(chunk([[0.0, 0.0, 0.02]] * 5)) is None
    bench.ticks(5)
    refusal = bench.arbiter.offer(chunk([[0.0, 0.0, 0.02]], observation_step=0, version=4))
    assert refusal is not None and "policy 4 (digest-4) is not the one" in refusal
    bench.arbiter.episode_started("e2")
    assert bench.arbiter.offer(chunk([[0.0, 0.0, 0.02]], episode="e2", version=4)) is None


def test_an_older_observation_never_replaces_a_newer_one():
    bench = running()
    bench.arbiter.offer(chunk([[0.0, 0.0, 0.02]] * 5))
    bench.ticks(10)
    assert bench.arbiter.offer(chunk([[0.0, 0.0, 0.02]] * 5, observation_step=1, chunk_id=2)) is None
    refusal = bench.arbiter.offer(chunk([[0.0, 0.0, 0.02]] * 5, observation_step=0, chunk_id=3))
    assert refusal is not None and "older than the running chunk 2" in refusal


def test_stale_joints_hold_with_the_reason_and_the_old_chunk_is_not_resumed():
    bench = running()
    bench.arbiter.offer(chunk([[0.05 * k, 0.0, 0.02] for k in range(1, 11)]))
    bench.ticks(5)
    bench.driver_alive = False
    output = bench.ticks(12)
    assert output.state == State.HOLD and output.reason == "joint states are stale: none for 0.2 s"
    held = output.positions
    bench.driver_alive = True
    output = bench.ticks(10)
    assert output.state == State.HOLD and output.reason == "waiting for a chunk observed after the hold"
    np.testing.assert_array_equal(output.positions, held)
    refusal = bench.arbiter.offer(chunk([[0.5, 0.0, 0.02]] * 10, observation_step=1, chunk_id=2))
    assert refusal is not None and "before the robot was held" in refusal
    last = bench.steps[-1].step
    assert bench.arbiter.offer(chunk([[0.3, 0.0, 0.02]] * 10, observation_step=last, chunk_id=3)) is None
    assert bench.ticks(6).state == State.POLICY


def test_a_non_finite_joint_state_is_refused_and_counts_as_missing():
    bench = running()
    bench.driver_alive = False
    for _ in range(12):
        assert bench.arbiter.joints(np.array([0.0, np.nan, 0.0]), bench.now) == "joint state is not finite"
        output = bench.ticks()
    assert output.reason.startswith("joint states are stale")


def test_a_step_interrupted_half_way_is_recorded_as_a_hold_with_its_proposal():
    bench = running()
    bench.arbiter.offer(chunk([[0.1, 0.0, 0.02]] * 3))
    bench.ticks(2)
    bench.arbiter.disarm()
    bench.ticks(3)
    step = bench.steps[0]
    assert step.author == Author.HOLD and step.chunk_id == 0 and step.chunk_index == -1
    np.testing.assert_array_equal(step.proposed, [0.1, 0.0, 0.02])
    np.testing.assert_allclose(step.positions, [0.04, 0.0, 0.02])


def test_the_estop_stops_latches_and_disarms():
    bench = running()
    bench.arbiter.offer(chunk([[0.1, 0.0, 0.02]] * 10))
    moving = bench.ticks(2)
    bench.arbiter.press_estop()
    assert bench.arbiter.state == State.ESTOP
    output = bench.ticks(20)
    assert output.state == State.ESTOP and output.reason == "e-stop pressed"
    np.testing.assert_array_equal(output.positions, moving.positions)
    assert bench.arbiter.reset_estop() == "the e-stop is still pressed"
    assert bench.arbiter.arm() == "the e-stop is latched; reset it first"
    bench.arbiter.release_estop()
    assert bench.ticks().state == State.ESTOP, "releasing the button alone must not clear the latch"
    assert bench.arbiter.reset_estop() is None
    output = bench.ticks()
    assert output.state == State.HOLD and not bench.arbiter.armed


def test_no_step_is_recorded_outside_an_episode_and_steps_count_from_zero():
    bench = Bench()
    bench.ticks(17)
    assert bench.steps == []
    bench.arbiter.episode_started("e1")
    bench.ticks(10)
    bench.arbiter.episode_started("e1")  # the latched message once more
    bench.ticks(5)
    assert [s.step for s in bench.steps] == [0, 1, 2]
    bench.arbiter.episode_ended()
    assert bench.ticks(10).reason == "no episode is running"
    assert len(bench.steps) == 3


def test_a_restart_begins_from_the_measured_joints_and_keeps_a_latched_estop():
    bench = running()
    bench.arbiter.offer(chunk([[0.1, 0.0, 0.02]] * 10))
    bench.ticks(7)
    bench.arbiter.restart()
    assert bench.arbiter.tick(bench.now).positions is None
    bench.measured = np.array([-0.7, 0.0, 0.02])  # moved by hand meanwhile
    output = bench.ticks(5)
    assert output.state == State.HOLD and not bench.arbiter.armed
    np.testing.assert_array_equal(output.positions, [-0.7, 0.0, 0.02])
    bench.arbiter.press_estop()
    bench.arbiter.restart()
    assert bench.ticks().state == State.ESTOP


def test_an_arbiter_that_joins_a_running_episode_counts_on_and_waits_for_a_fresh_chunk():
    bench = Bench()
    bench.arbiter.episode_started("e1", first_step=40)
    refusal = bench.arbiter.offer(chunk([[0.1, 0.0, 0.02]] * 10, observation_step=31))
    assert refusal is not None and "before the robot was held" in refusal
    bench.ticks(5)
    assert [s.step for s in bench.steps] == [40]
    assert bench.arbiter.offer(chunk([[0.1, 0.0, 0.02]] * 10, observation_step=40)) is None


def test_a_scripted_demonstrator_drives_through_the_same_path():
    bench = running()
    for step in range(3):
        command = [[0.05 * (step + 1), 0.0, 0.02]]
        offered = chunk(command, observation_step=step - 1, version=-1, author=Author.EXPERT)
        assert bench.arbiter.offer(offered) is None
        bench.ticks(5)
    assert [s.author for s in bench.steps] == [Author.EXPERT] * 3
    assert {(s.policy_version, s.chunk_id, s.chunk_index) for s in bench.steps} == {(-1, 0, -1)}
    np.testing.assert_allclose(bench.steps[-1].positions, [0.15, 0.0, 0.02])


@pytest.mark.parametrize("rates", [(30.0, 50.0), (50.0, 10.0), (0.0, 50.0), (10.0, float("nan"))])
def test_rates_that_do_not_divide_are_refused(rates):
    with pytest.raises(ValueError, match="must be"):
        ArbiterTiming(policy_step_hz=rates[0], output_hz=rates[1])


_value = st.one_of(st.floats(-3.0, 3.0), st.sampled_from([0.0, 1e308, -1e308, np.inf, -np.inf, np.nan]))
_joints = st.tuples(_value, _value, _value)
_operation = st.one_of(
    st.tuples(st.just("tick"), st.integers(1, 7)),
    st.tuples(st.just("tick"), st.integers(1, 7)),
    st.tuples(st.just("chunk"), st.lists(_joints, min_size=1, max_size=4)),
    st.tuples(st.just("chunk"), st.lists(st.tuples(*[st.floats(-3.0, 3.0)] * 3), min_size=1, max_size=4)),
    st.tuples(st.just("joints"), _joints),
    st.tuples(st.just("silence"), st.integers(1, 30)),
    st.tuples(st.sampled_from(["press", "release", "reset", "arm", "disarm", "start", "end"]), st.just(None)),
)


@settings(max_examples=150, deadline=None)
@given(first=st.tuples(*[st.floats(-3.0, 3.0)] * 3), operations=st.lists(_operation, max_size=40))
def test_no_switching_between_sources_breaks_a_limit(first, operations):
    """Over any sequence of chunks, holds, e-stops and stale joints: finite, inside the joint limits, and never
    faster than the velocity limit."""
    arbiter = Arbiter(ROBOT, TIMING, auto_arm=True)
    arbiter.joints(np.array(first), 0)
    arbiter.episode_started("e0")
    now, episode, commands = 0, 0, []

    def tick(count: int, fresh: bool) -> None:
        nonlocal now
        for _ in range(count):
            now += TICK_NS
            if fresh and commands:
                arbiter.joints(commands[-1], now)
            output = arbiter.tick(now)
            assert output.state == arbiter.state and output.reason
            commands.append(output.positions)

    for name, value in operations:
        if name == "tick":
            tick(value, fresh=True)
        elif name == "silence":
            tick(value, fresh=False)
        elif name == "joints":
            arbiter.joints(np.array(value), now)
            tick(1, fresh=False)
        elif name == "chunk":
            arbiter.offer(chunk(value, episode=arbiter.episode_id, observation_step=arbiter.step - 1))
        elif name == "start":
            episode += 1
            arbiter.episode_started(f"e{episode}")
        else:
            {
                "press": arbiter.press_estop,
                "release": arbiter.release_estop,
                "reset": arbiter.reset_estop,
                "arm": arbiter.arm,
                "disarm": arbiter.disarm,
                "end": arbiter.episode_ended,
            }[name]()

    path = np.array(commands).reshape(-1, 3)
    assert np.isfinite(path).all()
    assert (path >= ROBOT.lower).all() and (path <= ROBOT.upper).all()
    assert (np.abs(np.diff(path, axis=0)) <= MAX_STEP + 1e-12).all()


def test_arms_that_the_scene_moved_are_held_where_they_were_put():
    """The command of the episode before would otherwise drive them back before the next one starts."""
    bench = running()
    bench.arbiter.offer(chunk([[0.3, 0.2, 0.01]] * 10))
    bench.ticks(20)
    bench.arbiter.episode_ended()
    bench.ticks(3)
    bench.arbiter.scene_prepared()
    home = np.array([-0.6, 0.9, 0.04])
    bench.measured = home
    assert bench.ticks().positions == pytest.approx(home)
    bench.arbiter.episode_started("e2")
    assert bench.ticks(10).positions == pytest.approx(home)


def test_a_pushed_arm_is_not_followed_while_no_scene_is_prepared():
    bench = running()
    bench.ticks(5)
    bench.arbiter.episode_ended()
    held = bench.ticks(3).positions
    bench.measured = held + np.array([0.1, 0.0, 0.0])
    assert bench.ticks().positions == pytest.approx(held)
