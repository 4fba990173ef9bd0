# SPDX-License-Identifier: Apache-2.0
"""Trunks: shapes, what the features mean, and that one robot's feature does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lwd_policy.embodiment import Embodiment
from lwd_policy.observation import COMMAND, JOINT_POSITIONS, KEYPOINTS
from lwd_policy.trunk import Trunk, TrunkConfig, body_state, build_trunk

KINDS = ("keypoints", "images", "joints")


@pytest.fixture(scope="module")
def trunks(robot: Embodiment, trunk_config: Callable[[str], TrunkConfig]) -> dict[str, Trunk]:
    torch.manual_seed(0)
    return {kind: build_trunk(trunk_config(kind), robot).eval() for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_feature_does_not_depend_on_its_batch(kind: str, trunks: dict[str, Trunk], observe: Any) -> None:
    trunk = trunks[kind]
    observations = [observe(i, f"wording {i % 2}", images=True) for i in range(4)]
    together = trunk(trunk.inputs(observations))
    assert together.shape == (4, trunk.feature_dim) and torch.isfinite(together).all()
    for observation, row in zip(observations, together, strict=True):
        torch.testing.assert_close(trunk(trunk.inputs([observation]))[0], row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["keypoints", "images"])
def test_perception_has_the_shapes_that_pretraining_needs(
    kind: str, trunks: dict[str, Trunk], observe: Any
) -> None:
    trunk = trunks[kind]
    seen = trunk.perceive(trunk.inputs([observe(i, images=True) for i in range(2)]))
    assert seen.keypoints.shape == (2, 5, 3) and seen.presence_logits.shape == (2, 5)
    assert seen.item_logits.shape == (2, 3) and seen.place_logits.shape == (2, 2)
    assert seen.tool_offsets.shape == (2, 2 if kind == "images" else 0, 3)
    sum(
        x.sum() for x in (seen.keypoints, seen.presence_logits, seen.item_logits, seen.tool_offsets)
    ).backward()


@torch.no_grad()
def test_the_feature_holds_the_way_from_each_tool_to_what_is_referred_to(
    robot: Embodiment, trunks: dict[str, Trunk], observe: Any
) -> None:
    """The names of the instruction point, softly, at one item and one place; both minus each tool are features."""
    trunk, observation = trunks["keypoints"], observe(1)
    inputs = trunk.inputs([observation])
    seen = trunk.perceive(inputs)
    points = observation.values[KEYPOINTS].astype(np.float64)
    item = seen.item_logits.softmax(-1)[0].double().numpy() @ points[:3]
    place = seen.place_logits.softmax(-1)[0].double().numpy() @ points[3:]
    feature = trunk(inputs)[0].double().numpy()
    for arm in robot.arms:
        tool = arm.chain.forward(observation.values[JOINT_POSITIONS][robot.arm_columns(arm)[:-1]])[0]
        for way in (item - tool, place - tool):
            distance = np.abs(feature[None] - 8.0 * way[:, None]).min(axis=1)
            assert (distance < 1e-4).all()


@torch.no_grad()
def test_a_gripper_that_holds_something_is_told_from_one_that_closed_on_nothing(
    robot: Embodiment, trunks: dict[str, Trunk], observe: Any
) -> None:
    """Fingers that stop a quarter of their range before they are closed change a feature by nearly one."""
    trunk, seen = trunks["keypoints"], observe(1)
    arm = robot.arms[0]
    gripper = robot.arm_columns(arm)[-1]

    def feature(opening: float) -> torch.Tensor:
        joints, command = seen.values[JOINT_POSITIONS].copy(), seen.values[JOINT_POSITIONS].copy()
        low, high = robot.lower[gripper], robot.upper[gripper]
        joints[gripper], command[gripper] = low + opening * (high - low), low
        values = {**seen.values, JOINT_POSITIONS: joints, COMMAND: command}
        return trunk(trunk.inputs([replace(seen, values=values)]))[0]

    empty, holding = feature(0.0), feature(0.25)
    assert (holding - empty).abs().max() > 0.95


@torch.no_grad()
def test_what_is_not_there_says_nothing_and_is_never_meant(
    robot: Embodiment, trunks: dict[str, Trunk], observe: Any
) -> None:
    """Neither its own place nor the ways to it move with the tools; the instruction means one of those that are there."""
    trunk = trunks["keypoints"]
    inputs = trunk.inputs([observe(1)])
    inputs["keypoints"][0, 1:] = torch.tensor([0.0, 0.0, -1.0])  # only the first item is left
    point = inputs["keypoints"][0, 0]
    feature = trunk(inputs)[0]
    where, ways, near = feature[:21].view(7, 3), feature[21:63].view(2, 7, 3), feature[63:105].view(2, 7, 3)
    for part in (where, *ways, *near):
        assert not part[[1, 2, 3, 4, 6]].any()  # slots 1 to 4, and the place that is meant
        assert part[[0, 5]].any(-1).all()
    torch.testing.assert_close(where[0], 4 * point)
    torch.testing.assert_close(where[5], 4 * point)


@torch.no_grad()
def test_a_slot_that_an_image_does_not_show_says_nothing(
    robot: Embodiment, trunk_config: Callable[[str], TrunkConfig], observe: Any
) -> None:
    trunk = build_trunk(trunk_config("images"), robot).eval()
    inputs = trunk.inputs([observe(images=True)])
    last = trunk.locate[-1]  # type: ignore[index]
    last.bias.view(-1, 4)[:, 3] = -100.0
    assert not trunk(inputs)[0, : 7 * 3 * 5].any()


def test_the_body_is_seen_by_forward_kinematics_and_before_the_first_command_the_joints_stand_in(
    robot: Embodiment, observe: Any
) -> None:
    observation = observe(2)
    state = body_state(robot, [observation]).reshape(2, 11)
    for row, arm in zip(state, robot.arms, strict=True):
        columns = robot.arm_columns(arm)
        joints = observation.values[JOINT_POSITIONS]
        position, rotation = arm.chain.forward(joints[columns[:-1]])
        np.testing.assert_allclose(row[:3], position, atol=1e-6)
        np.testing.assert_allclose(row[3:9], rotation[:, :2].T.ravel(), atol=1e-6)
        np.testing.assert_allclose(row[9:], joints[columns[-1]] / 0.04, atol=1e-6)
    command = np.array(observation.values[JOINT_POSITIONS])
    command[robot.gripper_columns] = 0.0
    commanded = replace(observation, values={**observation.values, COMMAND: command})
    np.testing.assert_array_equal(body_state(robot, [commanded]).reshape(2, 11)[:, 10], 0.0)


def test_the_image_trunk_fits_into_four_megabytes_of_half_precision(trunks: dict[str, Trunk]) -> None:
    assert sum(p.numel() for p in trunks["images"].parameters()) < 1_000_000


def test_a_configuration_survives_json(trunk_config: Callable[[str], TrunkConfig]) -> None:
    config = trunk_config("images")
    assert TrunkConfig.from_json(config.to_json()) == config
    for content in ({}, {"kind": "images"}, {**config.to_json(), "items": 3}):
        with pytest.raises(ValueError):
            TrunkConfig.from_json(content)


def test_an_unknown_kind_is_refused(robot: Embodiment) -> None:
    with pytest.raises(ValueError, match="'sonar'; one of keypoints, images, joints"):
        build_trunk(TrunkConfig("sonar"), robot)
