# SPDX-License-Identifier: Apache-2.0
"""One network's way down its loss: an optimiser, a clipped gradient, and a refusal of what is not a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from lwd_learner.ranks import ALONE, Ranks

MakeOptimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class NonFiniteLoss(Exception):
    """A loss or gradient stopped being a number; nothing was updated by it."""


class Descent:
    """Owns the optimiser of `module`. `name` stands in errors and in saved states.

    `network` is what a loss must be computed with: several ranks then share its gradient. Alone it is `module`.
    """

    def __init__(
        self, name: str, module: nn.Module, make: MakeOptimiser, norm_max: float, ranks: Ranks = ALONE
    ) -> None:
        """norm_max: the gradient is scaled down to this norm. ranks: have placed the module (`Ranks.place`)."""
        self.name, self.module, self.norm_max = name, module, norm_max
        self.network = ranks.engine(module)
        self._ranks = ranks
        self._make = make
        self.optimiser = make(module.parameters())

    def beside(self, name: str, module: nn.Module, make: MakeOptimiser | None = None) -> Descent:
        """A descent of another network under the same terms; make: but with this optimiser."""
        placed = self._ranks.place(module)
        return Descent(name, placed, make or self._make, self.norm_max, self._ranks)

    def restart(self) -> None:
        """Forget what the optimiser remembers of gradients."""
        self.optimiser = self._make(self.module.parameters())

    @property
    def peak_rate(self) -> float:
        """The learning rate that the optimiser was made with."""
        return float(self.optimiser.defaults["lr"])

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next steps."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def step(self, loss: Tensor, along: Sequence[Descent] = ()) -> float:
        """One step down a scalar loss, the mean over ranks; returns the gradient's norm before it was clipped. along:
        descents of other networks that the loss went through; each clips its own part.

        Raises NonFiniteLoss, on all ranks at once: one that went on alone would wait for the others for ever.
        """
        value = float(self._ranks.mean(loss))
        if not isfinite(value):
            raise NonFiniteLoss(f"the {self.name} loss is {value}")
        together = (self, *along)
        for one in together:
            one.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        lengths = [one._clip() for one in together]  # all of them are numbers before any network changes
        for one in together:
            one.optimiser.step()
        return lengths[0]

    def _clip(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.norm_max)
        length = float(self._ranks.whole(norm))
        if not isfinite(length):
            raise NonFiniteLoss(f"the {self.name} gradient has norm {length}")
        return length
