# SPDX-License-Identifier: Apache-2.0
"""Shares of online rows that follow the losses: what is learned worse is drawn more often. algorithm.md 1.7, 4.17."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

_EVEN = 0.5


@dataclass(frozen=True)
class LossMixConfig:
    """SOP's rule: w = exp(a L_on) / (exp(a L_on) + exp(L_off)) for each task, clipped."""

    gain: float = 1.5  # a; published as greater than 1, without its value
    window: int = 200  # learner steps that the mean losses are over; as published
    low: float = 0.2  # share of online rows; as published
    high: float = 0.8  # share of online rows; as published

    def share(self, online_loss: float, offline_loss: float) -> float:
        """Share of online rows."""
        excess = max(-60.0, min(60.0, self.gain * online_loss - offline_loss))  # beyond, exp says nothing new
        return min(self.high, max(self.low, 1.0 / (1.0 + exp(-excess))))


class LossMix:
    """Mean losses of both sources over the last steps, by task. A task that lacks one of them stays at one to one."""

    def __init__(self, config: LossMixConfig) -> None:
        self.config = config
        # One entry per step: task -> `loss_sums`.
        self._steps: deque[dict[str, list[float]]] = deque(maxlen=config.window)

    def add(self, names: Sequence[str], sums: Tensor) -> None:
        """Note one step. names: of tasks; sums: [T, 4], see `loss_sums`."""
        self._steps.append(dict(zip(names, sums.tolist(), strict=True)))

    def shares(self) -> dict[str, float]:
        """Share of online rows, by task: what `Replay.sample` takes."""
        totals: dict[str, list[float]] = {}
        for step in self._steps:
            for name, sums in step.items():
                before = totals.get(name, [0.0] * 4)
                totals[name] = [a + b for a, b in zip(before, sums, strict=True)]
        return {
            name: self.config.share(on / on_rows, off / off_rows) if on_rows and off_rows else _EVEN
            for name, (on, on_rows, off, off_rows) in totals.items()
        }

    @property
    def state(self) -> list[dict[str, list[float]]]:
        """What must be saved; JSON gives it back exactly."""
        return list(self._steps)

    def restore(self, state: Sequence[dict[str, list[float]]]) -> None:
        """Continue from a saved `state`."""
        self._steps = deque(state, maxlen=self.config.window)


def loss_sums(tasks: int, task: Tensor, online: Tensor, loss: Tensor) -> Tensor:
    """[T, 4] float64, by task: sum and number of the losses of online rows, sum and number of those of offline rows.

    task: [B] int64 below `tasks`; online: [B] bool; loss: [B].
    """
    place = 2 * task + (~online).to(torch.int64)
    parts = torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)], dim=-1)
    sums = torch.zeros(2 * tasks, 2, dtype=torch.float64, device=loss.device)
    return sums.index_add_(0, place, parts).reshape(tasks, 4)
