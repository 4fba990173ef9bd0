# SPDX-License-Identifier: Apache-2.0
"""Edit head (QAM-E): a small correction of what the flow does, uphill on the critic, as random as it is asked to be.

algorithm.md 1.8, 1.9. B rows, H steps and A dimensions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lwd_learner.batch import Batch
from lwd_learner.extraction.head import climbed_value
from lwd_learner.flow_actor import FlowActor
from lwd_learner.value_learner import Metrics, ValueLearner
from lwd_policy.action_head import EditHead, EditSpec, split_noise


@dataclass(frozen=True)
class EditConfig:
    """How an edit head learns."""

    head: EditSpec = field(default_factory=EditSpec)
    entropy: float = (
        -0.5
    )  # nat per executed coordinate of the edit, which the temperature aims at; as published
    temperature: float = (
        0.01  # value units per nat, at first; 1 as published is for values that span 100, not 1
    )
    temperature_rate: float = (
        3e-3  # Adam, of its logarithm; at the policy's rate a factor 10 takes 8000 updates
    )
    acts_after: int = 1000  # updates since the first reference was frozen; until then the flow acts alone

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"an edit's temperature is positive, not {self.temperature}")


def squash(center: Tensor, log_deviation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The edit e = tanh(u) that noise draws from u ~ N(center, exp(log_deviation)^2), and log pi(e) by coordinate.

    All [B, H, A]. log pi(e) = log N(u) - log(1 - tanh(u)^2), the latter written so that it is finite for every u.
    """
    before = center + log_deviation.exp() * noise
    gaussian = -0.5 * noise.square() - log_deviation - 0.5 * math.log(2 * math.pi)
    shrinkage = 2 * (math.log(2) - before - functional.softplus(-2 * before))
    return torch.tanh(before), gaussian - shrinkage


def edit_loss(value: Tensor, log_density: Tensor, temperature: Tensor) -> Tensor:
    """- mean Q + temperature * mean log pi. value, log_density: [B]; temperature: a scalar, constant here."""
    return (temperature.detach() * log_density - value).mean()


def temperature_loss(temperature: Tensor, entropy: Tensor, target: Tensor) -> Tensor:
    """temperature * mean(entropy - target): falls with the temperature while the edit is more random than it has to be.
    entropy, target: [B], constant here."""
    return temperature * (entropy - target).detach().mean()


class Edit:
    """Edits what `flow` (context, noise) -> chunk does. Neither the flow nor the critic learns anything from it."""

    def __init__(
        self,
        config: EditConfig,
        flow: Callable[[Tensor, Tensor], Tensor],
        actor: FlowActor,
        values: ValueLearner,
    ) -> None:
        self._config, self._flow, self._actor, self._values = config, flow, actor, values
        self.network = EditHead(values.context_dim, *actor.chunk, config.head).to(actor.device)
        temperature = _Temperature(config.temperature).to(actor.device)
        adam = partial(torch.optim.Adam, lr=config.temperature_rate)
        self._descent = actor.descent.beside("edit", self.network)
        self._cooling = actor.descent.beside("edit_temperature", temperature, adam)
        self.modules: Mapping[str, nn.Module] = {"edit": self.network, "edit_temperature": temperature}
        self.descents = (self._descent, self._cooling)

    def update(self, batch: Batch) -> Metrics:
        """One step of the head and one of its temperature. Steps that were not executed count for neither."""
        context, mask, shape = batch.context, batch.mask, batch.action.shape
        flow = self._flow(context, self._actor.normal(shape))
        center, log_deviation = self._descent.network(context, flow)
        edit, densities = squash(center, log_deviation, self._actor.normal(shape))
        value = climbed_value(
            self._values, self._values.state(batch), self.network.apply_edit(flow, edit), mask
        )
        log_density = (densities * mask.unsqueeze(-1)).sum(dim=(1, 2))
        temperature: Tensor = self._cooling.network()
        loss = edit_loss(value, log_density, temperature)
        norm = self._descent.step(loss)
        coordinates = mask.sum(dim=1) * shape[2]
        entropy = -log_density.detach()
        self._cooling.step(temperature_loss(temperature, entropy, self._config.entropy * coordinates))
        return {
            "edit_loss": loss,
            "edit_gradient": norm,
            "edit_entropy": (entropy / coordinates.clamp_min(1)).mean(),
            "edit_temperature": temperature.detach(),
            "edit_size": self._config.head.scale * edit.detach().abs().mean(),
            "edit_value": value.detach().mean(),
        }

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """The flow's chunk with its edit drawn, as published; with noise [B, H, A] only, with the edit's centre."""
        start, own = split_noise(noise, self._actor.chunk[0])
        return self.network.act(context, self._flow(context, start), own)

    def restart(self, anew: bool = True) -> None:
        """What it learned of the critic stays true, and it sees where the flow now goes: only its momentum is dropped."""
        for descent in self.descents:
            descent.restart()


class _Temperature(nn.Module):
    """exp of a parameter, so that it stays positive."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor([math.log(first)]))

    def forward(self) -> Tensor:
        return self.log_value.exp().squeeze(0)
