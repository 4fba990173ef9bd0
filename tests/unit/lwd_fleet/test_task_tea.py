# SPDX-License-Identifier: Apache-2.0
"""`tea`: what its judge counts, what the lid makes of water, how exactly arms have to be, and that its script begins
anywhere."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from acting import act, drive

from lwd_fleet.sim import robot
from lwd_fleet.sim.experts import CLOSED_M, Expert, Script, Wish, over
from lwd_fleet.sim.parts import GLASS_HEIGHT
from lwd_fleet.sim.tasks import SPLITS, TASKS, Goal
from lwd_fleet.sim.tasks.tea import (
    KETTLE,
    LID,
    POT_HALF,
    PURE,
    SERVED,
    WATER,
    WATER_ENOUGH,
    is_in_the_pot,
    lid_is_off,
    lid_is_on,
    steep,
)
from lwd_fleet.sim.world import World

TASK = TASKS["tea"]
GOAL = Goal("green_tea", "glass")
POT = np.array([0.03, 0.09, POT_HALF])
ON, OFF = POT + [0, 0, POT_HALF + 0.003], np.array([0.04, -0.09, 0.013])
IN, ASIDE = POT + [0.01, 0.0, -0.014], np.array([0.23, 0.0, 0.01])
BREWED = {"green_tea": 1.2}


@dataclass
class Still:
    """A scene that is as a test says."""

    pot: dict[str, float] = field(default_factory=dict)
    glass: dict[str, float] = field(default_factory=dict)
    lid: np.ndarray = field(default_factory=OFF.copy)
    green: np.ndarray = field(default_factory=IN.copy)
    black: np.ndarray = field(default_factory=ASIDE.copy)
    hand: str = ""  # what the right arm holds
    spilled: float = 0.0

    def position(self, name: str) -> np.ndarray:
        return {"pot": POT, "lid": self.lid, "green_tea": self.green, "black_tea": self.black}[name]

    def holder(self, name: str) -> str | None:
        return "right" if self.hand == name else None

    def content(self, vessel: str) -> dict[str, float]:
        return {"pot": self.pot, "glass": self.glass}[vessel]

    def add(self, vessel: str, ingredient: str, portions: float) -> None:
        content = self.content(vessel)
        content[ingredient] = content.get(ingredient, 0.0) + portions


def _brewing(**last: object) -> list[Still]:
    """How it goes when it goes well; `last` changes the last state."""
    end: dict[str, object] = {"pot": {"green_tea": 0.2}, "glass": {"green_tea": 1.0}, "lid": ON, **last}
    return [
        Still(lid=ON, green=ASIDE),
        Still(lid=OFF + [0, 0, 0.1], green=ASIDE, hand="lid"),
        Still(green=ASIDE),
        Still(green=POT + [0, 0, 0.05], hand="green_tea"),
        Still(),
        Still({WATER: 1.2}),
        Still(BREWED, lid=ON, hand="lid"),
        Still(BREWED, lid=ON),
        Still(BREWED, lid=ON, hand="pot"),
        Still(**end),  # type: ignore[arg-type]
    ]


def _judge(*states: Still, goal: Goal = GOAL) -> tuple[bool, tuple[float, ...]]:
    progress = TASK.progress(goal)
    for state in states:
        progress.update(state)  # type: ignore[arg-type]
    return progress.done, progress.scores


# The judge -------------------------------------------------------------------------------------------


def test_every_sub_step_counts_when_it_is_reached() -> None:
    states = _brewing()
    results = [_judge(*states[: end + 1]) for end in range(len(states))]
    assert [sum(scores) for _, scores in results] == [0, 1, 1, 1, 2, 3, 3, 4, 4, 5]
    assert [done for done, _ in results] == [False] * 9 + [True]


def test_the_goal_decides_which_leaves_are_to_be_in_the_pot() -> None:
    assert _judge(*_brewing(), goal=Goal("black_tea", "glass")) == (False, (1, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("state", "reached"),
    [
        (Still(lid=POT + [0.08, 0, 0.0]), 0),  # the lid beside the pot, hardly off
        (Still(hand="green_tea"), 1),  # the leaves not let go
        (Still(green=POT + [0.05, 0, -0.018]), 1),  # beside the pot
        (Still(black=IN), 1),  # both leaves in it
        (Still(green=ASIDE, black=IN), 1),  # the other leaves
        (Still({WATER: WATER_ENOUGH - 0.05}), 2),  # too little water
        (Still({WATER: 1.2}), 3),
        (Still(BREWED, lid=POT + [0, 0, 0.06]), 3),  # the lid over the pot, not on it
        (Still(BREWED, lid=ON, hand="lid"), 3),
        (Still({WATER: 1.2}, lid=ON), 3),  # a lid, and no tea
        (Still({"green_tea": 0.5, "black_tea": 0.7}, lid=ON), 3),  # too little of the named
    ],
)
def test_it_gets_as_far_as_the_scene_is_right(state: Still, reached: int) -> None:
    start, open_pot = Still(lid=ON, green=ASIDE), Still(green=ASIDE)
    before = [start] if reached == 0 else [start, open_pot]
    filled = [Still(), Still({WATER: 1.2})] if reached == 3 else []
    done, scores = _judge(*before, *filled, state)
    assert not done and scores == (1,) * reached + (0,) * (5 - reached)


@pytest.mark.parametrize(
    "glass",
    [
        {},
        {"green_tea": SERVED - 0.05},
        {WATER: 1.0},
        {"black_tea": 1.0},
        {"green_tea": SERVED, "black_tea": 1.1 * SERVED * (1 - PURE) / PURE},
        {"green_tea": SERVED, WATER: 1.1 * SERVED * (1 - PURE) / PURE},
    ],
)
def test_only_enough_of_the_named_tea_unmixed_is_served(glass: dict[str, float]) -> None:
    assert _judge(*_brewing(glass=glass)) == (False, (1, 1, 1, 1, 0))


def test_what_is_in_the_glass_has_to_stay_tea() -> None:
    spoilt = Still(glass={"green_tea": 1.0, WATER: 1.0}, lid=ON)
    assert _judge(*_brewing(), spoilt) == (False, (1,) * 5)


@pytest.mark.parametrize(
    ("first", "scores"), [(5, (1, 1, 0.5, 1, 1)), (8, (1, 1, 1, 1, 0.5)), (10, (1, 1, 1, 1, 1))]
)
def test_what_was_spilled_makes_half_a_score(first: int, scores: tuple[float, ...]) -> None:
    states = _brewing()
    for state in states[first:]:
        state.spilled = 0.3
    assert _judge(*states) == (True, scores)


@pytest.mark.parametrize(
    ("flaw", "before", "scores"),
    [
        ([Still(green=ASIDE, hand="green_tea"), Still(green=ASIDE)], 3, (1, 0.5, 1, 1, 1)),
        ([Still({WATER: 1.2}, hand="lid"), Still({WATER: 1.2})], 6, (1, 1, 1, 0.5, 1)),
    ],
)
def test_leaves_or_lid_taken_once_more_than_needed_make_half_a_score(
    flaw: list[Still], before: int, scores: tuple[float, ...]
) -> None:
    states = _brewing()
    assert _judge(*states[:before], *flaw, *states[before:]) == (True, scores)


# Under the lid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "after"),
    [
        (Still({WATER: 1.2}, lid=ON), {WATER: 0.0, "green_tea": 1.2}),
        (Still({WATER: 1.2}, lid=ON, green=ASIDE, black=IN), {WATER: 0.0, "black_tea": 1.2}),
        (Still({WATER: 1.2}, lid=ON, black=IN), {WATER: 0.0, "green_tea": 0.6, "black_tea": 0.6}),
        (Still({WATER: 1.2}), {WATER: 1.2}),  # open
        (Still({WATER: 1.2}, lid=ON, green=ASIDE), {WATER: 1.2}),  # no leaves
        (Still({"black_tea": 1.2}, lid=ON), {"black_tea": 1.2}),  # what is tea already stays it
        (Still(lid=ON), {}),
    ],
)
def test_under_the_lid_water_is_tea_of_the_leaves_at_once(scene: Still, after: dict[str, float]) -> None:
    steep(scene)  # type: ignore[arg-type]
    assert scene.pot == pytest.approx(after)


# Arms that are not exact -----------------------------------------------------------------------------


def _uncover(expert: Expert) -> Script:
    yield from expert.put("left", "lid", OFF * [1, 1, 0], 0.035)


def _put_in(expert: Expert, leaves: str, aside: np.ndarray) -> Script:
    yield from expert.put("right", leaves, expert.world.position("pot") + aside, 0.035)


def _cover(expert: Expert, aside: np.ndarray) -> Script:
    yield from expert.pick("right", "lid")
    on = expert.world.position("pot") + [0, 0, POT_HALF + 0.003 + LID.grasp_offset] + aside
    yield from expert.carry("right", "lid", over(on, 0.04), exact=True)
    yield from expert.carry("right", "lid", over(on, 0.003), exact=True)
    yield from expert.let_go("right")


def _serve(expert: Expert) -> Script:
    yield from expert.pick("right", "pot", 0.19)
    yield from expert.pour("right", "pot", "glass", 0.9)


def _brew(leaves: str, aside: np.ndarray) -> World:
    """An episode that asks for green tea, up to the full glass; leaves and lid are put `aside` of the pot's middle."""
    world = World("tea")
    world.reset(0, GOAL)
    act(world, left=_uncover)
    act(world, right=lambda expert: _put_in(expert, leaves, aside))
    world.add("pot", WATER, 1.2)
    act(world, right=lambda expert: _cover(expert, aside))
    act(world, right=_serve)
    return world


