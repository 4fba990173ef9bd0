# SPDX-License-Identifier: Apache-2.0
"""The four grocery tasks: what counts and what does not, how their lids behave, and that a script begins anywhere."""

from collections.abc import Callable

import numpy as np
import pytest

from lwd_fleet.sim import play, robot
from lwd_fleet.sim.experts import CLOSED_M, STEP_S, Expert, Script, Wish
from lwd_fleet.sim.parts import GROCERIES, SHELF_HEIGHT_M
from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.tasks import SUITES, TASKS, Goal
from lwd_fleet.sim.tasks.correct import MAT_HALF, mat_of
from lwd_fleet.sim.tasks.freezer import CHEST_INNER
from lwd_fleet.sim.tasks.open_cooler import CARTONS, COOLER_INNER
from lwd_fleet.sim.world import World

TICKS = round(STEP_S / TICK_S)
TASK_NAMES = ("restock", "correct", "freezer", "open_cooler")
ITEMS = [item.name for item in GROCERIES]
ON_SHELF = SHELF_HEIGHT_M + 0.036


def _reset(task: str, goal: Goal, seed: int = 0) -> World:
    world = World(task)
    world.reset(seed, goal)
    return world


def _drive(world: World, expert: Expert, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    command, end = world.joint_positions, world.time_s + seconds
    while world.time_s < end and not until():
        target = expert.command()
        for tick in range(1, TICKS + 1):
            world.step(command + (target - command) * tick / TICKS)
        command = target


def _act(world: World, arm: str, skill: Callable[[Expert], Script], limit_s: float = 12.0) -> None:
    """One arm does a skill, with a steady hand, then stays; the other goes on with what it did."""
    ended = []

    def script(expert: Expert) -> Script:
        yield from skill(expert)
        ended.append(arm)
        yield from expert.hold(arm, lambda: False)

    other = "right" if arm == "left" else "left"

    def scripts(expert: Expert) -> dict[str, Script]:
        return {arm: script(expert), other: expert.hold(other, lambda: False)}

    _drive(world, Expert(world, np.random.default_rng(0), 0.0, scripts=scripts), limit_s, lambda: bool(ended))
    assert ended, "the arm did not get through"


def _put(world: World, arm: str, item: str, place: np.ndarray, height: float, carry: float = 0.13) -> None:
    _act(world, arm, lambda expert: expert.put(arm, item, place, height, carry))


# Restock and correct: an item on a place ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "shelf", "counts"),
    [
        ("blue_bar", "left_shelf", True),
        ("blue_bar", "right_shelf", False),
        ("red_cube", "left_shelf", False),
    ],
)
def test_restock_counts_the_named_item_on_the_named_shelf(item: str, shelf: str, counts: bool) -> None:
    world = _reset("restock", Goal("blue_bar", "left_shelf", "left"))
    _put(world, shelf.removesuffix("_shelf"), item, world.position(shelf), ON_SHELF)
    assert world.done() is counts
    assert world.sub_step_scores() == (float(item == "blue_bar"), float(counts))


def test_an_item_beside_the_bay_or_still_in_the_hand_is_not_restocked() -> None:
    goal = Goal("red_cube", "right_shelf", "right")
    world = _reset("restock", goal)
    shelf = world.position("right_shelf")
    _act(world, "right", lambda expert: expert.pick("right", "red_cube"))
    _act(
        world, "right", lambda expert: expert.carry("right", "red_cube", shelf + [0, 0, ON_SHELF], exact=True)
    )
    assert not world.done() and world.sub_step_scores() == (1.0, 0.0)
    _put(world, "right", "red_cube", shelf - [0.08, 0, 0], 0.03)  # on the table, before the shelf
    assert not world.done() and world.sub_step_scores() == (1.0, 0.0)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("own_mat", [True, False])
