# SPDX-License-Identifier: Apache-2.0
"""Actions: every representation and back, normalisation, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwd_policy.action import REPRESENTATIONS, ActionSpec
from lwd_policy.embodiment import Embodiment
from lwd_policy.kinematics import rotation_matrix

POSITIONS, ROTATIONS, GRIPPERS = [0, 1, 2, 7, 8, 9], [3, 4, 5, 10, 11, 12], [6, 13]


def spec(robot: Embodiment, representation: str) -> ActionSpec:
    return ActionSpec.unnormalised(robot, representation, 5, 0.1, 3)


def motion(robot: Embodiment, seed: int, batch: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Reference [batch, n] well inside the limits, and a smooth motion [batch, 5, n] away from it."""
    random = np.random.default_rng(seed)
    margin = 0.25 * (robot.upper - robot.lower)
    centre = np.clip(
        robot.home + random.uniform(-0.2, 0.2, (batch, 14)), robot.lower + margin, robot.upper - margin
    )
    step = random.uniform(-0.05, 0.05, (batch, 5, 14)) * np.where(robot.upper == 0.04, 0.1, 1.0)
    return centre, np.clip(centre[:, None] + np.cumsum(step, axis=1), robot.lower, robot.upper)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_positions_survive_encoding_and_decoding(robot: Embodiment, representation: str, seed: int) -> None:
    action = spec(robot, representation)
    reference, positions = motion(robot, seed)
    raw = action.encode(positions, reference)
    assert raw.shape == (3, 5, action.dim)
    again = action.encode(action.decode(raw, reference), reference)
    if representation != "ee_relative":
        np.testing.assert_allclose(again, raw, atol=1e-12)
        return
    np.testing.assert_allclose(again[..., POSITIONS], raw[..., POSITIONS], atol=1e-4)
    np.testing.assert_array_equal(again[..., GRIPPERS], raw[..., GRIPPERS])
    for first in (3, 10):
        turn = rotation_matrix(raw[..., first : first + 3]), rotation_matrix(again[..., first : first + 3])
        np.testing.assert_allclose(turn[0], turn[1], atol=1e-3)


def test_an_ee_action_is_the_motion_of_the_tool_in_the_base_frame(robot: Embodiment) -> None:
    action = spec(robot, "ee_relative")
    reference, positions = motion(robot, 1, batch=1)
    raw = action.encode(positions, reference)[0]
    for k, arm in enumerate(robot.arms):
        joints = robot.arm_columns(arm)[:-1]
        start, before = arm.chain.forward(reference[0, joints])
        end, after = arm.chain.forward(positions[0, -1, joints])
        np.testing.assert_allclose(raw[-1, 7 * k : 7 * k + 3], end - start, atol=1e-12)
        np.testing.assert_allclose(rotation_matrix(raw[-1, 7 * k + 3 : 7 * k + 6]) @ before, after, atol=1e-9)
        assert raw[-1, 7 * k + 6] == positions[0, -1, robot.arm_columns(arm)[-1]]


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_no_motion_is_decoded_to_the_reference(robot: Embodiment, representation: str) -> None:
    action = spec(robot, representation)
    positions = np.tile(robot.home, (5, 1))
    np.testing.assert_allclose(
        action.decode(action.encode(positions, robot.home), robot.home), positions, atol=1e-6
    )


def test_grippers_are_absolute_whatever_the_reference(robot: Embodiment) -> None:
    reference, positions = motion(robot, 3)
    closed = reference.copy()
    closed[:, robot.gripper_columns] = 0.0
    for representation in REPRESENTATIONS:
        action = spec(robot, representation)
        columns = GRIPPERS if representation == "ee_relative" else robot.gripper_columns
        raw = action.encode(positions, closed)[..., columns]
        np.testing.assert_array_equal(raw, positions[..., robot.gripper_columns])


def test_a_pose_out_of_reach_is_decoded_to_finite_joints_within_their_limits(robot: Embodiment) -> None:
    action = spec(robot, "ee_relative")
    raw = np.zeros((5, 14))
    raw[:, 0] = np.linspace(0.0, 5.0, 5)
    positions = action.decode(raw, robot.home)
    arm = np.setdiff1d(np.arange(14), robot.gripper_columns)
    assert np.isfinite(positions).all()
    assert (positions[:, arm] >= robot.lower[arm] - 1e-9).all() and (
        positions[:, arm] <= robot.upper[arm] + 1e-9
    ).all()


