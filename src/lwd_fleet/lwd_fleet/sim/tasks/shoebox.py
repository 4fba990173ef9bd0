# SPDX-License-Identifier: Apache-2.0
"""`shoebox`: one arm opens the box, the other puts the named shoe on the named side; the second shoe is handed over in
mid-air and goes beside it; the paper is folded over both, and the lid closed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.experts import CLEARANCE_M, OPEN_M, Expert, Script, Wish, over
from lwd_fleet.sim.parts import WALL, Fixture, Panel, Parts, Spot, Thing, open_box
from lwd_fleet.sim.robot import ARMS, Shape
from lwd_fleet.sim.tasks.task import AT_REST_M_S, Goal, Layout, SceneView, Task

BOX_INNER = (0.066, 0.062)  # half extents, m
BOX_HEIGHT = 0.058
LANE_M = 0.033  # of a shoe's place from the middle of the box
OPEN_ENOUGH = 0.9  # of lid and paper
SHUT = 0.06
MID_AIR_M = 0.08  # over the table
_LANE_HALF = (0.028, 0.030)  # how far a shoe's heel may be from its place, m
_SHOE_MIDDLE_M = 0.020  # of a shoe in front of its heel
_LID_THICKNESS = 0.005
_PAPER_LENGTH = 0.080
_KNOB_HEIGHT = 0.034


def _shoe(name: str, colour: str) -> Thing:
    """Its frame is over the heel, where it is taken; the other grasp point is over the toe."""
    return Thing(
        name,
        (
            Shape("box", (0.017, 0.045, 0.007), (0, _SHOE_MIDDLE_M, -0.009), colour="plum"),
            Shape("box", (0.015, 0.022, 0.011), (0, 0, 0.009), colour=colour),
            Shape("box", (0.015, 0.021, 0.006), (0, 0.043, 0.004), colour=colour),
        ),
        0.08,
        rest_height=0.016,
        grasp_offset=0.008,
        grip=0.014,
        other_grasp=(0.0, 0.045, 0.004),
    )


SHOES = (_shoe("red_shoe", "red"), _shoe("blue_shoe", "blue"))
SHOE_NAMES = tuple(shoe.name for shoe in SHOES)
_LID = Panel(
    "lid",
    (
        Shape(
            "box",
            (BOX_INNER[0] + WALL, BOX_INNER[1] + WALL, _LID_THICKNESS / 2),
            (0, -BOX_INNER[1] - WALL / 2, 0),
            colour="orange",
        ),
        Shape(
            "box",
            (0.008, 0.008, _KNOB_HEIGHT / 2),
            (0, 0.016 - 2 * BOX_INNER[1], (_LID_THICKNESS + _KNOB_HEIGHT) / 2),
            colour="plum",
        ),
    ),
    joint="hinge",
    origin=(0.0, BOX_INNER[1] + WALL / 2, BOX_HEIGHT + 0.003 + _LID_THICKNESS / 2),
    axis=(-1.0, 0.0, 0.0),
    closed=0.0,
    open=1.85,
    handle=(0.0, 0.016 - 2 * BOX_INNER[1], 0.022),
    grip=0.008,
)
_PAPER = Panel(
    "paper",
    (
        Shape(
            "box",
            (BOX_INNER[0] - 0.008, _PAPER_LENGTH / 2, 0.0008),
            (0, _PAPER_LENGTH / 2, 0),
            colour="white",
        ),
        Shape("box", (0.008, 0.007, 0.0012), (0, _PAPER_LENGTH - 0.009, 0), colour="teal"),
    ),
    joint="hinge",
    origin=(0.0, -BOX_INNER[1] - WALL / 2, BOX_HEIGHT + 0.001),
    axis=(1.0, 0.0, 0.0),
    closed=0.0,
    open=2.85,
    handle=(0.0, _PAPER_LENGTH - 0.009, 0.0),
    grip=0.008,
    mass=0.02,
    friction=0.02,
)
SHOEBOX_FIXTURE = Fixture(
    "shoebox",
    open_box("shoebox", *BOX_INNER, BOX_HEIGHT, "wood").shapes,
    (_LID, _PAPER),
    spots=(Spot("left_lane", (-LANE_M, 0.0, WALL)), Spot("right_lane", (LANE_M, 0.0, WALL))),
)


def other_shoe(goal: Goal) -> str:
    """The one that is handed over."""
    return next(shoe.name for shoe in SHOES if shoe.name != goal.item)


def opposite(side: str) -> str:
    """The other arm or side."""
    return "right" if side == "left" else "left"


def lane(scene: SceneView, side: str) -> NDArray[np.float64]:
    """Where a shoe's frame is when it lies on a side of the box, [3] m."""
    sign = 1.0 if side == "right" else -1.0
    return scene.position("shoebox") + [sign * LANE_M, -_SHOE_MIDDLE_M, WALL + SHOES[0].rest_height]


