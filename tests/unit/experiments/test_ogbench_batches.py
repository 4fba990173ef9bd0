# SPDX-License-Identifier: Apache-2.0
"""Chunk transitions of play: which rows, which steps count, and that values on [0, 1] are the published ones."""

import numpy as np
import pytest
import torch

from experiments.ogbench_play.batches import ChunkSampler, Play, unit_rewards

GAMMA, HORIZON = 0.9, 3


def play(episodes: list[list[int]], parts: int) -> Play:
    """Episodes given as the number of parts in place per row; observation and action count the rows."""
    in_place = np.array([count for episode in episodes for count in episode])
    last = np.zeros(len(in_place), bool)
    last[np.cumsum([len(episode) for episode in episodes]) - 1] = True
    rows = np.arange(len(in_place), dtype=np.float32)
    return Play(
        observations=np.stack([rows, np.ones_like(rows)], axis=1),
        actions=rows[:, None] / 100,
        last=last,
        rewards=(in_place - parts).astype(np.float32),
        success=in_place == parts,
    )


def published_value(rewards: list[float], success: list[bool]) -> float:
    """Discounted sum of the published rewards up to and with the step that starts in a success."""
    total = 0.0
    for step, (reward, ended) in enumerate(zip(rewards, success, strict=True)):
        total += GAMMA**step * reward
        if ended:
            break
    return total


def test_chunks_start_wherever_all_their_steps_are_in_one_episode() -> None:
    sampler = ChunkSampler(play([[0] * 6, [0] * 4], parts=1), 1, HORIZON, GAMMA)
    assert sampler.starts.tolist() == [0, 1, 2, 6]
    batch = sampler.rows(sampler.starts)
    assert torch.equal(batch.action[3, :, 0], torch.tensor([0.06, 0.07, 0.08]))
    unscaled = batch.next_context[:, 0] * sampler.scale[0] + sampler.center[0]
    assert unscaled.tolist() == pytest.approx([3, 4, 5, 9])


def test_the_step_that_starts_in_a_success_ends_the_chunk_and_is_paid() -> None:
    sampler = ChunkSampler(play([[0, 0, 1, 1, 0, 0, 0, 0]], parts=1), 1, HORIZON, GAMMA)
    batch = sampler.rows(torch.tensor([0, 1, 2, 4]))
    assert batch.mask.tolist() == [[True] * 3, [True, True, False], [True, False, False], [True] * 3]
    assert batch.reward.tolist() == pytest.approx([GAMMA**2, GAMMA, 1.0, 0.0])
    assert batch.discount.tolist() == pytest.approx([0.0, 0.0, 0.0, GAMMA**HORIZON])
    assert batch.valid.all()


@pytest.mark.parametrize("parts", [1, 5])
def test_values_on_the_unit_interval_are_the_published_ones_mapped(parts: int) -> None:
    """V01 = 1 + (1 - gamma) V / n along a whole episode, with partial progress made and lost."""
    rng = np.random.default_rng(parts)
    in_place = [*rng.integers(0, parts, 40).tolist(), parts]
    data = play([in_place], parts)
    unit = unit_rewards(data.rewards, data.success, parts, GAMMA)
    for start in range(len(in_place)):
        value = published_value(data.rewards[start:].tolist(), data.success[start:].tolist())
        mapped = sum(GAMMA**step * float(reward) for step, reward in enumerate(unit[start:]))
        assert mapped == pytest.approx(1 + (1 - GAMMA) * value / parts, abs=1e-6)
        assert 0 <= mapped <= 1


def test_a_bootstrap_from_the_true_value_gives_the_true_value() -> None:
    """The chunk's reward and discount are those of the Bellman equation over its steps."""
    in_place = [0, 2, 1, 0, 1, 2, 3, 0, 0, 0]
    data = play([in_place], parts=3)
    sampler = ChunkSampler(data, 3, HORIZON, GAMMA)
    unit = unit_rewards(data.rewards, data.success, 3, GAMMA)[:7].tolist()
    value = [sum(GAMMA**i * r for i, r in enumerate(unit[start:])) for start in range(7)] + [0.0] * 3
    rows = sampler.starts[:7]
    batch = sampler.rows(rows)
    following = torch.tensor([value[row + HORIZON] for row in rows.tolist()])
    assert (batch.reward + batch.discount * following).tolist() == pytest.approx(value[:7], abs=1e-6)


def test_sampling_repeats_with_its_generator() -> None:
    sampler = ChunkSampler(play([[0] * 20], parts=1), 1, HORIZON, GAMMA)
    first, second = (sampler.sample(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.row, second.row) and set(first.row.tolist()) <= set(sampler.starts.tolist())


def test_networks_see_standardised_observations() -> None:
    sampler = ChunkSampler(play([[0] * 50], parts=1), 1, HORIZON, GAMMA)
    seen = sampler.rows(sampler.starts).context
    assert seen[:, 0].abs().max() < 2.0
    assert torch.equal(seen[:, 1], torch.zeros(len(seen)))  # a constant stays finite
