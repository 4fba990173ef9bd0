# SPDX-License-Identifier: Apache-2.0
"""QAM: tilt the flow expert towards the critic by adjoint matching."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lwd_learner import qam
from lwd_learner.batch import Batch
from lwd_learner.descent import Descent
from lwd_learner.flow_actor import FlowActor
from lwd_learner.value_learner import Metrics, ValueLearner


class AdjointMatching:
    """The states of a batch are used, its actions are not. algorithm.md 2.6, 2.7."""

    modules: Mapping[str, nn.Module] = {}
    descents: tuple[Descent, ...] = ()

    def __init__(self, actor: FlowActor, values: ValueLearner, config: qam.QamConfig) -> None:
        self._actor, self._values, self._config = actor, values, config
        self.dual = qam.initial_dual(config)

    def update(self, batch: Batch) -> Metrics:
        """One adjoint-matching step, and one of the temperature."""
        actor, config = self._actor, self._config
        context, mask = batch.context, batch.mask
        reference_velocity = actor.velocity(actor.frozen, context)
        noise = actor.normal((config.steps, len(batch), actor.chunk[0] * actor.chunk[1]))
        path = qam.rollout(actor.velocity(actor.expert, context), reference_velocity, noise, config.paths)
        endpoint, temperature = path.states[-1], qam.effective_lambda(self.dual, config)
        terminal = qam.terminal_adjoint(
            lambda a: self._values.q(context, a.view(-1, *actor.chunk), mask),
            endpoint,
            temperature,
            config.clip,
            mask.unsqueeze(-1).expand(-1, *actor.chunk).flatten(1),
            config.adjoint_norm_max,
        )
        carry = qam.denoiser_adjoint if config.adjoint == "denoiser" else qam.lean_adjoint
        adjoints = carry(reference_velocity, path.states, terminal)
        loss = qam.qam_loss(path, adjoints)
        norm = actor.descent.step(loss)
        kl = (qam.path_kl(path) / mask.sum(dim=1)).mean()
        self.dual = qam.update_dual(self.dual, float(kl), config)
        return {
            "policy_loss": loss / path.velocities[:, 0].numel(),
            "policy_gradient": norm,
            "adjoint": adjoints.norm(dim=-1).mean(),
            "path_kl": kl,
            "lambda": temperature,
            "saturated": (endpoint.abs() > config.clip).float().mean(),
        }

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """Euler steps of the tilted flow."""
        return self._actor.sample(self._actor.expert, context, noise)

    def restart(self) -> None:
        """The distance from a new reference is spent anew."""
        self.dual = qam.initial_dual(self._config)

    @property
    def numbers(self) -> dict[str, float]:
        return self.dual._asdict()

    def restore(self, numbers: Mapping[str, float]) -> None:
        self.dual = qam.Dual(**numbers)