def test_correct_counts_the_named_item_on_the_mat_of_its_colour(named: bool, own_mat: bool) -> None:
    goal = Goal("green_cylinder", "green_mat")
    world = _reset("correct", goal, seed=0)
    other = next(item for item in ITEMS if item != goal.item and not _on_mat(world, item, mat_of(item)))
    assert not any(_on_mat(world, item, mat) for mat in ("green_mat", mat_of(other)) for item in ITEMS)
    item = goal.item if named else other
    mat = goal.place if own_mat else mat_of(other)
    arm = "left" if world.position(item)[0] < 0 else "right"
    _act(world, arm, lambda expert: expert.bring_near(arm, item))
    arm = "left" if world.position(mat)[0] < 0 else "right"
    assert not world.done()
    _act(world, arm, lambda expert: expert.put(arm, item, world.position(mat), 0.033))
    assert _on_mat(world, item, mat)
    assert world.done() is (named and own_mat)


def _on_mat(world: World, item: str, mat: str) -> bool:
    return bool((np.abs(world.position(item) - world.position(mat))[:2] < MAT_HALF).all())


def test_in_correct_one_item_is_right_and_two_are_not_so_that_only_the_instruction_tells_which() -> None:
    world, on_table = World("correct"), []
    for seed in range(60):
        world.reset(seed)
        right = [item for item in ITEMS if _on_mat(world, item, mat_of(item))]
        assert len(right) == 1 and world.goal.item not in right and not world.done()
        on_table.append(not any(_on_mat(world, world.goal.item, mat_of(item)) for item in ITEMS))
    assert 0.25 < np.mean(on_table) < 0.75


def test_a_mat_of_the_same_colour_may_be_anywhere() -> None:
    world = World("correct")
    places = []
    for seed in range(40):
        world.reset(seed)
        places.append([round(world.position(mat_of(item))[0] / 0.24) for item in ITEMS])
    assert len(np.unique(places, axis=0)) == 6


# Freezer: a lid that slides ------------------------------------------------------------------------------


def test_freezer_needs_lid_item_and_lid() -> None:
    world = _reset("freezer", Goal("blue_bar", "chest"))
    chest = world.position("chest")
    assert world.sub_step_scores() == (0.0, 0.0, 0.0) and not world.done()  # shut, but nothing is inside
    _act(world, "left", lambda expert: expert.lead("left", "lid", 0.5))
    assert world.sub_step_scores() == (0.0, 0.0, 0.0)
    _act(world, "left", lambda expert: expert.lead("left", "lid", 1.0))
    assert world.sub_step_scores() == (1.0, 0.0, 0.0)
    _put(world, "right", "red_cube", chest + [0.03, 0.03, 0], 0.035)
    assert world.sub_step_scores() == (1.0, 0.0, 0.0)  # not the one that was asked for
    _put(world, "right", "blue_bar", chest + [0.02, -0.025, 0], 0.035)
    assert world.sub_step_scores() == (1.0, 1.0, 0.0) and not world.done()
    _act(world, "left", lambda expert: expert.lead("left", "lid", 0.0))
    assert world.holder("lid") == "left" and not world.done()
    _act(world, "left", lambda expert: expert.let_go("left"))
    assert world.done() and world.sub_step_scores() == (1.0, 1.0, 1.0)
    _act(world, "left", lambda expert: expert.lead("left", "lid", 1.0))
    assert not world.done() and world.sub_step_scores() == (1.0, 1.0, 0.0)


def test_the_lid_of_the_freezer_stays_where_it_is_left_and_carries_what_falls_on_it() -> None:
    world = _reset("freezer", Goal("red_cube", "chest"))
    _put(world, "right", "red_cube", world.position("chest") + [0.05, 0, 0], 0.10)
    _act(world, "right", lambda expert: expert.let_go("right"))
    assert world.position("red_cube")[2] > 0.07 and world.sub_step_scores() == (0.0, 0.0, 0.0)
    _act(world, "left", lambda expert: expert.lead("left", "lid", 0.6))
    _act(world, "left", lambda expert: expert.let_go("left"))
    left_at = world.opening("lid")
    assert abs(left_at - 0.6) < 0.1
    for _ in range(100):
        world.step(world.embodiment.home)
    assert abs(world.opening("lid") - left_at) < 0.01


