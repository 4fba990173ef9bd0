# SPDX-License-Identifier: Apache-2.0
"""One thing changed of `lwd_offline` at a time. Learned on all tasks, looked at on one short and one long one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.fleet_study.plan import CELLS, Cell
from lwd_learner.extraction.awr import AwrConfig
from lwd_learner.learner import LearnerConfig
from lwd_learner.replay import Selection
from lwd_learner.transitions import AUTHOR_HUMAN, AUTHOR_POLICY, OUTCOME_SUCCESS

TASKS = ("correct", "shoebox")

_SUCCEEDED = Selection(outcomes=frozenset({OUTCOME_SUCCESS}))


def _divl(config: LearnerConfig, **changes: Any) -> LearnerConfig:
    trainer = config.trainer
    return replace(config, trainer=replace(trainer, divl=replace(trainer.divl, **changes)))


def _fixed_tau(config: LearnerConfig) -> LearnerConfig:
    """The mean of the adaptive one, as in the paper's Table III."""
    return _divl(config, alpha=0.0, tau_base_offline=0.52)


def _high_tau(config: LearnerConfig) -> LearnerConfig:
    """Offline already where the paper has it online."""
    return _divl(config, tau_base_offline=0.9)


def _hard_quantile(config: LearnerConfig) -> LearnerConfig:
    return _divl(config, quantile="hard")


def _expectile(config: LearnerConfig) -> LearnerConfig:
    return _divl(config, value="expectile")


def _one_step(config: LearnerConfig) -> LearnerConfig:
    return replace(config, n_step={})


def _awr(config: LearnerConfig) -> LearnerConfig:
    return replace(config, trainer=replace(config.trainer, extraction=AwrConfig(), policy_rows=None))


def _without_failures(config: LearnerConfig) -> LearnerConfig:
    return replace(config, draws=_SUCCEEDED)


def _without_play(config: LearnerConfig) -> LearnerConfig:
    """Of what no policy had a part in, only what succeeded: play is what is left out."""
    deployed = Selection(authors=frozenset({AUTHOR_POLICY, AUTHOR_HUMAN}), also=_SUCCEEDED)
    return replace(config, draws=deployed)


_BASE = CELLS["lwd_offline"]

ABLATIONS = {
    "tau_fixed": replace(_BASE, adapt=_fixed_tau),
    "tau_high": replace(_BASE, adapt=_high_tau),
    "hard_quantile": replace(_BASE, adapt=_hard_quantile),
    "expectile": replace(_BASE, adapt=_expectile),
    "one_step": replace(_BASE, adapt=_one_step),
    "qam_as_published": replace(_BASE, method="qam"),
    "awr": replace(_BASE, adapt=_awr),
    "fql": replace(_BASE, method="fql"),
    "without_refit": replace(_BASE, refits=False),
    "refit_alone": Cell("filtered_bc", online=False),
    "without_failures": replace(_BASE, adapt=_without_failures),
    "without_play": replace(_BASE, adapt=_without_play),
}

FLEETS = {
    f"fleet_{robots}": replace(CELLS["lwd_online"], robots=robots, tasks=TASKS) for robots in (1, 4, 16)
}
"""Fleets that work on these two tasks only, with as many updates between two waves."""
