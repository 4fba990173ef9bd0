# SPDX-License-Identifier: Apache-2.0
"""The trainer hands the right network, mask and count to each loss: mistakes that still train, only worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_batch import plain_batch
from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig, CriticEnsemble
from lwd_learner.divl import DivlConfig
from lwd_learner.qam import QamConfig
from lwd_learner.trainer import Trainer, TrainerConfig

C, H, A, ROWS = 3, 4, 2, 8
CONFIG = TrainerConfig(
    critic=CriticConfig(width=8, embedding=4),
    divl=replace(DivlConfig(), ema_rate=0.0),
    extraction=QamConfig(box_penalty=0.0),  # an untrained reference leaves the box
)


class LinearExpert(nn.Module):
    """The interface of a flow expert in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(C + H * A + 1, H * A)

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        velocity: Tensor = self.net(torch.cat([context, noisy.flatten(1), flow_time[:, None]], dim=-1))
        return velocity.view_as(noisy)


def made() -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(LinearExpert(), C, H, A, CONFIG)
    trainer.freeze_reference()
    return trainer


def batch(executed: int = 2, planned: int = H) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return plain_batch(
        torch.randn(ROWS, C, generator=generator),
        torch.randn(ROWS, H, A, generator=generator).clamp(-1, 1),
        mask=(torch.arange(H) < executed).expand(ROWS, H),
        valid=(torch.arange(H) < planned).expand(ROWS, H),
        discount=torch.ones(ROWS),
        next_context=torch.randn(ROWS, C, generator=generator),
    )


def make_constant(critic: CriticEnsemble, *heads: float) -> None:
    """Every head says the same of everything."""
    with torch.no_grad():
        critic.value.weight.zero_()
        critic.value.bias.copy_(torch.tensor(heads).reshape(-1, 1, 1))


def test_the_label_of_v_is_the_lower_head_of_the_target_critic() -> None:
    trainer = made()
    make_constant(trainer.values.target_critic, 0.6, 0.3)
    make_constant(trainer.values.critic, 0.9, 0.9)
    assert trainer.learn(batch(), update_policy=False)["value_label"] == pytest.approx(0.3)


def test_the_policy_climbs_the_target_critic_and_not_the_one_in_training() -> None:
    trainer = made()
    make_constant(trainer.values.target_critic, 0.5, 0.5)
    assert trainer.learn(batch())["adjoint"] == 0.0
    trainer = made()
    assert trainer.learn(batch())["adjoint"] > 0.0


def test_the_policy_is_judged_by_the_executed_steps_only() -> None:
    trainer, seen = made(), []
    critic = trainer.values.target_critic.forward

    def spy(context: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask.clone())
        return critic(context, chunk, mask)

    trainer.values.target_critic.forward = spy  # type: ignore[method-assign]
    trainer.learn(batch(executed=1))
    assert len(seen) == 2 and all(torch.equal(mask, batch(executed=1).mask) for mask in seen)


def test_cloning_imitates_what_was_planned_and_not_only_what_was_executed() -> None:
    def loss(rows: Batch) -> float:
        trainer = made()
        with torch.no_grad():  # blind to its input, which does show what stands beyond the plan
            weight, _ = trainer.actor.expert.parameters()
            weight.zero_()
        return trainer.clone(rows)["clone_loss"]

    rows = batch(executed=1, planned=3)
    within, beyond = rows.action.clone(), rows.action.clone()
    within[:, 2] += 1.0
    beyond[:, 3] += 1.0
    assert loss(replace(rows, action=within)) != pytest.approx(loss(rows))
    assert loss(replace(rows, action=beyond)) == loss(rows)
    assert loss(batch(executed=3, planned=3)) == loss(rows)


def test_the_path_kl_counts_per_executed_step() -> None:
    measured = []
    for executed in (1, 4):
        trainer = made()
        with torch.no_grad():
            _, bias = trainer.actor.expert.parameters()
            bias.add_(0.1)  # away from the reference
        measured.append(trainer.learn(batch(executed))["path_kl"])
    assert measured[0] > 0 and measured[0] == pytest.approx(4 * measured[1])


def test_freezing_a_reference_starts_the_policys_optimiser_and_temperature_anew() -> None:
    trainer = made()
    first = trainer.extraction.numbers
    trainer.learn(batch())
    assert trainer.extraction.numbers != first and trainer.actor.descent.optimiser.state
    trainer.freeze_reference()
    assert trainer.extraction.numbers == first and not trainer.actor.descent.optimiser.state
