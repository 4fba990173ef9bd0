# SPDX-License-Identifier: Apache-2.0
"""Chunk transitions of play data: a chunk of H actions may start at every control step.

Rewards. OGBench pays r_t in {-n, .., 0} on each step, the number of the n parts of the task that are not in place, and
ends the episode with the step that starts in a success. The learner's values live on [0, 1], so they are put there:

    V01 = 1 + (1 - gamma) V / n,   hence   r01_t = (1 - gamma) (1 + r_t / n),   and 1 for the step that ends it:

V = r + gamma V' becomes V01 = 1 + (1 - gamma) (r + gamma V') / n = r01 + gamma V01'. The map rises, so it changes no
order of actions; a temperature on V is (1 - gamma) / n times as large on V01. With one part (`cube-single`) r01 is 1 at
the success and 0 before: V01 is gamma to the power of the steps that remain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwd_learner.batch import Batch


@dataclass(frozen=True)
class Play:
    """N rows of play, episode after episode; the action of an episode's last row leads nowhere."""

    observations: NDArray[np.float32]  # [N, O]
    actions: NDArray[np.float32]  # [N, A] in [-1, 1]
    last: NDArray[np.bool_]  # [N] the last row of its episode
    rewards: NDArray[np.float32]  # [N] as published, of the step that starts in the row
    success: NDArray[np.bool_]  # [N] all parts are in place in the row


def unit_rewards(
    rewards: NDArray[np.float32], success: NDArray[np.bool_], parts: int, gamma: float
) -> NDArray[np.float32]:
    """[N] rewards r01 whose values are V01; see above."""
    return np.where(success, 1.0, (1 - gamma) * (1 + rewards / parts)).astype(np.float32)


class ChunkSampler:
    """Draws `Batch`es uniformly over all rows whose chunk has H actions and a next observation in its episode."""

    def __init__(self, play: Play, parts: int, horizon: int, gamma: float) -> None:
        """parts: n above. gamma: discount of one control step. Observations are standardised by the data."""
        self.center = play.observations.mean(axis=0)
        self.scale = play.observations.std(axis=0).clip(min=1e-3)
        self.horizon, self.action_dim = horizon, play.actions.shape[1]
        self._contexts = self.context(play.observations)
        self._actions = torch.from_numpy(play.actions)
        until_last = _rows_until(play.last)
        self.starts = torch.from_numpy(np.flatnonzero(until_last >= horizon))
        # The chunk ends with the step that starts in a success: what follows would be another episode.
        self._executed = torch.from_numpy(np.minimum(_rows_until(play.success) + 1, horizon))
        self._done = torch.from_numpy(_rows_until(play.success) < horizon)
        self._rewards = torch.from_numpy(
            _discounted_sums(
                unit_rewards(play.rewards, play.success, parts, gamma), self._executed.numpy(), horizon, gamma
            )
        )
        self._discount = float(gamma**horizon)

    @property
    def context_dim(self) -> int:
        return self._contexts.shape[1]

    def context(self, observations: NDArray[np.float32]) -> Tensor:
        """[..., O] observations -> [..., O] float32 as networks see them."""
        return torch.from_numpy(((observations - self.center) / self.scale).astype(np.float32))

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Chunks start anywhere, with replacement."""
        return self.rows(self.starts[torch.randint(len(self.starts), (size,), generator=generator)])

    def rows(self, row: Tensor) -> Batch:
        """The chunks that start in the given rows [B]."""
        steps = torch.arange(self.horizon)
        mask = steps < self._executed[row].unsqueeze(-1)
        zeros = torch.zeros_like(row)
        return Batch(
            context=self._contexts[row],
            action=self._actions[row.unsqueeze(-1) + steps],
            mask=mask,
            valid=torch.ones_like(mask),  # cloning imitates play, and play went on
            reward=self._rewards[row],
            discount=torch.where(self._done[row], 0.0, self._discount),
            next_context=self._contexts[row + self.horizon],
            online=zeros.bool(),
            author=zeros,
            outcome=zeros,
            policy_version=zeros,
            task=zeros,
            row=row,
        )


def _rows_until(marked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[N] number of rows from each row to the first marked one at or after it; N where none follows."""
    rows = np.arange(len(marked))
    following = np.minimum.accumulate(np.where(marked, rows, 2 * len(marked))[::-1])[::-1]
    return np.minimum(following - rows, len(marked))


def _discounted_sums(
    rewards: NDArray[np.float32], executed: NDArray[np.int64], horizon: int, gamma: float
) -> NDArray[np.float32]:
    """[N] sum over the executed steps of gamma^i r; beyond the end of the data nothing is paid."""
    padded = np.concatenate([rewards, np.zeros(horizon, np.float32)])
    total = np.zeros(len(rewards), np.float64)
    for step in range(horizon):
        total += np.where(step < executed, gamma**step * padded[step : step + len(rewards)], 0.0)
    return total.astype(np.float32)
