# SPDX-License-Identifier: Apache-2.0
"""One-step head: does in one step what a flow does in many, and climbs the critic while it is at it. algorithm.md 1.8.

Beside adjoint matching this is QAM-F; beside cloning it is FQL (arXiv 2502.02538).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.extraction.head import climbed_value
from lwd_learner.flow_actor import FlowActor
from lwd_learner.value_learner import Metrics, ValueLearner
from lwd_policy.action_head import OneStepHead


@dataclass(frozen=True)
class OneStepConfig:
    """How a one-step head learns."""

    distillation: float = (
        3.0  # value units per mean squared distance to the flow; 300 as published at values of 100
    )
    acts_after: int = 1000  # updates since the first reference was frozen; the flow acts until it is followed

    def __post_init__(self) -> None:
        if not self.distillation >= 0.0:
            raise ValueError(f"distillation pulls towards the flow, it is not {self.distillation}")


def one_step_loss(chunk: Tensor, flow: Tensor, value: Tensor, distillation: float) -> Tensor:
    """distillation * mean_{B,H,A} (mu - flow)^2 - mean_B Q. chunk, flow: [B, H, A] from the same noise; value: [B].

    Q is not divided by its size, as in the published tables (an option there): with a success of 1 its scale is known,
    and a critic that knows nothing yet, |Q| near 0, would pull hardest.
    """
    return distillation * (chunk - flow.detach()).square().mean() - value.mean()


class OneStep:
    """Follows `flow` (context, noise) -> chunk. Neither the flow nor the critic learns anything from it."""

    def __init__(
        self,
        config: OneStepConfig,
        flow: Callable[[Tensor, Tensor], Tensor],
        actor: FlowActor,
        values: ValueLearner,
    ) -> None:
        self._config, self._flow, self._actor, self._values = config, flow, actor, values
        self.network = OneStepHead(actor.ranks.copy(actor.descent.module))
        self._descent = actor.descent.beside("one_step", self.network.expert)
        self._learning = OneStepHead(self._descent.network)
        self.modules: Mapping[str, nn.Module] = {"one_step": self.network}
        self.descents = (self._descent,)

    def update(self, batch: Batch) -> Metrics:
        """One step. All steps of a chunk follow the flow; those that were executed climb as well."""
        noise = self._actor.normal(batch.action.shape)
        flow = self._flow(batch.context, noise)
        chunk = self._learning(batch.context, noise)
        value = climbed_value(self._values, self._values.state(batch), chunk.clamp(-1.0, 1.0), batch.mask)
        loss = one_step_loss(chunk, flow, value, self._config.distillation)
        norm = self._descent.step(loss)
        return {
            "one_step_loss": loss,
            "one_step_gradient": norm,
            "one_step_distance": (chunk.detach() - flow).square().mean(),
            "one_step_value": value.detach().mean(),
        }

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """What the head makes of the noise."""
        return self.network.act(context, noise)

    def restart(self, anew: bool = True) -> None:
        """Begin as the first step of the present flow, or go on: most of the way to another flow takes a hundred updates."""
        if anew:
            self.network.expert.load_state_dict(self._actor.descent.module.state_dict())
        self._descent.restart()
