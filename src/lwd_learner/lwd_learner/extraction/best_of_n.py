# SPDX-License-Identifier: Apache-2.0
"""Best of N: clone, and when acting let the critic choose among samples. Needs the critic where the policy acts, so it
is for evaluation and comparison; what is published to robots is the cloned flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lwd_learner import divl
from lwd_learner.extraction.cloning import Cloning
from lwd_learner.flow_actor import FlowActor
from lwd_learner.value_learner import ValueLearner


@dataclass(frozen=True)
class BestOfNConfig:
    """How many samples the critic chooses from."""

    candidates: int = (
        16  # samples; the tilt grows as their logarithm, the KL is at most log N - (N - 1)/N nat
    )
    executed_steps: int | None = (
        None  # policy steps until the next decision: what the critic judges; None: all
    )

    def __post_init__(self) -> None:
        if self.candidates < 1 or (self.executed_steps is not None and self.executed_steps < 1):
            raise ValueError(f"best-of-N needs a candidate and an executed step at least, not {self}")


def best_of(candidates: Tensor, q: Tensor) -> Tensor:
    """The candidate with the highest value of each row; the first of equals.

    candidates: [N, B, ...]; q: [N, B]. Returns [B, ...].
    """
    best = q.argmax(dim=0)
    return candidates[best, torch.arange(candidates.shape[1], device=candidates.device)]


class BestOfN(Cloning):
    """Acts with the sample that the lower head of the slow critic ranks first: the label that V learns from."""

    def __init__(self, actor: FlowActor, values: ValueLearner, config: BestOfNConfig) -> None:
        super().__init__(actor, values)
        if values.features.modules:
            raise ValueError(
                'best-of-N acts on a context alone, which a critic with features = "own" cannot judge'
            )
        self._config = config

    @torch.no_grad()
    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """The given noise makes the first candidate and decides what noise makes the others, as everything that acts
        is a function of context and noise."""
        rows, horizon, _ = noise.shape
        count = self._config.candidates
        digest = int(noise.contiguous().view(torch.int32).long().sum())
        generator = torch.Generator(noise.device).manual_seed(digest)
        others = torch.randn((count - 1, *noise.shape), generator=generator, device=noise.device)
        noises = torch.cat([noise.unsqueeze(0), others]).flatten(0, 1)
        contexts = context.expand(count, *context.shape).flatten(0, 1)
        chunks = self.actor.sample(self.actor.expert, contexts, noises)
        steps = torch.arange(horizon, device=noise.device)
        mask = (steps < (self._config.executed_steps or horizon)).expand(len(chunks), horizon)
        q = divl.value_label(self.values.q(contexts, chunks, mask))
        return best_of(chunks.view(count, *noise.shape), q.view(count, rows))
