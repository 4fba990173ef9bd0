# SPDX-License-Identifier: Apache-2.0
"""Robots without ROS: what they record is an episode like any other, and no robot disturbs its neighbours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.robot.arbiter import ArbiterTiming, Author
from lwd_fleet.sim.headless import EpisodeRequest, EpisodeResult, HeadlessSetup, run_expert, run_policy
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_policy.action import ActionSpec
from lwd_policy.chunk_policy import ChunkPolicy
from lwd_policy.embodiment import Embodiment
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.trunk import build_trunk

IDLE, PREPARING, RUNNING, ENDED = range(4)
SUCCESS, FAILURE = 1, 2
HORIZON, EXECUTE = 10, 5
ROBOT_FILE = Path(__file__).parents[3] / "config" / "robots" / "sim_dual_arm.yaml"


def setup_of(spool: Path | None, kind: str = "keypoints") -> HeadlessSetup:
    robot = Embodiment.load(ROBOT_FILE)
    spec = observation_spec(kind, image_size=48)
    return HeadlessSetup(robot, ArbiterTiming(), spec, image_size=48, spool=spool)


def untrained(setup: HeadlessSetup, kind: str = "keypoints") -> ChunkPolicy:
    """Trembles around where it is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ones = np.ones((HORIZON, 14))
    action = ActionSpec(setup.embodiment, "joint_relative", HORIZON, 0.1, EXECUTE, 0 * ones, 0.05 * ones)
    policy = FlowPolicy(build_trunk(trunk_config(kind), setup.embodiment), setup.spec, action)
    torch.nn.init.normal_(policy.expert.leave.weight, std=0.02)
    return ChunkPolicy(policy)


def states(reader: EpisodeReader) -> list[Any]:
    return [recorded.message for recorded in reader.messages("episode")]


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> tuple[EpisodeResult, EpisodeReader]:
    setup = setup_of(tmp_path_factory.mktemp("spool"), "images")
    (result,) = run_expert(setup, [EpisodeRequest("place", 3)], noise=0.0)
    assert result.path is not None
    return result, EpisodeReader(result.path)


def test_an_expert_succeeds_and_its_sealed_episode_says_so(
    demonstration: tuple[EpisodeResult, EpisodeReader],
) -> None:
    result, reader = demonstration
    assert result.success and set(result.sub_step_scores) == {1.0}
    assert [state.state for state in states(reader)] == [RUNNING, ENDED]
    last = states(reader)[-1]
    assert (last.outcome, last.outcome_source, last.seed, last.task) == (SUCCESS, "detector", 3, "place")
    assert last.episode_id == result.episode_id and last.instruction == result.instruction
    assert reader.summary.episode_id == result.episode_id


def test_a_demonstration_holds_every_step_and_every_observation_of_it(
    demonstration: tuple[EpisodeResult, EpisodeReader],
) -> None:
    result, reader = demonstration
    count = Counter(recorded.topic for recorded in reader)
    steps = [recorded.message for recorded in reader.messages("executed_action")]
    assert [step.step for step in steps] == list(range(result.steps))
    assert {int(author) for step in steps for author in step.author} == {Author.EXPERT}
    observed = -(-result.steps // 5)
    for camera in ("top", "wrist_left", "wrist_right"):
        assert count[f"camera_{camera}/image_raw/compressed"] == observed
    assert count["joint_states"] >= result.steps and count["task"] == 1
    assert count["policy/action_chunk"] == 0, "an expert has no chunks"


def test_time_in_the_bag_is_simulated_and_never_runs_back(
    demonstration: tuple[EpisodeResult, EpisodeReader],
) -> None:
    result, reader = demonstration
    times = [recorded.log_time_ns for recorded in reader]
    assert times == sorted(times)
    assert (times[-1] - times[0]) / 1e9 == pytest.approx(result.duration_s, abs=1e-6)


@pytest.fixture(scope="module")
def failure(tmp_path_factory: pytest.TempPathFactory) -> tuple[EpisodeResult, EpisodeReader]:
    setup = setup_of(tmp_path_factory.mktemp("spool"))
    (result,) = run_policy(setup, untrained(setup), 7, "d" * 64, [EpisodeRequest("place", 3)], robots=2)
    assert result.path is not None
    return result, EpisodeReader(result.path)


def test_an_episode_that_runs_out_of_time_is_labelled_a_failure(
    failure: tuple[EpisodeResult, EpisodeReader],
) -> None:
    result, reader = failure
    assert not result.success
    assert (states(reader)[-1].outcome, states(reader)[-1].end_reason) == (FAILURE, "time limit")


def test_chunks_are_recorded_with_their_version_and_the_samples_they_were_decided_on(
    failure: tuple[EpisodeResult, EpisodeReader],
) -> None:
    result, reader = failure
    chunks = [recorded.message for recorded in reader.messages("policy/action_chunk")]
    assert [chunk.observation_step for chunk in chunks] == list(range(-1, result.steps - 1, EXECUTE))
    assert {(chunk.policy_version, chunk.policy_digest) for chunk in chunks} == {(7, "d" * 64)}
    assert {(chunk.horizon, len(chunk.positions)) for chunk in chunks} == {(HORIZON, HORIZON * 14)}
    first, second = (set(chunk.observations[-1].stream_names) for chunk in chunks[:2])
    assert first == {"joint_positions", "instruction", "keypoints"}, "nothing was commanded before"
    assert second == {*first, "command"}
    for earlier, chunk in zip([chunks[0], *chunks], chunks, strict=False):
        assert [one.stamp for one in chunk.observations] == [
            earlier.observations[-1].stamp,
            chunk.observations[-1].stamp,
        ]


def test_every_step_says_which_action_of_which_chunk_it_was(
    failure: tuple[EpisodeResult, EpisodeReader],
) -> None:
    steps = [recorded.message for recorded in failure[1].messages("executed_action")]
    assert [step.chunk_index for step in steps] == [i % EXECUTE for i in range(len(steps))]
    assert [step.chunk_id for step in steps] == [1 + i // EXECUTE for i in range(len(steps))]
    assert {step.policy_version for step in steps} == {7}


def executed(spool: Path, robots: int, seeds: list[int]) -> dict[int, np.ndarray]:
    """Commands [T, 14] of each seed's episode."""
    setup = setup_of(spool)
    requests = [EpisodeRequest("place", seed) for seed in seeds]
    commands = {}
    for result in run_policy(setup, untrained(setup), 1, "d" * 64, requests, robots):
        assert result.path is not None
        reader = EpisodeReader(result.path)
        commands[result.request.seed] = np.stack(
            [recorded.message.positions for recorded in reader.messages("executed_action")]
        )
    return commands


def test_an_episode_depends_on_its_seed_and_not_on_its_neighbours(tmp_path: Path) -> None:
    alone = executed(tmp_path / "alone", 1, [1, 2, 3])
    together = executed(tmp_path / "together", 2, [3, 1, 2])
    assert alone.keys() == together.keys()
    for seed, commands in alone.items():
        # the same up to rounding: a batch is summed in another order
        np.testing.assert_allclose(together[seed], commands, atol=1e-4)
    assert not np.allclose(alone[1], alone[2], atol=1e-2)


def test_nothing_is_recorded_without_a_spool() -> None:
    (result,) = run_expert(setup_of(None), [EpisodeRequest("place", 3)], noise=0.0)
    assert result.success and result.path is None
