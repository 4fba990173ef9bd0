# SPDX-License-Identifier: Apache-2.0
"""Which methods meet with which settings, on which tasks and seeds: three trials each on one task, one choice on another.

Temperatures are in units of V01 (`batches.py`): with one part, .01 is 1 in published units (1 / `inv_temp` of QAM's
code, 1 / `alpha` of OGBench's IQL), with five parts .002 is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from experiments.ogbench_play.bout import Entry, Harness
from lwd_learner.extraction.awr import AwrConfig
from lwd_learner.extraction.best_of_n import BestOfNConfig
from lwd_learner.extraction.cloning import CloningConfig
from lwd_learner.extraction.edit import EditConfig
from lwd_learner.extraction.one_step import OneStepConfig
from lwd_learner.qam import QamConfig
from lwd_policy.action_head import EditSpec

DEVELOPMENT_TASK = 3  # of 1 to 5: settings are chosen on it ...
REPORTED_TASK = 2  # ... and reported on this one, OGBench's default task of both environments
DEVELOPMENT_SEED = 100
SEEDS = (0, 1, 2)
EPISODES = 100  # of play, 1,000 transitions each
DATA_SEED = 0

_REPORT = Harness()
_DEVELOPMENT = replace(_REPORT, updates=5_000, evaluate_every=2_500)
_ROWS = (
    128  # of the batch's 256, for what asks the critic about its own actions: saves time, half of it for QAM
)


def _qam(value: float) -> QamConfig:
    return QamConfig(temperature="fixed", fixed_lambda=value)


def _qam_kl(nat: float) -> QamConfig:
    """The multiplier may go as low as the lowest fixed temperature, and starts low: it moves by little per update."""
    return QamConfig(
        kl_budget=nat, lambda_eff_min=0.003, lambda_range=(0.001, 100.0), dual_rate=0.001, initial_lambda=0.03
    )


def _trials() -> Iterator[Entry]:
    """Three a method; cloning has nothing to choose."""
    yield Entry("bc", "", CloningConfig())
    for count in (4, 16, 64):
        yield Entry("best_of_n", f"n_{count}", BestOfNConfig(count))
    for value in (0.03, 0.01, 0.003):
        yield Entry("awr", f"temperature_{value:g}", AwrConfig(value))
    for weight in (10.0, 3.0, 1.0):
        yield Entry("fql", f"distillation_{weight:g}", CloningConfig(), OneStepConfig(weight), None, _ROWS)
    for value in (0.03, 0.01, 0.003):
        yield Entry("qam", f"lambda_{value:g}", _qam(value), None, _ROWS)
    for scale in (0.1, 0.3, 0.9):
        yield Entry("qam_edit", f"scale_{scale:g}", _qam(0.01), EditConfig(EditSpec(scale)), _ROWS, _ROWS)
    for nat in (0.1, 0.3, 1.0):
        yield Entry("qam_kl", f"budget_{nat:g}", _qam_kl(nat), None, _ROWS)


TRIALS = {entry.name: entry for entry in _trials()}
_TOGETHER = (("qam", "qam_edit"), ("bc", "best_of_n", "awr", "fql"), ("qam_kl",))  # in one process

# For the report: of each method the trial with most successes in development (results/ogbench/summary.json).
QAM = TRIALS["qam-lambda_0.03"]
CHOSEN = (
    TRIALS["bc"],
    TRIALS["best_of_n-n_4"],
    TRIALS["awr-temperature_0.003"],
    TRIALS["fql-distillation_3"],
    QAM,
    replace(TRIALS["qam_edit-scale_0.1"], extraction=QAM.extraction),  # an edit of the flow that QAM reports
)
CHOSEN_KL = TRIALS["qam_kl-budget_0.3"]
CHOSEN_SCENE = (TRIALS["bc"], TRIALS["awr-temperature_0.003"], CHOSEN_KL)  # the better of the two QAM


class Stage(str, Enum):
    """Parts of the plan."""

    DEVELOPMENT = "development"
    REPORT = "report"


@dataclass(frozen=True)
class Match:
    """What one process trains: one task, one seed, several methods."""

    environment: str
    task: int
    seed: int
    harness: Harness
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return f"{self.environment}-task{self.task}-seed{self.seed}"

    @property
    def key(self) -> str:
        """Also tells matches of the same task and seed apart."""
        names = " ".join(entry.name for entry in self.entries)
        return f"{self.name}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def matches(stage: Stage) -> Iterator[Match]:
    """In the order in which they are worth most."""
    if stage is Stage.DEVELOPMENT:
        for methods in _TOGETHER:
            entries = tuple(entry for entry in TRIALS.values() if entry.method in methods)
            yield Match("cube-single", DEVELOPMENT_TASK, DEVELOPMENT_SEED, _DEVELOPMENT, entries)
        return
    for environment, entries in (
        ("cube-single", CHOSEN),
        ("cube-single", (CHOSEN_KL,)),
        ("scene", CHOSEN_SCENE),
    ):
        for seed in SEEDS:
            yield Match(environment, REPORTED_TASK, seed, _REPORT, entries)
