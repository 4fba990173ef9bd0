# SPDX-License-Identifier: Apache-2.0
"""Kinematics against MuJoCo's own URDF loader and against themselves."""

from pathlib import Path

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwd_policy.embodiment import Embodiment
from lwd_policy.kinematics import KinematicsError, SerialChain, rotation_matrix, rotation_vector

ROBOT = Path(__file__).parents[3] / "config/robots/sim_dual_arm.yaml"
URDF = ROBOT.with_suffix(".urdf").read_text(encoding="utf-8")
EMBODIMENT = Embodiment.load(ROBOT)
LEFT = EMBODIMENT.arms[0].chain

fractions = st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6).map(np.array)
offsets = st.lists(st.floats(-0.15, 0.15), min_size=6, max_size=6).map(np.array)
vectors = st.lists(st.floats(-2.0, 2.0), min_size=3, max_size=3).map(np.array)


@pytest.fixture(scope="module")
def oracle() -> mujoco.MjModel:
    extension = '<mujoco><compiler fusestatic="false"/></mujoco></robot>'
    return mujoco.MjModel.from_xml_string(URDF.replace("</robot>", extension))


@pytest.mark.parametrize("arm", ["left", "right"])
def test_forward_agrees_with_mujoco(oracle: mujoco.MjModel, arm: str) -> None:
    data = mujoco.MjData(oracle)
    chain = EMBODIMENT.arm(arm).chain
    rng = np.random.default_rng(0)
    for _ in range(50):
        q = rng.uniform(chain.lower, chain.upper)
        for name, value in zip(chain.joint_names, q, strict=True):
            data.joint(name).qpos[0] = value
        mujoco.mj_kinematics(oracle, data)
        position, rotation = chain.forward(q)
        np.testing.assert_allclose(position, data.body(f"{arm}_tcp").xpos, atol=1e-9)
        np.testing.assert_allclose(rotation.ravel(), data.body(f"{arm}_tcp").xmat, atol=1e-9)


def test_forward_agrees_with_mujoco_on_prismatic_and_skewed_joints() -> None:
    """A chain with every joint type and origins that are not multiples of 90 degrees."""
    inertial = (
        '<inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial>'
    )
    links = "".join(f'<link name="{name}">{inertial}</link>' for name in "abcdef")
    text = f"""<robot name="odd">{links}
      <joint name="j1" type="continuous"><parent link="a"/><child link="b"/><origin xyz=".1 .2 .3" rpy=".3 -.4 1.1"/>
        <axis xyz="1 2 -1"/></joint>
      <joint name="j2" type="prismatic"><parent link="b"/><child link="c"/><origin rpy="-1 .2 .4"/><axis xyz="0 1 1"/>
        <limit lower="-.5" upper=".5" velocity="1" effort="1"/></joint>
      <joint name="fixed" type="fixed"><parent link="c"/><child link="d"/><origin xyz="0 .1 0" rpy="2 0 1"/></joint>
      <joint name="j3" type="revolute"><parent link="d"/><child link="e"/><origin xyz=".3 0 0"/><axis xyz="0 1 0"/>
        <limit lower="-1" upper="2" velocity="1" effort="1"/></joint>
      <joint name="end" type="fixed"><parent link="e"/><child link="f"/><origin xyz="0 0 .2" rpy=".1 .2 .3"/></joint>
      </robot>"""
    chain = SerialChain.from_urdf(text, "a", "f")
    extension = '<mujoco><compiler fusestatic="false"/></mujoco></robot>'
    model = mujoco.MjModel.from_xml_string(text.replace("</robot>", extension))
    data = mujoco.MjData(model)
    for q in np.random.default_rng(1).uniform(-0.5, 0.5, (20, 3)):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        position, rotation = chain.forward(q)
        np.testing.assert_allclose(position, data.body("f").xpos, atol=1e-9)
        np.testing.assert_allclose(rotation.ravel(), data.body("f").xmat, atol=1e-9)
        reached, _ = chain.forward(chain.inverse(position, rotation, q + 0.1))
        np.testing.assert_allclose(reached, position, atol=1e-4)


