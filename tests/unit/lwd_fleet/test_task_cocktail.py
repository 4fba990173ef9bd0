# SPDX-License-Identifier: Apache-2.0
"""`cocktail`: what its judge counts, what makes foam, and that its script begins anywhere."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from acting import act, drive

from lwd_fleet.sim import robot
from lwd_fleet.sim.experts import CLOSED_M, Expert, Script, Wish
from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.tasks import SPLITS, TASKS, Goal
from lwd_fleet.sim.tasks.cocktail import (
    FOAM,
    FOAM_ENOUGH,
    LID,
    SHAKER_HALF,
    SPIRIT_AT_LEAST,
    foam,
    lid_is_on,
)
from lwd_fleet.sim.world import World

TASK = TASKS["cocktail"]
GOAL = Goal("gin", "glass")
SHAKER = np.array([0.0, 0.03, SHAKER_HALF])
ON, OFF = SHAKER + [0, 0, SHAKER_HALF + 0.004], np.array([-0.11, -0.07, 0.012])
MIXED = {"gin": 0.8, "lemon": 0.5}
DRINK = MIXED | {FOAM: 0.5}


@dataclass
class Still:
    """A scene that is as a test says; the shaker moves at `fast` m/s."""

    shaker: dict[str, float] = field(default_factory=dict)
    glass: dict[str, float] = field(default_factory=dict)
    lid: np.ndarray = field(default_factory=OFF.copy)
    hands: dict[str, str] = field(default_factory=dict)
    spilled: float = 0.0
    fast: float = 0.0

    def position(self, name: str) -> np.ndarray:
        return {"shaker": SHAKER, "lid": self.lid}[name]

    def speed(self, name: str) -> float:
        return self.fast

    def held(self, arm: str) -> str | None:
        return self.hands.get(arm)

    def holder(self, name: str) -> str | None:
        return next((arm for arm in robot.ARMS if self.held(arm) == name), None)

    def content(self, vessel: str) -> dict[str, float]:
        return {"shaker": self.shaker, "glass": self.glass}[vessel]

    def add(self, vessel: str, ingredient: str, portions: float) -> None:
        content = self.content(vessel)
        content[ingredient] = content.get(ingredient, 0.0) + portions


def _mixing(**last: object) -> list[Still]:
    """How it goes when it goes well; `last` changes the last state."""
    end: dict[str, object] = {"glass": dict(DRINK), **last}
    return [
        Still(),
        Still({"gin": 0.8}),
        Still(dict(MIXED)),
        Still(dict(MIXED), hands={"left": "lid"}, lid=ON),
        Still(dict(MIXED), lid=ON),
        Still(dict(DRINK), lid=ON, hands={"right": "shaker"}),
        Still(**end),  # type: ignore[arg-type]
    ]


def _judge(*states: Still, goal: Goal = GOAL) -> tuple[bool, tuple[float, ...]]:
    progress = TASK.progress(goal)
    for state in states:
        progress.update(state)  # type: ignore[arg-type]
    return progress.done, progress.scores


# The judge -------------------------------------------------------------------------------------------


def test_every_sub_step_counts_when_it_is_reached() -> None:
    states = _mixing()
    reached = [sum(_judge(*states[: end + 1])[1]) for end in range(len(states))]
    assert reached == [0, 1, 2, 2, 3, 4, 5]
    assert [_judge(*states[: end + 1])[0] for end in range(len(states))] == [False] * 6 + [True]


def test_the_goal_decides_which_spirit_it_has_to_be() -> None:
    assert _judge(*_mixing(), goal=Goal("rum", "glass")) == (False, (0,) * 5)


@pytest.mark.parametrize(
    ("shaker", "reached"),
    [
        ({"lemon": 0.5}, 0),  # the spirit is missing
        ({"rum": 0.8}, 0),
        ({"gin": SPIRIT_AT_LEAST - 0.01}, 0),
        ({"gin": 0.8}, 1),
        ({"gin": 0.8, "rum": 0.1}, 1),  # a dash of the wrong one
        ({"gin": 0.8, "lemon": 0.1}, 1),  # too little juice
        ({"gin": 0.8, "rum": 0.3, "lemon": 0.5}, 0),  # spoiled
        ({"gin": 0.8, "lemon": 0.5}, 2),
    ],
)
def test_what_is_in_the_shaker_decides_how_far_it_got(shaker: dict[str, float], reached: int) -> None:
    done, scores = _judge(Still(), Still(shaker))
    assert not done and sum(scores) == reached


def test_without_foam_or_with_half_of_it_still_in_the_shaker_it_is_not_served() -> None:
    assert not _judge(*_mixing()[:5], Still({}, dict(MIXED)))[0]
    half = {name: amount / 2 for name, amount in DRINK.items()}
    assert _judge(*_mixing()[:6], Still(half, dict(half))) == (False, (1, 1, 1, 1, 0))


def test_a_drink_beside_the_glass_is_not_served() -> None:
    assert _judge(*_mixing()[:6], Still({}, {}, spilled=1.8)) == (False, (1, 1, 1, 1, 0))


@pytest.mark.parametrize(("state", "sub_step"), [(1, 0), (2, 1), (6, 4)])
def test_spilling_while_pouring_makes_half_a_score_of_that_sub_step_alone(state: int, sub_step: int) -> None:
    states = _mixing()
    for later in states[state:]:
        later.spilled = 0.3
    scores = [1.0] * 5
    scores[sub_step] = 0.5
    assert _judge(*states) == (True, tuple(scores))


@pytest.mark.parametrize(("thing", "before", "sub_step"), [("lid", 3, 2), ("shaker", 5, 3)])
def test_taking_lid_or_shaker_twice_makes_half_a_score(thing: str, before: int, sub_step: int) -> None:
    states = _mixing()
    mixed = MIXED
    taken = [
        Still(mixed, hands={"right": thing}, lid=ON if thing == "shaker" else OFF),
        Still(mixed, lid=ON if thing == "shaker" else OFF),
    ]
    scores = [1.0] * 5
    scores[sub_step] = 0.5
    assert _judge(*states[:before], *taken, *states[before:]) == (True, tuple(scores))


# Foam and lid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "foams"),
    [
        (Still(dict(MIXED), lid=ON, fast=0.3), True),
        (Still(dict(MIXED), lid=ON, fast=0.1), False),  # too slow
        (Still(dict(MIXED), lid=OFF, fast=0.3), False),  # open
        (Still({}, lid=ON, fast=0.3), False),  # empty
        (Still(MIXED | {FOAM: 0.8}, lid=ON, fast=0.3), False),  # no more of it
    ],
)
def test_what_is_in_the_closed_shaker_foams_while_it_moves_fast(scene: Still, foams: bool) -> None:
    before = scene.shaker.get(FOAM, 0.0)
    for _ in range(10):
        foam(scene)  # type: ignore[arg-type]
    assert (scene.shaker.get(FOAM, 0.0) > before) is foams


def test_a_few_seconds_of_shaking_are_enough() -> None:
    scene, seconds = Still(dict(MIXED), lid=ON, fast=0.3), 0.0
    while scene.shaker.get(FOAM, 0.0) < FOAM_ENOUGH:
        foam(scene)  # type: ignore[arg-type]
        seconds += TICK_S
    assert 0.8 < seconds < 3.0


def _cover(expert: Expert) -> Script:
    world = expert.world
    yield from expert.pick("left", "lid", 0.19)
    on = world.position("shaker") + [0, 0, SHAKER_HALF + 0.004 + LID.grasp_offset]
    yield from expert.carry("left", "lid", on + [0, 0, 0.04], exact=True)
    yield from expert.carry("left", "lid", on + [0, 0, 0.003], exact=True)
    yield from expert.let_go("left")


def _swing(expert: Expert) -> Script:
    yield from expert.grasp("right", "shaker", 1)
    for step in range(40):
        point = np.array([0.10 + (0.06 if step % 10 < 5 else -0.06), -0.02, 0.19])
        yield Wish(point, CLOSED_M)


def test_the_level_of_a_closed_shaker_rises_visibly_while_it_is_swung_and_the_lid_stays_on() -> None:
    world = World("cocktail")
    world.reset(0, GOAL)
    for ingredient, portions in MIXED.items():
        world.add("shaker", ingredient, portions)
    surface, body = world.keypoint_names.index("shaker_liquid"), world.keypoint_names.index("shaker")

    def level() -> float:
        points = world.keypoints(noise=False)
        return float(points[surface, 2] - points[body, 2])

    act(world, left=_cover)
    assert lid_is_on(world) and world.sub_step_scores() == (1, 1, 1, 0, 0)
    before = level()
    act(world, right=_swing)
    assert lid_is_on(world) and world.sub_step_scores() == (1, 1, 1, 1, 0)
    assert level() - before > 0.015  # three times the noise of a detector


def test_an_open_shaker_does_not_foam() -> None:
    world = World("cocktail")
    world.reset(0, GOAL)
    for ingredient, portions in MIXED.items():
        world.add("shaker", ingredient, portions)
    act(world, right=_swing)
    assert not world.content("shaker").get(FOAM) and world.sub_step_scores() == (1, 1, 0, 0, 0)


# The scene -------------------------------------------------------------------------------------------


def test_nothing_moves_before_an_arm_does_and_each_bottle_is_on_a_side_of_its_own() -> None:
    world, sides = World("cocktail"), set()
    names = [thing.name for thing in TASK.parts.things]
    for seed in range(12):
        world.reset(seed)
        before = np.array([world.position(name) for name in names])
        for _ in range(50):
            world.step(world.embodiment.home)
        np.testing.assert_allclose([world.position(name) for name in names], before, atol=3e-3)
        assert world.position("gin")[0] * world.position("rum")[0] < 0
        assert sum(world.sub_step_scores()) == 0 and world.spilled == 0 and not lid_is_on(world)
        sides.add((world.goal.item, bool(world.position("gin")[0] < 0)))
    assert len(sides) == 4


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.3])
def test_everything_is_within_reach_of_the_arms_that_take_it(scale: float) -> None:
    body = robot.embodiment()
    for seed in range(15):
        layout = TASK.layout(np.random.default_rng(seed), GOAL, scale, 1.0)
        places = {name: np.array(place[:3]) for name, place in layout.things.items()}
        shaker, glass = places.pop("shaker"), np.array([*layout.fixtures["glass"], 0.19])
        assert all(np.linalg.norm((place - shaker)[:2]) > 0.08 for place in places.values())
        for arm in robot.ARMS:
            side = -1 if arm == "left" else 1
            own = [
                place
                for name, place in places.items()
                if side * place[0] > 0 or (name == "lid" and arm == "left")
            ]
            points = [shaker + [0, 0, 0.25], shaker + [side * 0.05, 0, 0.1]]
            points += [point for place in own for point in (place, place + [0, 0, 0.2])]
            if arm == "right":
                points += [shaker + [0.090, 0, 0.012], glass + [0.14, 0, 0]]
            home = body.home[body.arm_columns(body.arm(arm))[:-1]]
            chain = body.arm(arm).chain
            reached, _ = chain.forward(chain.inverse(np.array(points), chain.forward(home)[1], home, 60))
            np.testing.assert_allclose(reached, points, atol=1e-3)


def test_there_are_enough_wordings() -> None:
    for goal in TASK.goals:
        train, heldout = (TASK.instructions(split, goal) for split in SPLITS)
        assert len(set(train)) >= 10 and len(set(heldout)) >= 5


# The script ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [2.0, 4.5, 8.0, 11.5, 14.5, 17.5])
def test_a_new_demonstrator_goes_on_where_another_was_relieved(seconds: float) -> None:
    world = World("cocktail")
    for seed in (1, 2):
        world.reset(seed)
        drive(world, Expert(world, np.random.default_rng(seed)), seconds)
        drive(world, Expert(world, np.random.default_rng(seed + 1)), 30.0, world.done)
        assert world.done()


@pytest.mark.parametrize("arm", robot.ARMS)
def test_a_tall_bottle_is_poured_from_either_side_without_touching_the_shaker(arm: str) -> None:
    world = World("cocktail")
    for seed in range(20):
        world.reset(seed, GOAL)
        if (world.position("gin")[0] < 0) == (arm == "left"):
            break
    before = world.position("shaker")

    def work(expert: Expert) -> Script:
        yield from expert.pick(arm, "gin", 0.19)
        yield from expert.pour(arm, "gin", "shaker", 5.0)

    act(world, **{arm: work})
    assert world.content("shaker")["gin"] == pytest.approx(0.8, abs=0.02) and world.spilled < 0.02
    np.testing.assert_allclose(world.position("shaker"), before, atol=2e-3)


def test_the_wrong_spirit_stays_where_it_is() -> None:
    world = World("cocktail")
    for item in ("gin", "rum"):
        world.reset(3, Goal(item, "glass"))
        drive(world, Expert(world, np.random.default_rng(0)), 30.0, world.done)
        wrong = "rum" if item == "gin" else "gin"
        assert world.done() and world.content("glass").get(wrong, 0.0) == 0.0
        assert world.content(wrong)[wrong] == 0.8


def test_a_lid_on_an_empty_shaker_is_taken_off_first() -> None:
    world = World("cocktail")
    world.reset(0, GOAL)
    act(world, left=_cover)
    assert lid_is_on(world)
    drive(world, Expert(world, np.random.default_rng(0)), 35.0, world.done)
    assert world.done()