def _fill(expert: Expert) -> Script:
    yield from expert.pick("left", "kettle", 0.19)
    yield from expert.pour("left", "kettle", "pot", 0.8)
    yield from expert.put("left", "kettle", np.array([-0.26, 0.0, 0.0]), 0.092, 0.19)


def test_kettle_and_pot_are_poured_from_their_spouts_and_stand_again() -> None:
    world = World("tea")
    for seed in range(4):
        world.reset(seed)
        act(world, left=_uncover)
        act(world, left=_fill)
        filled = world.content("pot")[WATER]
        act(world, right=_serve)
        assert 0.8 <= filled < 1.0  # some flows while the kettle is turned up again
        assert world.content("glass")[WATER] == pytest.approx(filled)
        assert world.spilled < 0.02 and world.lean("kettle") < 0.1 and world.lean("pot") < 0.1


@pytest.mark.parametrize("angle", np.arange(4) * np.pi / 2 + 0.4)
def test_leaves_and_lid_may_be_fifteen_millimetres_aside(angle: float) -> None:
    world = _brew("green_tea", 0.015 * np.array([np.cos(angle), np.sin(angle), 0.0]))
    assert is_in_the_pot(world, "green_tea") and lid_is_on(world)  # also of a pot that leaned
    assert world.done() and world.sub_step_scores() == (1,) * 5 and world.spilled == 0.0


