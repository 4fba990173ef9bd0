# SPDX-License-Identifier: Apache-2.0
"""Robot descriptions: what is loaded, what survives JSON, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from lwd_policy.embodiment import Embodiment, EmbodimentError

ROBOT = Path(__file__).parents[3] / "config/robots/sim_dual_arm.yaml"


def test_the_simulated_robot_has_fourteen_joints_in_two_arms() -> None:
    robot = Embodiment.load(ROBOT)
    assert len(robot.joint_names) == 14
    assert [arm.name for arm in robot.arms] == ["left", "right"]
    np.testing.assert_array_equal(robot.arm_columns("left"), np.arange(7))
    np.testing.assert_array_equal(robot.arm_columns(robot.arms[1]), np.arange(7, 14))
    np.testing.assert_array_equal(robot.gripper_columns, [6, 13])
    assert robot.arms[0].joints == robot.joint_names[:6] and robot.arms[0].gripper == "left_gripper"
    assert (robot.upper[robot.gripper_columns] == 0.04).all()
    assert ((robot.home >= robot.lower) & (robot.home <= robot.upper)).all()
    assert (robot.max_velocity > 0).all() and (robot.max_acceleration > 0).all()


def test_json_carries_the_whole_robot() -> None:
    robot = Embodiment.load(ROBOT)
    copy = Embodiment.from_json(robot.to_json())
    assert copy == robot and hash(copy) == hash(robot) and copy.to_json() == robot.to_json()
    q = robot.home[robot.arm_columns("right")[:-1]]
    np.testing.assert_array_equal(
        copy.arm("right").chain.forward(q)[0], robot.arm("right").chain.forward(q)[0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joint_names": ["left_joint_1"]}, "differ"),
        ({"joint_names": ["left_joint_1", "left_joint_1"]}, "twice"),
        ({"home": {"left_joint_1": 0.0}}, "home"),
        ({"max_acceleration": None}, "max_acceleration"),
        ({"arms": [{"name": "left"}]}, "tip_link"),
        ({"arms": [{"name": "left", "tip_link": "nowhere"}]}, "nowhere"),
        ({"urdf": "missing.urdf"}, "missing.urdf"),
        ({"urdf": 3}, "urdf"),
    ],
)
def test_a_contradictory_description_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    content = yaml.safe_load(ROBOT.read_text(encoding="utf-8")) | change
    (tmp_path / "sim_dual_arm.urdf").write_text(ROBOT.with_suffix(".urdf").read_text(encoding="utf-8"))
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(EmbodimentError, match=message):
        Embodiment.load(tmp_path / "robot.yaml")


def test_a_home_outside_the_limits_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load(ROBOT.read_text(encoding="utf-8"))
    content["home"]["left_joint_1"] = 9.0
    content["urdf"] = str(ROBOT.with_suffix(".urdf"))
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(EmbodimentError, match="home is outside"):
        Embodiment.load(tmp_path / "robot.yaml")


def test_an_unknown_arm_is_named() -> None:
    with pytest.raises(EmbodimentError, match="no arm 'middle'"):
        Embodiment.load(ROBOT).arm("middle")
