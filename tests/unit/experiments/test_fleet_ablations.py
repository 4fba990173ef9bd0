# SPDX-License-Identifier: Apache-2.0
"""Each ablation changes something of the cell that it is compared with, and nothing that it is not named after."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from experiments.fleet_study.ablations import ABLATIONS, FLEETS
from experiments.fleet_study.plan import CELLS, FleetPlan
from lwd_learner.methods import named
from lwd_learner.replay_index import EVERYTHING, SPAN, WHOLE, ReplayIndex
from lwd_learner.transitions import AUTHOR_EXPERT, AUTHOR_POLICY, OUTCOME_FAILURE, OUTCOME_SUCCESS


def changed(one: object, other: object) -> set[str]:
    mine, theirs = asdict(one), asdict(other)  # type: ignore[call-overload]
    return {name for name in mine if mine[name] != theirs[name]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tau_fixed", {"alpha", "tau_base_offline"}),
        ("tau_high", {"tau_base_offline"}),
        ("hard_quantile", {"quantile"}),
        ("expectile", {"value"}),
        ("one_step", set()),
        ("without_failures", set()),
    ],
)
def test_one_setting_is_changed(name: str, settings: set[str]) -> None:
    plan, base = FleetPlan(), FleetPlan().learner(CELLS["lwd_offline"])
    config = plan.learner(ABLATIONS[name])
    assert changed(config.trainer.divl, base.trainer.divl) == settings
    outside = changed(config, base) - {"trainer"}
    assert outside == {"one_step": {"n_step"}, "without_failures": {"draws"}}.get(name, set())


def test_all_learn_offline_from_the_cloned_policy() -> None:
    for cell in ABLATIONS.values():
        named(cell.method)
        assert cell.start == "sft" and not cell.online


@pytest.mark.parametrize(
    ("name", "rows"),
    [("lwd_offline", [0, 1, 2, 3]), ("without_failures", [0, 2]), ("without_play", [0, 2, 3])],
)
def test_offline_data_are_left_out(name: str, rows: list[int]) -> None:
    """Row 0 was demonstrated, 1 played, 2 a policy that succeeded, 3 one that failed."""
    index = ReplayIndex()
    spans = np.zeros(4, SPAN)
    spans["first_row"] = spans["episode"] = spans["ordinal"] = np.arange(4)
    spans["rows"] = 1
    spans["author"] = AUTHOR_EXPERT, AUTHOR_EXPERT, AUTHOR_POLICY, AUTHOR_POLICY
    spans["outcome"] = OUTCOME_SUCCESS, OUTCOME_FAILURE, OUTCOME_SUCCESS, OUTCOME_FAILURE
    index.extend(spans)
    config = FleetPlan().learner((CELLS | ABLATIONS)[name])
    assert index.rows(config.draws or EVERYTHING, WHOLE).tolist() == rows


def test_smaller_fleets_bring_fewer_episodes_in_the_same_proportions() -> None:
    plan = FleetPlan()
    for name, robots in (("fleet_1", 1), ("fleet_4", 4), ("fleet_16", 16)):
        waves = [Counter(task for task, _ in plan.worked(0, wave, FLEETS[name])) for wave in (0, 5)]
        n = plan.episodes_per_wave * robots // 4
        assert waves == 2 * [{"correct": n, "shoebox": 3 * n}]