@given(fractions, offsets)
@settings(max_examples=100, deadline=None)
def test_inverse_returns_to_a_pose_near_the_seed(fraction: np.ndarray, offset: np.ndarray) -> None:
    q = LEFT.lower + 0.15 + fraction * (LEFT.upper - LEFT.lower - 0.3)
    position, rotation = LEFT.forward(q)
    solution = LEFT.inverse(position, rotation, q + offset)
    reached_position, reached_rotation = LEFT.forward(solution)
    assert np.linalg.norm(reached_position - position) < 1e-4
    assert np.linalg.norm(rotation_vector(rotation @ reached_rotation.T)) < 1e-3
    assert (solution >= LEFT.lower).all() and (solution <= LEFT.upper).all()


def test_a_batch_equals_its_rows_and_keeps_its_shape() -> None:
    q = np.random.default_rng(2).uniform(LEFT.lower + 0.2, LEFT.upper - 0.2, (2, 5, 6))
    position, rotation = LEFT.forward(q)
    assert position.shape == (2, 5, 3) and rotation.shape == (2, 5, 3, 3)
    solution = LEFT.inverse(position, rotation, q + 0.05)
    assert solution.shape == q.shape
    for row in np.ndindex(2, 5):
        alone = LEFT.inverse(position[row], rotation[row], q[row] + 0.05)
        np.testing.assert_allclose(alone, solution[row], atol=1e-8)


def test_one_seed_serves_many_targets() -> None:
    home = EMBODIMENT.home[:6]
    position, rotation = LEFT.forward(home)
    targets = position + np.linspace([0.0, 0.0, 0.0], [0.1, 0.15, -0.1], 10)
    reached, _ = LEFT.forward(LEFT.inverse(targets, rotation, home))
    np.testing.assert_allclose(reached, targets, atol=1e-4)


def test_a_target_out_of_reach_gives_finite_joints_within_limits_that_point_at_it() -> None:
    home = EMBODIMENT.home[:6]
    _, rotation = LEFT.forward(home)
    solution = LEFT.inverse([0.0, 3.0, 0.1], rotation, home, iterations=100)
    assert np.isfinite(solution).all()
    assert (solution >= LEFT.lower).all() and (solution <= LEFT.upper).all()
    reached, _ = LEFT.forward(solution)
    assert reached[1] > LEFT.forward(home)[0][1] + 0.2


@given(vectors)
@settings(max_examples=200, deadline=None)
def test_rotation_vector_inverts_rotation_matrix(vector: np.ndarray) -> None:
    angle = np.linalg.norm(vector)
    if angle > np.pi:
        vector = vector * (np.pi / angle)
    matrix = rotation_matrix(vector)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(rotation_matrix(rotation_vector(matrix)), matrix, atol=1e-6)


@pytest.mark.parametrize("axis", np.concatenate([np.eye(3), [[0.6, 0.8, 0.0], [1, 1, 1]]]))
def test_half_turns_have_a_rotation_vector(axis: np.ndarray) -> None:
    unit = axis / np.linalg.norm(axis)
    for angle in (np.pi, np.pi - 1e-6, np.pi - 1e-3):
        vector = rotation_vector(rotation_matrix(unit * angle))
        np.testing.assert_allclose(np.abs(vector), np.abs(unit * angle), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<robot", "well-formed"),
        ("<model/>", "root element"),
        (URDF.replace('lower="-2.6"', 'lower="nan"', 1), "left_joint_1"),
        (URDF.replace("left_joint_2", "left_gripper").replace("left_tcp", "gone"), "left_tcp"),
    ],
)
def test_a_broken_urdf_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(KinematicsError, match=message):
        SerialChain.from_urdf(text, "base_link", "left_tcp")


def test_a_chain_through_a_mimic_joint_is_refused() -> None:
    with pytest.raises(KinematicsError, match="mimic"):
        SerialChain.from_urdf(URDF, "base_link", "left_finger_b")
