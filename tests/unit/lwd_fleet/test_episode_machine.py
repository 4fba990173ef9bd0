# SPDX-License-Identifier: Apache-2.0
"""Every state meets every event; outcomes say who judged and are never guessed."""

import pytest

from lwd_fleet.robot.episode_machine import (
    TRANSITIONS,
    Episode,
    EpisodeMachine,
    Event,
    NotNow,
    Outcome,
    State,
)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def machine(clock):
    return EpisodeMachine(clock)


TO_STATE = {
    State.IDLE: [],
    State.PREPARING: [Event.GOAL],
    State.RUNNING: [Event.GOAL, Event.READY],
    State.ENDED: [Event.GOAL, Event.READY, Event.ABORT],
}


def cause(machine, clock, event):
    if event is Event.GOAL:
        machine.begin("e1", "place", "put it there")
    elif event is Event.READY:
        if machine.state is State.PREPARING:
            machine.describe("put it there", 7, 10.0)
        machine.run()
    elif event is Event.REFUSED:
        machine.refuse()
    elif event is Event.VERDICT:
        machine.decide(Outcome.SUCCESS, (), "operator:anna")
    elif event is Event.TIME_UP:
        clock.now_s += 10.0
        machine.check_time()
    elif event is Event.ABORT:
        machine.abort("test")
    else:
        machine.close()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_the_table_is_all_that_can_happen(machine, clock, state, event):
    for step in TO_STATE[state]:
        cause(machine, clock, step)
    assert machine.state is state
    expected = TRANSITIONS.get((state, event))
    if expected is not None:
        cause(machine, clock, event)
        assert machine.state is expected
    elif event is Event.TIME_UP:  # time passes in every state; it only ends a running episode
        cause(machine, clock, event)
        assert machine.state is state
    else:
        with pytest.raises(NotNow):
            cause(machine, clock, event)
        assert machine.state is state


@pytest.fixture
def running(machine):
    machine.begin("e1", "place", "")
    machine.describe("put it there", 7, 10.0)
    machine.run()
    return machine


def test_the_detector_ends_an_episode_only_when_the_task_is_done(running):
    running.judge(False, [0.5, 0.0])
    assert running.state is State.RUNNING and running.episode.sub_step_scores == (0.5, 0.0)
    running.judge(True, [1.0, 1.0])
    episode = running.episode
    assert (running.state, episode.outcome, episode.outcome_source) == (
        State.ENDED,
        Outcome.SUCCESS,
        "detector",
    )
    assert episode.sub_step_scores == (1.0, 1.0) and (episode.instruction, episode.seed) == (
        "put it there",
        7,
    )


def test_a_time_limit_is_a_failure_only_where_a_detector_was_watching(running, clock):
    running.judge(False, [0.5])
    clock.now_s += 9.99
    running.check_time()
    assert running.state is State.RUNNING and running.elapsed_s == pytest.approx(9.99)
    clock.now_s += 0.02
    running.check_time()
    assert running.episode.outcome is Outcome.FAILURE
    assert running.episode.sub_step_scores == (0.5,) and "time limit of 10 s" in running.episode.end_reason


def test_a_time_limit_without_a_detector_is_unlabelled(running, clock):
    clock.now_s += 10.0
    running.check_time()
    assert (running.episode.outcome, running.episode.outcome_source) == (Outcome.UNLABELLED, "")


def test_an_abort_is_unlabelled_and_says_why(running):
    running.abort("emergency stop")
    assert running.episode.outcome is Outcome.UNLABELLED
    assert running.episode.end_reason == "aborted: emergency stop"


def test_an_operators_verdict_is_recorded_as_his(running):
    running.judge(False, [0.5])
    running.decide(Outcome.FAILURE, (), "operator:anna")
    episode = running.episode
    assert (episode.outcome, episode.outcome_source, episode.sub_step_scores) == (
        Outcome.FAILURE,
        "operator:anna",
        (0.5,),
    )


def test_every_change_is_announced_with_the_state_it_leads_to(clock):
    seen = []
    machine = EpisodeMachine(clock, lambda: seen.append((machine.state, machine.episode.episode_id)))
    machine.begin("e1", "place", "x")
    machine.run()
    machine.abort("x")
    machine.close()
    assert seen == [(State.PREPARING, "e1"), (State.RUNNING, "e1"), (State.ENDED, "e1"), (State.IDLE, "")]
    assert machine.episode == Episode()
