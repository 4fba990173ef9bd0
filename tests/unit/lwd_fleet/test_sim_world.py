# SPDX-License-Identifier: Apache-2.0
"""The simulated world: determinism, grasping, judging, sensing, shifting."""

import numpy as np
import pytest

from lwd_fleet.sim.grasp import GRASP_RADIUS_M
from lwd_fleet.sim.parts import GROCERIES
from lwd_fleet.sim.robot import GRIPPER_OPEN_M, JOINT_NAMES
from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.shift import Shift
from lwd_fleet.sim.tasks import TASKS, Goal, suite_of
from lwd_fleet.sim.tasks.stow import BOX_HEIGHT, LID
from lwd_fleet.sim.world import ABSENT, World

TASK_NAMES = sorted(TASKS)
ITEMS = [item.name for item in GROCERIES]
COLUMNS = {"left": np.arange(6), "right": np.arange(7, 13)}
GRIPPER = {"left": 6, "right": 13}


class Driver:
    """Moves one arm of a world by hand: goes to points, opens and closes."""

    def __init__(self, world: World, arm: str) -> None:
        self.world, self.arm = world, arm
        self.command = world.embodiment.home.copy()
        chain = world.embodiment.arm(arm).chain
        _, self.rotation = chain.forward(self.command[COLUMNS[arm]])
        self.chain = chain

    def go(self, point: np.ndarray, seconds: float = 0.8) -> None:
        """Straight to the point in joint space; ends standing still."""
        columns = COLUMNS[self.arm]
        start = self.command[columns]
        goal = self.chain.inverse(point, self.rotation, start, 60)
        ticks = round(seconds / TICK_S)
        for tick in range(1, ticks + 1):
            self.command[columns] = start + (goal - start) * min(1.0, 1.5 * tick / ticks)
            self.world.step(self.command)

    def grip(self, opening: float) -> None:
        self.command[GRIPPER[self.arm]] = opening
        for _ in range(20):
            self.world.step(self.command)

    def pick(self, thing: str, offset: tuple[float, float, float] = (0, 0, 0)) -> None:
        point = self.world.grasp_point(thing) + offset
        self.go(point + [0, 0, 0.08], 1.5)
        self.go(point)
        self.grip(0.0)


