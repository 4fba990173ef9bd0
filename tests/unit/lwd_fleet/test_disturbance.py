# SPDX-License-Identifier: Apache-2.0
"""Disturbances of demonstrations: what befalls an arm is nobody's decision, and the demonstrator goes on from there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.robot.arbiter import ArbiterTiming, Author
from lwd_fleet.sim import robot
from lwd_fleet.sim.disturbance import DisturbanceConfig, Disturbances
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_expert
from lwd_fleet.sim.presets import observation_spec
from lwd_fleet.sim.world import World

PUSHES = DisturbanceConfig(per_s=4.0, pauses=0.0, grips=0.0)
PAUSES = DisturbanceConfig(per_s=4.0, pauses=1.0)


def endless(config: DisturbanceConfig, seed: int) -> tuple[World, list[np.ndarray | None]]:
    """A world in which a demonstrator who does nothing is disturbed for 200 steps; all answers."""
    world = World("place")
    world.reset(seed)
    disturbances = Disturbances(world, config, np.random.default_rng(seed))
    command, answers = world.joint_positions, []
    for _ in range(200):
        answers.append(disturbances.command(command))
        if answers[-1] is not None:
            command = answers[-1]
        for _ in range(5):
            world.step(command)
    return world, answers


def lengths(answers: list[np.ndarray | None]) -> list[int]:
    """Steps of each disturbance that has ended."""
    marks = "".join("." if answer is None else "x" for answer in answers)
    return [len(run) for run in marks.rsplit(".", 1)[0].split(".") if run]


def test_disturbances_come_as_often_and_last_as_long_as_configured() -> None:
    """The mean time between two is 1 / per_s; one follows upon another without a step between now and then."""
    config = DisturbanceConfig(per_s=0.5, duration_s=(0.3, 0.6), pauses=1.0)
    answers = [endless(config, seed)[1] for seed in range(8)]
    runs = [run for episode in answers for run in lengths(episode)]
    assert min(runs) >= 3
    quiet_s = sum(answer is None for episode in answers for answer in episode) * 0.1
    assert quiet_s / len(runs) == pytest.approx(2.0, rel=0.3)


def test_in_a_pause_the_last_command_is_repeated() -> None:
    world, answers = endless(PAUSES, 0)
    start = next(answer for answer in answers if answer is not None)
    assert all(answer is None or np.array_equal(answer, start) for answer in answers)


def test_a_push_moves_both_arms_within_its_reach_and_their_speed() -> None:
    world, answers = endless(PUSHES, 1)
    commands = np.array([answer for answer in answers if answer is not None])
    body = world.embodiment
    for arm in body.arms:
        columns = body.arm_columns(arm)[:-1]
        tools = np.array([arm.chain.forward(command[columns])[0] for command in commands])
        assert np.ptp(tools, axis=0).max() > 0.05
        assert tools[:, 2].min() > 0.02
        step = np.abs(np.diff(commands[:, columns], axis=0)) / 0.1
        assert (step <= body.max_velocity[columns] * 1.2).all()  # consecutive pushes may lie steps apart


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> EpisodeReader:
    """A demonstration that was disturbed and succeeded all the same."""
    spec = observation_spec("keypoints")
    setup = HeadlessSetup(
        robot.embodiment(), ArbiterTiming(), spec, spool=tmp_path_factory.mktemp("disturbed")
    )
    requests = [EpisodeRequest("place", seed) for seed in range(6)]
    done = [one for one in run_expert(setup, requests, disturbed=DisturbanceConfig(per_s=0.6)) if one.success]
    longest = max(done, key=lambda one: one.steps)
    assert longest.path is not None
    return EpisodeReader(longest.path)


def test_disturbed_steps_are_nobodys_decision_and_the_demonstrator_still_succeeds(
    disturbed: EpisodeReader,
) -> None:
    steps = [recorded.message for recorded in disturbed.messages("executed_action")]
    authors = [step.author[0] for step in steps]
    assert {Author.HOLD, Author.EXPERT} == set(authors)
    assert 0.05 < authors.count(Author.HOLD) / len(authors) < 0.7
    assert [step.step for step in steps] == list(range(len(steps)))


def test_the_same_seed_is_disturbed_in_the_same_way(tmp_path: Path) -> None:
    setup = HeadlessSetup(robot.embodiment(), ArbiterTiming(), observation_spec("keypoints"))
    request = [EpisodeRequest("place", 5)]
    first, second = (
        next(run_expert(setup, request, disturbed=DisturbanceConfig(per_s=0.6))) for _ in range(2)
    )
    undisturbed = next(run_expert(setup, request))
    assert first.steps == second.steps != undisturbed.steps
