# SPDX-License-Identifier: Apache-2.0
"""A joint space without a robot description: from the data, marked as such, self-contained."""

from __future__ import annotations

import numpy as np

from lwd_learner.importers.embodiment import embodiment_from_positions
from lwd_policy.embodiment import Embodiment

NAMES = ("shoulder & elbow", "grip", "still")  # names of foreign data are not chosen by us
EPISODES = [np.array([[0.0, 1.0, 5.0], [1.0, 3.0, 5.0]]), np.array([[-1.0, 2.0, 5.0], [-1.0, 2.0, 5.0]])]


def test_limits_are_the_range_of_the_data_widened() -> None:
    body = embodiment_from_positions("r1", NAMES, EPISODES, step_s=0.1)
    np.testing.assert_allclose(body.lower, [-1.2, 0.8, 4.99])
    np.testing.assert_allclose(body.upper, [1.2, 3.2, 5.01])
    assert ((body.home >= body.lower) & (body.home <= body.upper)).all()


def test_speeds_are_those_within_episodes_not_the_jumps_between_them() -> None:
    body = embodiment_from_positions("r1", NAMES, EPISODES, step_s=0.1)
    np.testing.assert_allclose(body.max_velocity[:2], [15.0, 30.0])
    assert (body.max_velocity > 0).all() and (body.max_acceleration > 0).all()


def test_it_has_no_arms_and_says_that_it_comes_from_data() -> None:
    body = embodiment_from_positions("r1", NAMES, EPISODES, step_s=0.1)
    assert body.arms == () and body.gripper_columns.size == 0
    assert body.from_data
    copy = Embodiment.from_json(body.to_json())
    assert copy == body and copy.from_data and copy.joint_names == NAMES