def _wander(world: World, seed: int, ticks: int, look: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    command = world.embodiment.home.copy()
    states = []
    for tick in range(ticks):
        command += rng.normal(size=command.size) * 0.02
        world.step(command)
        if look and tick % 10 == 0:
            world.render("top")
        states.append(world.state())
    return np.stack(states)


# Determinism -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_seed_fixes_every_bit_of_an_episode(task: str) -> None:
    shift = Shift(calibration_sigma_m=0.01, colour_jitter=0.1, command_latency_ticks=2)
    used, fresh = World(task, shift), World(task, shift)
    used.reset(99)
    _wander(used, 1, 30)
    used.reset(7)
    fresh.reset(7)
    assert used.instruction == fresh.instruction and used.goal == fresh.goal
    np.testing.assert_array_equal(used.keypoints(), fresh.keypoints())
    np.testing.assert_array_equal(_wander(used, 2, 100), _wander(fresh, 2, 100))


def test_looking_does_not_change_what_happens() -> None:
    blind, seeing = World("place"), World("place")
    blind.reset(3)
    seeing.reset(3)
    np.testing.assert_array_equal(_wander(blind, 2, 60), _wander(seeing, 2, 60, look=True))


def test_seeds_differ() -> None:
    world = World("place")
    layouts = []
    for seed in range(5):
        world.reset(seed)
        layouts.append(world.keypoints(noise=False)[:3].ravel())
    assert len(np.unique(np.round(layouts, 6), axis=0)) == 5


# Moving and grasping ---------------------------------------------------------------------------------


def test_the_arms_go_where_they_are_told_and_hold_still_at_home() -> None:
    world = World("place")
    world.reset(0)
    home = world.joint_positions
    for _ in range(50):
        world.step(home)
    np.testing.assert_allclose(world.joint_positions, home, atol=1e-6)
    driver = Driver(world, "left")
    point = np.array([-0.1, 0.05, 0.15])
    driver.go(point, 2.0)
    assert np.linalg.norm(world.tool("left") - point) < 0.003


@pytest.mark.parametrize("bad", [np.zeros(13), np.full(14, np.nan), np.full(14, np.inf)])
def test_a_malformed_command_is_refused(bad: np.ndarray) -> None:
    world = World("place")
    world.reset(0)
    with pytest.raises(ValueError, match="14 finite numbers"):
        world.step(bad)


def test_a_command_beyond_the_limits_is_clipped() -> None:
    world = World("place")
    world.reset(0)
    for _ in range(100):
        world.step(np.full(14, 100.0))
    assert (world.joint_positions <= world.embodiment.upper + 0.02).all()


@pytest.mark.parametrize(
    ("distance", "holds"), [(GRASP_RADIUS_M - 0.006, True), (GRASP_RADIUS_M + 0.006, False)]
)
def test_a_closing_gripper_takes_what_is_within_reach_of_its_fingers(distance: float, holds: bool) -> None:
    world = World("place")
    world.reset(0)
    driver = Driver(world, "left")
    driver.pick("red_cube", (0.0, 0.0, distance))
    assert (world.held("left") == "red_cube") is holds
    assert world.holder("red_cube") == ("left" if holds else None)


def test_the_measured_gripper_tells_a_grasp_from_a_miss() -> None:
    world = World("place")
    world.reset(0)
    driver = Driver(world, "left")
    driver.grip(0.0)
    assert world.joint_positions[6] < 0.003
    driver.grip(GRIPPER_OPEN_M)
    driver.pick("red_cube")
    assert 0.015 < world.joint_positions[6] < 0.025


def test_a_closed_gripper_has_to_open_before_it_can_grasp() -> None:
    world = World("place")
    world.reset(0)
    driver = Driver(world, "left")
    driver.grip(0.0)
    driver.pick("red_cube")
    assert world.held("left") is None
    driver.grip(GRIPPER_OPEN_M)
    driver.grip(0.0)
    assert world.held("left") == "red_cube"


def test_a_held_thing_follows_the_arm_and_falls_when_let_go() -> None:
    world = World("place")
    world.reset(0)
    driver = Driver(world, "left")
    before = world.position("red_cube")
    driver.pick("red_cube")
    np.testing.assert_allclose(
        world.position("red_cube"), before, atol=0.002
    )  # closing does not make it jump
    driver.go(before + [-0.1, 0.02, 0.15], 1.5)
    np.testing.assert_allclose(world.position("red_cube"), before + [-0.1, 0.02, 0.15], atol=0.01)
    driver.grip(GRIPPER_OPEN_M)
    assert world.held("left") is None
    for _ in range(40):
        world.step(driver.command)
    assert world.position("red_cube")[2] < 0.05


# Judging ---------------------------------------------------------------------------------------------


def _place(item: str, goal: Goal, tray: str, release: bool, height: float = 0.06) -> World:
    world = World("place")
    world.reset(1, goal)
    arm = tray.removesuffix("_tray")
    driver = Driver(world, arm)
    driver.pick(item)
    assert world.held(arm) == item
    over = world.position(tray) + [0, 0, height]
    driver.go(over + [0, 0, 0.08], 1.5)
    driver.go(over, 1.0)
    if release:
        driver.grip(GRIPPER_OPEN_M)
        driver.go(over + [0, 0, 0.1], 0.6)
    return world


def test_the_named_item_released_in_the_named_tray_is_success() -> None:
    world = _place("red_cube", Goal("red_cube", "left_tray", "left"), "left_tray", release=True)
    assert world.done() and world.sub_step_scores() == (1.0, 1.0)


def test_an_item_held_over_or_in_the_tray_is_not_success() -> None:
    for height in (0.02, 0.12):
        world = _place(
            "red_cube", Goal("red_cube", "left_tray", "left"), "left_tray", release=False, height=height
        )
        assert not world.done() and world.sub_step_scores() == (1.0, 0.0)


def test_the_wrong_item_or_the_wrong_tray_is_not_success() -> None:
    assert not _place("blue_bar", Goal("red_cube", "left_tray", "left"), "left_tray", release=True).done()
    assert not _place("red_cube", Goal("red_cube", "right_tray", "right"), "left_tray", release=True).done()


def test_stow_needs_lid_item_and_lid_in_this_order() -> None:
    world = World("stow")
    world.reset(0, Goal("red_cube", "box"))
    assert (
        world.sub_step_scores() == (0.0, 0.0, 0.0) and not world.done()
    )  # the lid is on, but nothing is inside
    left, right = Driver(world, "left"), Driver(world, "right")
    right.command = left.command  # one command for both arms
    box = world.position("box")
    left.pick("lid")
    assert world.held("left") == "lid"
    left.go(box + [0, 0, 0.2], 1.0)
    left.go(np.array([-0.22, 0.04, 0.15]), 1.5)
    assert world.sub_step_scores() == (1.0, 0.0, 0.0)
    right.pick("red_cube")
    right.go(box + [0, 0, 0.15], 1.5)
    right.go(box + [0, 0, 0.05], 0.8)
    assert world.sub_step_scores() == (1.0, 0.0, 0.0)
    right.grip(GRIPPER_OPEN_M)
    assert world.sub_step_scores() == (1.0, 1.0, 0.0) and not world.done()
    right.go(np.array([0.25, -0.1, 0.2]), 1.5)
    on = box + [0, 0, BOX_HEIGHT + LID.rest_height + LID.grasp_offset]
    left.go(on + [0, 0, 0.06], 1.5)
    left.go(on + [0, 0, 0.002], 1.0)
    assert not world.done()  # still in the hand
    left.grip(GRIPPER_OPEN_M)
    assert world.done() and world.sub_step_scores() == (1.0, 1.0, 1.0)


def test_stow_with_the_wrong_item_stops_at_the_first_sub_step() -> None:
    world = World("stow")
    world.reset(0, Goal("blue_bar", "box"))
    box = world.position("box")
    left = Driver(world, "left")
    left.pick("lid")
    left.go(box + [0, 0, 0.2], 1.0)
    left.go(np.array([-0.22, 0.04, 0.15]), 1.5)
    right = Driver(world, "right")
    right.command = left.command
    right.pick("red_cube")
    right.go(box + [0, 0, 0.15], 1.5)
    right.go(box + [0, 0, 0.05], 0.8)
    right.grip(GRIPPER_OPEN_M)
    assert world.sub_step_scores() == (1.0, 0.0, 0.0)


# Sensing ---------------------------------------------------------------------------------------------


def test_keypoints_have_the_same_slots_in_every_task_of_a_suite() -> None:
    for task in TASK_NAMES:
        world = World(task)
        world.reset(0)
        exact = world.keypoints(noise=False)
        assert world.keypoint_names == suite_of(task).keypoints
        assert exact.shape == (len(world.keypoint_names), 3) and exact.dtype == np.float32
        present = [name in world.task.keypoints for name in world.keypoint_names]
        for name, point, there in zip(world.keypoint_names, exact, present, strict=True):
            assert (not np.allclose(point, ABSENT)) == there, name
        noisy = np.stack([world.keypoints() for _ in range(300)])
        spread = noisy.std(axis=0)
        assert (np.abs(spread[present] - 0.005) < 0.0015).all() and (spread[~np.array(present)] == 0).all()


def _colour_centroid(image: np.ndarray, item: str) -> np.ndarray:
    channel = ITEMS.index(item)  # red, green, blue
    values = image.astype(float)
    others = np.delete(values, channel, axis=-1).max(axis=-1)
    mask = values[..., channel] > others + 70
    assert mask.sum() >= 6, f"{item} is not visible"
    rows, columns = np.nonzero(mask)
    return np.array([rows.mean(), columns.mean()])


def test_the_top_camera_sees_every_item_where_it_is() -> None:
    world = World("place")
    for seed in range(5):
        world.reset(seed)
        image = world.render("top")
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        seen = {item: _colour_centroid(image, item) for item in ITEMS}
        for first in ITEMS:
            for second in ITEMS:
                apart = world.position(first) - world.position(second)
                if abs(apart[0]) > 0.03:  # further right in the world is further right in the picture
                    assert (seen[first][1] > seen[second][1]) == (apart[0] > 0)
                if abs(apart[1]) > 0.03:  # further away is further up
                    assert (seen[first][0] < seen[second][0]) == (apart[1] > 0)


@pytest.mark.parametrize("arm", ["left", "right"])
def test_the_wrist_camera_sees_the_item_below_the_fingers(arm: str) -> None:
    world = World("place")
    world.reset(1)
    Driver(world, arm).go(world.position("red_cube") + [0, 0, 0.1], 2.0)
    _colour_centroid(world.render(f"wrist_{arm}"), "red_cube")


def test_pictures_have_the_size_asked_for() -> None:
    world = World("stow", image_size=64)
    world.reset(0)
    assert world.render("wrist_left").shape == (64, 64, 3)
    assert world.render("top", size=128).shape == (128, 128, 3)
    with pytest.raises(ValueError, match="no camera"):
        world.render("side")


def test_joints_are_reported_in_the_order_of_the_robot() -> None:
    world = World("place")
    world.reset(0)
    assert world.embodiment.joint_names == JOINT_NAMES
    np.testing.assert_array_equal(world.joint_positions, world.embodiment.home)
    assert world.joint_velocities.shape == (14,)
