# SPDX-License-Identifier: Apache-2.0
"""Success rates that can be believed: intervals, and paired comparisons on equal seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

_Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves no room for zero: only then is a difference claimed."""
        return self.low > 0.0 or self.high < 0.0


def success_rate(successes: Sequence[bool]) -> Estimate:
    """Share of successes with Wilson's score interval. Raises ValueError without an episode."""
    n = len(successes)
    if n == 0:
        raise ValueError("no evaluation episode: there is no rate to estimate")
    p = sum(successes) / n
    centre = (p + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 * sqrt(p * (1 - p) / n + _Z95**2 / (4 * n**2)) / (1 + _Z95**2 / n)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(
    after: Mapping[int, bool], before: Mapping[int, bool], resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of after - before over the seeds of both, with the percentile bootstrap interval over seeds.

    Raises ValueError if the two were not evaluated on the same seeds: that would not be a paired comparison.
    """
    if after.keys() != before.keys() or not after:
        raise ValueError(
            f"not paired: {len(after.keys() ^ before.keys())} of {len(after.keys() | before.keys())} seeds differ"
        )
    difference = np.array([float(after[s]) - float(before[s]) for s in sorted(after)])
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(len(difference), size=(resamples, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(difference.mean()), float(low), float(high))
