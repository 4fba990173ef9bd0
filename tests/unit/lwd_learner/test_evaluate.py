# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from lwd_learner.evaluate import paired_difference, success_rate


def test_wilson_interval_of_a_known_case() -> None:
    rate = success_rate([True] * 8 + [False] * 2)
    assert (rate.value, rate.low, rate.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_all_successes_still_leave_room_for_failure() -> None:
    rate = success_rate([True] * 200)
    assert rate.high == pytest.approx(1.0)
    assert rate.low == pytest.approx(200 / (200 + 1.959964**2), abs=1e-9)


def test_no_episode_is_refused() -> None:
    with pytest.raises(ValueError, match="no evaluation episode"):
        success_rate([])


def test_pairing_removes_the_difficulty_of_the_seeds() -> None:
    """Half of the seeds are impossible for both; the gain on the others is certain, and the interval says so."""
    before = {s: s % 4 == 0 for s in range(200)}
    after = {s: s % 2 == 0 for s in range(200)}
    gain = paired_difference(after, before)
    assert gain.value == pytest.approx(0.25)
    assert gain.excludes_zero
    standard_error = np.sqrt(0.25 * 0.75 / 200)
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)


def test_equal_policies_claim_nothing() -> None:
    outcome = {s: s % 3 == 0 for s in range(50)}
    swapped = {s: not outcome[s] if s < 2 else outcome[s] for s in range(50)}
    assert not paired_difference(swapped, outcome).excludes_zero


def test_other_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired: 2 of 3"):
        paired_difference({1: True, 2: True}, {2: True, 3: False})
