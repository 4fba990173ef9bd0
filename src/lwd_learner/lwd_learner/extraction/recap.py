# SPDX-License-Identifier: Apache-2.0
"""RECAP: clone everything, told which of it was better than expected; act as if told that it will be.

Advantage conditioning of pi*0.6 (arXiv 2511.14759), with a flow expert in the place of the language model: a binary
indicator "advantage positive" enters beside the context, and is left out now and then so that guidance is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lwd_learner import divl
from lwd_learner.batch import Batch
from lwd_learner.conditioned_flow import fold, spread, widened
from lwd_learner.flow_actor import FlowActor, fast_products
from lwd_learner.transitions import AUTHOR_HUMAN
from lwd_learner.value_learner import Metrics, ValueLearner

# What an expert is told. Two inputs, so that "nothing" need not lie half-way between the other two.
POSITIVE, NEGATIVE, NOTHING = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2)


@dataclass(frozen=True)
class RecapConfig:
    """How advantages become an indicator, and how it is used."""

    positive_share: float = 0.3  # of a task's rows; as published for pre-training, .4 in later rounds
    drop: float = 0.3  # chance that a row is told nothing; as published
    guidance: float = (
        1.0  # weight beta of the indicator when acting; 1.5-2.5 as published. Robots run 1: one expert
    )

    def __post_init__(self) -> None:
        if not (0.0 < self.positive_share < 1.0 and 0.0 <= self.drop < 1.0):
            raise ValueError(f"RECAP needs a share between 0 and 1 and a drop below 1, not {self}")
        if self.guidance != 1.0 and self.drop == 0.0:
            raise ValueError(
                "guidance is a difference from an expert that was told nothing: it needs a drop above 0"
            )


def best_rows(advantage: Tensor, task: Tensor, share: float) -> Tensor:
    """[B], [B] -> [B] bool: the best `share` of each task's rows, to the nearest row."""
    best = torch.zeros_like(task, dtype=torch.bool)
    for one in set(task.tolist()):
        rows = (task == one).nonzero().squeeze(-1)
        order = advantage[rows].argsort(
            descending=True, stable=True
        )  # of equals, which are drawn at random, the first
        best[rows[order[: round(share * len(rows))]]] = True
    return best


class AdvantageConditioned:
    """Trains a wider copy of the actor's expert. After each step the actor's expert is what the copy does when told
    "positive": it can be published at any time. The batch decides what is positive in it; with several ranks, each
    rank's part of it does. Raises ValueError where ranks keep pieces of the expert: a piece cannot be widened."""

    def __init__(self, actor: FlowActor, values: ValueLearner, config: RecapConfig) -> None:
        self._actor, self._values, self._config = actor, values, config
        if any(actor.ranks.whole(one) is not one for one in actor.descent.module.parameters()):
            raise ValueError(
                "RECAP widens the expert, which needs it whole on every rank: train it with ddp, not fsdp"
            )
        self.wide = widened(actor.descent.module, values.context_dim, len(NOTHING))
        self._descent = actor.descent.beside("recap", self.wide)
        self.modules: Mapping[str, nn.Module] = {"recap": self.wide}
        self.descents = (self._descent,)

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Tensor:
        """[B] n-step return of the window, bootstrapped with V, minus V."""
        after = self._values.baseline(self._values.next_state(batch))
        target = divl.critic_target(batch.reward, batch.discount, after)
        return target - self._values.baseline(self._values.state(batch))

    def positive(self, batch: Batch) -> Tensor:
        """[B] bool. What a person did is positive, whatever came of it: somebody thought it necessary."""
        best = best_rows(self.advantage(batch), batch.task, self._config.positive_share)
        return best | (batch.author == AUTHOR_HUMAN)

    def update(self, batch: Batch) -> Metrics:
        """One cloning step of the whole batch, each row told its indicator or nothing."""
        positive = self.positive(batch)
        told = self._actor.uniform((len(batch),)) >= self._config.drop
        indicator = torch.stack([positive & told, ~positive & told], dim=-1).to(batch.context)
        seen = replace(batch, context=torch.cat([batch.context, indicator], dim=-1))
        with fast_products():
            loss = self._actor.cloning_loss(seen, expert=self._descent.network)
            norm = self._descent.step(loss)
        fold(self.wide, self._actor.descent.module, self._values.context_dim, POSITIVE)
        return {"clone_loss": loss, "clone_gradient": norm, "positive": positive.float().mean()}

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """Euler steps of the positive flow, or of the guided one."""
        if self._config.guidance == 1.0:
            return self._actor.sample(self._actor.expert, context, noise)
        return self._actor.sample(_Guided(self.wide, self._config.guidance), context, noise)

    def restart(self) -> None:
        """Begin from the present policy, which heeds no indicator."""
        spread(self._actor.descent.module, self.wide, self._values.context_dim)
        self._descent.restart()

    @property
    def numbers(self) -> dict[str, float]:
        return {}

    def restore(self, numbers: Mapping[str, float]) -> None:
        """There are none."""


class _Guided(nn.Module):
    """v(nothing) + beta (v(positive) - v(nothing)): classifier-free guidance."""

    def __init__(self, wide: nn.Module, guidance: float) -> None:
        super().__init__()
        self.wide, self.guidance = wide, guidance

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        without, told = (
            self.wide(
                torch.cat([context, one.to(context).expand(len(context), -1)], dim=-1), noisy, flow_time
            )
            for one in (NOTHING, POSITIVE)
        )
        guided: Tensor = torch.lerp(without, told, self.guidance)
        return guided
