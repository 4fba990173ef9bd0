# SPDX-License-Identifier: Apache-2.0
"""What the trainer expects of a policy extraction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.descent import Descent
from lwd_learner.value_learner import Metrics


class Extraction(Protocol):
    """Improves the actor's flow expert, or networks of its own beside it, by what the values say."""

    def update(self, batch: Batch) -> Metrics:
        """One policy step. Raises NonFiniteLoss, ReferenceMissing."""

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """How the policy acts: context [B, C], noise [B, H, A] -> chunk [B, H, A] in [-1, 1], without gradient."""

    def restart(self) -> None:
        """The reference was frozen anew: a new phase."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks of its own, by name; all that is saved besides `numbers`."""

    @property
    def descents(self) -> tuple[Descent, ...]:
        """Of its own networks."""

    @property
    def numbers(self) -> dict[str, float]:
        """What else must be saved."""

    def restore(self, numbers: Mapping[str, float]) -> None:
        """Continue from saved `numbers`."""
