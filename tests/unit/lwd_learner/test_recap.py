# SPDX-License-Identifier: Apache-2.0
"""RECAP: what counts as positive, that an indicator folds into a bias, and what policies told different things do."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import two_mode_bandit as bandit
from torch import Tensor, nn

from lwd_learner.conditioned_flow import fold, spread, widened
from lwd_learner.extraction.recap import (
    NEGATIVE,
    NOTHING,
    POSITIVE,
    AdvantageConditioned,
    RecapConfig,
    best_rows,
)
from lwd_learner.ranks import Ranks
from lwd_learner.state_networks import StateFlow
from lwd_learner.trainer import Trainer
from lwd_learner.transitions import AUTHOR_HUMAN, AUTHOR_POLICY
from lwd_policy.flow_expert import FlowExpert

CONTEXT, HORIZON, ACTION = 5, 4, 3


def expert_of(kind: type[nn.Module]) -> nn.Module:
    """With random weights everywhere, in double precision."""
    torch.manual_seed(0)
    made = kind(CONTEXT, HORIZON, ACTION)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.double()


def question() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    context, noisy = (
        torch.randn(9, CONTEXT, generator=generator),
        torch.randn(9, HORIZON, ACTION, generator=generator),
    )
    return context.double(), noisy.double(), torch.rand(9, generator=generator).double()


@pytest.mark.parametrize("kind", [FlowExpert, StateFlow])
def test_a_fixed_indicator_folds_into_a_bias_exactly(kind: type[nn.Module]) -> None:
    expert, plain = expert_of(kind), expert_of(kind)
    wide = widened(expert, CONTEXT, 2)
    for parameter in wide.parameters():
        nn.init.normal_(parameter, std=0.3)
    context, noisy, time = question()
    outputs = []
    for indicator in (POSITIVE, NEGATIVE, NOTHING):
        fold(wide, plain, CONTEXT, indicator)
        told = torch.cat([context, indicator.double().expand(9, 2)], dim=-1)
        outputs.append(plain(context, noisy, time))
        assert torch.allclose(outputs[-1], wide(told, noisy, time), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert plain.state_dict().keys() == expert.state_dict().keys()


@pytest.mark.parametrize("kind", [FlowExpert, StateFlow])
def test_a_widened_expert_does_what_it_did_whatever_it_is_told(kind: type[nn.Module]) -> None:
    expert = expert_of(kind)
    context, noisy, time = question()
    wide = widened(expert, CONTEXT, 2)
    told = torch.cat([context, torch.randn(9, 2, dtype=torch.float64)], dim=-1)
    assert torch.allclose(wide(told, noisy, time), expert(context, noisy, time), rtol=1e-12, atol=1e-12)
    back = copy.deepcopy(expert)
    fold(wide, back, CONTEXT, POSITIVE)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), expert.parameters(), strict=True))
    for parameter in wide.parameters():
        nn.init.zeros_(parameter)
    spread(expert, wide, CONTEXT)
    assert torch.allclose(wide(told, noisy, time), expert(context, noisy, time), rtol=1e-12, atol=1e-12)


def test_an_expert_that_does_not_say_where_its_context_enters_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear names no linear map in `context_entry`"):
        widened(nn.Linear(3, 3), 3, 2)


def test_an_expert_in_pieces_on_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "whole", lambda ranks, tensor: tensor.clone())  # as where it must be gathered
    with pytest.raises(ValueError, match="ddp, not fsdp"):
        bandit.made(RecapConfig())


def test_the_share_that_is_positive_is_that_of_each_task() -> None:
    advantage = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0, 0.1, 0.2, 0.3, 0.4, 0.0])
    task = torch.tensor([0] * 5 + [3] * 5)
    assert best_rows(advantage, task, 0.4).nonzero().squeeze(-1).tolist() == [3, 4, 7, 8]
    assert (
        best_rows(torch.zeros(10), torch.zeros(10, dtype=torch.int64), 0.3).sum() == 3
    )  # equals: no more than that


def test_advantages_bootstrap_with_v_and_what_a_person_did_is_positive() -> None:
    trainer = bandit.made(RecapConfig(positive_share=0.25))
    extraction = trainer.extraction
    assert isinstance(extraction, AdvantageConditioned)
    generator = torch.Generator().manual_seed(0)
    rows = replace(
        bandit.replayed(generator, rows=4),
        context=torch.tensor([[0.2, 0.0], [0.5, 0.0], [0.1, 0.0], [0.9, 0.0]]),
        next_context=torch.tensor([[0.8, 0.0], [0.6, 0.0], [torch.nan, 0.0], [0.1, 0.0]]),
        reward=torch.tensor([0.0, 0.0, 1.0, 0.0]),
        discount=torch.tensor([0.5, 1.0, 0.0, 1.0]),
        author=torch.tensor([AUTHOR_POLICY, AUTHOR_POLICY, AUTHOR_POLICY, AUTHOR_HUMAN]),
    )
    trainer.values.baseline = lambda context: context[:, 0]  # type: ignore[method-assign]
    assert torch.allclose(extraction.advantage(rows), torch.tensor([0.2, 0.1, 0.9, -0.8]))
    assert extraction.positive(rows).tolist() == [False, False, True, True]


def share_when_told(trainer: Trainer, indicator: Tensor) -> float:
    extraction = trainer.extraction
    assert isinstance(extraction, AdvantageConditioned)
    plain = copy.deepcopy(trainer.actor.expert)
    fold(extraction.wide, plain, bandit.C, indicator)
    noise = torch.randn(2000, bandit.H, bandit.A, generator=torch.Generator().manual_seed(1))
    chunk = trainer.actor.sample(plain, torch.zeros(2000, bandit.C), noise)
    return float((chunk > 0).float().mean())


def test_a_policy_goes_where_it_was_told_that_it_pays() -> None:
    """Half of the rows pay; three in ten are called positive, all of which pay; of the rest two in seven do."""
    trainer = bandit.made(RecapConfig())
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        trainer.learn(bandit.replayed(generator), update_policy=False)
    for _ in range(500):
        metrics = trainer.extraction.update(bandit.replayed(generator))
    assert float(metrics["positive"]) == pytest.approx(0.3, abs=0.01)
    assert bandit.share_right(trainer) > 0.9
    assert share_when_told(trainer, POSITIVE) == pytest.approx(bandit.share_right(trainer), abs=0.03)
    assert share_when_told(trainer, NEGATIVE) == pytest.approx(2 / 7, abs=0.1)
    assert share_when_told(trainer, NOTHING) == pytest.approx(0.5, abs=0.1)


def test_guidance_leads_from_being_told_nothing_through_being_told_to_beyond_it() -> None:
    at = {}
    for guidance in (0.0, 1.0, 2.0):
        trainer = bandit.made(RecapConfig(guidance=guidance))
        wide = trainer.extraction.modules["recap"]
        with torch.no_grad():  # an expert whose velocity is what it was told: 1 for positive, 0 for nothing
            for parameter in wide.parameters():
                parameter.zero_()
            wide.context[0].weight[0, bandit.C] = 5.0
            wide.enter.weight[0, -64] = wide.body[1].weight[0, 0] = wide.body[3].weight[0, 0] = 0.5
        fold(wide, trainer.actor.expert, bandit.C, POSITIVE)
        at[guidance] = trainer.extraction.act(
            torch.zeros(1, bandit.C), torch.zeros(1, bandit.H, bandit.A)
        ).item()
    assert at[0.0] == 0.0 and at[1.0] > 0.01
    assert at[2.0] == pytest.approx(2 * at[1.0], rel=1e-5)


def test_a_new_phase_begins_from_the_cloned_policy() -> None:
    trainer = bandit.made(RecapConfig())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        trainer.clone(bandit.replayed(generator))
    cloned = {name: tensor.clone() for name, tensor in trainer.actor.expert.state_dict().items()}
    trainer.freeze_reference()
    shares = {share_when_told(trainer, indicator) for indicator in (POSITIVE, NEGATIVE, NOTHING)}
    assert len(shares) == 1
    assert all(
        torch.equal(cloned[name], tensor) for name, tensor in trainer.actor.expert.state_dict().items()
    )


@pytest.mark.parametrize("wrong", [{"positive_share": 0.0}, {"drop": 1.0}, {"drop": 0.0, "guidance": 2.0}])
def test_a_configuration_without_meaning_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"RECAP needs|guidance is"):
        RecapConfig(**wrong)
