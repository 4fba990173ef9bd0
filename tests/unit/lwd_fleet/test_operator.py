# SPDX-License-Identifier: Apache-2.0
"""The simulated operator has a person's limits, and what they do is recorded as a person's; play ends in failures."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.robot.arbiter import ArbiterTiming, Author
from lwd_fleet.sim import robot
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_expert, run_policy
from lwd_fleet.sim.operator import Operator, OperatorLimits
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_policy.action import ActionSpec
from lwd_policy.chunk_policy import ChunkPolicy
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.trunk import build_trunk

LIMITS = OperatorLimits(reaction_s=(1.0, 1.0), patience=0.5, longest_s=3.0, share=0.25)
PATIENCE = 20  # steps: half of a sub-step's share of 8 s


@dataclass
class Helpless:
    """A robot whose task has two sub-steps and 8 s, and that reaches none by itself."""

    scores: list[float] = field(default_factory=lambda: [0.0, 0.0])
    step: int = 0
    episode_id: str = "e"

    @property
    def world(self) -> SimpleNamespace:
        task = SimpleNamespace(time_limit_s=8.0, sub_steps=("first", "second"))
        return SimpleNamespace(task=task, sub_step_scores=lambda: tuple(self.scores))


def _watch(operator: Operator, robots: list[Helpless], steps: int) -> list[int | None]:
    """Who is driven in each step. An episode of a robot lasts 80 steps."""
    driven = []
    for _ in range(steps):
        driven.append(operator.attend(robots))
        if driven[-1] is not None:
            operator._expert = operator._expert or object()  # type: ignore[assignment]
        for one in robots:
            one.step += 1
            if one.step == 80:
                one.step, one.episode_id = 0, f"{one.episode_id}e"
    return driven


def test_they_wait_then_react_then_drive_as_long_as_their_share_allows() -> None:
    operator = Operator(LIMITS, 0)
    driven = _watch(operator, [Helpless()], 80)
    begins = driven.index(0)
    assert begins == PATIENCE + 1 + 10, "patience, the step at which it is over, one second to react"
    for step in range(1, 81):
        assert driven[:step].count(0) <= 0.25 * step


def test_they_hand_back_when_a_sub_step_is_reached() -> None:
    operator, one = Operator(LIMITS, 0), Helpless()
    driven = _watch(operator, [one], 35)
    assert driven[-1] == 0
    one.scores[0] = 1.0
    assert _watch(operator, [one], PATIENCE) == [None] * PATIENCE


def test_they_drive_one_robot_at_a_time_and_the_share_is_per_robot() -> None:
    operator, robots = Operator(LIMITS, 0), [Helpless() for _ in range(4)]
    driven = _watch(operator, robots, 800)
    for index in range(4):
        assert 0.05 * 800 < driven.count(index) <= 0.25 * 800
    changes = [(a, b) for a, b in pairwise(driven) if a != b]
    assert all(None in pair for pair in changes), "between two robots they have to look up and react"


def test_a_robot_that_gets_on_is_left_alone() -> None:
    operator, one = Operator(LIMITS, 0), Helpless()
    for step in range(200):
        assert operator.attend([one]) is None
        one.step += 1
        if step % 15 == 0:
            one.scores[0] += 0.01


# With real robots ------------------------------------------------------------------------------------


def _setup(spool: Path | None) -> HeadlessSetup:
    return HeadlessSetup(robot.embodiment(), ArbiterTiming(), observation_spec("keypoints"), spool=spool)


def _still(setup: HeadlessSetup) -> ChunkPolicy:
    """A policy that hardly moves."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ones = np.ones((10, 14))
    action = ActionSpec(setup.embodiment, "joint_relative", 10, 0.1, 5, 0 * ones, 0.01 * ones)
    return ChunkPolicy(
        FlowPolicy(build_trunk(trunk_config("keypoints"), setup.embodiment), setup.spec, action)
    )


@pytest.fixture(scope="module")
def assisted(tmp_path_factory: pytest.TempPathFactory) -> list:
    setup = _setup(tmp_path_factory.mktemp("spool"))
    requests = [EpisodeRequest("place", seed) for seed in range(6)]
    limits = OperatorLimits(share=0.8, patience=0.05, reaction_s=(0.1, 0.1))
    return list(run_policy(setup, _still(setup), 1, "d" * 64, requests, robots=1, assistance=limits))


def test_an_operator_saves_episodes_that_the_policy_would_lose(assisted: list) -> None:
    assert sum(result.success for result in assisted) >= 3
    assert all(result.human_steps > 0 for result in assisted if result.success)


def test_what_an_operator_does_is_recorded_as_a_persons_and_the_policy_decides_anew_after_it(
    assisted: list,
) -> None:
    result = next(result for result in assisted if 0 < result.human_steps < result.steps)
    reader = EpisodeReader(result.path)
    authors = [int(recorded.message.author[0]) for recorded in reader.messages("executed_action")]
    assert len(authors) == result.steps and set(authors) <= {Author.POLICY, Author.HUMAN}
    assert authors.count(Author.HUMAN) == result.human_steps
    decided = {recorded.message.observation_step for recorded in reader.messages("policy/action_chunk")}
    back = [
        step
        for step in range(1, len(authors))
        if authors[step - 1] == Author.HUMAN and authors[step] == Author.POLICY
    ]
    assert all(step - 1 in decided for step in back)


def test_without_assistance_nobody_takes_over() -> None:
    setup = _setup(None)
    (result,) = run_policy(setup, _still(setup), 1, "d" * 64, [EpisodeRequest("place", 0)], robots=1)
    assert not result.success and result.human_steps == 0


def test_play_hardly_ever_fulfils_the_task_and_does_different_things(tmp_path: Path) -> None:
    setup = _setup(tmp_path)
    requests = [EpisodeRequest(task, seed) for task in ("place", "stow") for seed in range(10)]
    results = list(run_expert(setup, requests, plays=True))
    assert sum(result.success for result in results) <= 2
    assert len({result.sub_step_scores for result in results}) >= 3, (
        "it gets to different points of the tasks"
    )
    paths = [
        np.array(
            [
                recorded.message.positions
                for recorded in EpisodeReader(result.path).messages("executed_action")
            ]
        )
        for result in results[:2]
    ]
    length = min(map(len, paths))
    assert np.abs(paths[0][:length] - paths[1][:length]).max() > 0.1
