# SPDX-License-Identifier: Apache-2.0
"""The fleet study: scenes are never used twice, the statistics have the numbers that they should."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.fleet_study.analysis import Outcomes, holm, read_work, summarise, table
from experiments.fleet_study.plan import CELLS, HOURS, ROBOTS, FleetPlan

TASKS = ("restock", "tea")
ONLINE = CELLS["lwd_online"]


def write(folder: Path, seed: int, method: str, chance: dict[str, float], scenes: int = 40) -> None:
    rng = np.random.default_rng([seed, len(method)])
    (folder / f"seed_{seed}").mkdir(parents=True, exist_ok=True)
    with (folder / f"seed_{seed}" / f"{method}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "scene", "success", "score", "steps", "sub_steps"])
        for task in TASKS:
            for scene in range(scenes):
                success = int(rng.random() < chance[task])
                score = success if task == "restock" else 0.5 + 0.5 * success
                writer.writerow([task, scene, success, score, 10, "[]"])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for seed in range(3):
        write(tmp_path, seed, "sft", {"restock": 0.5, "tea": 0.3})
        write(tmp_path, seed, "lwd_offline", {"restock": 0.5, "tea": 0.3})
        write(tmp_path, seed, "lwd_online", {"restock": 0.95, "tea": 0.9})
    return tmp_path


def test_scores_mix_success_and_sub_steps_and_success_is_strict(results: Path) -> None:
    outcomes = Outcomes.read(results)
    summary = summarise(outcomes)
    success, score = outcomes.success["sft"], outcomes.score["sft"]
    assert success.shape == (3, 2, 40) and outcomes.seeds["sft"] == (0, 1, 2) and outcomes.tasks == TASKS
    metrics = summary["metrics"]
    assert metrics["success_sft"] == pytest.approx(success.mean(), abs=1e-4)
    assert metrics["long_sft"] == pytest.approx((0.5 + 0.5 * success[:, 1]).mean(), abs=1e-4)
    assert metrics["score_sft"] == pytest.approx((success[:, 0].mean() + metrics["long_sft"]) / 2, abs=1e-4)
    low, high = summary["intervals"]["score_sft"]
    assert low < score.mean() < high and high - low < 0.25
    assert "| sft |" in table(summary, ["sft", "unknown"]) and "unknown" not in table(summary, ["unknown"])


def test_a_difference_is_claimed_where_there_is_one_and_not_where_there_is_none(results: Path) -> None:
    ladder = {(one["better"], one["than"]): one for one in summarise(Outcomes.read(results))["ladder"]}
    assert set(ladder) == {("lwd_offline", "sft"), ("lwd_online", "lwd_offline"), ("lwd_online", "sft")}
    assert ladder["lwd_online", "sft"]["p_holm"] < 0.01 and ladder["lwd_online", "sft"]["interval"][0] > 0
    low, high = ladder["lwd_offline", "sft"]["interval"]
    assert low < 0 < high and ladder["lwd_offline", "sft"]["p_holm"] > 0.05


def test_holm_multiplies_the_smallest_by_all_and_never_decreases() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_methods_with_fewer_training_seeds_are_compared_over_those_that_both_have(results: Path) -> None:
    (results / "seed_1" / "sft.csv").unlink()
    outcomes = Outcomes.read(results)
    assert outcomes.seeds == {"sft": (0, 2), "lwd_offline": (0, 1, 2), "lwd_online": (0, 1, 2)}
    expected = outcomes.score["lwd_online"][[0, 2]] - outcomes.score["sft"]
    assert np.array_equal(outcomes.difference("lwd_online", "sft"), expected)
    ladder = {(one["better"], one["than"]): one for one in summarise(outcomes)["ladder"]}
    assert ladder["lwd_online", "sft"]["seeds"] == 2 and ladder["lwd_online", "lwd_offline"]["seeds"] == 3


def test_methods_without_a_common_training_seed_are_not_compared(results: Path) -> None:
    for seed in (0, 1):
        (results / f"seed_{seed}" / "sft.csv").unlink()
    (results / "seed_2" / "lwd_online.csv").unlink()
    ladder = {(one["better"], one["than"]) for one in summarise(Outcomes.read(results))["ladder"]}
    assert ladder == {("lwd_offline", "sft"), ("lwd_online", "lwd_offline")}


def test_tasks_can_be_picked_and_folders_joined(
    results: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("ablations")
    write(other, 0, "tau_fixed", {"restock": 0.2, "tea": 0.2})
    outcomes = Outcomes.read(other, results, only=("tea",))
    assert outcomes.tasks == ("tea",) and outcomes.score["tau_fixed"].shape == (1, 1, 40)
    summary = summarise(outcomes, [("lwd_online", "tau_fixed")])
    assert [(one["than"], one["seeds"]) for one in summary["ladder"]] == [("tau_fixed", 1)]


def test_other_scenes_are_not_compared(results: Path) -> None:
    write(results, 1, "sft", {"restock": 0.5, "tea": 0.5}, scenes=39)
    with pytest.raises(ValueError, match="not evaluated on the scenes"):
        Outcomes.read(results)


def test_no_scene_is_used_twice() -> None:
    plan = FleetPlan()
    uses = [plan.demonstrated(), plan.played(), plan.evaluated(), plan.evaluated(development=True)]
    for seed in range(5):
        uses += [plan.rolled_out(seed), *(plan.worked(seed, wave, ONLINE) for wave in range(plan.waves))]
    scenes = Counter(scene for use in uses for _, scene in use)
    assert max(scenes.values()) == 1


def test_cells_that_only_clone_do_as_many_updates_as_those_that_refit() -> None:
    plan = FleetPlan(offline_steps=100, wave_steps=10, refit_steps=40, refit_every=4)
    for name in ("filtered_bc", "hg_dagger", "lwd_offline", "lwd_online"):
        offline, per_wave = plan.updates(CELLS[name])
        refits = CELLS[name].refits
        assert offline == 140 and per_wave == (10 if refits else 20)
    assert plan.updates(CELLS["lwd_paper"]) == (100, 10)


def test_only_adjoint_matching_is_spared_rows() -> None:
    rows = {name: FleetPlan().learner(cell).trainer.policy_rows for name, cell in CELLS.items()}
    assert {name for name, used in rows.items() if used is not None} == {
        name for name in CELLS if name.startswith("lwd")
    }


def test_the_fleet_has_the_papers_robots_and_proportions() -> None:
    plan = FleetPlan()
    assert sum(ROBOTS.values()) == 16
    wave = Counter(task for task, _ in plan.worked(0, 3, ONLINE))
    assert wave == {task: robots * plan.episodes_per_wave for task, robots in ROBOTS.items()}
    played, shown = (
        Counter(task for task, _ in plan.played()),
        Counter(task for task, _ in plan.demonstrated()),
    )
    for task, (demonstrated_h, _, played_h) in HOURS.items():
        assert played[task] / shown[task] == pytest.approx(played_h / demonstrated_h, abs=0.01)


def test_work_with_and_without_people_is_told_apart(tmp_path: Path) -> None:
    wave = {
        "policy": "flow-0123",
        "critic_loss": 0.1,
        "episodes": 10,
        "steps": 400,
        "human_steps": 30,
        "assisted": 4,
    }
    for seed, (alone, assisted) in enumerate(((3, 4), (6, 2))):
        (tmp_path / f"seed_{seed}").mkdir()
        waves = [wave | {"succeeded_alone": alone, "succeeded_assisted": assisted}]
        (tmp_path / f"seed_{seed}/lwd_online.json").write_text(json.dumps({"wall_s": 600, "waves": waves}))
    (tmp_path / "seed_0/sft_continued.json").write_text(json.dumps({"wall_s": 90, "waves": []}))
    assert read_work(tmp_path) == {
        "lwd_online": {
            "minutes": 10.0,
            "human_share": 0.075,
            "success_alone": 0.75,
            "success_assisted": 0.75,
        },
        "sft_continued": {"minutes": 1.5},
    }
