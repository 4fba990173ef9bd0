# SPDX-License-Identifier: Apache-2.0
"""The coordinator's promises: every robot for itself, every wait bounded, evaluation scenes never used."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import OperationalError

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.rollout import catalog_watch
from lwd_fleet.rollout.catalog_watch import CatalogWatch
from lwd_fleet.rollout.coordinator import (
    EVALUATION_SEEDS,
    FIRST_SEED,
    Coordinator,
    CoordinatorTiming,
    Desired,
    Goal,
)

V1, V2 = Desired(1, "file:///store/v1", "digest1"), Desired(2, "file:///store/v2", "digest2")


def fleet(**options) -> Coordinator:
    tasks = {"r1": ["place", "stow"], "r2": ["place"]}
    coordinator = Coordinator(
        tasks, timing=CoordinatorTiming(10.0, silence_s=30.0, policy_silence_s=100.0), **options
    )
    coordinator.catalog(V1, committed=0)
    return coordinator


def give_policy(coordinator: Coordinator, name: str, now: float = 0.0) -> None:
    coordinator.policy_status(name, "digest1", active_version=1)
    coordinator.policy_heard(name, now)


def run(coordinator: Coordinator, name: str, now: float = 0.0, success: bool = True) -> Goal:
    goal = dict(coordinator.goals_due(now))[name]
    coordinator.goal_sent(name, now)
    coordinator.goal_ended(name, recorded=True, success=success, message="", now_s=now)
    return goal


def test_a_robot_gets_work_only_once_it_runs_a_policy():
    coordinator = fleet()
    assert coordinator.goals_due(0.0) == []
    coordinator.policy_status("r2", "digest1", active_version=1)
    assert coordinator.goals_due(0.0) == [], "its latched status may have outlived it"
    coordinator.policy_heard("r2", 0.0)
    assert [name for name, _ in coordinator.goals_due(0.0)] == ["r2"]


def test_a_robot_whose_policy_died_gets_no_work_though_its_status_is_still_there():
    coordinator = fleet()
    give_policy(coordinator, "r1", now=0.0)
    assert coordinator.goals_due(100.0) != []
    assert coordinator.goals_due(100.1) == []
    coordinator.policy_heard("r1", 200.0)
    assert coordinator.goals_due(200.0) != []


def test_tasks_take_turns_and_no_scene_comes_twice():
    coordinator = fleet()
    for name in ("r1", "r2"):
        give_policy(coordinator, name)
    goals = [run(coordinator, name) for name in ("r1", "r2", "r1", "r1", "r2")]
    assert [goal.task for goal in goals] == ["place", "place", "stow", "place", "place"]
    seeds = [goal.seed for goal in goals]
    assert len(set(seeds)) == len(seeds) and not set(seeds) & set(EVALUATION_SEEDS)


def test_a_coordinator_started_again_goes_on_with_fresh_scenes():
    coordinator = Coordinator({"r1": ["place"]})
    give_policy(coordinator, "r1")
    assert coordinator.goals_due(0.0) == [], "the catalog has not been seen yet"
    coordinator.catalog(V1, committed=120)
    assert run(coordinator, "r1").seed == FIRST_SEED + 120


def test_seeds_kept_for_evaluation_are_refused():
    with pytest.raises(ValueError, match="is kept for evaluations; use 1000000 or more"):
        Coordinator({"r1": ["place"]}, first_seed=999_999)


def test_a_robot_without_a_task_is_refused():
    with pytest.raises(ValueError, match="no task for r2"):
        Coordinator({"r1": ["place"], "r2": []})


def test_it_stops_after_the_number_of_episodes_asked_for():
    coordinator = fleet(episodes_per_robot=2)
    for name in ("r1", "r2"):
        give_policy(coordinator, name)
        run(coordinator, name, success=True)
        assert not coordinator.finished
        run(coordinator, name, success=False)
    assert coordinator.finished and coordinator.goals_due(99.0) == []
    assert [(robot.episodes, robot.successes) for robot in coordinator.robots.values()] == [(2, 1), (2, 1)]


def test_a_refused_goal_is_offered_again_later_and_a_failed_episode_is_not_repeated():
    coordinator = fleet()
    give_policy(coordinator, "r1")
    ((_, goal),) = coordinator.goals_due(0.0)
    coordinator.goal_sent("r1", 0.0)
    coordinator.goal_refused("r1", "busy", 1.0)
    assert coordinator.goals_due(2.0) == []
    assert coordinator.goals_due(3.0) == [("r1", goal)]
    coordinator.goal_sent("r1", 3.0)
    coordinator.goal_ended("r1", recorded=False, success=False, message="disk full", now_s=9.0)
    assert coordinator.robots["r1"].note == "the episode failed: disk full"
    assert coordinator.robots["r1"].episodes == 0
    ((_, other),) = coordinator.goals_due(20.0)
    assert other.seed != goal.seed


def test_a_robot_that_falls_silent_is_given_up_and_the_others_go_on():
    coordinator = fleet()
    for name in ("r1", "r2"):
        give_policy(coordinator, name)
    for name, _ in coordinator.goals_due(0.0):
        coordinator.goal_sent(name, 0.0)
    for second in range(1, 30):
        coordinator.heard("r2", float(second))
    assert coordinator.given_up(30.0) == []
    assert coordinator.given_up(31.0) == ["r1"]
    assert coordinator.given_up(32.0) == []
    assert coordinator.robots["r2"].running
    assert [name for name, _ in coordinator.goals_due(40.0)] == ["r1"], (
        "it is asked again when it may be back"
    )


def test_every_robot_is_told_the_version_until_its_status_shows_it():
    coordinator = fleet()
    assert coordinator.updates_due(0.0) == [("r1", V1), ("r2", V1)]
    coordinator.update_sent("r1", 0.0)
    assert coordinator.updates_due(0.0) == [("r2", V1)], "r2 is off-line and stays due"
    coordinator.update_ended("r1", "", 0.1)
    coordinator.policy_status("r1", "digest1", active_version=-1)
    assert coordinator.updates_due(60.0) == [("r2", V1)]


def test_a_robot_that_lost_its_version_is_told_again():
    coordinator = fleet()
    give_policy(coordinator, "r1")
    give_policy(coordinator, "r2")
    assert coordinator.updates_due(0.0) == []
    coordinator.policy_status("r2", "", -1)  # its policy node was killed and is back
    assert coordinator.updates_due(0.0) == [("r2", V1)]


def test_an_update_without_an_answer_or_with_a_refusal_is_tried_again_later():
    coordinator = fleet()
    give_policy(coordinator, "r2")
    coordinator.update_sent("r1", 0.0)
    assert coordinator.updates_due(9.0) == []
    assert coordinator.updates_due(11.0) == [] and "no answer in 10 s" in coordinator.robots["r1"].note
    assert coordinator.updates_due(13.1) == [("r1", V1)]
    coordinator.update_sent("r1", 13.1)
    coordinator.update_ended("r1", "uri is not allowed", 13.2)
    assert coordinator.updates_due(15.0) == []
    coordinator.catalog(V2, committed=0)  # a new version gets its chance at once
    assert coordinator.updates_due(15.0) == [("r1", V2), ("r2", V2)]


def wait_for(condition) -> None:
    import time

    end = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_catalog_is_watched_and_a_broken_one_keeps_the_last_view(tmp_path, monkeypatch):
    url = str(tmp_path / "catalog.db")
    catalog = Catalog(url)
    watch = CatalogWatch(url, period_s=0.01)
    try:
        wait_for(lambda: watch.view.looks > 0)
        assert watch.view.desired is None
        version = catalog.register_policy("digest1", "file:///v1", (0, 0))
        catalog.set_policy_state(version, "active")
        wait_for(lambda: watch.view.desired == Desired(version, "file:///v1", "digest1"))

        def broken(self):
            raise OperationalError("SELECT", {}, OSError("connection lost"))

        monkeypatch.setattr(catalog_watch.Catalog, "desired_policy", broken)
        wait_for(lambda: watch.view.error)
        assert "connection lost" in watch.view.error and watch.view.desired is not None
    finally:
        watch.close()
        catalog.close()
