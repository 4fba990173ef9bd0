# SPDX-License-Identifier: Apache-2.0
"""QAM: tilt the flow expert towards the critic by adjoint matching."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lwd_learner import qam
from lwd_learner.batch import Batch
from lwd_learner.descent import Descent
from lwd_learner.flow_actor import FlowActor
from lwd_learner.value_learner import Metrics, ValueLearner


class AdjointMatching:
    """The states of a batch are used, its actions are not. algorithm.md 2.6, 2.7."""

    descents: tuple[Descent, ...] = ()

    def __init__(self, actor: FlowActor, values: ValueLearner, config: qam.QamConfig) -> None:
        self._actor, self._values, self._config = actor, values, config
        self.dual = qam.initial_dual(config)
        size = actor.chunk[0] * actor.chunk[1]
        self._spread = _Spread(size).to(actor.device) if config.adjoint == "gaussian" else None

    def update(self, batch: Batch) -> Metrics:
        """One adjoint-matching step, and one of the temperature."""
        actor, config = self._actor, self._config
        context, mask = batch.context, batch.mask
        noise = actor.normal((config.steps, len(batch), actor.chunk[0] * actor.chunk[1]), axis=1)
        temperature = qam.effective_lambda(self.dual, config)
        state = self._values.slow_state(batch)
        step = qam.policy_loss(
            actor.velocity(actor.expert, context),
            actor.velocity(actor.frozen, context),
            lambda a: self._values.q(state, a.view(-1, *actor.chunk), mask),
            noise,
            temperature,
            config,
            mask.unsqueeze(-1).expand(-1, *actor.chunk).flatten(1),
            self._reference_variance(context),
            actor.ranks.total,
        )
        norm = actor.descent.step(step.loss)
        kl = actor.ranks.mean((qam.path_kl(step.path) / mask.sum(dim=1)).mean())
        self.dual = qam.update_dual(self.dual, float(kl), config)
        return {
            "policy_loss": step.loss / step.path.velocities[:, 0].numel(),
            "policy_gradient": norm,
            "adjoint": step.adjoints.norm(dim=-1).mean(),
            "path_kl": kl,
            "lambda": temperature,
            "saturated": step.saturated,
        }

    def _reference_variance(self, context: Tensor) -> Tensor | None:
        """[H A] what the gaussian adjoint needs to know of the reference, from two samples in some of the contexts."""
        if self._spread is None:
            return None
        context = context[: self._actor.ranks.share(self._config.spread_rows)]
        noise = self._actor.normal((2, len(context), self._actor.chunk[0] * self._actor.chunk[1]), axis=1)
        velocity = self._actor.velocity(self._actor.frozen, context)
        sample = self._actor.ranks.mean(qam.reference_variance(velocity, noise, self._config.steps))
        return self._spread.add(sample, self._config.spread_ema)

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """Euler steps of the tilted flow."""
        return self._actor.sample(self._actor.expert, context, noise)

    def restart(self) -> None:
        """The distance from a new reference is spent anew."""
        self.dual = qam.initial_dual(self._config)
        if self._spread is not None:
            self._spread.forget()

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {} if self._spread is None else {"spread": self._spread}

    @property
    def numbers(self) -> dict[str, float]:
        return self.dual._asdict()

    def restore(self, numbers: Mapping[str, float]) -> None:
        self.dual = qam.Dual(**numbers)


class _Spread(nn.Module):
    """Running mean [D] of the reference's variance, unbiased from its first sample on; a module so that it is saved."""

    total: Tensor
    weight: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(size))
        self.register_buffer("weight", torch.zeros(()))

    def add(self, sample: Tensor, rate: float) -> Tensor:
        """Weigh in one sample [D]; returns the mean [D]."""
        self.total.lerp_(sample, rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)
        return self.total / self.weight

    def forget(self) -> None:
        self.total.zero_()
        self.weight.zero_()
