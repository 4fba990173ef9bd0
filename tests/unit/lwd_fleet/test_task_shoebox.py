# SPDX-License-Identifier: Apache-2.0
"""`shoebox`: what its judge counts, what it does not, and that its script begins anywhere."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from acting import act, drive

from lwd_fleet.sim import play, robot
from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.tasks import SPLITS, TASKS, Goal
from lwd_fleet.sim.tasks.shoebox import SHOE_NAMES, is_in_lane, lane
from lwd_fleet.sim.world import World

TASK = TASKS["shoebox"]
GOAL = Goal("red_shoe", "left_lane", "left")
OFF = np.array([-0.25, 0.0, 0.016])
IN_THE_AIR = np.array([0.0, 0.0, 0.18])


@dataclass
class Still:
    """A scene that is as a test says."""

    red: np.ndarray = field(default_factory=OFF.copy)
    blue: np.ndarray = field(default_factory=lambda: -OFF)
    lid: float = 0.0
    paper: float = 1.0
    hands: dict[str, str] = field(default_factory=dict)

    def position(self, name: str) -> np.ndarray:
        return {"red_shoe": self.red, "blue_shoe": self.blue, "shoebox": np.array([0.01, 0.11, 0.0])}[name]

    def speed(self, name: str) -> float:
        return 0.0

    def held(self, arm: str) -> str | None:
        return self.hands.get(arm)

    def holder(self, name: str) -> str | None:
        return next((arm for arm in robot.ARMS if self.held(arm) == name), None)

    def opening(self, panel: str) -> float:
        return {"lid": self.lid, "paper": self.paper}[panel]


LEFT, RIGHT = (lane(Still(), side) for side in ("left", "right"))  # type: ignore[arg-type]


def _judge(*states: Still) -> tuple[bool, tuple[float, ...]]:
    progress = TASK.progress(GOAL)
    for state in states:
        progress.update(state)  # type: ignore[arg-type]
    return progress.done, progress.scores


def _packing(**last: object) -> list[Still]:
    """How it goes when it goes well; `last` changes the last state."""
    end: dict[str, object] = {"red": LEFT, "blue": RIGHT, "lid": 0.0, "paper": 0.0, **last}
    return [
        Still(),
        Still(lid=1.0, hands={"left": "lid"}),
        Still(lid=0.97, hands={"left": "red_shoe"}),
        Still(lid=0.97, red=LEFT),
        Still(lid=0.97, red=LEFT, blue=IN_THE_AIR, hands={"right": "blue_shoe"}),
        Still(lid=0.97, red=LEFT, blue=IN_THE_AIR, hands={"right": "blue_shoe", "left": "blue_shoe"}),
        Still(lid=0.97, red=LEFT, blue=IN_THE_AIR, hands={"left": "blue_shoe"}),
        Still(lid=0.97, red=LEFT, blue=RIGHT),
        Still(lid=0.97, red=LEFT, blue=RIGHT, paper=0.0),
        Still(**end),  # type: ignore[arg-type]
    ]


# The judge -------------------------------------------------------------------------------------------


def test_every_sub_step_counts_when_it_is_reached() -> None:
    states = _packing()
    reached = [sum(_judge(*states[: end + 1])[1]) for end in range(len(states))]
    assert reached == [0, 1, 1, 2, 2, 3, 3, 4, 5, 6]
    assert [_judge(*states[: end + 1])[0] for end in range(len(states))] == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("end", "scores"),
    [
        ({"red": RIGHT, "blue": LEFT}, (1, 0, 1, 0, 0, 0)),  # the shoes on the wrong sides
        ({"blue": OFF}, (1, 1, 1, 0, 0, 0)),  # one outside
        ({"blue": RIGHT + [0, 0, 0.03]}, (1, 1, 1, 0, 0, 0)),  # one on top of something
        ({"paper": 0.5}, (1, 1, 1, 1, 0, 0)),
        ({"paper": 1.0}, (1, 1, 1, 1, 0, 0)),  # under the lid, but not folded
        ({"lid": 0.3}, (1, 1, 1, 1, 1, 0)),
        ({"hands": {"right": "lid"}}, (1, 1, 1, 1, 1, 0)),  # still in the hand
        ({"hands": {"right": "paper"}}, (1, 1, 1, 1, 0, 0)),
    ],
)
def test_what_is_not_as_it_should_be_at_the_end_does_not_count(
    end: dict[str, object], scores: tuple[float, ...]
) -> None:
    assert _judge(*_packing(**end)) == (False, scores)


def test_without_a_hand_over_it_is_not_done() -> None:
    states = [state for state in _packing() if len(state.hands) < 2]
    assert _judge(*states) == (False, (1, 1, 0, 1, 1, 1))


def test_a_hand_over_on_the_table_does_not_count() -> None:
    states = _packing()
    states[5].blue = OFF
    assert _judge(*states)[1][2] == 0.0


@pytest.mark.parametrize(
    ("shoe", "after", "scores"),
    [
        ("red_shoe", 2, (1, 0.5, 1, 1, 1, 1)),  # the named shoe fell
        ("blue_shoe", 4, (1, 1, 0.5, 1, 1, 1)),  # the other fell before it was handed over
        ("blue_shoe", 6, (1, 1, 1, 0.5, 1, 1)),  # and after it
    ],
)
def test_a_shoe_that_was_dropped_makes_half_a_score(shoe: str, after: int, scores: tuple[float, ...]) -> None:
    states = _packing()
    lying, held = states[after].__class__(lid=0.97), states[after]
    assert shoe in held.hands.values()
    assert _judge(*states[: after + 1], lying, held, *states[after + 1 :]) == (True, scores)


def test_the_goals_ask_for_different_things() -> None:
    """Each end state fulfils one goal: whose shoe is where, and which of them was handed over."""
    for goal in TASK.goals:
        progress = TASK.progress(goal)
        for state in _packing():
            progress.update(state)  # type: ignore[arg-type]
        assert progress.done is (goal == GOAL)


# The scene -------------------------------------------------------------------------------------------


def test_shoes_on_the_wrong_sides_are_no_success_however_well_packed() -> None:
    world = World("shoebox")
    world.reset(3, GOAL)
    expert = Expert(world, np.random.default_rng(0))
    world.goal = Goal("red_shoe", "right_lane", "right")  # what the demonstrator believes
    drive(world, expert, 12.0)
    assert all(is_in_lane(world, shoe, side) for shoe, side in (("red_shoe", "right"), ("blue_shoe", "left")))
    assert not world.done() and world.sub_step_scores()[1] == world.sub_step_scores()[3] == 0.0


@pytest.mark.parametrize("arm", robot.ARMS)
def test_either_arm_opens_the_lid_and_folds_the_paper_and_they_stay(arm: str) -> None:
    world = World("shoebox")
    world.reset(5)

    def work(expert: Expert) -> Script:
        for panel, opening in (("lid", 1.0), ("paper", 0.0)):
            yield from expert.lead(arm, panel, opening)
            yield from expert.let_go(arm)
        yield from expert.wait(arm, lambda: True)

    act(world, 20.0, **{arm: work})
    for _ in range(50):
        world.step(world.embodiment.home)
    assert world.opening("lid") > 0.92 and world.opening("paper") < 0.05


def test_nothing_moves_before_an_arm_does_and_the_shoes_lie_one_on_each_side() -> None:
    world, sides = World("shoebox"), set()
    for seed in range(12):
        world.reset(seed)
        before = np.array([world.position(shoe) for shoe in SHOE_NAMES])
        for _ in range(50):
            world.step(world.embodiment.home)
        np.testing.assert_allclose([world.position(shoe) for shoe in SHOE_NAMES], before, atol=3e-3)
        assert before[0, 0] * before[1, 0] < 0
        assert world.opening("lid") == pytest.approx(0, abs=0.01)
        assert world.opening("paper") == pytest.approx(1, abs=0.01)
        assert sum(world.sub_step_scores()) == 0
        sides.add((world.goal.item, bool(world.position(world.goal.item)[0] < 0), world.goal.side))
    assert len(sides) >= 6  # where the named shoe is does not tell where it is to go


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.3])
def test_everything_is_within_reach_of_the_arms_that_take_it(scale: float) -> None:
    body = robot.embodiment()
    for seed in range(15):
        layout = TASK.layout(np.random.default_rng(seed), GOAL, scale, 1.0)
        box = np.array([*layout.fixtures["shoebox"], 0.0])
        both = [
            box + [0, -0.04, 0.12],
            box + [0.04, 0.04, 0.03],
            box + [0, 0.14, 0.22],
            box + [0, -0.14, 0.1],
        ]
        for arm in robot.ARMS:
            side = -1 if arm == "left" else 1
            own = [np.array(place[:3]) for place in layout.things.values() if side * place[0] > 0]
            points = np.array([*both, *own, *(point + [0, 0, 0.1] for point in own)])
            home = body.home[body.arm_columns(body.arm(arm))[:-1]]
            chain = body.arm(arm).chain
            reached, _ = chain.forward(chain.inverse(points, chain.forward(home)[1], home, 60))
            np.testing.assert_allclose(reached, points, atol=1e-3)


def test_there_are_enough_wordings() -> None:
    for goal in TASK.goals:
        train, heldout = (TASK.instructions(split, goal) for split in SPLITS)
        assert len(set(train)) >= 10 and len(set(heldout)) >= 5


# The script ------------------------------------------------------------------------------------------


def test_a_script_finishes_what_another_hand_left_in_a_mess() -> None:
    world, finished = World("shoebox"), []
    for seed in range(10):
        world.reset(seed)
        rng = np.random.default_rng(seed)
        drive(world, Expert(world, rng, scripts=play.scripts), rng.uniform(3.0, 12.0))
        drive(world, Expert(world, rng), 30.0, world.done)
        finished.append(world.done())
    assert sum(finished) >= 8


def test_shoes_that_lie_in_each_others_places_are_exchanged() -> None:
    world = World("shoebox")
    world.reset(3, GOAL)
    expert = Expert(world, np.random.default_rng(0))
    world.goal = Goal("red_shoe", "right_lane", "right")
    drive(world, expert, 14.0)
    world.goal = GOAL
    drive(world, Expert(world, np.random.default_rng(1)), 30.0, world.done)
    assert world.done() and world.sub_step_scores()[1] == 0.5


def test_a_shoe_that_went_in_without_a_hand_over_is_taken_out_and_handed_over() -> None:
    world = World("shoebox")
    world.reset(3, GOAL)
    arm = "left" if world.position("blue_shoe")[0] < 0 else "right"

    def work(expert: Expert) -> Script:
        yield from expert.lead(arm, "lid", 1.0)
        yield from expert.let_go(arm)
        yield from expert.put(arm, "blue_shoe", lane(world, "right"), 0.035, straight=True)

    act(world, 20.0, **{arm: work})
    assert world.sub_step_scores() == (1, 0, 0, 1, 0, 0)
    drive(world, Expert(world, np.random.default_rng(1)), 30.0, world.done)
    assert world.done() and world.sub_step_scores() == (1, 1, 0.5, 1, 1, 1)


def test_each_side_of_the_box_is_a_place_of_its_own_that_a_detector_reports() -> None:
    """The side is in the words only: a policy has to be shown which place they mean."""
    world = World("shoebox")
    for goal in TASK.goals:
        world.reset(1, goal)
        points = dict(zip(world.keypoint_names, world.keypoints(noise=False), strict=True))
        offset = points[goal.place] - lane(world, goal.side)
        assert np.abs(offset[:2]).max() < 0.025  # between heel and middle of the shoe
        assert (points[goal.place][0] > world.position("shoebox")[0]) == (goal.side == "right")
