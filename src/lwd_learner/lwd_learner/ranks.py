# SPDX-License-Identifier: Apache-2.0
"""What processes that train one model have to agree on. Here: one process, which agrees with itself.

R ranks take a step on one batch: global row g lies on rank g % R. A rank's first n / R rows are therefore the
global batch's first n, and the update is that of one process with the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class UnevenRows(ValueError):
    """Rows that cannot be dealt out to the ranks evenly; a mean of the ranks' means would not be the mean."""


class RanksDiverged(Exception):
    """Ranks hold different values of what they train together."""


class Ranks:
    """A single rank: nothing is sent. `distributed.Group` is the same for many.

    All ranks make the same calls in the same order, each with what it has; all get the same result.
    """

    index: int = 0
    size: int = 1
    sharded: bool = False  # whether a rank keeps pieces of parameters only
    keeper: bool = True  # whether this rank keeps the files of its host; the first rank always does

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes, publishes and speaks."""
        return self.index == 0

    # --- rows ----------------------------------------------------------------------------------------------

    def share(self, rows: int) -> int:
        """How many of the global batch's rows are this rank's. Raises UnevenRows."""
        if rows % self.size:
            raise UnevenRows(
                f"{rows} rows cannot be dealt out evenly to {self.size} ranks; take a multiple of {self.size}"
            )
        return rows // self.size

    def mine(self, rows: Tensor, axis: int = 0) -> Tensor:
        """This rank's rows, [.., B, ..], of numbers that all ranks hold for the global batch, [.., B R, ..]."""
        return rows[(slice(None),) * axis + (slice(self.index, None, self.size),)]

    def sampling(self, generator: torch.Generator) -> torch.Generator:
        """What to draw this rank's minibatch with: streams of different ranks differ, and follow from `generator`,
        which stays the same on all ranks."""
        return generator

    # --- numbers -------------------------------------------------------------------------------------------

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, without gradient. Any shape, the same on all ranks."""
        return value.detach()

    def total(self, value: Tensor) -> Tensor:
        """Sum over ranks, without gradient. Any shape, the same on all ranks."""
        return value.detach()

    def means(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Mean over ranks of each; the same names on all ranks."""
        return dict(numbers)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def given(
        self, tensors: Mapping[str, Tensor], record: dict[str, Any]
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """The first rank's tensors, on the CPU, and what it says of them as JSON. What others pass is ignored."""
        return tensors, record

    def newest(self, number: int) -> int:
        """The first rank's number."""
        return number

    def least(self, number: int) -> int:
        """The smallest number of any rank."""
        return number

    def require_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise RanksDiverged unless all ranks hold these tensors with equal values; as good as a sum of them can say."""

    def wait(self) -> None:
        """Until all ranks have come here."""

    # --- networks ------------------------------------------------------------------------------------------

    def place(self, module: nn.Module) -> nn.Module:
        """The module with the first rank's values, in the layout in which this rank keeps networks; in place."""
        return module

    def copy(self, module: nn.Module) -> nn.Module:
        """Another one like a placed module, with equal values in the same layout."""
        return copy.deepcopy(module)

    def engine(self, module: nn.Module) -> nn.Module:
        """What to call instead of a placed module so that its gradient becomes the mean over ranks."""
        return module

    def bare(self, module: nn.Module) -> nn.Module:
        """The module inside an `engine`; a module that is none is returned as it is."""
        return module

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter, or a state of an optimiser, with what other ranks hold of it."""
        return tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this rank keeps of a tensor that lies like `like`: the inverse of `whole`."""
        return whole


ALONE = Ranks()
