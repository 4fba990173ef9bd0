# SPDX-License-Identifier: Apache-2.0
"""Shares of online rows that follow the losses. algorithm.md 1.7, 4.17."""

from __future__ import annotations

import json
from math import exp, log

import pytest
import torch

from lwd_learner.loss_mix import LossMix, LossMixConfig, loss_sums


def note(mix: LossMix, online: float, offline: float, name: str = "a") -> None:
    mix.add([name], torch.tensor([[2 * online, 2.0, 3 * offline, 3.0]]))


@pytest.mark.parametrize(("online", "offline"), [(0.0, 0.0), (0.3, 0.2), (1.0, 2.0), (0.0, log(4))])
def test_the_share_is_that_of_the_published_rule(online: float, offline: float) -> None:
    config = LossMixConfig(gain=1.5)
    up, down = exp(1.5 * online), exp(offline)
    assert config.share(online, offline) == pytest.approx(up / (up + down))


def test_the_share_stays_between_one_fifth_and_four_fifths() -> None:
    config = LossMixConfig()
    assert config.share(1e9, 0.0) == config.share(2.0, 0.0) == 0.8
    assert config.share(0.0, 1e9) == config.share(0.0, 2.0) == 0.2


def test_what_is_learned_worse_is_drawn_more_often_by_task() -> None:
    mix = LossMix(LossMixConfig(gain=1.5))
    sums = loss_sums(
        3,
        task=torch.tensor([0, 0, 0, 1, 1, 2]),
        online=torch.tensor([True, False, False, True, False, True]),
        loss=torch.tensor([0.8, 0.1, 0.3, 0.1, 0.8, 5.0]),
    )
    assert sums.tolist() == [
        pytest.approx([0.8, 1, 0.4, 2]),
        pytest.approx([0.1, 1, 0.8, 1]),
        pytest.approx([5.0, 1, 0.0, 0]),
    ]
    mix.add(["x", "y", "z"], sums)
    shares = mix.shares()
    assert shares["x"] == pytest.approx(1 / (1 + exp(0.2 - 1.5 * 0.8)))
    assert shares["y"] == pytest.approx(1 / (1 + exp(0.8 - 1.5 * 0.1)))
    assert shares["z"] == 0.5, "there is nothing offline to compare with"


def test_losses_are_forgotten_after_the_window() -> None:
    mix = LossMix(LossMixConfig(window=200))
    note(mix, online=1.0, offline=0.0)
    assert mix.shares()["a"] == 0.8
    for _ in range(199):
        note(mix, 0.0, 0.0)
    assert mix.shares()["a"] == pytest.approx(1 / (1 + exp(-1.5 / 200)))
    note(mix, 0.0, 0.0)
    assert mix.shares()["a"] == 0.5


def test_a_restored_mix_goes_on_as_the_saved_one() -> None:
    mix, rng = LossMix(LossMixConfig(window=7)), torch.Generator().manual_seed(0)

    def step(each: LossMix, sums: torch.Tensor) -> dict[str, float]:
        each.add(["a", "b"], sums)
        return each.shares()

    for _ in range(9):
        step(mix, torch.rand(2, 4, generator=rng, dtype=torch.float64))
    restored = LossMix(LossMixConfig(window=7))
    restored.restore(json.loads(json.dumps(mix.state)))
    for _ in range(9):
        sums = torch.rand(2, 4, generator=rng, dtype=torch.float64)
        assert step(mix, sums) == step(restored, sums)
