# SPDX-License-Identifier: Apache-2.0
"""Filtered behaviour cloning: keep cloning, on the successes only. What any reinforcement learning has to beat."""

from __future__ import annotations

from lwd_learner.replay import Replay, Selection
from lwd_learner.trainer import Trainer

SUCCESS = 1  # OUTCOME_SUCCESS of transitions.py
SUCCESSES = Selection(outcomes=frozenset({SUCCESS}))


def step(trainer: Trainer, replay: Replay) -> dict[str, float]:
    """One cloning step on successful episodes, whoever acted, mixed as the learner mixes. Raises ReplayEmpty."""
    config = trainer.config
    batch = replay.sample(config.batch, trainer.sampling, config.gamma, selection=SUCCESSES)
    return trainer.clone(batch)
