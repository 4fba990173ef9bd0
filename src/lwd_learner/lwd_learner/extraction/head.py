# SPDX-License-Identifier: Apache-2.0
"""What heads have in common: how they train beside an extraction, and the value that they climb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.descent import Descent
from lwd_learner.value_learner import Metrics, ValueLearner
from lwd_policy.action_head import ActionHead


class Head(Protocol):
    """Trains one `lwd_policy.action_head`. It acts on what an extraction does, or in its place."""

    def update(self, batch: Batch) -> Metrics:
        """One step of the head, after the extraction's. Raises NonFiniteLoss."""

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """context [B, C], noise [B, N, A] (`action_head.noise_steps`) -> chunk [B, H, A] in [-1, 1], without gradient."""

    def restart(self, anew: bool = True) -> None:
        """The reference was frozen anew. anew: and the head never acted; otherwise it goes on from what it is."""

    @property
    def network(self) -> ActionHead:
        """What robots run."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All that is saved, by name."""

    @property
    def descents(self) -> tuple[Descent, ...]:
        """Of all that learns."""


def climbed_value(values: ValueLearner, state: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
    """[B] mean of the heads of the online critic, as published (adjoint matching asks the slow one). algorithm.md 1.8.

    state: `ValueLearner.state`. The gradient reaches the chunk, in its executed steps (mask [B, H]), and no parameter of the critic.
    """
    critic = values.critic_descent.module  # what collects gradients over ranks expects one for every call
    with _constant(critic):
        heads: Tensor = critic(state, chunk, mask)
    return heads.mean(dim=0)


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Products that are formed inside have no gradient in the module's parameters; it would be formed for nothing."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