def test_a_lid_stops_at_its_end_however_an_arm_pulls() -> None:
    world = _reset("freezer", Goal("red_cube", "chest"))
    _act(world, "left", lambda expert: expert.lead("left", "lid", 0.0))
    beyond = world.tool("left") + [0.03, 0.0, 0.0]

    def pull(expert: Expert) -> Script:
        for _ in range(15):
            yield Wish(beyond, CLOSED_M)

    _act(world, "left", pull)
    assert world.holder("lid") == "left" and abs(world.opening("lid")) < 0.02


# Open cooler: a lid on a spring --------------------------------------------------------------------------


def test_open_cooler_needs_the_lid_held_open_the_named_carton_on_its_shelf_and_the_lid_down() -> None:
    world = _reset("open_cooler", Goal("milk_carton", "right_shelf", "right"))
    shelf = world.position("right_shelf")
    assert world.sub_step_scores() == (0.0, 0.0, 0.0)
    _act(world, "left", lambda expert: expert.lead("left", "lid", 1.0))
    assert world.sub_step_scores() == (1.0, 0.0, 0.0)
    _put(world, "right", "milk_carton", shelf, SHELF_HEIGHT_M + 0.044, 0.135)
    assert world.holder("lid") == "left" and world.opening("lid") > 0.9
    assert world.sub_step_scores() == (1.0, 1.0, 0.0) and not world.done()
    _act(world, "left", lambda expert: expert.let_go("left"))
    for _ in range(60):
        world.step(world.joint_positions)
    assert world.done() and world.sub_step_scores() == (1.0, 1.0, 1.0)


def test_the_other_carton_on_the_other_shelf_is_not_success() -> None:
    world = _reset("open_cooler", Goal("juice_carton", "left_shelf", "left"))  # the milk stands on the right
    _act(world, "left", lambda expert: expert.lead("left", "lid", 1.0))
    _put(world, "right", "milk_carton", world.position("right_shelf"), SHELF_HEIGHT_M + 0.044, 0.135)
    _act(world, "left", lambda expert: expert.lead("left", "lid", 0.0))
    _act(world, "left", lambda expert: expert.let_go("left"))
    assert not world.done() and world.sub_step_scores() == (1.0, 0.0, 0.0)


def test_the_lid_of_the_cooler_falls_shut_when_nobody_holds_it() -> None:
    world = _reset("open_cooler", Goal("milk_carton", "right_shelf", "right"))
    _act(world, "left", lambda expert: expert.lead("left", "lid", 1.0))
    assert world.opening("lid") > 0.9
    before = {carton.name: world.position(carton.name) for carton in CARTONS}
    _act(world, "left", lambda expert: expert.let_go("left"))
    for _ in range(60):
        world.step(world.joint_positions)
    assert world.opening("lid") < 0.05
    for name, position in before.items():  # it shuts over the cartons without touching them
        np.testing.assert_allclose(world.position(name), position, atol=2e-3)


# Layouts -------------------------------------------------------------------------------------------------


def test_cartons_stand_apart_in_the_cooler_the_named_one_on_the_side_of_its_shelf() -> None:
    world = World("open_cooler")
    for seed in range(40):
        world.reset(seed)
        offsets = {carton.name: world.position(carton.name) - world.position("cooler") for carton in CARTONS}
        for offset in offsets.values():
            assert (np.abs(offset[:2]) + 0.021 < COOLER_INNER).all()
        first, second = offsets.values()
        assert abs(first[0] - second[0]) > 0.08
        assert (offsets[world.goal.item][0] > 0) == (world.goal.side == "right")


@pytest.mark.parametrize("task", TASK_NAMES)
def test_nothing_moves_before_an_arm_does(task: str) -> None:
    world = World(task)
    things = [thing.name for thing in world.task.parts.things]
    for seed in range(10):
        world.reset(seed)
        before = np.array([world.position(name) for name in things])
        for _ in range(50):
            world.step(world.embodiment.home)
        np.testing.assert_allclose([world.position(name) for name in things], before, atol=3e-3)
        assert sum(world.sub_step_scores()) == 0.0


def _reached(arm: str, points: list[np.ndarray]) -> np.ndarray:
    body = robot.embodiment()
    chain = body.arm(arm).chain
    home = body.home[body.arm_columns(arm)[:-1]]
    _, down = chain.forward(home)
    return chain.forward(chain.inverse(np.array(points), down, home, 60))[0]


