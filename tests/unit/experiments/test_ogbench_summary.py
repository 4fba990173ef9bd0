# SPDX-License-Identifier: Apache-2.0
"""Intervals over few seeds: as wide as episodes make them at least, wider where seeds differ."""

import numpy as np
import pytest

from experiments.ogbench_play.summary import final_success, finished, interval, summarise, trials


def evaluations(successes: list[int]) -> np.ndarray:
    return np.array([(count, 50) for count in successes], float)


def test_equal_seeds_leave_the_binomial_of_all_episodes() -> None:
    low, high = interval([evaluations([25, 25, 25])] * 3)
    half_width = 1.96 * np.sqrt(0.25 / 450)
    assert low == pytest.approx(0.5 - half_width, abs=0.006)
    assert high == pytest.approx(0.5 + half_width, abs=0.006)


def test_seeds_that_differ_widen_it() -> None:
    low, high = interval([evaluations([5] * 3), evaluations([25] * 3), evaluations([45] * 3)])
    assert low < 0.2 and high > 0.8


def test_nothing_but_failures_is_certain() -> None:
    assert interval([evaluations([0, 0, 0])] * 3) == (0.0, 0.0)


def test_success_is_the_mean_of_the_last_three_evaluations() -> None:
    curve = [
        {"successes": count, "episodes": 50, "updates": 10 * step, "cpu_s": 60.0 * step}
        for step, count in enumerate([50, 0, 10, 20])
    ]
    run = {"environment": "cube-single", "method": "bc", "seed": 4, "curve": curve}
    assert final_success(run)[:, 0].tolist() == [0, 10, 20]
    summary = summarise([run, {**run, "environment": "scene", "seed": 5}])
    assert summary["metrics"]["success_bc"] == pytest.approx(0.2)
    assert summary["metrics"]["cpu_minutes_bc"] == pytest.approx(3.0)
    assert summary["metrics"]["updates_scene_bc"] == 30
    assert summary["seeds"] == {"bc": [4], "scene_bc": [5]}


def test_trials_count_every_evaluation_since_cloning() -> None:
    curve = [{"successes": count, "episodes": 50} for count in (50, 5, 15)]
    runs = [{"method": "qam", "setting": name, "curve": curve} for name in ("a", "b")]
    assert trials(runs) == {"qam": {"a": 0.2, "b": 0.2}}


def test_a_run_is_finished_when_its_last_evaluation_is_at_its_last_update() -> None:
    run = {"harness": {"updates": 20}, "curve": [{"updates": 0}, {"updates": 10}]}
    assert not finished(run)
    assert finished({**run, "curve": [*run["curve"], {"updates": 20}]})
