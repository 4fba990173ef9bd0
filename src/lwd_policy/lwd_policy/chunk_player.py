# SPDX-License-Identifier: Apache-2.0
"""Which action now: plays chunks step by step and changes over to the next without repeating or skipping motion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ChunkPlayer:
    """Plays the newest chunk offered.

    A chunk's action i is meant for the (i + 1)-th step of motion after its observation. While it was computed the
    robot may have gone on with the chunk before: as many actions of the new one are skipped as steps of motion were
    made since the observation. They are counted, not estimated from a latency: steps on which the robot had nothing
    to play and held do not use up the new chunk (an estimate once skipped most of a first movement).
    """

    def __init__(self) -> None:
        self._positions: Array | None = None
        self._index = 0
        self._moved: list[int] = []  # policy steps on which an action was played, ascending

    def offer(self, positions: Array, observation_step: int) -> None:
        """Play `positions` [H, n] from the next step on. observation_step: last policy step executed when the
        observation was taken, -1 before the first."""
        self._moved = [step for step in self._moved if step > observation_step]
        self._positions = positions
        self._index = len(self._moved)

    def next(self, step: int) -> tuple[Array, int] | None:
        """The action [n] for policy step `step` and its index in its chunk; None when the chunk is used up."""
        if self._positions is None or self._index >= len(self._positions):
            return None
        index = self._index
        self._index += 1
        self._moved.append(step)
        return self._positions[index], index
