# SPDX-License-Identifier: Apache-2.0
"""Advantage-weighted regression: clone what the replay holds, more of what turned out better than expected.

AWR (arXiv 1910.00177) with the critic and the clip of IQL (arXiv 2110.06169). Its fixed point is the tilted policy
pi(a) ∝ pi_data(a) exp(A/temperature): the one that QAM aims at, from weights instead of gradients of the critic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from lwd_learner import divl
from lwd_learner.batch import Batch
from lwd_learner.extraction.cloning import Cloning
from lwd_learner.flow_actor import FlowActor
from lwd_learner.value_learner import ValueLearner


@dataclass(frozen=True)
class AwrConfig:
    """How sharply the better actions are preferred."""

    temperature: float = (
        0.1  # value per nat; with Q in [0, 1]: .1 better counts e times as much. IQL's 1/beta: .1-.33
    )
    weight_max: float = 100.0  # as in IQL: one lucky row must not be the whole batch

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.weight_max < 1:
            raise ValueError(f"AWR needs a temperature above 0 and weights that may reach 1, not {self}")


def advantage_weight(advantage: Tensor, config: AwrConfig) -> Tensor:
    """min(exp(A / temperature), weight_max): any shape, the same back."""
    return torch.exp((advantage / config.temperature).clamp_max(log(config.weight_max)))


class AdvantageWeighted(Cloning):
    """Cloning with weights from A = min over target heads of Q(s, a) - V(s). V(s) is `ValueLearner.baseline`; within
    one state it cancels, it decides only how much states count against each other."""

    def __init__(self, actor: FlowActor, values: ValueLearner, config: AwrConfig) -> None:
        super().__init__(actor, values)
        self._config = config

    @torch.no_grad()
    def weights(self, batch: Batch) -> Tensor:
        q = divl.value_label(self.values.q(self.values.slow_state(batch), batch.action, batch.mask))
        return advantage_weight(q - self.values.baseline(self.values.state(batch)), self._config)
