# SPDX-License-Identifier: Apache-2.0
"""How a learning rate changes over the steps of a phase."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Shares of a peak rate. A cosine needs an end: without one, as in a deployment, the rate stays at its peak."""

    shape: Literal["constant", "cosine"] = "constant"  # cosine: falls to 0 along half a cosine; as published
    warm_up: int = 0  # steps of a linear rise; a fresh optimiser's first steps are its least informed ones

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise ValueError(f"warm_up is a number of steps, not {self.warm_up}")

    def share(self, step: int, total: int | None = None) -> float:
        """Share of the peak rate that the update after `step` earlier ones has, of `total`; None: there is no end.

        min(1, (k+1)/w) for a constant one, times (1 + cos(pi k/N))/2 for a cosine; 0 from step N on.
        """
        rise = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        if self.shape == "constant" or total is None:
            return rise
        return rise * 0.5 * (1.0 + cos(pi * min(step, total) / total))


CONSTANT = Schedule()
