# SPDX-License-Identifier: Apache-2.0
"""An extraction with a head: both learn from the same batch, and together they act."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.descent import Descent
from lwd_learner.extraction.base import Extraction
from lwd_learner.extraction.edit import Edit, EditConfig
from lwd_learner.extraction.head import Head
from lwd_learner.extraction.one_step import OneStep, OneStepConfig
from lwd_learner.flow_actor import FlowActor
from lwd_learner.value_learner import Metrics, ValueLearner
from lwd_policy.action_head import noise_steps
from lwd_policy.flow_policy import FlowPolicy

HeadConfig = EditConfig | OneStepConfig

_UPDATES = "head_updates"


def with_head(
    config: HeadConfig | None,
    extraction: Extraction,
    actor: FlowActor,
    values: ValueLearner,
) -> Extraction:
    """The extraction with the head that `config` describes; itself for None. The head learns as the actor's expert does."""
    if config is None:
        return extraction
    head = make_head(config, extraction, actor, values)
    return Headed(extraction, head, config.acts_after, actor.chunk[0])


def make_head(config: HeadConfig, extraction: Extraction, actor: FlowActor, values: ValueLearner) -> Head:
    """The head alone. Its first weights are decided by the seed of the actor's noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(actor.noise.initial_seed())
        match config:
            case EditConfig():
                return Edit(config, extraction.act, actor, values)
            case OneStepConfig():
                return OneStep(config, extraction.act, actor, values)


class Headed:
    """Is an extraction. The head acts once it has had `acts_after` updates on top of a frozen reference: what it does
    before that is an accident of its first weights, and robots may be given the policy at any time."""

    def __init__(self, extraction: Extraction, head: Head, acts_after: int, horizon: int) -> None:
        self.extraction, self.head = extraction, head
        self._acts_after, self._horizon = acts_after, horizon
        self._updates = 0  # of the head, since it began

    @property
    def acting(self) -> bool:
        """Whether the head has its say."""
        return self._updates >= self._acts_after

    def update(self, batch: Batch) -> Metrics:
        """One step of the extraction, then one of the head on top of it."""
        metrics = self.extraction.update(batch) | self.head.update(batch)
        self._updates += 1
        return metrics | {"head_acts": float(self.acting)}

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """noise: [B, N, A] with N of `noise_steps`; [B, H, A] makes an edit head act by its centre."""
        if self.acting:
            return self.head.act(context, noise)
        return self.extraction.act(context, noise[:, : self._horizon])

    def restart(self) -> None:
        """A new phase for both. A head that acts goes on acting, and follows; one that does not yet begins again."""
        anew = not self.acting or not self._updates
        self.extraction.restart()
        self.head.restart(anew)
        if anew:
            self._updates = 0

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {**self.extraction.modules, **self.head.modules}

    @property
    def descents(self) -> tuple[Descent, ...]:
        return (*self.extraction.descents, *self.head.descents)

    @property
    def numbers(self) -> dict[str, float]:
        return {**self.extraction.numbers, _UPDATES: self._updates}

    def restore(self, numbers: Mapping[str, float]) -> None:
        self.extraction.restore({name: number for name, number in numbers.items() if name != _UPDATES})
        self._updates = int(numbers[_UPDATES])


def acting_noise_steps(config: HeadConfig | None, horizon: int) -> int:
    """N of the noise [B, N, A] that `act` wants."""
    return noise_steps(config.head if isinstance(config, EditConfig) else None, horizon)


def deployed(policy: FlowPolicy, extraction: Extraction) -> FlowPolicy:
    """What robots are to run, where `policy` is the flow that the extraction improves: the same with the head, if one
    acts. Nothing is copied."""
    if isinstance(extraction, Headed) and extraction.acting:
        return policy.with_head(extraction.head.network)
    return policy.with_head(None)
