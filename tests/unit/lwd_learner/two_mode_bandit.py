# SPDX-License-Identifier: Apache-2.0
"""One state, one step, two ways to act of which one pays: the smallest task that tells policy extractions apart."""

from __future__ import annotations

import torch
from plain_batch import plain_batch
from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.divl import DivlConfig
from lwd_learner.extraction import ExtractionConfig
from lwd_learner.trainer import Trainer, TrainerConfig

C, H, A = 2, 1, 1
MODE = 0.6  # right, which pays 1, and minus it, which pays nothing
SPREAD = 0.05  # of the actions about their mode
ROWS = 256


class Expert(nn.Module):
    """The interface of a flow expert, in three layers; `context` enters by one linear map, as in `FlowExpert`."""

    context_entry = "context.0"

    def __init__(self, context_dim: int = C, width: int = 64) -> None:
        super().__init__()
        self.context = nn.Sequential(nn.Linear(context_dim, width), nn.SiLU())
        self.enter = nn.Linear(H * A + 2 + width, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, H * A))

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        time = torch.stack([flow_time, flow_time.square()], dim=-1)
        velocity: Tensor = self.body(
            self.enter(torch.cat([noisy.flatten(1), time, self.context(context)], dim=-1))
        )
        return velocity.view_as(noisy)


def replayed(generator: torch.Generator, right: float = 0.5, rows: int = ROWS) -> Batch:
    """What a replay gives of it; a share `right` of the rows went where it pays."""
    side = torch.where(torch.rand(rows, generator=generator) < right, 1.0, -1.0)
    action = MODE * side + SPREAD * torch.randn(rows, generator=generator)
    pays = side > 0
    return plain_batch(
        torch.zeros(rows, C),
        action.reshape(rows, H, A),
        reward=pays.float(),
        outcome=torch.where(pays, 1, 2),
    )


def made(extraction: ExtractionConfig, expert: nn.Module | None = None) -> Trainer:
    """A trainer of it; one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = TrainerConfig(
        divl=DivlConfig(ema_rate=0.05),  # the slow critic arrives within a hundred steps
        extraction=extraction,
        critic=CriticConfig(width=32, embedding=8),
        policy_rate=2e-3,
        critic_rate=3e-3,
        batch=ROWS,
    )
    return Trainer(expert or Expert(), C, H, A, config)


def share_right(trainer: Trainer, rows: int = 4000) -> float:
    """Share of the policy's actions on the side that pays."""
    noise = torch.randn(rows, H, A, generator=torch.Generator().manual_seed(1))
    chunk = trainer.extraction.act(torch.zeros(rows, C), noise)
    return float((chunk > 0).float().mean())