def is_in_lane(scene: SceneView, shoe: str, side: str) -> bool:
    """Whether a shoe is on a side of the box, released; it may still be settling."""
    offset = np.abs(scene.position(shoe) - lane(scene, side))
    return bool((offset[:2] < _LANE_HALF).all() and offset[2] < 0.022) and scene.holder(shoe) is None


class ShoeboxProgress:
    """Sub-steps: the lid was opened; the named shoe lies on its side; the other was held by both arms in mid-air; it
    lies on the other side; the paper is folded over both; the lid is shut.

    A shoe that was picked up more than once, as it was dropped or put down, makes half a score: for the named shoe's
    place, for the hand-over if it was before it, else for the other shoe's place. Shoes, paper and lid count as they
    are now.
    """

    def __init__(self, goal: Goal) -> None:
        self._side = {goal.item: goal.side, other_shoe(goal): opposite(goal.side)}
        self._named, self._other = self._side
        self._pick_ups = dict.fromkeys(self._side, 0)
        self._held = dict.fromkeys(self._side, False)
        self._opened = False
        self._handed_over = 0.0
        self._pick_ups_before = 0  # of the other shoe, when it was handed over
        self._scores = (0.0,) * 6

    def update(self, scene: SceneView) -> None:
        for shoe in self._side:
            held = scene.holder(shoe) is not None
            self._pick_ups[shoe] += held and not self._held[shoe]
            self._held[shoe] = held
        self._opened |= scene.opening("lid") > OPEN_ENOUGH
        in_both_hands = all(scene.held(arm) == self._other for arm in ARMS)
        if not self._handed_over and in_both_hands and scene.position(self._other)[2] > MID_AIR_M:
            self._pick_ups_before = self._pick_ups[self._other]
            self._handed_over = _neatly(self._pick_ups_before <= 1)
        named, other = (
            is_in_lane(scene, shoe, side) and scene.speed(shoe) < AT_REST_M_S
            for shoe, side in self._side.items()
        )
        packed = named and other
        folded = packed and scene.opening("paper") < SHUT and scene.holder("paper") is None
        shut = folded and scene.opening("lid") < SHUT and scene.holder("lid") is None
        self._scores = (
            float(self._opened),
            named * _neatly(self._pick_ups[self._named] <= 1),
            self._handed_over,
            other * _neatly(self._pick_ups[self._other] <= max(1, self._pick_ups_before)),
            float(folded),
            float(shut),
        )

    @property
    def scores(self) -> tuple[float, ...]:
        return self._scores

    @property
    def done(self) -> bool:
        return all(self._scores)


def _neatly(neat: bool) -> float:
    return 1.0 if neat else 0.5


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    x, y = rng.uniform([-0.02, 0.105], [0.02, 0.125])
    sides = rng.permutation([-1.0, 1.0])
    spread = rng.uniform(-1, 1, (2, 2)) * (0.035, 0.06) * placement_range
    yaws = rng.uniform(-0.14, 0.14, 2)
    things = {
        shoe.name: (
            float(side * 0.245 + shift[0]),
            float(0.0 + shift[1]),
            shoe.rest_height,
            float(yaw),
        )
        for shoe, side, shift, yaw in zip(SHOES, sides, spread, yaws, strict=True)
    }
    return Layout(things, {"shoebox": (float(x), float(y))}, {"paper": 1.0})


