# SPDX-License-Identifier: Apache-2.0
"""What the learner makes of a bag is what the policy saw and the robot was commanded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.robot.arbiter import ArbiterTiming
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_policy
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_learner.learner import topics_of, trace_episode
from lwd_learner.transitions import AUTHOR_POLICY, EpisodeRows, episode_rows
from lwd_policy.action import ActionSpec
from lwd_policy.chunk_policy import ChunkPolicy, PolicyChunk
from lwd_policy.embodiment import Embodiment
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import Observation, reference_position
from lwd_policy.trunk import build_trunk

ROBOT_FILE = Path(__file__).parents[3] / "config" / "robots" / "sim_dual_arm.yaml"
IK_TOLERANCE = 5e-4  # rad: inverse kinematics ends after a fixed number of steps


class RememberedPolicy(ChunkPolicy):
    """Keeps what it answered."""

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__(policy)
        self.chunks: list[PolicyChunk] = []
        self.references: list[np.ndarray] = []
        self.pasts: list[np.ndarray] = []  # features half a second before

    def chunk(
        self, contexts: Sequence[Sequence[Observation]], slots: Sequence[int] = (0,)
    ) -> list[PolicyChunk]:
        chunks = super().chunk(contexts, slots)
        self.chunks += chunks
        self.references += [reference_position(context[-1]) for context in contexts]
        self.pasts += [self.policy.feature([context[0]])[0].numpy() for context in contexts]
        return chunks


@pytest.fixture(scope="module", params=[("keypoints", "joint_relative"), ("images", "ee_relative")])
def episode(request, tmp_path_factory) -> tuple[RememberedPolicy, EpisodeRows]:  # type: ignore[no-untyped-def]
    """One episode of an untrained policy that makes small motions, and the same read from its bag."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    robot = Embodiment.load(ROBOT_FILE)
    kind, representation = request.param
    center = np.zeros((10, 14))
    center[:, [6, 13]] = 0.02  # grippers half open, so that no limit is near
    action = ActionSpec(robot, representation, 10, 0.1, 5, center, np.full((10, 14), 0.01))
    spec = observation_spec(kind, image_size=48)
    policy = FlowPolicy(build_trunk(trunk_config(kind), robot), spec, action).eval()
    live = RememberedPolicy(policy)
    spool = tmp_path_factory.mktemp("spool")
    setup = HeadlessSetup(robot, ArbiterTiming(), spec, image_size=48, spool=spool)
    (result,) = run_policy(setup, live, 3, "d" * 64, [EpisodeRequest("place", 1)], robots=1)
    assert result.path is not None
    reader = EpisodeReader(result.path)
    trace = trace_episode(result.episode_id, reader.messages(*topics_of(policy)), policy, 5)
    return live, episode_rows(trace, policy)


def test_features_from_the_bag_are_those_of_the_robot(episode: tuple[RememberedPolicy, EpisodeRows]) -> None:
    live, rows = episode
    assert len(live.chunks) == len(rows.trace.points) == len(rows.transitions) == 14
    features = np.stack([chunk.feature for chunk in live.chunks])
    np.testing.assert_allclose(rows.features, features, atol=1e-5)
    np.testing.assert_allclose(rows.features[rows.previous], np.stack(live.pasts), atol=1e-5)
    for point, reference in zip(rows.trace.points, live.references, strict=True):
        np.testing.assert_allclose(reference_position(point.observation), reference, atol=1e-9)


def test_actions_decode_to_what_was_commanded(episode: tuple[RememberedPolicy, EpisodeRows]) -> None:
    live, rows = episode
    spec = live.action_spec
    for transition, normalised in zip(rows.transitions, rows.actions, strict=True):
        assert (transition.author, transition.policy_version) == (AUTHOR_POLICY, 3)
        reference = reference_position(rows.trace.points[transition.point].observation)
        decoded = spec.decode(spec.denormalise(normalised.astype(np.float64)), reference)
        commanded = rows.trace.positions[transition.first : transition.first + transition.planned]
        np.testing.assert_allclose(decoded[: transition.planned], commanded, atol=IK_TOLERANCE)


def test_the_robot_did_what_the_policy_sampled(episode: tuple[RememberedPolicy, EpisodeRows]) -> None:
    live, rows = episode
    for chunk, row in zip(live.chunks, rows.transitions, strict=True):
        taken = rows.trace.positions[row.first : row.first + row.executed]
        np.testing.assert_allclose(taken, chunk.positions[: row.executed], atol=1e-9)
