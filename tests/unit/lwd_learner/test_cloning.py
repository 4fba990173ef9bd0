# SPDX-License-Identifier: Apache-2.0
"""Cloning as an extraction: equal to the trainer's cloning step, and weighted row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_batch import plain_batch
from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.extraction.cloning import CloningConfig
from lwd_learner.trainer import Trainer, TrainerConfig

C, H, A, ROWS = 3, 2, 2, 64
CONFIG = TrainerConfig(
    extraction=CloningConfig(), critic=CriticConfig(width=8, embedding=4), policy_rate=1e-2
)


class Constant(nn.Module):
    """Velocity of a flow to one chunk, so that what was cloned can be read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk = nn.Parameter(torch.zeros(H, A))

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        return (self.chunk - noisy) / (1.05 - flow_time)[:, None, None]


def batch(action: Tensor) -> Batch:
    return plain_batch(torch.zeros(len(action), C), action)


def two_sided() -> Batch:
    """Half of the rows at -.5, half at .5."""
    side = torch.where(torch.arange(ROWS) % 2 == 0, -0.5, 0.5)
    return batch(side[:, None, None].expand(ROWS, H, A).clone())


def test_the_extraction_takes_the_step_that_the_trainer_takes_when_it_clones() -> None:
    ours, trainers = (Trainer(Constant(), C, H, A, CONFIG) for _ in range(2))
    for _ in range(3):
        metrics = ours.extraction.update(two_sided())
        assert torch.as_tensor(metrics["clone_loss"]).item() == trainers.clone(two_sided())["clone_loss"]
    assert torch.equal(ours.actor.expert.chunk, trainers.actor.expert.chunk)


def test_learning_by_cloning_needs_no_reference_and_trains_the_values_beside() -> None:
    made = Trainer(Constant(), C, H, A, CONFIG)
    before = made.values.critic.value.bias.detach().clone()
    metrics = made.learn(two_sided())
    assert {"clone_loss", "critic_loss", "value_loss"} <= metrics.keys()
    assert not torch.equal(before, made.values.critic.value.bias)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_rows_count_by_their_weight_relative_to_the_others(scale: float) -> None:
    made, rows = Trainer(Constant(), C, H, A, CONFIG), two_sided()
    weight = scale * torch.where(torch.arange(ROWS) % 2 == 0, 1.0, 3.0)
    mean = 0.0
    for step in range(900):
        made.actor.descent.step(made.actor.cloning_loss(rows, weight))
        mean += float(made.actor.expert.chunk.detach().mean()) * (step >= 300) / 600
    assert mean == pytest.approx((-0.5 + 3 * 0.5) / 4, abs=0.04)


def test_a_row_without_weight_is_not_there() -> None:
    rows = two_sided()
    spoiled = replace(
        rows, action=torch.where(rows.action < 0, torch.full_like(rows.action, 7.0), rows.action)
    )
    weight = (rows.action[:, 0, 0] > 0).float()
    losses = [
        Trainer(Constant(), C, H, A, CONFIG).actor.cloning_loss(one, weight).item() for one in (rows, spoiled)
    ]
    assert losses[0] == losses[1]