# The script ------------------------------------------------------------------------------------------

_MEETING = np.array([0.0, -0.045, 0.18])  # where the heel of the shoe that is handed over is held
_ASIDE = {"left": np.array([-0.24, 0.0]), "right": np.array([0.24, 0.0])}
_PUT_HEIGHT_M = WALL + SHOES[0].rest_height + SHOES[0].grasp_offset + 0.006
_WAIT = "wait"


def _scripts(expert: Expert) -> dict[str, Script]:
    meeting = _MEETING + expert.scatter(0.012)
    return {arm: _pack(expert, arm, meeting) for arm in ARMS}


def _pack(expert: Expert, arm: str, meeting: NDArray[np.float64]) -> Script:
    """Do what is this arm's to do now, again and again."""
    while True:
        job, part = _job(expert, arm)
        if job == "put":
            yield from _put(expert, arm, part)
        elif job == "set aside":
            yield from expert.put(arm, part, _ASIDE[arm], _PUT_HEIGHT_M)
        elif job == "fetch":
            yield from expert.pick(arm, part)
            yield from expert.hold(arm, lambda: _job(expert, arm)[0] != "fetch")
        elif job == "offer":
            yield from expert.offer(arm, opposite(arm), part, meeting)
        elif job == "receive":
            yield from expert.receive(arm, opposite(arm), part, meeting)
        elif job == "let go":
            yield from expert.let_go(arm)
        elif job in ("open", "shut"):
            yield from expert.lead(arm, part, 1.0 if job == "open" else 0.0)
            yield from expert.let_go(arm)
        elif job == "be ready":
            yield Wish(over(expert.world.position(part), CLEARANCE_M), OPEN_M)
        else:
            yield from expert.wait(arm, lambda: _job(expert, arm)[0] != _WAIT)


def _put(expert: Expert, arm: str, shoe: str) -> Script:
    goal = expert.world.goal
    side = goal.side if shoe == goal.item else opposite(goal.side)
    place = lane(expert.world, side) + expert.scatter(0.004)
    yield from expert.put(arm, shoe, place, _PUT_HEIGHT_M, straight=True)


def _job(expert: Expert, arm: str) -> tuple[str, str]:
    """What an arm has to do now, and with what."""
    world = expert.world
    named, other = world.goal.item, other_shoe(world.goal)
    side = {named: world.goal.side, other: opposite(world.goal.side)}
    handed_over = world.sub_step_scores()[2] > 0
    lies = {shoe: is_in_lane(world, shoe, side[shoe]) for shoe in side}
    packed = all(lies.values()) and handed_over
    lid_open, paper_open = world.opening("lid") > OPEN_ENOUGH, world.opening("paper") > OPEN_ENOUGH
    if packed:
        jobs = _finish(world, lid_open)
    elif not lid_open and any(_lies_on_the_lid(world, shoe) for shoe in side):
        jobs = {_nearest(world, shoe): ("set aside", shoe) for shoe in side if _lies_on_the_lid(world, shoe)}
    elif not lid_open:
        opener = "left" if lies[named] else opposite(_nearest(world, named))
        jobs = {opener: ("open", "lid")}
        if not lies[named]:
            jobs[opposite(opener)] = ("fetch", named)
    elif not paper_open:
        free = "right" if world.held("left") in SHOE_NAMES and world.held("right") is None else "left"
        jobs = {free: ("open", "paper")}
    elif all(world.held(each) == other for each in ARMS):
        jobs = {each: ("let go", other) for each in ARMS if world.grip(each) == 0}
    else:
        jobs = _fill(world, side, lies, handed_over)
    return jobs.get(arm, (_WAIT, ""))