def test_tea_of_the_wrong_leaves_is_no_success_however_well_made() -> None:
    world = _brew("black_tea", np.zeros(3))
    assert world.content("glass")["black_tea"] > SERVED
    assert not world.done() and world.sub_step_scores() == (1, 0, 0, 0, 0)


# The scene -------------------------------------------------------------------------------------------


def test_nothing_moves_before_an_arm_does() -> None:
    world = World("tea")
    names = [thing.name for thing in TASK.parts.things]
    for seed in range(8):
        world.reset(seed)
        before = np.array([world.position(name) for name in names])
        for _ in range(50):
            world.step(world.embodiment.home)
        np.testing.assert_allclose([world.position(name) for name in names], before, atol=3e-3)
        assert lid_is_on(world) and not lid_is_off(world)
        assert sum(world.sub_step_scores()) == 0 and world.spilled == 0


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.3])
def test_everything_is_within_reach_of_the_arms_that_take_it(scale: float) -> None:
    body = robot.embodiment()
    handle = KETTLE.rest_height + KETTLE.grasp_offset
    for seed in range(15):
        layout = TASK.layout(np.random.default_rng(seed), GOAL, scale, 1.0)
        places = {name: np.array(place[:3]) for name, place in layout.things.items()}
        pot, glass = places["pot"], np.array([*layout.fixtures["glass"], GLASS_HEIGHT])
        left = [places["kettle"] * [1, 1, 0] + [0, 0, z] for z in (handle, 0.19)]
        left += [places["lid"], pot + [-0.06, 0, 0.15], OFF]
        right = [places["green_tea"], places["black_tea"], pot + [0.078, 0, 0.014], pot + [0, 0, 0.1], OFF]
        right += [glass + [0.14, 0, 0.05]]
        for arm, points in (("left", left), ("right", right)):
            home = body.home[body.arm_columns(body.arm(arm))[:-1]]
            chain = body.arm(arm).chain
            reached, _ = chain.forward(chain.inverse(np.array(points), chain.forward(home)[1], home, 60))
            np.testing.assert_allclose(reached, points, atol=1e-3)


