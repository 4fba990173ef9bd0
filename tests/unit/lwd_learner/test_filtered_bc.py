# SPDX-License-Identifier: Apache-2.0
"""Filtered behaviour cloning sees successes only."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lwd_learner.baselines import filtered_bc
from lwd_learner.replay import Replay
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout
from lwd_learner.trainer import Trainer, TrainerConfig

LAYOUT = ReplayLayout(feature_dim=2, horizon=1, action_dim=1, history=1)


class Constant(nn.Module):
    """A velocity that is one number, so that what it was trained on can be read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.zeros(()))

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        return (self.target - noisy) / (1.05 - flow_time)[:, None, None]


def test_failures_are_not_cloned(tmp_path: Path) -> None:
    with Replay(tmp_path, LAYOUT) as replay:
        for name, outcome, action in (("good", 1, 0.5), ("bad", 2, -0.9)):
            table = np.zeros(1, TRANSITION)
            table["next_point"], table["executed"], table["planned"], table["done"] = -1, 1, 1, True
            features, actions = np.zeros((1, 2), np.float32), np.full((1, 1, 1), action, np.float32)
            replay.append(
                ReplayEpisode(name, "t", "offline", outcome, features, np.zeros(1, np.int64), actions, table)
            )  # type: ignore[arg-type]
        expert = Constant()
        trainer = Trainer(expert, 2, 1, 1, TrainerConfig(policy_rate=2e-2, batch=64))
        for _ in range(200):
            filtered_bc.step(trainer, replay)
    assert abs(expert.target.item() - 0.5) < 0.05