def _fill(
    world: SceneView, side: dict[str, str], lies: dict[str, bool], handed_over: bool
) -> dict[str, tuple[str, str]]:
    """Jobs while a shoe is missing in the open box. side, lies: of each shoe, the named one first.

    A shoe that lies in the other's place is only blocked by it until an arm has taken it up.
    """
    named, other = side
    named_is_blocked = is_in_lane(world, other, side[named])
    other_is_blocked = is_in_lane(world, named, side[other])
    jobs = {}
    mover = _nearest(world, other)
    if not lies[named]:
        filler = _nearest(world, named)
        jobs[filler] = ("fetch" if named_is_blocked else "put", named)
        mover = opposite(filler) if named_is_blocked else mover
    if handed_over and not lies[other]:
        jobs.setdefault(mover, ("fetch" if other_is_blocked else "put", other))
    elif not handed_over:
        jobs.setdefault(mover, ("offer", other))
        jobs.setdefault(opposite(mover), ("receive", other))
    return jobs


def _finish(world: SceneView, lid_open: bool) -> dict[str, tuple[str, str]]:
    """Jobs once both shoes lie in the box."""
    if world.opening("paper") < SHUT and world.holder("paper") is None:
        shut = world.opening("lid") < SHUT and world.holder("lid") is None
        return {} if shut else {"right": ("shut", "lid")}
    if lid_open:
        return {"left": ("shut", "paper"), "right": ("be ready", "lid")}
    return {"right": ("open", "lid")}


def _lies_on_the_lid(world: SceneView, shoe: str) -> bool:
    offset = world.position(shoe) - world.position("shoebox")
    return bool((np.abs(offset[:2]) < 0.1).all() and offset[2] > BOX_HEIGHT) and world.holder(shoe) is None


def _nearest(world: SceneView, shoe: str) -> str:
    """The arm that holds a shoe, else the one on whose side it is."""
    return world.holder(shoe) or ("left" if world.position(shoe)[0] < 0 else "right")


SHOEBOX = Task(
    name="shoebox",
    summary="Put the named shoe on the named side of the box, hand the other over and put it beside, close the box.",
    time_limit_s=19.0,
    sub_steps=(
        "lid open",
        "named shoe in its place",
        "other shoe handed over",
        "other shoe in its place",
        "paper over the shoes",
        "lid shut",
    ),
    goals=tuple(Goal(shoe, f"{side}_lane", side) for shoe in SHOE_NAMES for side in ("left", "right")),
    parts=Parts(SHOES, (SHOEBOX_FIXTURE,)),
    keypoints=(*SHOE_NAMES, "left_lane", "right_lane", "lid", "paper"),
    wordings={
        "train": (
            "pack the shoes with the {item} on the {side}",
            "pack both shoes, the {item} on the {side} side of the box",
            "put the {item} into the {side} half of the shoebox and the other one beside it",
            "open the shoebox, lay the {item} on the {side}, hand over the other shoe, close it",
            "the {item} goes first, on the {side} of the box, then the other shoe",
            "box up the pair of shoes, {item} on the {side}",
            "please pack the pair, with the {item} on the {side} side",
            "shoes into the box, {item} {side}, then fold the paper and close the lid",
            "first the {item} on the {side}, then pass the other shoe over and pack it too",
            "lay the {item} on the {side} of the shoebox, add the other shoe and wrap them up",
            "pack the shoebox, the {item} belongs on the {side}",
            "place the {item} in the box on the {side}, its partner next to it, and shut the box",
        ),
        "heldout": (
            "could you pack the shoes so that the {item} is on the {side}",
            "in the shoebox the {item} should lie on the {side}",
            "pack the pair of shoes and keep the {item} on the {side} side",
            "the {side} half of the box is for the {item}, the rest for the other shoe",
            "start with the {item} on the {side}, pack its partner, then close the shoebox",
        ),
    },
    layout=_layout,
    progress=ShoeboxProgress,
    scripts=_scripts,
)