@pytest.mark.parametrize(
    ("task", "arms"), [("freezer", ("left",)), ("open_cooler", ("left", "right"))]
)  # of those that lead the lid
def test_every_place_and_the_whole_way_of_a_lid_are_within_reach(task: str, arms: tuple[str, ...]) -> None:
    world = World(task)
    for seed in range(15):
        world.reset(seed)
        way = [world.panel_handle("lid", opening) for opening in np.linspace(0.0, 1.0, 6)]
        for arm in arms:
            np.testing.assert_allclose(_reached(arm, way), way, atol=1e-3)
        if task == "open_cooler":
            side = world.goal.side
            carton, shelf = world.grasp_point(world.goal.item), world.position(f"{side}_shelf")
            points = [carton, carton + [0, 0, 0.1], shelf + [0, 0, 0.10], shelf + [0, 0, 0.17]]
            np.testing.assert_allclose(_reached(side, points), points, atol=1e-3)
        else:
            chest = world.position("chest") + [CHEST_INNER[0] / 2, 0, 0.03]
            points = [chest, chest + [0, 0, 0.1]]
            np.testing.assert_allclose(_reached("right", points), points, atol=1e-3)


def test_every_item_of_correct_is_within_reach_of_an_arm_and_every_mat_of_its_arm() -> None:
    world = World("correct")
    for seed in range(15):
        world.reset(seed)
        for item in ITEMS:
            point, mat = world.grasp_point(item), world.position(mat_of(item)) + [0, 0, 0.1]
            np.testing.assert_allclose(
                _reached("left" if point[0] < 0 else "right", [point]), [point], atol=1e-3
            )
            np.testing.assert_allclose(_reached("left" if mat[0] < 0 else "right", [mat]), [mat], atol=1e-3)


# Scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_script_finishes_what_another_hand_left_in_a_mess(task: str) -> None:
    world = World(task)
    finished = []
    for seed in range(10):
        world.reset(seed)
        rng = np.random.default_rng(seed)
        _drive(world, Expert(world, rng, scripts=play.scripts), rng.uniform(2.0, 6.0))
        _drive(world, Expert(world, rng), 1.5 * world.time_limit_s, world.done)
        finished.append(world.done())
    assert sum(finished) >= 9


@pytest.mark.parametrize("task", ["restock", "freezer"])
def test_the_other_arm_brings_what_is_out_of_reach(task: str) -> None:
    goal = next(goal for goal in TASKS[task].goals if goal.side != "left")
    world = _reset(task, goal, seed=1)
    _put(world, "right", goal.item, np.array([-0.12, -0.06, 0.0]), 0.03)
    _put(world, "left", goal.item, np.array([-0.26, -0.05, 0.0]), 0.03)
    assert not Expert(world, np.random.default_rng(0)).can_take("right", goal.item)
    _drive(world, Expert(world, np.random.default_rng(1)), 12.0, world.done)
    assert world.done()


def test_in_the_suite_two_arms_and_language_are_needed() -> None:
    suite = SUITES["eight"]
    assert [task.name for task in suite.tasks][:4] == list(TASK_NAMES)
    for name in TASK_NAMES:
        assert len({goal.item for goal in TASKS[name].goals}) >= 2
        for goal in TASKS[name].goals:
            assert goal.item in suite.items and goal.place in suite.places
            assert {goal.item, goal.place} <= set(TASKS[name].keypoints)
            assert len(TASKS[name].instructions("train", goal)) >= 10
            assert len(TASKS[name].instructions("heldout", goal)) >= 5


def test_both_arms_work_over_the_goals_of_every_task() -> None:
    for name in TASK_NAMES:
        world, used = World(name), set()
        for seed in range(12):
            world.reset(seed)

            def watch(world: World = world, used: set[str] = used) -> bool:
                used |= {arm for arm in robot.ARMS if world.held(arm) is not None}
                return world.done()

            _drive(world, Expert(world, np.random.default_rng(seed)), world.time_limit_s, watch)
            if len(used) == 2:
                break
        assert used == {"left", "right"}, name
