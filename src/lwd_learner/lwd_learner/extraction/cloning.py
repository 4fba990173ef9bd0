# SPDX-License-Identifier: Apache-2.0
"""Cloning as an extraction: the policy imitates the batch, whatever the values say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.descent import Descent
from lwd_learner.flow_actor import FlowActor, fast_products
from lwd_learner.value_learner import Metrics, ValueLearner


@dataclass(frozen=True)
class CloningConfig:
    """Flow matching to the actions that are drawn. Which are drawn is the replay's selection: nothing else to set."""


class Cloning:
    """Flow matching to the batch's valid actions; `weights` may let some rows count more. algorithm.md 2.5.

    It never asks for a reference.
    """

    modules: Mapping[str, nn.Module] = {}
    descents: tuple[Descent, ...] = ()

    def __init__(self, actor: FlowActor, values: ValueLearner) -> None:
        self.actor, self.values = actor, values

    def weights(self, batch: Batch) -> Tensor | None:
        """[B] how much each row counts, >= 0; None: all the same."""
        return None

    def update(self, batch: Batch) -> Metrics:
        """One cloning step. Its sampling noise is far above what faster products lose."""
        weight = self.weights(batch)
        with fast_products():
            loss = self.actor.cloning_loss(batch, weight)
            norm = self.actor.descent.step(loss)
        metrics: Metrics = {"clone_loss": loss, "clone_gradient": norm}
        return metrics if weight is None else metrics | weight_metrics(weight)

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """Euler steps of the cloned flow."""
        return self.actor.sample(self.actor.expert, context, noise)

    def restart(self) -> None:
        """Nothing is measured from the reference."""

    @property
    def numbers(self) -> dict[str, float]:
        return {}

    def restore(self, numbers: Mapping[str, float]) -> None:
        """There are none."""


def weight_metrics(weight: Tensor) -> Metrics:
    """[B] weights. effective_rows: share of the batch that would say as much if all its rows counted the same."""
    effective = weight.sum().square() / weight.square().sum() / len(weight)
    return {"weight": weight.mean(), "weight_max": weight.max(), "effective_rows": effective}
