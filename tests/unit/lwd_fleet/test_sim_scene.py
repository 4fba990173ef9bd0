# SPDX-License-Identifier: Apache-2.0
"""One robot, three descriptions: the constants, the committed URDF and YAML, and the simulated body agree."""

from pathlib import Path

import mujoco
import numpy as np
import pytest

from lwd_fleet.sim import robot, scene
from lwd_policy.embodiment import Embodiment

ROBOTS = Path(__file__).parents[3] / "config/robots"


def test_the_committed_description_is_the_generated_one() -> None:
    assert (ROBOTS / "sim_dual_arm.urdf").read_text(encoding="utf-8") == robot.urdf()
    assert (ROBOTS / "sim_dual_arm.yaml").read_text(encoding="utf-8") == robot.robot_yaml()
    assert Embodiment.load(ROBOTS / "sim_dual_arm.yaml") == robot.embodiment()


@pytest.mark.parametrize("task", sorted(scene.FURNITURE))
def test_the_simulated_tool_is_where_the_urdf_says(task: str) -> None:
    model = scene.build_model(task)
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    for _ in range(20):
        for arm in robot.embodiment().arms:
            q = rng.uniform(arm.chain.lower, arm.chain.upper)
            for name, value in zip(arm.joints, q, strict=True):
                data.joint(name).qpos[0] = value
            mujoco.mj_kinematics(model, data)
            position, rotation = arm.chain.forward(q)
            np.testing.assert_allclose(position, data.site(f"{arm.name}_tcp").xpos, atol=1e-9)
            np.testing.assert_allclose(rotation.ravel(), data.site(f"{arm.name}_tcp").xmat, atol=1e-9)


@pytest.mark.parametrize("task", sorted(scene.FURNITURE))
def test_joint_limits_are_those_of_the_urdf(task: str) -> None:
    model = scene.build_model(task)
    body = robot.embodiment()
    for name, low, high in zip(body.joint_names, body.lower, body.upper, strict=True):
        np.testing.assert_allclose(model.joint(name).range, [low, high])
        np.testing.assert_allclose(model.actuator(name).ctrlrange, [low, high])


@pytest.mark.parametrize("task", sorted(scene.FURNITURE))
def test_the_arms_collide_with_nothing_and_objects_with_each_other(task: str) -> None:
    model = scene.build_model(task)
    moving = {model.body(name).id for name in scene.CARRIED[task]}
    for geom in range(model.ngeom):
        body = model.body(int(model.geom_bodyid[geom]))
        if body.name.startswith(("left_", "right_")) and not body.name.endswith("tray"):
            assert model.geom_contype[geom] == 0 and model.geom_conaffinity[geom] == 0
        elif body.id in moving:
            assert model.geom_contype[geom] == 1


def test_an_unknown_task_has_no_scene() -> None:
    with pytest.raises(ValueError, match="juggle"):
        scene.build_model("juggle")
