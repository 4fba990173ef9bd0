# SPDX-License-Identifier: Apache-2.0
"""Advantage-weighted regression: its weights, its fixed point, and that a critic is asked the right thing."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import pytest
import torch
import two_mode_bandit as bandit

from lwd_learner.extraction.awr import AdvantageWeighted, AwrConfig, advantage_weight


def test_weights_are_exponential_in_the_advantage_up_to_the_clip() -> None:
    config = AwrConfig(temperature=0.5, weight_max=20.0)
    advantage = torch.tensor([-1e6, -0.5, 0.0, 0.5, 1.0, 1e6], dtype=torch.float64)
    expected = torch.tensor([0.0, exp(-1), 1.0, exp(1), exp(2), 20.0], dtype=torch.float64)
    assert torch.allclose(advantage_weight(advantage, config), expected)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": -1.0}, {"weight_max": 0.5}])
def test_a_configuration_without_meaning_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="AWR needs"):
        AwrConfig(**wrong)


@pytest.mark.parametrize("right", [0.5, 0.2])
def test_the_paying_mode_is_preferred_by_the_share_that_the_temperature_predicts(right: float) -> None:
    """pi(right) / pi(left) = data odds * exp(1 / temperature), as Q is 1 and 0."""
    temperature = 1.0
    trainer = bandit.made(AwrConfig(temperature))
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        trainer.learn(bandit.replayed(generator, right), update_policy=False)
    for _ in range(400):
        metrics = trainer.extraction.update(bandit.replayed(generator, right))
    predicted = right * exp(1 / temperature) / (right * exp(1 / temperature) + 1 - right)
    assert bandit.share_right(trainer) == pytest.approx(predicted, abs=0.06)
    odds = exp(1 / temperature)
    share = (right * odds + 1 - right) ** 2 / (right * odds**2 + 1 - right)
    assert float(metrics["effective_rows"]) == pytest.approx(share, abs=0.06)
    assert float(metrics["weight_max"]) == pytest.approx(
        exp((1 - right) / temperature), rel=0.1
    )  # V is the mean of Q


def test_the_lower_head_of_the_slow_critic_is_compared_with_the_mean_of_v() -> None:
    trainer = bandit.made(AwrConfig(temperature=0.5))
    with torch.no_grad():
        for module, heads in (
            (trainer.values.target_critic, (0.9, 0.4)),
            (trainer.values.critic, (5.0, 5.0)),
        ):
            module.value.weight.zero_()
            module.value.bias.copy_(torch.tensor(heads).reshape(-1, 1, 1))
        trainer.values.value.logits.weight.zero_()
    rows = bandit.replayed(torch.Generator().manual_seed(0))
    extraction = trainer.extraction
    assert isinstance(extraction, AdvantageWeighted)
    mean = 0.5  # of the uniform law on [-.1, 1.1]
    assert torch.allclose(extraction.weights(rows), torch.full((bandit.ROWS,), exp((0.4 - mean) / 0.5)))
    unseen = replace(rows, mask=torch.zeros_like(rows.mask), action=torch.full_like(rows.action, torch.nan))
    assert torch.equal(extraction.weights(unseen), extraction.weights(rows))
