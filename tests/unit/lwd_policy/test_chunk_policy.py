# SPDX-License-Identifier: Apache-2.0
"""A policy in use: history per robot, repeatable noise, absolute positions."""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch

from lwd_policy.chunk_policy import ChunkPolicy
from lwd_policy.observation import COMMAND


def begun(policy: Any, seeds: dict[int, int]) -> ChunkPolicy:
    chunks = ChunkPolicy(policy)
    for slot, seed in seeds.items():
        chunks.begin_episode(slot, seed)
    return chunks


def recorded_contexts(policy: Any) -> list[torch.Tensor]:
    """The contexts that the policy samples from, from now on."""
    contexts: list[torch.Tensor] = []
    sample = policy.sample

    def spy(context: torch.Tensor, *rest: Any) -> torch.Tensor:
        contexts.append(context)
        return sample(context, *rest)

    policy.sample = spy
    return contexts


def test_at_its_beginning_the_first_feature_stands_in_for_the_past(make_policy: Any, observe: Any) -> None:
    policy = make_policy(history=3)
    contexts = recorded_contexts(policy)
    chunks = begun(policy, {0: 1})
    features = [torch.from_numpy(chunks.chunk([observe(i)])[0].feature) for i in range(4)]
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    for context, ages in zip(contexts, expected, strict=True):
        assert torch.equal(context[0], torch.cat([features[i] for i in ages]))
    chunks.begin_episode(0, 1)
    chunks.chunk([observe(3)])
    torch.testing.assert_close(contexts[-1][0], features[3].repeat(3))


def test_robots_of_a_batch_do_not_influence_each_other(make_policy: Any, observe: Any) -> None:
    policy = make_policy()
    together = begun(policy, {4: 7, 2: 8})
    alone = {slot: begun(policy, {0: seed}) for slot, seed in ((4, 7), (2, 8))}
    for i, slots in enumerate([(4, 2), (2,), (2, 4), (4,)]):
        observations = [observe(10 * i + slot) for slot in slots]
        batch = together.chunk(observations, slots)
        for slot, observation, chunk in zip(slots, observations, batch, strict=True):
            single = alone[slot].chunk([observation])[0]
            np.testing.assert_allclose(chunk.normalised, single.normalised, atol=1e-5)
            np.testing.assert_allclose(chunk.positions, single.positions, atol=1e-4)


def test_a_seed_makes_an_episode_repeatable_and_without_one_none_is_like_another(
    make_policy: Any, observe: Any
) -> None:
    policy = make_policy()
    first, second = begun(policy, {0: 3}), begun(policy, {0: 3})
    for i in range(2):
        one, other = first.chunk([observe(i)])[0], second.chunk([observe(i)])[0]
        np.testing.assert_array_equal(one.positions, other.positions)
    for chunks in (first, second):
        chunks.begin_episode()
    assert not np.array_equal(first.chunk([observe()])[0].normalised, second.chunk([observe()])[0].normalised)


@pytest.mark.parametrize("representation", ["joint_absolute", "joint_relative", "ee_relative"])
def test_positions_are_the_decoded_chunk_relative_to_the_last_command(
    make_policy: Any, observe: Any, representation: str
) -> None:
    policy = make_policy(representation=representation)
    observation = observe()
    command = observation.values["joint_positions"] + 0.01
    observation = replace(observation, values={**observation.values, COMMAND: command})
    chunk = begun(policy, {0: 1}).chunk([observation])[0]
    assert chunk.positions.shape == (4, 14) and chunk.positions.dtype == np.float64
    action = policy.action_spec
    raw = action.denormalise(chunk.normalised.astype(np.float64))
    np.testing.assert_allclose(chunk.positions, action.decode(raw, command), atol=1e-9)


def test_the_value_of_a_policy_with_a_head_comes_with_its_chunk(make_policy: Any, observe: Any) -> None:
    assert isnan(begun(make_policy(), {0: 1}).chunk([observe()])[0].value)
    assert 0 <= begun(make_policy(value_head=True), {0: 1}).chunk([observe()])[0].value <= 1


def test_an_episode_has_to_begin_first(make_policy: Any, observe: Any) -> None:
    with pytest.raises(KeyError):
        ChunkPolicy(make_policy()).chunk([observe()])
