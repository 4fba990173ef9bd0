# SPDX-License-Identifier: Apache-2.0
"""The stages of the fleet study with real episodes: what is interrupted goes on, and runs no scene twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.fleet_study.plan import CELLS, FleetPlan
from experiments.fleet_study.study import Study
from lwd_fleet.data.catalog import Catalog

PLAN = replace(
    FleetPlan(tasks=("restock",)).quick(), demonstrations=3, clone_steps=3, offline_steps=4, waves=2
)

ONLINE = replace(CELLS["lwd_online"], robots=1)


class Interrupted(Exception):
    pass


def interrupt_at(title: str, count: int):
    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage.startswith(title) and done == count:
            raise Interrupted

    return progress


def silent(stage: str, done: int, total: int, note: str) -> None:
    pass


def study(root: Path, progress=silent) -> Study:
    return Study(root, PLAN, 1, progress)


def scenes(folder: Path) -> Counter[int]:
    with Catalog(folder / "catalog.db") as catalog:
        return Counter(row.summary.seed for row in catalog.episodes_since(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fleet")
    with pytest.raises(Interrupted):
        study(root, interrupt_at("demonstrations", 2)).gather()
    study(root).gather()
    study(root).clone(0)
    study(root).learn(0, "lwd_offline", CELLS["lwd_offline"])
    return root


def test_interrupted_gathering_ends_with_each_scene_once(root: Path) -> None:
    wanted = [seed for _, seed in (*PLAN.demonstrated(), *PLAN.played())]
    assert scenes(root / "base") == Counter(wanted)


def test_a_finished_stage_is_not_done_again(root: Path) -> None:
    with pytest.raises(FileExistsError, match="remove it to do this stage again"):
        study(root).gather()


def test_an_interrupted_cell_goes_on_in_the_wave_it_was_in(root: Path) -> None:
    interrupted = study(root, interrupt_at("online", 2))
    with pytest.raises(Interrupted):
        interrupted.learn(0, "lwd_online", ONLINE)  # after its first wave was recorded
    assert not (root / "seed_0" / "lwd_online").exists()

    study(root).learn(0, "lwd_online", ONLINE)

    done = root / "seed_0" / "lwd_online"
    waves = json.loads((done / "waves.json").read_text())
    assert len(waves) == PLAN.waves and all(wave["episodes"] == 1 for wave in waves)
    worked = [seed for wave in range(PLAN.waves) for _, seed in PLAN.worked(0, wave, ONLINE)]
    assert scenes(done) == scenes(root / "seed_0" / "sft") + Counter(worked)


def test_an_online_cell_goes_on_from_the_offline_one(root: Path) -> None:
    study(root).learn(0, "continued", ONLINE)
    states = {
        name: sorted(path.name for path in (root / f"seed_0/{name}/learner/state").iterdir())
        for name in ("lwd_offline", "continued")
    }
    newest = {name: int(found[-1].removeprefix("step_")[:9]) for name, found in states.items()}
    assert newest["continued"] >= newest["lwd_offline"] + PLAN.waves * PLAN.wave_steps
    # The offline updates are not done again: all that is online came on top.
    most = PLAN.waves * (PLAN.wave_steps + PLAN.refit_steps)
    assert newest["continued"] <= newest["lwd_offline"] + most
