# SPDX-License-Identifier: Apache-2.0
"""Policy steps on the axis of time. Cameras do not wait for the arbiter: an observation lies anywhere within a step,
and a chunk made from it has to be shifted by that fraction before it can be played step by step."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

_KEPT = 200  # steps; far more than the age of any observation


class StepClock:
    """When each policy step of an episode ended, as `ExecutedAction` says it."""

    def __init__(self) -> None:
        self._ends: list[int] = []  # ns, ascending
        self._steps: list[int] = []

    def clear(self) -> None:
        """Forget all: another episode begins."""
        self._ends.clear()
        self._steps.clear()

    def add(self, step: int, end_ns: int) -> None:
        """Policy step `step` was over at `end_ns`. A clock that was set back starts anew."""
        if self._ends and end_ns <= self._ends[-1]:
            self.clear()
        self._ends.append(end_ns)
        self._steps.append(step)
        del self._ends[:-_KEPT], self._steps[:-_KEPT]

    def place(self, time_ns: int) -> tuple[int, float] | None:
        """The last step that was over at a time, and which fraction [0, 1) of the one after it had passed; None while
        no step is known. The fraction is 0 before the first step, after the last, and where steps are missing."""
        if not self._steps:
            return None
        index = bisect_right(self._ends, time_ns) - 1
        if index < 0:
            return self._steps[0] - 1, 0.0
        step, end = self._steps[index], self._ends[index]
        if index + 1 == len(self._steps) or self._steps[index + 1] != step + 1:
            return step, 0.0
        return step, (time_ns - end) / (self._ends[index + 1] - end)


def to_step_grid(
    positions: NDArray[np.float64], reference: NDArray[np.float64], phase: float
) -> NDArray[np.float64]:
    """A chunk at the ends of policy steps. positions [H, n]: a step, two steps... after the observation, which was made
    when `phase` of a step had passed; reference [n]: the command at the observation. Returns [H, n], of which the
    first row is for the end of the step under way at the observation."""
    before = np.concatenate([reference[None], positions[:-1]])
    grid: NDArray[np.float64] = (1 - phase) * positions + phase * before
    return grid


def from_step_grid(positions: NDArray[np.float64], phase: float) -> NDArray[np.float64]:
    """Inverse of `to_step_grid` for what was executed: the commands [L, n] at the ends of steps, seen a step, two
    steps... after the observation [L, n]. The last one is held."""
    after = np.concatenate([positions[1:], positions[-1:]])
    seen: NDArray[np.float64] = (1 - phase) * positions + phase * after
    return seen
