# SPDX-License-Identifier: Apache-2.0
"""Best of N: the choice itself, and acting by it."""

from __future__ import annotations

import pytest
import torch
import two_mode_bandit as bandit
from torch import Tensor

from lwd_learner.extraction import make_extraction
from lwd_learner.extraction.best_of_n import BestOfNConfig, best_of
from lwd_learner.extraction.cloning import CloningConfig


def test_the_highest_of_each_row_is_chosen() -> None:
    candidates = torch.arange(24.0).reshape(3, 4, 2)
    q = torch.tensor([[0.0, 3.0, 1.0, 1.0], [2.0, 0.0, 1.0, 0.0], [1.0, 4.0, 0.0, 2.0]])
    assert best_of(candidates, q).tolist() == [
        candidates[1, 0].tolist(),
        candidates[2, 1].tolist(),
        candidates[0, 2].tolist(),  # the first of equals
        candidates[2, 3].tolist(),
    ]


def test_one_candidate_is_the_cloned_policy() -> None:
    noise = torch.randn(5, bandit.H, bandit.A)
    chunks = [
        bandit.made(config).extraction.act(torch.zeros(5, bandit.C), noise)
        for config in (BestOfNConfig(candidates=1), CloningConfig())
    ]
    assert torch.equal(*chunks)


def test_more_candidates_find_the_paying_mode_as_often_as_one_of_them_goes_there() -> None:
    """A cloned policy that goes right with chance p does so best-of-N with 1 - (1 - p)^N."""
    trainer = bandit.made(BestOfNConfig(candidates=4))
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        trainer.learn(bandit.replayed(generator, right=0.3), update_policy=step >= 100)
    best = bandit.share_right(trainer)
    trainer.extraction = make_extraction(CloningConfig(), trainer.actor, trainer.values)
    cloned = bandit.share_right(trainer)
    assert 0.2 < cloned < 0.4
    assert best == pytest.approx(1 - (1 - cloned) ** 4, abs=0.03)


def test_acting_is_a_function_of_context_and_noise_and_draws_nothing_from_training() -> None:
    trainer = bandit.made(BestOfNConfig(candidates=8))
    before = trainer.actor.noise.get_state()
    noise = torch.randn(6, bandit.H, bandit.A)
    once, again = (trainer.extraction.act(torch.zeros(6, bandit.C), noise) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(trainer.actor.noise.get_state(), before)


def test_the_critic_judges_what_will_be_executed() -> None:
    trainer, seen = bandit.made(BestOfNConfig(candidates=2, executed_steps=3)), []

    def critic(context: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask)
        return torch.zeros(2, len(chunk))

    trainer.values.q = critic  # type: ignore[method-assign]
    trainer.actor.sample = lambda expert, context, noise, steps=10: noise  # type: ignore[method-assign]
    trainer.extraction.act(torch.zeros(4, bandit.C), torch.randn(4, 5, 2))
    assert seen[0].shape == (8, 5)
    assert seen[0].sum(dim=1).unique().tolist() == [3] and bool(seen[0][:, :3].all())


@pytest.mark.parametrize("wrong", [{"candidates": 0}, {"executed_steps": 0}])
def test_a_choice_from_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        BestOfNConfig(**wrong)
