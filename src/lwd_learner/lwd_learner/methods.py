# SPDX-License-Identifier: Apache-2.0
"""The ways to learn that can be asked for by name. They share data, networks and budget: what is compared is the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lwd_learner.divl import DivlConfig
from lwd_learner.extraction.awr import AwrConfig
from lwd_learner.extraction.cloning import CloningConfig
from lwd_learner.extraction.one_step import OneStepConfig
from lwd_learner.extraction.recap import RecapConfig
from lwd_learner.qam import QamConfig
from lwd_learner.replay import EVERYTHING, Selection
from lwd_learner.selections import CORRECTED, CORRECTED_OR_SUCCEEDED, DEMONSTRATIONS, DEPLOYED
from lwd_learner.trainer import TrainerConfig

DEFAULT = "lwd"


class UnknownMethod(ValueError):
    """A name that stands for no method; the text lists those that there are."""


@dataclass(frozen=True)
class Method:
    """What a way to learn does with a run's episodes."""

    about: str  # in a few words, for people
    adapt: Callable[[TrainerConfig], TrainerConfig]  # its own settings in the place of others; networks stay
    draws: Selection = EVERYTHING  # the transitions that it learns from
    judges: bool = True  # whether there is a value to be learned, or only something to be cloned


def _clone(config: TrainerConfig) -> TrainerConfig:
    return replace(config, extraction=CloningConfig())


def _expectile(config: TrainerConfig, expectile: float) -> DivlConfig:
    return replace(config.divl, value="expectile", expectile=expectile)


def _qam(config: TrainerConfig) -> TrainerConfig:
    published = QamConfig(temperature="fixed", fixed_lambda=1 / 6, adjoint="vjp", pairing="official")
    return replace(config, extraction=published)


def _fql(config: TrainerConfig) -> TrainerConfig:
    return replace(config, extraction=CloningConfig(), head=OneStepConfig())


def _recap(config: TrainerConfig) -> TrainerConfig:
    # At one half the expectile is the mean: the value of the data's own policy, which RECAP fits to returns.
    return replace(config, extraction=RecapConfig(), divl=_expectile(config, 0.5))


def _iql_awr(config: TrainerConfig) -> TrainerConfig:
    return replace(config, extraction=AwrConfig(), divl=_expectile(config, DivlConfig().expectile))


METHODS = {
    "lwd": Method("DIVL, QAM at a budgeted distance", lambda config: config),
    "lwd_paper": Method("DIVL and QAM as published in LWD", TrainerConfig.paper),
    "qam": Method("DIVL, QAM as published in QAM, fixed temperature", _qam),
    "iql_awr": Method("IQL's expectile, advantage-weighted cloning", _iql_awr),
    "fql": Method("DIVL, one step that follows a cloned flow and climbs the critic", _fql),
    "recap": Method("cloning of everything, conditioned on the advantage", _recap),
    "bc": Method("cloning of demonstrations", _clone, DEMONSTRATIONS, judges=False),
    "sft_continued": Method(
        "more cloning of demonstrations, from a cloned policy", _clone, DEMONSTRATIONS, judges=False
    ),
    "filtered_bc": Method("cloning of what succeeded in deployment", _clone, DEPLOYED, judges=False),
    "hg_dagger": Method("cloning of demonstrations and corrections", _clone, CORRECTED, judges=False),
    "hg_dagger_offline": Method(
        "cloning of demonstrations, corrections and what succeeded",
        _clone,
        CORRECTED_OR_SUCCEEDED,
        judges=False,
    ),
}


def named(name: str) -> Method:
    """The method of that name. Raises UnknownMethod."""
    if name not in METHODS:
        raise UnknownMethod(f"no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
