# SPDX-License-Identifier: Apache-2.0
"""Time and policy steps: where a moment lies, and chunks shifted to where steps end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwd_policy.step_clock import StepClock, from_step_grid, to_step_grid


def clock(*ends: int, first: int = 0) -> StepClock:
    made = StepClock()
    for step, end in enumerate(ends, first):
        made.add(step, end)
    return made


def test_a_moment_lies_after_a_step_and_within_the_next() -> None:
    made = clock(100, 200, 310)
    assert made.place(200) == (1, 0.0)
    assert made.place(255) == (1, 0.5)
    assert made.place(40) == (-1, 0.0), "how far the first step was is not known"
    assert made.place(400) == (2, 0.0), "nor the one under way"


def test_without_a_step_there_is_no_place() -> None:
    made = clock(100)
    made.clear()
    assert made.place(100) is None


def test_steps_that_are_missing_have_no_inside() -> None:
    made = clock(100, 200)
    made.add(7, 1000)
    assert made.place(600) == (1, 0.0) and made.place(1000) == (7, 0.0)


def test_a_clock_that_was_set_back_begins_anew() -> None:
    made = clock(100, 200)
    made.add(2, 50)
    assert made.place(60) == (2, 0.0)


@given(phase=st.floats(0, 0.999), speed=st.floats(-2, 2), start=st.floats(-1, 1))
def test_at_constant_speed_the_shift_is_exact_both_ways(phase: float, speed: float, start: float) -> None:
    """The arm moves at `speed` per step and is at `start` when it is observed: a step later at start + speed. The step
    under way ends 1 - phase later."""
    after = np.arange(1, 6.0)[:, None]
    grid = to_step_grid(start + speed * after, np.array([start]), phase)
    np.testing.assert_allclose(grid, start + speed * (after - phase), atol=1e-9)
    seen = from_step_grid(grid, phase)
    np.testing.assert_allclose(seen[:-1], start + speed * after[:-1], atol=1e-9)


def test_at_the_end_of_a_step_nothing_is_shifted() -> None:
    chunk = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_array_equal(to_step_grid(chunk, np.ones(3), 0.0), chunk)
    np.testing.assert_array_equal(from_step_grid(chunk, 0.0), chunk)


@pytest.mark.parametrize("phase", [0.25, 0.75])
def test_what_was_held_at_last_stays_held(phase: float) -> None:
    held = np.concatenate([np.zeros((2, 1)), np.ones((3, 1))])
    np.testing.assert_array_equal(from_step_grid(held, phase)[2:], held[2:])
