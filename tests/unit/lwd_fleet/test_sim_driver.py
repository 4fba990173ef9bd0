# SPDX-License-Identifier: Apache-2.0
"""The simulated driver under an injected clock."""

import numpy as np
import pytest

from lwd_fleet.sim.driver import SimulatedDriver, camera_matrix
from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.world import World


@pytest.fixture
def driver() -> SimulatedDriver:
    world = World("place")
    world.reset(0)
    return SimulatedDriver(world, command_timeout_s=0.25)


def _run(driver: SimulatedDriver, start_s: float, seconds: float) -> float:
    for tick in range(round(seconds / TICK_S)):
        driver.advance(start_s + tick * TICK_S)
    return start_s + seconds


def test_it_stays_at_home_until_commanded(driver: SimulatedDriver) -> None:
    assert driver.holding(0.0)
    _run(driver, 0.0, 0.5)
    np.testing.assert_allclose(driver.world.joint_positions, driver.world.embodiment.home, atol=1e-6)


def test_it_follows_a_command_of_some_joints_in_any_order(driver: SimulatedDriver) -> None:
    assert driver.accept(["right_joint_1", "left_gripper"], [0.2, 0.01], 0.0) is None
    _run(driver, 0.0, 1.0)
    positions = driver.world.joint_positions
    np.testing.assert_allclose(positions[[7, 6]], [0.2, 0.01], atol=0.002)
    np.testing.assert_allclose(positions[0], driver.world.embodiment.home[0], atol=1e-4)


@pytest.mark.parametrize(
    ("names", "positions", "message"),
    [
        (["left_joint_9"], [0.0], "no joint left_joint_9"),
        (["left_joint_1"], [float("nan")], "not finite"),
        (["left_joint_1"], [float("inf")], "not finite"),
        (["left_joint_1"], [0.0, 1.0], "2 positions"),
        (["left_joint_1", "left_joint_1"], [0.0, 1.0], "each once"),
        ([], [], "0 joint names"),
    ],
)
def test_a_bad_command_is_refused_and_changes_nothing(
    driver: SimulatedDriver, names: list[str], positions: list[float], message: str
) -> None:
    refusal = driver.accept(names, positions, 0.0)
    assert refusal is not None
    assert message in refusal
    assert driver.refused == 1
    assert driver.command_age_s(1.0) is None
    _run(driver, 0.0, 0.3)
    np.testing.assert_allclose(driver.world.joint_positions, driver.world.embodiment.home, atol=1e-6)


def test_it_holds_the_last_command_when_commands_stop(driver: SimulatedDriver) -> None:
    driver.accept(["left_joint_1"], [0.3], 0.0)
    assert not driver.holding(0.2)
    assert driver.holding(0.3)
    now = _run(driver, 0.0, 2.0)
    before = driver.world.joint_positions
    _run(driver, now, 1.0)
    np.testing.assert_allclose(driver.world.joint_positions, before, atol=1e-6)
    np.testing.assert_allclose(before[0], 0.3, atol=1e-3)


def test_simulated_time_keeps_up_with_the_clock_and_gives_up_a_long_gap(driver: SimulatedDriver) -> None:
    assert driver.advance(10.0) == 1
    assert driver.advance(10.0) == 0
    assert driver.advance(10.0 + 3.5 * TICK_S) == 3
    assert driver.advance(20.0) == 10
    assert driver.lost_s == pytest.approx(20.0 - 10.0 - 14 * TICK_S)
    assert driver.advance(20.0 + 1.01 * TICK_S) == 1


def test_a_reset_forgets_the_last_command(driver: SimulatedDriver) -> None:
    driver.accept(["left_joint_1"], [0.3], 0.0)
    _run(driver, 0.0, 1.0)
    driver.world.reset(1)
    driver.reset(driver.world)
    assert driver.holding(1.0)
    _run(driver, 1.0, 0.5)
    np.testing.assert_allclose(driver.world.joint_positions, driver.world.embodiment.home, atol=1e-6)


def test_the_camera_matrix_projects_the_edge_of_the_view_to_the_edge_of_the_picture() -> None:
    matrix = camera_matrix(np.deg2rad(40.0), 96)
    edge = np.tan(np.deg2rad(20.0))
    pixel = matrix @ [edge, 0.0, 1.0]
    assert pixel[0] == pytest.approx(95.5)


def test_after_a_reset_only_a_command_that_starts_from_there_is_followed(driver: SimulatedDriver) -> None:
    names = driver.world.embodiment.joint_names
    driver.world.reset(2)
    driver.reset(driver.world)
    here = driver.world.joint_positions
    elsewhere = here + 0.3
    assert "where the reset put the arms" in (driver.accept(names, elsewhere, 0.0) or "")
    assert driver.accept(names, here, 0.02) is None
    assert driver.accept(names, elsewhere, 0.04) is None
