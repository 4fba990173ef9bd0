# SPDX-License-Identifier: Apache-2.0
"""`juice`: how the press works, what its judge counts, and that its script begins anywhere."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from acting import act, drive

from lwd_fleet.sim import play, robot
from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.parts import SHELF_HEIGHT_M
from lwd_fleet.sim.shift import Shift
from lwd_fleet.sim.tasks import SPLITS, TASKS, Goal
from lwd_fleet.sim.tasks.juice import (
    FRUIT_HALF,
    GLASS_REST,
    JUICE_PER_S,
    PRESS_HEIGHT,
    SPOUT,
    is_in_the_press,
    is_served,
    is_under_the_spout,
)
from lwd_fleet.sim.world import World

TASK = TASKS["juice"]
GOAL = Goal("lime", "left_shelf", "left")
PLACES = {
    "press": np.array([0.01, 0.14, 0.0]),
    "left_shelf": np.array([-0.29, 0.12, 0.0]),
    "right_shelf": np.array([0.29, 0.12, 0.0]),
}
OUT = np.array([0.2, 0.0, FRUIT_HALF])
IN = PLACES["press"] + [0.005, -0.005, PRESS_HEIGHT + FRUIT_HALF]
UNDER = PLACES["press"] + [SPOUT[0], SPOUT[1], GLASS_REST]
START = np.array([0.0, -0.06, GLASS_REST])
SERVED = {side: PLACES[f"{side}_shelf"] + [0.01, 0.01, SHELF_HEIGHT_M + GLASS_REST] for side in robot.ARMS}
FULL = {"lime": 0.9}


@dataclass
class Still:
    """A scene that is as a test says."""

    lid: float = 0.0
    lime: np.ndarray = field(default_factory=OUT.copy)
    orange: np.ndarray = field(default_factory=lambda: OUT * [-1, 1, 1])
    glass: np.ndarray = field(default_factory=START.copy)
    juice: dict[str, float] = field(default_factory=dict)
    hand: str = ""  # what the right arm holds
    spilled: float = 0.0
    leans: float = 0.0

    def position(self, name: str) -> np.ndarray:
        return {**PLACES, "lime": self.lime, "orange": self.orange, "glass": self.glass}[name]

    def speed(self, name: str) -> float:
        return 0.0

    def lean(self, name: str) -> float:
        return self.leans

    def held(self, arm: str) -> str | None:
        return self.hand if arm == "right" and self.hand else None

    def holder(self, name: str) -> str | None:
        return "right" if self.hand == name else None

    def opening(self, panel: str) -> float:
        return self.lid

    def content(self, vessel: str) -> dict[str, float]:
        return self.juice


def _judge(*states: Still, goal: Goal = GOAL) -> tuple[bool, tuple[float, ...]]:
    progress = TASK.progress(goal)
    for state in states:
        progress.update(state)  # type: ignore[arg-type]
    return progress.done, progress.scores


def _making(**last: object) -> list[Still]:
    """How it goes when it goes well; `last` changes the last state."""
    end: dict[str, object] = {"lid": 1.0, "glass": SERVED["left"], "juice": FULL, **last}
    return [
        Still(),
        Still(lid=1.0, hand="lid"),
        Still(lid=1.0, hand="lime", lime=OUT + [0, 0, 0.1]),
        Still(lid=1.0, lime=IN),
        Still(lid=1.0, lime=IN, hand="glass", glass=START + [0, 0, 0.1]),
        Still(lid=1.0, lime=IN, glass=UNDER),
        Still(lid=0.0, lime=IN, glass=UNDER, juice=FULL, hand="lid"),
        Still(lid=1.0, lime=IN, glass=UNDER, juice=FULL),
        Still(lid=1.0, glass=UNDER, juice=FULL),
        Still(lid=1.0, glass=UNDER + [0, 0, 0.1], juice=FULL, hand="glass"),
        Still(**end),  # type: ignore[arg-type]
    ]


# The judge -------------------------------------------------------------------------------------------


def test_every_sub_step_counts_when_it_is_reached() -> None:
    states = _making()
    results = [_judge(*states[: end + 1]) for end in range(len(states))]
    assert [sum(scores) for _, scores in results] == [0, 1, 1, 2, 2, 3, 4, 5, 6, 6, 7]
    assert [done for done, _ in results] == [False] * 10 + [True]


@pytest.mark.parametrize(
    ("end", "scores"),
    [
        ({"glass": SERVED["right"]}, (1, 1, 1, 1, 1, 1, 0)),  # the wrong shelf
        ({"glass": SERVED["left"] + [0.06, 0, 0]}, (1, 1, 1, 1, 1, 1, 0)),
        ({"glass": SERVED["left"] + [0, 0, 0.03]}, (1, 1, 1, 1, 1, 1, 0)),
        ({"hand": "glass"}, (1, 1, 1, 1, 1, 1, 0)),
        ({"leans": 0.5}, (1, 1, 1, 1, 1, 1, 0)),
        ({"juice": {"lime": 0.1}}, (1, 1, 1, 0, 1, 1, 0)),  # poured away on the way
        ({"juice": {"lime": 0.9, "orange": 0.3}}, (1, 1, 1, 0, 1, 1, 0)),
        ({"lid": 0.4}, (1, 1, 1, 1, 0, 1, 1)),
        ({"hand": "lid"}, (1, 1, 1, 1, 0, 1, 1)),
        ({"lime": IN}, (1, 1, 1, 1, 1, 0, 1)),  # left in the press
        ({"hand": "lime"}, (1, 1, 1, 1, 1, 0, 1)),
    ],
)
def test_what_is_not_as_it_should_be_at_the_end_does_not_count(
    end: dict[str, object], scores: tuple[float, ...]
) -> None:
    assert _judge(*_making(**end)) == (False, scores)


def test_the_juice_of_the_other_fruit_does_not_count() -> None:
    states = [
        Still(s.lid, s.orange * [-1, 1, 1], s.lime, s.glass, {"orange": 0.9} if s.juice else {})
        for s in _making()
    ]
    assert _judge(*states) == (False, (1, 0, 1, 0, 0, 0, 0))
    assert _judge(*states, goal=Goal("orange", "left_shelf", "left"))[0]


def test_both_fruits_in_the_press_do_not_count() -> None:
    assert _judge(Still(lid=1.0, lime=IN, orange=IN + [0, 0.02, 0]))[1][1] == 0.0


@pytest.mark.parametrize(
    ("flaw", "after", "scores"),
    [
        (Still(lid=1.0), 2, (1, 0.5, 1, 1, 1, 1, 1)),  # the fruit was dropped
        (Still(lid=1.0, lime=IN), 4, (1, 1, 0.5, 1, 1, 1, 1)),  # the glass was set down elsewhere
    ],
)
def test_what_had_to_be_taken_twice_makes_half_a_score(
    flaw: Still, after: int, scores: tuple[float, ...]
) -> None:
    states = _making()
    assert _judge(*states[: after + 1], flaw, states[after], *states[after + 1 :]) == (True, scores)


@pytest.mark.parametrize(
    ("first", "scores"), [(6, (1, 1, 1, 0.5, 1, 1, 0.5)), (9, (1, 1, 1, 1, 1, 1, 0.5)), (11, (1,) * 7)]
)
def test_what_was_spilled_makes_half_a_score(first: int, scores: tuple[float, ...]) -> None:
    states = _making()
    for state in states[first:]:
        state.spilled = 0.3
    assert _judge(*states) == (True, scores)


# The press -------------------------------------------------------------------------------------------


def _put_in(expert: Expert, arm: str, fruit: str) -> Script:
    yield from expert.put(arm, fruit, expert.world.position("press"), IN[2] + 0.012, 0.15)


def _place_glass(expert: Expert, arm: str) -> Script:
    yield from expert.put(arm, "glass", expert.world.position("press") + SPOUT, GLASS_REST + 0.034)


def _open(expert: Expert, arm: str) -> Script:
    yield from expert.lead(arm, "lid", 1.0)
    yield from expert.let_go(arm)


def _press(expert: Expert, arm: str, seconds: float) -> Script:
    yield from expert.lead(arm, "lid", 0.0)
    end = expert.world.time_s + seconds
    yield from expert.hold(arm, lambda: expert.world.time_s > end)
    yield from _open(expert, arm)


def _prepared(fruit: str | None, glass: bool) -> World:
    """An open press with a fruit in it and a glass under its spout, or not."""
    world = World("juice")
    world.reset(4, GOAL)
    arm = "left" if world.position("lime")[0] < 0 else "right"

    def work(expert: Expert) -> Script:
        yield from _open(expert, arm)
        if fruit is not None:
            yield from _put_in(expert, arm, fruit)
        if glass:
            yield from _place_glass(expert, arm)

    act(world, 20.0, **{arm: work})
    assert fruit is None or is_in_the_press(world, fruit)
    assert is_under_the_spout(world) is glass
    return world


@pytest.mark.parametrize("arm", robot.ARMS)
def test_a_pressed_fruit_fills_the_glass_for_as_long_as_the_lid_is_held_down(arm: str) -> None:
    world, down = _prepared("lime", glass=True), 0
    before = world.content("glass").get("lime", 0.0)
    expert = Expert(
        world, np.random.default_rng(0), 0.0, scripts=lambda e: {arm: _press(e, arm, 1.0)} | _rest(e, arm)
    )
    for _ in range(60):
        drive(world, expert, 0.1)
        down += world.opening("lid") < 0.06 and world.holder("lid") == arm
        if down and world.opening("lid") > 0.9:
            break
    gained = world.content("glass")["lime"] - before
    assert gained == pytest.approx(JUICE_PER_S * 0.1 * down, abs=2 * JUICE_PER_S * 0.1)
    assert gained > 0.3 and world.spilled == 0.0


def _rest(expert: Expert, busy: str) -> dict[str, Script]:
    return {arm: expert.rest(arm) for arm in robot.ARMS if arm != busy}


@pytest.mark.parametrize(("fruit", "glass"), [("lime", False), (None, True)])
def test_juice_needs_a_fruit_and_without_a_glass_it_is_spilled(fruit: str | None, glass: bool) -> None:
    world = _prepared(fruit, glass)
    act(world, left=lambda expert: _press(expert, "left", 1.0))
    assert sum(world.content("glass").values()) == 0.0
    assert (world.spilled > 0.3) is (fruit is not None)


def test_a_lid_that_lies_on_the_fruit_alone_does_not_press() -> None:
    world = _prepared("lime", glass=True)

    def close(expert: Expert) -> Script:
        yield from expert.lead("left", "lid", 0.15)
        yield from expert.let_go("left")

    act(world, left=close)
    for _ in range(50):
        world.step(world.joint_positions)
    assert world.content("glass").get("lime", 0.0) == 0.0


@pytest.mark.parametrize("scale", [1.0, 1.2])
def test_the_lid_closes_over_a_fruit_however_large(scale: float) -> None:
    world = World("juice", Shift(object_scale=scale))
    for seed in range(3):
        world.reset(seed)
        drive(world, Expert(world, np.random.default_rng(seed)), 24.0, world.done)
        assert world.done()


# The scene and the script ----------------------------------------------------------------------------


def test_nothing_moves_before_an_arm_does() -> None:
    world = World("juice")
    names = [thing.name for thing in TASK.parts.things]
    for seed in range(8):
        world.reset(seed)
        before = np.array([world.position(name) for name in names])
        for _ in range(50):
            world.step(world.embodiment.home)
        np.testing.assert_allclose([world.position(name) for name in names], before, atol=2e-3)
        assert world.opening("lid") == pytest.approx(0, abs=0.01) and sum(world.sub_step_scores()) == 0


def test_juice_of_the_wrong_fruit_on_the_wrong_shelf_is_no_success_however_well_made() -> None:
    world = World("juice")
    for believed in (Goal("orange", "left_shelf", "left"), Goal("lime", "right_shelf", "right")):
        world.reset(3, GOAL)
        expert = Expert(world, np.random.default_rng(0))
        world.goal = believed
        drive(world, expert, 20.0)
        assert is_served(world, believed.place)
        assert not world.done() and world.sub_step_scores()[6] == 0.0


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.3])
def test_everything_is_within_reach_of_the_arms_that_take_it(scale: float) -> None:
    body = robot.embodiment()
    world = World("juice")
    for seed in range(10):
        layout = TASK.layout(np.random.default_rng(seed), GOAL, scale, 1.0)
        press = np.array([*layout.fixtures["press"], 0.0])
        world.reset(seed)
        handle = world.panel_handle("lid", 1.0) - world.position("press")
        both = [
            press + [0, 0, 0.16],
            press + handle,
            press + handle + [0, 0, 0.075],
            press + SPOUT + [0, 0, 0.1],
        ]
        both += [np.array(layout.things["glass"][:3]) + [0, 0, z] for z in (0.03, 0.12)]
        for arm in robot.ARMS:
            side = -1 if arm == "left" else 1
            own = [np.array(layout.things[name][:3]) for name in ("orange", "lime")]
            own = [point for point in own if side * point[0] > 0]
            shelf = np.array([*layout.fixtures[f"{arm}_shelf"], SHELF_HEIGHT_M])
            points = np.array([*both, *own, shelf + [0, 0, 0.04], shelf + [0, 0, 0.13]])
            home = body.home[body.arm_columns(body.arm(arm))[:-1]]
            chain = body.arm(arm).chain
            reached, _ = chain.forward(chain.inverse(points, chain.forward(home)[1], home, 60))
            np.testing.assert_allclose(reached, points, atol=1e-3)


def test_there_are_enough_wordings() -> None:
    for goal in TASK.goals:
        train, heldout = (TASK.instructions(split, goal) for split in SPLITS)
        assert len(set(train)) >= 10 and len(set(heldout)) >= 5


def test_a_script_finishes_what_another_hand_left_in_a_mess() -> None:
    """Except with a glass that lies on its side or fell off the table."""
    world, finished = World("juice"), []
    for seed in range(16):
        world.reset(seed)
        rng = np.random.default_rng(seed)
        drive(world, Expert(world, rng, scripts=play.scripts), rng.uniform(3.0, 12.0))
        if world.lean("glass") < 0.2 and world.position("glass")[2] > 0:
            drive(world, Expert(world, rng), 40.0, world.done)
            finished.append(world.done())
    assert len(finished) >= 10 and np.mean(finished) >= 0.85


def test_a_wrong_fruit_is_taken_out_before_it_is_pressed() -> None:
    world = _prepared("lime", glass=False)
    world.goal = Goal("orange", "left_shelf", "left")
    expert = Expert(world, np.random.default_rng(1))
    drive(world, expert, 20.0, lambda: is_in_the_press(world, "orange"))
    assert is_in_the_press(world, "orange") and not is_in_the_press(world, "lime")
    drive(world, expert, 20.0, lambda: sum(world.content("glass").values()) > 0.7)
    assert world.content("glass")["orange"] > 0.7 and world.content("glass").get("lime", 0.0) == 0.0
