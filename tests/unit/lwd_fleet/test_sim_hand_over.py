# SPDX-License-Identifier: Apache-2.0
"""A thing with two grasp points goes from hand to hand in mid-air."""

import numpy as np
import pytest
from acting import act, drive

from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.robot import GRIPPER_OPEN_M
from lwd_fleet.sim.tasks import Goal
from lwd_fleet.sim.world import World

SHOE, GIVER, TAKER = "red_shoe", "left", "right"
POINT = np.array([0.02, -0.04, 0.18])


@pytest.fixture
def world() -> World:
    """The red shoe lies on the left."""
    world = World("shoebox")
    for seed in range(20):
        world.reset(seed, Goal("blue_shoe", "left_lane", "left"))
        if world.position(SHOE)[0] < 0:
            return world
    raise AssertionError("the red shoe is never on the left")


def test_a_shoe_goes_from_hand_to_hand_without_touching_the_table(world: World) -> None:
    act(world, left=lambda expert: expert.pick(GIVER, SHOE))
    heights, both = [], []

    def watch() -> bool:
        heights.append(float(world.position(SHOE)[2]))
        both.append(world.held(GIVER) == world.held(TAKER) == SHOE)
        return world.held(TAKER) == SHOE and world.held(GIVER) is None

    def scripts(expert: Expert) -> dict[str, Script]:
        return {
            GIVER: _then_rest(expert, GIVER, expert.offer(GIVER, TAKER, SHOE, POINT)),
            TAKER: _then_hold(expert, TAKER, expert.receive(TAKER, GIVER, SHOE, POINT)),
        }

    drive(world, Expert(world, np.random.default_rng(0), scripts=scripts), 8.0, watch)
    assert world.held(GIVER) is None and world.held(TAKER) == SHOE and any(both)
    assert min(heights) > 0.08
    assert np.linalg.norm(world.grasp_point(SHOE) - POINT) < 0.04
    drive(world, Expert(world, np.random.default_rng(0), scripts=scripts), 1.0)
    assert world.held(TAKER) == SHOE  # it stays with the taker, who took it by the other end
    assert world.grip(TAKER) == 1
    assert np.linalg.norm(world.grasp_point(SHOE, 1) - world.tool(TAKER)) < 0.028


def _then_rest(expert: Expert, arm: str, script: Script) -> Script:
    yield from script
    yield from expert.rest(arm)


def _then_hold(expert: Expert, arm: str, script: Script) -> Script:
    yield from script
    yield from expert.hold(arm, lambda: False)


@pytest.mark.parametrize("end", [0, 1])
def test_the_taker_takes_the_end_that_the_giver_leaves_free(world: World, end: int) -> None:
    act(world, left=lambda expert: expert.grasp(GIVER, SHOE, end))
    assert world.grip(GIVER) == end and world.grip(TAKER) is None
    act(
        world,
        left=lambda expert: expert.offer(GIVER, TAKER, SHOE, POINT),
        right=lambda expert: expert.receive(TAKER, GIVER, SHOE, POINT),
    )
    assert world.held(TAKER) == SHOE and world.grip(TAKER) == 1 - end


@pytest.mark.parametrize("end", [0, 1])
def test_what_is_held_at_either_end_is_put_where_it_is_to_be(world: World, end: int) -> None:
    act(world, left=lambda expert: expert.grasp(GIVER, SHOE, end))
    place = np.array([-0.15, -0.06, 0.0])
    act(world, left=lambda expert: expert.put(GIVER, SHOE, place, 0.027, straight=True))
    assert world.held(GIVER) is None
    np.testing.assert_allclose(world.grasp_point(SHOE)[:2], place[:2], atol=0.01)
    assert abs(world.heading(SHOE)) < 0.06


def test_a_shoe_that_lies_askew_is_put_down_straight(world: World) -> None:
    joint = world._free[SHOE]
    address = int(joint.qposadr[0])
    world._data.qpos[address + 3 : address + 7] = np.cos(0.4), 0.0, 0.0, np.sin(0.4)
    world.step(world.embodiment.home)
    assert world.heading(SHOE) == pytest.approx(0.8, abs=0.01)
    place = np.array([-0.15, -0.06, 0.0])
    act(world, left=lambda expert: expert.put(GIVER, SHOE, place, 0.027, straight=True))
    assert abs(world.heading(SHOE)) < 0.06


def test_a_second_arm_cannot_take_the_end_that_is_held(world: World) -> None:
    act(world, left=lambda expert: expert.pick(GIVER, SHOE))
    act(world, left=lambda expert: expert.carry(GIVER, SHOE, POINT, exact=True))

    def beside_the_toe(expert: Expert) -> Script:
        """Close on the heel, nearer to it than to the toe, but out of the toe's reach."""
        at = world.grasp_point(SHOE) - [0.0, 0.012, 0.0]
        yield from expert._go(TAKER, lambda: at + [0, 0, 0.08], GRIPPER_OPEN_M, 0.01)
        yield from expert._go(TAKER, lambda: at, GRIPPER_OPEN_M, 0.005, steady=True)
        yield from expert._go(TAKER, lambda: at, 0.0, 0.0, steady=True)

    act(world, right=beside_the_toe)
    assert world.held(TAKER) is None and world.held(GIVER) == SHOE


def test_a_shoe_that_the_giver_drops_is_offered_again(world: World) -> None:
    dropped = []

    def clumsy(expert: Expert) -> Script:
        for wish in expert.offer(GIVER, TAKER, SHOE, POINT):
            if world.held(GIVER) == SHOE and world.position(SHOE)[2] > 0.1 and not dropped:
                dropped.append(world.time_s)
                yield from expert.let_go(GIVER)
            yield wish

    act(world, 25.0, left=clumsy, right=lambda expert: expert.receive(TAKER, GIVER, SHOE, POINT))
    assert dropped and world.held(TAKER) == SHOE and world.held(GIVER) is None


def test_a_taker_stops_reaching_for_what_is_no_longer_offered(world: World) -> None:
    act(world, left=lambda expert: expert.pick(GIVER, SHOE))
    act(world, left=lambda expert: expert.carry(GIVER, SHOE, POINT, exact=True))

    def scripts(expert: Expert) -> dict[str, Script]:
        return {
            GIVER: _then_rest(expert, GIVER, expert.let_go(GIVER)),
            TAKER: expert.receive(TAKER, GIVER, SHOE, POINT),
        }

    drive(world, Expert(world, np.random.default_rng(0), 0.0, scripts=scripts), 4.0)
    assert world.held(TAKER) is None and world.position(SHOE)[2] < 0.05
    assert world.tool(TAKER)[2] > POINT[2] - 0.02  # waits in the air, does not follow the shoe down
