# SPDX-License-Identifier: Apache-2.0
"""One network's way down its loss: an optimiser, a clipped gradient, and a refusal of what is not a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite

import torch
from torch import Tensor, nn

MakeOptimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class NonFiniteLoss(Exception):
    """A loss or gradient stopped being a number; nothing was updated by it."""


class Descent:
    """Owns the optimiser of `module`. `name` stands in errors and in saved states."""

    def __init__(self, name: str, module: nn.Module, make: MakeOptimiser, norm_max: float) -> None:
        """norm_max: the gradient is scaled down to this norm."""
        self.name, self.module, self.norm_max = name, module, norm_max
        self._make = make
        self.optimiser = make(module.parameters())

    def restart(self) -> None:
        """Forget what the optimiser remembers of gradients."""
        self.optimiser = self._make(self.module.parameters())

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next steps."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def step(self, loss: Tensor) -> float:
        """One step down a scalar loss; returns the gradient's norm before it was clipped. Raises NonFiniteLoss."""
        if not isfinite(float(loss.detach())):
            raise NonFiniteLoss(f"the {self.name} loss is {float(loss.detach())}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.norm_max))
        if not isfinite(norm):
            raise NonFiniteLoss(f"the {self.name} gradient has norm {norm}")
        self.optimiser.step()
        return norm
