# SPDX-License-Identifier: Apache-2.0
"""OGBench's single-task versions: rewards for play data, and episodes to judge a policy by."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import ogbench.manipspace  # noqa: F401  registers the environments
import torch
from numpy.typing import NDArray
from ogbench.relabel_utils import relabel_dataset

from experiments.ogbench_play.batches import Play
from experiments.ogbench_play.bout import Act, Context

PARTS = {"cube-single": 1, "scene": 5}  # a cube; a cube, two buttons, a drawer, a window


class SingleTask:
    """One task of one environment. Rendering is never asked for."""

    def __init__(self, environment: str, index: int) -> None:
        """index: 1 to 5, as OGBench counts."""
        self.environment, self.index = environment, index
        self.name = f"{environment}-singletask-task{index}-v0"
        limit = gymnasium.spec(self.name).max_episode_steps
        if limit is None:
            raise ValueError(f"{self.name} has no time limit")
        self.step_limit = limit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the precision of the bounds of spaces
            self._env: Any = gymnasium.make(self.name).unwrapped

    @property
    def parts(self) -> int:
        return PARTS[self.environment]

    def label(self, rows: Mapping[str, NDArray[Any]]) -> Play:
        """Play data with this task's published rewards. rows: as `collect` gives them."""
        labelled = dict(rows)
        relabel_dataset(self.environment, self._env, labelled)
        return Play(
            observations=rows["observations"],
            actions=rows["actions"],
            last=rows["terminals"],
            rewards=labelled["rewards"],
            success=labelled["masks"] == 0,
        )

    def succeeds(self, act: Act, context: Context, noise_steps: int, seed: int) -> bool:
        """One episode under the published time limit; each chunk is executed to its end without looking.

        noise_steps: N of the noise that `act` wants. seed: of the start and of the policy's noise; the same seed repeats the episode exactly.
        """
        noise = torch.Generator().manual_seed(seed)
        observation, _ = self._env.reset(seed=seed)
        shape = (1, noise_steps, self._env.action_space.shape[0])
        queue: list[NDArray[np.float32]] = []
        for _ in range(self.step_limit):
            if not queue:
                seen = context(observation[None].astype(np.float32))
                queue = list(act(seen, torch.randn(shape, generator=noise))[0].numpy())
            observation, _, terminated, _, info = self._env.step(queue.pop(0))
            if terminated:
                break
        return bool(info["success"])
