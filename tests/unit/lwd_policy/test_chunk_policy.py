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


def past(observe: Any, *ages: int) -> list[Any]:
    return [observe(age) for age in ages]


def test_the_context_is_made_of_the_observations_given_each_seen_once(make_policy: Any, observe: Any) -> None:
    policy = make_policy(history=3)
    contexts = recorded_contexts(policy)
    seen: list[int] = []
    feature = policy.feature

    def spy(observations: Any) -> torch.Tensor:
        seen.extend(observation.time_ns for observation in observations)
        return feature(observations)

    policy.feature = spy
    chunks = begun(policy, {0: 1})
    ages = [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3), (7, 8, 9)]
    for one in ages:
        chunks.chunk([past(observe, *one)])
    for context, one in zip(contexts, ages, strict=True):
        expected = torch.cat([feature([observe(age)])[0] for age in one])
        torch.testing.assert_close(context[0], expected)
    assert seen == [0, 1, 2, 3, 7, 8, 9]


def test_robots_of_a_batch_do_not_influence_each_other(make_policy: Any, observe: Any) -> None:
    policy = make_policy()
    together = begun(policy, {4: 7, 2: 8})
    alone = {slot: begun(policy, {0: seed}) for slot, seed in ((4, 7), (2, 8))}
    for i, slots in enumerate([(4, 2), (2,), (2, 4), (4,)]):
        observations = [past(observe, 10 * i, 10 * i + slot) for slot in slots]
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
        one, other = first.chunk([past(observe, i, i)])[0], second.chunk([past(observe, i, i)])[0]
        np.testing.assert_array_equal(one.positions, other.positions)
    for chunks in (first, second):
        chunks.begin_episode()
    one, other = (chunks.chunk([past(observe, 0, 0)])[0].normalised for chunks in (first, second))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("representation", ["joint_absolute", "joint_relative", "ee_relative"])
def test_positions_are_the_decoded_chunk_relative_to_the_last_command(
    make_policy: Any, observe: Any, representation: str
) -> None:
    policy = make_policy(representation=representation)
    observation = observe()
    command = observation.values["joint_positions"] + 0.01
    observation = replace(observation, values={**observation.values, COMMAND: command})
    chunk = begun(policy, {0: 1}).chunk([[observe(), observation]])[0]
    assert chunk.positions.shape == (4, 14) and chunk.positions.dtype == np.float64
    action = policy.action_spec
    raw = action.denormalise(chunk.normalised.astype(np.float64))
    np.testing.assert_allclose(chunk.positions, action.decode(raw, command), atol=1e-9)


def test_the_value_of_a_policy_with_a_head_comes_with_its_chunk(make_policy: Any, observe: Any) -> None:
    assert isnan(begun(make_policy(), {0: 1}).chunk([past(observe, 0, 0)])[0].value)
    assert 0 <= begun(make_policy(value_head=True), {0: 1}).chunk([past(observe, 0, 0)])[0].value <= 1


def test_an_episode_has_to_begin_first(make_policy: Any, observe: Any) -> None:
    with pytest.raises(KeyError):
        ChunkPolicy(make_policy()).chunk([past(observe, 0, 0)])


def test_exploration_leads_chunks_astray_by_so_much_drifting_and_repeatably(
    make_policy: Any, observe: Any
) -> None:
    policy = make_policy()

    def astray(exploration: float, chunks: int = 200) -> np.ndarray:
        """[chunks, H, A]: the difference to what the policy alone would do from the same noise; masked where the box ends."""
        explores = ChunkPolicy(policy, exploration)
        explores.begin_episode(0, seed=3)
        found = []
        for i in range(chunks):
            state = explores._slots[0].generator.get_state()
            alone = begun(policy, {0: 0})
            alone._slots[0].generator.set_state(state)
            context = [past(observe, i, i)]
            usual = alone.chunk(context)[0].normalised
            offset = explores.chunk(context)[0].normalised - usual
            found.append(np.ma.masked_where(np.abs(usual) > 0.9, offset))
        return np.ma.stack(found)

    assert not astray(0.0, chunks=5).any()
    offsets = astray(0.02)
    first = offsets.mean(axis=1)  # [chunks, A]
    assert np.abs(offsets - first[:, None]).max() < 1e-5, "the same for all steps of a chunk"
    assert 0.015 < first.std() < 0.025
    assert 0.6 < (first[1:] * first[:-1]).mean() / (first**2).mean() < 0.95
    np.testing.assert_array_equal(astray(0.02, chunks=5), offsets[:5])


def test_exploration_stays_in_the_box(make_policy: Any, observe: Any) -> None:
    explores = ChunkPolicy(make_policy(), exploration=3.0)
    explores.begin_episode(0, seed=3)
    assert np.abs(explores.chunk([past(observe, 0, 0)])[0].normalised).max() == 1.0