def test_one_robot_decodes_as_it_does_in_a_batch(robot: Embodiment) -> None:
    action = spec(robot, "ee_relative")
    reference, positions = motion(robot, 4)
    raw = action.encode(positions, reference)
    together = action.decode(raw, reference)
    for i in range(3):
        np.testing.assert_allclose(action.decode(raw[i], reference[i]), together[i], atol=1e-9)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_normalisation_is_undone(robot: Embodiment, seed: int) -> None:
    random = np.random.default_rng(seed)
    raw = random.normal(size=(50, 5, 14)) * random.uniform(1e-4, 10.0, 14)
    action = spec(robot, "joint_relative").with_statistics(raw, np.ones((50, 5), bool))
    np.testing.assert_allclose(action.denormalise(action.normalise(raw)), raw, rtol=1e-9, atol=1e-12)


def test_statistics_are_quantiles_of_what_is_valid(robot: Embodiment) -> None:
    raw = np.zeros((101, 5, 14))
    raw[:, :, 0] = np.linspace(-2.0, 4.0, 101)[:, None]
    raw[:50, 1, 0] = 1e9
    valid = np.ones((101, 5), bool)
    valid[:50, 1] = False
    valid[:, 4] = False
    action = spec(robot, "joint_relative").with_statistics(raw, valid)
    np.testing.assert_allclose(
        [action.center[0, 0], action.scale[0, 0]], [1.0, 2.988]
    )  # 0.2 % and 99.8 % of [-2, 4]
    assert action.center[1, 0] == pytest.approx(2.5) and action.scale[1, 0] < 1.5, "invalid rows do not count"
    assert action.scale[0, 1] == 1e-3, "what never moved is not amplified"
    np.testing.assert_array_equal(action.center[4], action.center[3])


def test_a_motion_that_only_a_rare_task_makes_is_within_the_range(robot: Embodiment) -> None:
    """One row in a thousand turns the wrist by up to .5, the others keep it still: no policy could turn it otherwise."""
    random = np.random.default_rng(0)
    raw = random.normal(0.0, 0.01, size=(10_000, 5, 14))
    task = (np.arange(10_000) % 1000 == 0).astype(np.int64)
    raw[task == 1, :, 5] = np.linspace(-0.5, 0.5, 10)[:, None]
    action = spec(robot, "joint_relative").with_statistics(raw, np.ones((10_000, 5), bool), task)
    assert np.abs(action.normalise(raw)[task == 1, :, 5]).max() < 1.05
    np.testing.assert_allclose(action.center[:, 5], 0.0, atol=1e-9)
    blind = spec(robot, "joint_relative").with_statistics(raw, np.ones((10_000, 5), bool))
    assert np.abs(blind.normalise(raw)[task == 1, :, 5]).max() > 10


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_json_carries_the_robot_and_the_normalisation(robot: Embodiment, representation: str) -> None:
    random = np.random.default_rng(0)
    action = spec(robot, representation)
    action = action.with_statistics(random.normal(size=(20, 5, action.dim)), np.ones((20, 5), bool))
    copy = ActionSpec.from_json(action.to_json())
    assert copy.to_json() == action.to_json() and copy.embodiment == robot and copy.dim == action.dim
    reference, positions = motion(robot, 5)
    np.testing.assert_array_equal(copy.encode(positions, reference), action.encode(positions, reference))
    np.testing.assert_array_equal(copy.center, action.center)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"representation": "torque"}, "'torque'; one of joint_absolute"),
        ({"execute_steps": 6}, "within 1 and horizon"),
        ({"execute_steps": 0}, "within 1 and horizon"),
        ({"step_s": 0.0}, "step_s positive"),
        ({"step_s": float("nan")}, "step_s positive"),
        ({"center": np.zeros((5, 3))}, r"center must be finite with shape \(5, 14\)"),
        ({"scale": np.full((5, 14), np.nan)}, "scale must be finite"),
        ({"scale": np.zeros((5, 14))}, "scale must be positive"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(robot: Embodiment, change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(spec(robot, "joint_relative"), **change)


def test_tools_cannot_be_moved_by_a_robot_without_arms(robot: Embodiment) -> None:
    with pytest.raises(ValueError, match="has no arm"):
        spec(replace(robot, arms=()), "ee_relative")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"embodiment": 3}'])
def test_json_that_is_no_action_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        ActionSpec.from_json(text)
