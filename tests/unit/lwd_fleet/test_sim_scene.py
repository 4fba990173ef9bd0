# SPDX-License-Identifier: Apache-2.0
"""One robot, three descriptions: the constants, the committed URDF and YAML, and the simulated body agree."""

from pathlib import Path

import mujoco
import numpy as np
import pytest

from lwd_fleet.sim import robot
from lwd_fleet.sim.scene import build_model
from lwd_fleet.sim.tasks import TASKS
from lwd_policy.embodiment import Embodiment

ROBOTS = Path(__file__).parents[3] / "config/robots"


def test_the_committed_description_is_the_generated_one() -> None:
    assert (ROBOTS / "sim_dual_arm.urdf").read_text(encoding="utf-8") == robot.urdf()
    assert (ROBOTS / "sim_dual_arm.yaml").read_text(encoding="utf-8") == robot.robot_yaml()
    assert Embodiment.load(ROBOTS / "sim_dual_arm.yaml") == robot.embodiment()


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_simulated_tool_is_where_the_urdf_says(task: str) -> None:
    model = build_model(TASKS[task].parts, task)
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


@pytest.mark.parametrize("task", sorted(TASKS))
def test_joint_limits_are_those_of_the_urdf(task: str) -> None:
    model = build_model(TASKS[task].parts, task)
    body = robot.embodiment()
    for name, low, high in zip(body.joint_names, body.lower, body.upper, strict=True):
        np.testing.assert_allclose(model.joint(name).range, [low, high])
        np.testing.assert_allclose(model.actuator(name).ctrlrange, [low, high])


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_arms_collide_with_nothing_and_things_with_each_other_and_with_fixtures(task: str) -> None:
    model = build_model(TASKS[task].parts, task)
    parts = TASKS[task].parts

    def collide(first: int, second: int) -> bool:
        kinds, masks = model.geom_contype, model.geom_conaffinity
        return bool(kinds[first] & masks[second] or kinds[second] & masks[first])

    def geoms(names: list[str]) -> list[int]:
        ids = {model.body(name).id for name in names}
        return [
            g
            for g in range(model.ngeom)
            if model.geom_bodyid[g] in ids and "liquid" not in model.geom(g).name
        ]

    things = geoms([thing.name for thing in parts.things])
    fixed = [*geoms([part.name for part in (*parts.fixtures, *parts.panels)]), model.geom("table").id]
    arms = [
        g
        for g in range(model.ngeom)
        if model.body(int(model.geom_bodyid[g])).name.startswith(("left_", "right_"))
    ]
    arms = [g for g in arms if g not in fixed and g not in things]
    assert len(arms) > 10
    assert not any(collide(arm, other) for arm in arms for other in range(model.ngeom))
    assert all(collide(thing, other) for thing in things for other in (*things, *fixed))
    assert not any(collide(first, second) for first in fixed for second in fixed)