def test_there_are_enough_wordings() -> None:
    for goal in TASK.goals:
        train, heldout = (TASK.instructions(split, goal) for split in SPLITS)
        assert len(set(train)) >= 10 and len(set(heldout)) >= 5


# The script ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [2.0, 4.0, 6.5, 8.5, 10.5, 12.5])
def test_a_new_demonstrator_goes_on_where_another_was_relieved(seconds: float) -> None:
    world = World("tea")
    for seed in (1, 2):
        world.reset(seed)
        drive(world, Expert(world, np.random.default_rng(seed)), seconds)
        drive(world, Expert(world, np.random.default_rng(seed + 1)), 30.0, world.done)
        assert world.done()


@pytest.mark.parametrize("seconds", [3.0, 5.0, 9.0, 11.0])
def test_what_both_arms_let_go_of_is_taken_again(seconds: float) -> None:
    world = World("tea")
    world.reset(5)
    drive(world, Expert(world, np.random.default_rng(5)), seconds)
    act(world, left=lambda expert: expert.let_go("left"), right=lambda expert: expert.let_go("right"))
    drive(world, Expert(world, np.random.default_rng(6)), 30.0, world.done)
    assert world.done()


def test_wrong_leaves_are_taken_out_before_the_lid_is_on() -> None:
    world = World("tea")
    world.reset(0, GOAL)
    act(world, left=_uncover)
    act(world, right=lambda expert: _put_in(expert, "black_tea", np.zeros(3)))
    world.add("pot", WATER, 1.0)
    assert is_in_the_pot(world, "black_tea")
    drive(world, Expert(world, np.random.default_rng(0)), 30.0, world.done)
    assert world.done() and not is_in_the_pot(world, "black_tea")
    assert world.content("glass").get("black_tea", 0.0) == 0.0


def _turn_pot(expert: Expert) -> Script:
    yield from expert.grasp("right", "pot")
    handle = expert.world.grasp_point("pot")
    for height in (0.05, 0.004):
        for _ in range(15):
            yield Wish(over(handle, height), CLOSED_M, steady=True, yaw=0.9)
    yield from expert.let_go("right")


def test_a_pot_that_was_turned_is_straightened_before_it_is_poured_from() -> None:
    world = World("tea")
    world.reset(0, GOAL)
    act(world, left=_uncover)
    act(world, right=_turn_pot)
    assert world.heading("pot") > 0.6
    drive(world, Expert(world, np.random.default_rng(0)), 40.0, world.done)
    assert world.done() and abs(world.heading("pot")) < 0.2
