# SPDX-License-Identifier: Apache-2.0
"""Learning rates over a phase: closed forms, and that each optimiser follows its own."""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi

import pytest
from test_trainer import CONFIG, batch, trainer

from lwd_learner.extraction.edit import EditConfig
from lwd_learner.schedule import CONSTANT, Schedule
from lwd_learner.trainer import Trainer


def test_a_cosine_falls_from_the_peak_to_zero_and_stays_there() -> None:
    cosine = Schedule("cosine")
    assert cosine.share(0, 100) == 1.0
    assert cosine.share(50, 100) == pytest.approx(0.5)
    assert cosine.share(25, 100) == pytest.approx(0.5 + 0.25 * 2**0.5)
    assert cosine.share(100, 100) == cosine.share(101, 100) == 0.0
    shares = [cosine.share(step, 100) for step in range(101)]
    assert shares == sorted(shares, reverse=True)


def test_the_warm_up_is_a_line_to_the_peak() -> None:
    assert [Schedule(warm_up=4).share(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    both = Schedule("cosine", warm_up=4)
    for step in range(20):
        expected = min(1.0, (step + 1) / 4) * 0.5 * (1 + cos(pi * step / 20))
        assert both.share(step, 20) == pytest.approx(expected)


def test_without_an_end_a_rate_stays_at_its_peak() -> None:
    assert {shape.share(step) for shape in (CONSTANT, Schedule("cosine")) for step in (0, 10**6)} == {1.0}


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warm_up is a number of steps, not -1"):
        Schedule(warm_up=-1)


def rates(made: Trainer) -> dict[str, float]:
    return {each.name: each.optimiser.param_groups[0]["lr"] for each in made._descents()}


def test_policy_and_critics_follow_schedules_of_their_own() -> None:
    made = trainer(replace(CONFIG, policy_schedule=Schedule("cosine"), critic_schedule=Schedule(warm_up=2)))
    made.planned = 4
    seen = []
    for _ in range(5):
        made.learn(batch())
        seen.append(rates(made))
    cosine = [1.0, 0.5 + 2**-1.5, 0.5, 0.5 - 2**-1.5, 0.0]
    assert [one["policy"] / CONFIG.policy_rate for one in seen] == pytest.approx(cosine)
    assert [one["value"] / CONFIG.critic_rate for one in seen] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert [one["critic"] for one in seen] == [one["value"] for one in seen]
    made.begin_phase()
    made.learn(batch())
    assert rates(made)["policy"] == CONFIG.policy_rate


def test_a_head_follows_the_policys_schedule_from_its_own_peak() -> None:
    made = trainer(replace(CONFIG, head=EditConfig(), policy_schedule=Schedule("cosine")))
    before = rates(made)
    made.planned = 2
    for _ in range(2):
        made.learn(batch())
    heads = {each.name for each in made.extraction.descents}
    assert heads and all(rates(made)[name] == pytest.approx(before[name] / 2) for name in heads)


def test_the_papers_rates_fall_where_the_number_of_steps_is_known() -> None:
    made = trainer(CONFIG.paper())
    made.learn(batch())
    made.learn(batch())
    assert rates(made)["critic"] == CONFIG.critic_rate
    made.planned = 4
    made.learn(batch())
    assert rates(made)["critic"] == pytest.approx(CONFIG.critic_rate / 2)
    assert CONFIG.policy_schedule == CONFIG.critic_schedule == CONSTANT
