# SPDX-License-Identifier: Apache-2.0
"""What value and critic see of a state: the policy's cached trunk features, or a feature of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lwd_learner.descent import Descent, MakeOptimiser
from lwd_learner.divl import ema_update
from lwd_learner.image_encoder import ImageEncoder
from lwd_learner.ranks import Ranks


class CriticFeatures(Protocol):
    """From contexts [B, C] and images (`Batch.images`) to features [B, Z], as trained now and as they slowly follow."""

    dim: int  # Z

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks, by name, to be saved."""

    @property
    def descents(self) -> tuple[Descent, ...]:
        """What goes along with every step of value or critic."""

    def online(self, context: Tensor, images: Tensor | None) -> Tensor:
        """As V and the critic in training read them; their losses reach what made them."""

    def slow(self, context: Tensor, images: Tensor | None) -> Tensor:
        """As the target critic reads them, without gradient."""

    def follow(self, rate: float) -> None:
        """The slow ones come nearer to those in training."""


class TrunkFeatures:
    """The context itself: nothing learns, nothing has to follow."""

    modules: Mapping[str, nn.Module] = {}
    descents: tuple[Descent, ...] = ()

    def __init__(self, context_dim: int) -> None:
        self.dim = context_dim

    def online(self, context: Tensor, images: Tensor | None) -> Tensor:
        return context

    def slow(self, context: Tensor, images: Tensor | None) -> Tensor:
        return context

    def follow(self, rate: float) -> None:
        pass


class OwnFeatures:
    """One encoder shared by V and Q, trained by the losses of both; the target critic reads a copy that follows by EMA
    as it does itself. algorithm.md 1.2, 4.8."""

    def __init__(
        self, encoder: ImageEncoder, make_optimiser: MakeOptimiser, norm_max: float, ranks: Ranks
    ) -> None:
        self.dim = encoder.dim
        placed = ranks.place(encoder)
        self._descent = Descent("encoder", placed, make_optimiser, norm_max, ranks)
        self._target = ranks.copy(placed).requires_grad_(False)
        self.modules: Mapping[str, nn.Module] = {"encoder": placed, "target_encoder": self._target}
        self.descents = (self._descent,)

    def online(self, context: Tensor, images: Tensor | None) -> Tensor:
        feature: Tensor = self._descent.network(context, _there(images))
        return feature

    @torch.no_grad()
    def slow(self, context: Tensor, images: Tensor | None) -> Tensor:
        feature: Tensor = self._target(context, _there(images))
        return feature

    def follow(self, rate: float) -> None:
        ema_update(self._target, self._descent.network, rate)


def _there(images: Tensor | None) -> Tensor:
    if images is None:
        raise ValueError('a critic with features = "own" needs images, which this batch was drawn without')
    return images
