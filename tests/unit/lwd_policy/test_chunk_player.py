# SPDX-License-Identifier: Apache-2.0
"""Which action now: skipping what was moved meanwhile, exhaustion, late chunks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lwd_policy.chunk_player import ChunkPlayer


def chunk(name: int, horizon: int = 10) -> np.ndarray:
    """One joint; action i of chunk `name` is 100 * name + i."""
    return (100.0 * name + np.arange(horizon))[:, None]


def played(player: ChunkPlayer, steps: range) -> list[int | None]:
    actions = [player.next(step) for step in steps]
    assert all(action is None or action[0] % 100 == action[1] for action in actions)
    return [None if action is None else int(action[0][0]) for action in actions]


def test_nothing_is_played_before_the_first_chunk() -> None:
    assert ChunkPlayer().next(0) is None


def test_a_chunk_is_played_once_from_its_beginning_and_then_exhausted() -> None:
    player = ChunkPlayer()
    player.offer(chunk(1, 3), -1)
    assert played(player, range(5)) == [100, 101, 102, None, None]


def test_a_new_chunk_skips_the_steps_made_since_its_observation() -> None:
    player = ChunkPlayer()
    player.offer(chunk(1), -1)
    assert played(player, range(5)) == [100, 101, 102, 103, 104]
    player.offer(chunk(2), 4)  # observed after step 4, here before step 5: nothing is lost
    assert played(player, range(5, 8)) == [200, 201, 202]
    player.offer(chunk(3), 5)  # observed after step 5; steps 6 and 7 were made while it was computed
    assert played(player, range(8, 10)) == [302, 303]


def test_steps_that_were_held_do_not_use_up_the_new_chunk() -> None:
    player = ChunkPlayer()
    player.offer(chunk(1, 2), -1)
    assert played(player, range(6)) == [100, 101, None, None, None, None]
    player.offer(chunk(2), 0)  # observed after step 0; of steps 1 to 5 only step 1 moved
    assert played(player, range(6, 8)) == [201, 202]


def test_a_chunk_that_comes_too_late_has_nothing_left() -> None:
    player = ChunkPlayer()
    player.offer(chunk(1), -1)
    played(player, range(10))
    player.offer(chunk(2, 3), 2)
    assert player.next(10) is None


def test_motion_under_a_new_chunk_counts_for_the_next_one() -> None:
    player = ChunkPlayer()
    player.offer(chunk(1), -1)
    played(player, range(3))
    player.offer(chunk(2), 1)
    played(player, range(3, 5))
    player.offer(chunk(3), 1)  # steps 2, 3 and 4 were made since, by two chunks
    assert played(player, range(5, 6)) == [303]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=8))
def test_in_steady_operation_the_plan_is_neither_repeated_nor_jumped(plan: list[tuple[int, int]]) -> None:
    """Every chunk says "be at position p at step p": whatever the latencies, step s is played as s."""
    player, step = ChunkPlayer(), 0
    player.offer(np.arange(20.0)[:, None], -1)
    for steps, latency in plan:
        for _ in range(steps):
            assert player.next(step)[0][0] == step
            step += 1
        observed = step - 1
        for _ in range(latency):
            assert player.next(step)[0][0] == step
            step += 1
        player.offer(np.arange(observed + 1.0, observed + 21)[:, None], observed)
