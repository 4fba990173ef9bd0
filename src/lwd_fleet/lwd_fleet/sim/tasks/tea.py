# SPDX-License-Identifier: Apache-2.0
"""`tea`: the lid off the pot, the named leaves in, hot water over them, the lid on again; the tea is poured through the
spout into the glass. The left arm has the kettle, the right arm leaves and pot; the lid passes from left to right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.experts import CLEARANCE_M, OPEN_M, Expert, Script, Wish, over
from lwd_fleet.sim.parts import GLASS, WALL, Parts, Thing, Vessel
from lwd_fleet.sim.robot import ARMS, Shape
from lwd_fleet.sim.scene import liquid_name
from lwd_fleet.sim.tasks.task import Goal, Layout, Scene, SceneView, Task, scatter

WATER = "water"
WATER_ENOUGH = 0.8  # portions in pot and glass, water or tea
SERVED = 0.7  # portions of the named tea in the glass
PURE = 0.85  # its share of what is in the glass
SPILL_FLAW = 0.1  # portions during a sub-step

POT_INNER, POT_HALF = 0.032, 0.028
_HANDLE_M = 0.078  # from the pot's axis
_LID_RADIUS, _LID_HALF = 0.048, 0.003
_PLUG_RADIUS, _PLUG_HALF = 0.014, 0.005  # the play in the pot is generous: 18 mm to each side
_LID_ON_Z_M = POT_HALF + _LID_HALF  # of the lid over the pot
_LID_OFF_M = 0.09
_STANDS_RAD, _STANDS_M = 0.15, 0.015


def _leaves(name: str, colour: str) -> Thing:
    """A pressed cake of tea."""
    return Thing(
        name,
        (Shape("box", (0.012, 0.012, 0.010), colour=colour),),
        0.03,
        rest_height=0.010,
        grasp_offset=0.004,
        grip=0.011,
        scalable=True,
    )


def _pot() -> Thing:
    """Its handle is on the right, its spout on the left."""
    middle, half, outer = POT_INNER + WALL / 2, WALL / 2, POT_INNER + WALL
    low = (
        POT_HALF - 0.001
    )  # walls end over the table, and those beside the lid's way under it: fewer contacts
    walls = [
        shape
        for sign in (-1, 1)
        for shape in (
            Shape("box", (half, outer, low), (sign * middle, 0, 0), colour="white"),
            Shape("box", (POT_INNER, half, low), (0, sign * middle, 0.001), colour="white"),
        )
    ]
    bar = (_HANDLE_M - 0.008 - outer) / 2
    return Thing(
        "pot",
        (
            Shape("box", (outer, outer, half), (0, 0, half - POT_HALF), colour="white"),
            *walls,
            Shape("box", (0.015, 0.007, 0.006), (-0.049, 0, 0.016), colour="white"),
            Shape("box", (bar, 0.005, 0.005), (outer + bar, 0, 0.012), colour="white"),
            Shape("box", (0.008, 0.012, 0.012), (_HANDLE_M, 0, 0.012), colour="slate"),
        ),
        0.20,
        rest_height=POT_HALF,
        grasp_offset=0.014,
        grip=0.008,
        grasp_aside=(_HANDLE_M, 0.0),
        vessel=Vessel(
            WALL - POT_HALF, POT_HALF, 0.030, POT_INNER, 1.8, colour="wood", spout=(-0.064, 0.0, 0.022)
        ),
    )


LEAVES = (_leaves("green_tea", "green"), _leaves("black_tea", "plum"))
LEAF_NAMES = tuple(leaves.name for leaves in LEAVES)
POT = _pot()
KETTLE = Thing(
    "kettle",
    (
        Shape("cylinder", (0.034, 0.026), colour="steel"),
        Shape("box", (0.013, 0.006, 0.006), (0.045, 0, 0.016), colour="steel"),
        Shape("box", (0.004, 0.003, 0.018), (0, -0.029, 0.044), colour="slate"),
        Shape("box", (0.004, 0.003, 0.018), (0, 0.029, 0.044), colour="slate"),
        Shape("box", (0.008, 0.032, 0.005), (0, 0, 0.062), colour="slate"),
    ),
    0.20,
    rest_height=0.026,
    grasp_offset=0.062,
    grip=0.008,
    vessel=Vessel(-0.022, 0.027, 0.030, 0.034, 5.0, holds=WATER, colour="blue", spout=(0.058, 0.0, 0.022)),
)
LID = Thing(
    "lid",
    (
        Shape("cylinder", (_LID_RADIUS, _LID_HALF), colour="pink"),
        Shape("cylinder", (_PLUG_RADIUS, _PLUG_HALF), (0, 0, -_LID_HALF - _PLUG_HALF), colour="pink"),
        Shape("cylinder", (0.009, 0.013), (0, 0, 0.016), colour="yellow"),
    ),
    0.05,
    rest_height=_LID_HALF + 2 * _PLUG_HALF,
    grasp_offset=0.018,
    grip=0.009,
    covers=True,
)


def other_leaves(goal: Goal) -> str:
    """Those that stay where they are."""
    return next(leaves for leaves in LEAF_NAMES if leaves != goal.item)


def lid_is_on(scene: SceneView) -> bool:
    """Whether the lid lies on the pot, however that leans, or is held there."""
    offset = scene.position("lid") - scene.position("pot")
    return bool(0.02 < np.linalg.norm(offset) < 0.045 and offset[2] > -0.01)


def lid_is_off(scene: SceneView) -> bool:
    """Whether the lid is well away from the pot."""
    return bool(np.linalg.norm(scene.position("lid") - scene.position("pot")) > _LID_OFF_M)


def is_in_the_pot(scene: SceneView, leaves: str) -> bool:
    """Whether leaves are in the pot, however that leans, released."""
    offset = scene.position(leaves) - scene.position("pot")
    return bool(np.linalg.norm(offset) < 0.04 and offset[2] < 0.02) and scene.holder(leaves) is None


def pot_stands(scene: SceneView) -> bool:
    """Whether the pot stands on the table."""
    low = scene.position("pot")[2] < POT.rest_height + _STANDS_M
    return bool(low) and scene.lean("pot") < _STANDS_RAD


def steep(scene: Scene) -> None:
    """As soon as the lid is on, water is tea of the leaves that are in it."""
    water = scene.content("pot").get(WATER, 0.0)
    inside = [leaves for leaves in LEAF_NAMES if is_in_the_pot(scene, leaves)]
    if water > 0.0 and inside and lid_is_on(scene):
        scene.add("pot", WATER, -water)
        for leaves in inside:
            scene.add("pot", leaves, water / len(inside))


def amount(scene: SceneView) -> float:
    """Portions of water and tea in pot and glass."""
    return sum(sum(scene.content(vessel).values()) for vessel in ("pot", "glass"))


class TeaProgress:
    """Sub-steps: the lid was taken off; the named leaves were put in the pot, alone; enough water over them; the lid on,
    released, over tea of the named leaves; enough of that is in the glass, not mixed with anything else.

    In this order, each counted once reached. Half a score: the leaves had to be taken more than once, the lid more than
    twice (lid on), or more than 0.1 portions were spilled since the sub-step before (water, tea in the glass).
    """

    def __init__(self, goal: Goal) -> None:
        self._item, self._other = goal.item, other_leaves(goal)
        self._takings = {goal.item: 0, "lid": 0}
        self._held = dict.fromkeys(self._takings, False)
        self._scores: list[float] = []
        self._spilled = 0.0
        self._served = False

    def update(self, scene: SceneView) -> None:
        for thing in self._takings:
            held = scene.holder(thing) is not None
            self._takings[thing] += held and not self._held[thing]
            self._held[thing] = held
        alone = is_in_the_pot(scene, self._item) and not is_in_the_pot(scene, self._other)
        closed = lid_is_on(scene) and scene.holder("lid") is None
        pot, glass = scene.content("pot"), scene.content("glass")
        named = glass.get(self._item, 0.0)
        self._served = named >= SERVED and named >= PURE * sum(glass.values())
        reached = (
            lid_is_off(scene),
            alone,
            alone and amount(scene) >= WATER_ENOUGH,
            closed and named + pot.get(self._item, 0.0) >= SERVED,
            self._served,
        )
        while len(self._scores) < len(reached) and reached[len(self._scores)]:
            self._scores.append(self._neatness(scene.spilled))
            self._spilled = scene.spilled

    def _neatness(self, spilled: float) -> float:
        """Of the sub-step that is reached now."""
        flaws = {0: False, 1: self._takings[self._item] > 1, 3: self._takings["lid"] > 2}
        flaw = flaws.get(len(self._scores), spilled - self._spilled > SPILL_FLAW)
        return 0.5 if flaw else 1.0

    @property
    def scores(self) -> tuple[float, ...]:
        return (*self._scores, *[0.0] * (5 - len(self._scores)))

    @property
    def done(self) -> bool:
        return self._served and len(self._scores) == 5


_POT_HOME, _KETTLE_HOME, _GLASS_HOME = (0.03, 0.09), (-0.26, 0.0), (-0.15, 0.15)
_LEAVES_HOME, _LID_ASIDE = (0.23, -0.01), (0.04, -0.09)


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    half = (0.05 * placement_range, 0.07 * placement_range)
    things = scatter(rng, LEAVES, _LEAVES_HOME, half, scale)
    pot, glass = rng.uniform(-0.015, 0.015, (2, 2)) + (_POT_HOME, _GLASS_HOME)
    kettle = rng.uniform(-0.035, 0.035, 2) * placement_range + _KETTLE_HOME
    turned = rng.uniform(-0.1, 0.1, 2)
    things["pot"] = (float(pot[0]), float(pot[1]), POT.rest_height, float(turned[0]))
    things["lid"] = (float(pot[0]), float(pot[1]), POT.rest_height + _LID_ON_Z_M, 0.0)
    things["kettle"] = (float(kettle[0]), float(kettle[1]), KETTLE.rest_height, float(turned[1]))
    return Layout(things, {"glass": (float(glass[0]), float(glass[1]))})


# The script ------------------------------------------------------------------------------------------

_HIGH_M = 0.19  # of the kettle's handle on its way
_LEAVES_HEIGHT_M = 0.035  # of their grasp point when they are let go in the pot
_CLEAR_M = 0.12
_WATER, _TEA = 1.2, 1.0  # portions that pot and glass are to hold
_POURS_ON = 0.12  # portions that flow while a vessel is turned up again
_LITTLE = 0.02  # portions
_TURNED_RAD = 0.4
_WAIT = "wait"
_PUT_AWAY = {"pot": "put down", "kettle": "put back", "lid": "uncover"}
_Jobs = dict[str, tuple[str, str]]


def _scripts(expert: Expert) -> dict[str, Script]:
    return {arm: _brew(expert, arm) for arm in ARMS}


def _brew(expert: Expert, arm: str) -> Script:
    """Do what is this arm's to do now, again and again."""
    world = expert.world
    while True:
        job, part = _job(expert, arm)

        def changed(now: tuple[str, str] = (job, part)) -> bool:
            return _job(expert, arm) != now

        if job == "fetch":
            yield from expert.pick(arm, part, _HIGH_M if part == "kettle" else 0.13)
            yield from expert.hold(arm, changed)
        elif job == "put in":
            inside = world.position("pot") + expert.scatter(0.004)
            yield from expert.put(arm, part, inside, _LEAVES_HEIGHT_M)
        elif job == "put aside":
            side = 1.0 if arm == "right" else -1.0
            aside = np.array([side * _LEAVES_HOME[0], -0.10, 0.0])
            yield from expert.put(arm, part, aside + expert.scatter(0.01), LEAVES[0].rest_height + 0.008)
        elif job == "pour":
            into, wanted = ("pot", _WATER) if part == "kettle" else ("glass", _TEA)
            yield from expert.pick(arm, part, _HIGH_M)
            missing = wanted - sum(world.content(into).values())
            yield from expert.pour(arm, part, into, max(_LITTLE, missing - _POURS_ON))
        elif job == "put back":
            home = np.array([*_KETTLE_HOME, 0.0]) + expert.scatter(0.015)
            height = KETTLE.rest_height + KETTLE.grasp_offset + 0.004
            yield from expert.put(arm, part, home, height, _HIGH_M, straight=True)
        elif job == "put down":
            handle = np.array([_POT_HOME[0] + _HANDLE_M, _POT_HOME[1], 0.0]) + expert.scatter(0.008)
            yield from expert.put(arm, part, handle, POT.rest_height + 0.018, straight=True)
        elif job == "cover":
            yield from _cover(expert, arm, changed)
        elif job == "uncover":
            aside = np.array([*_LID_ASIDE, 0.0]) + expert.scatter(0.01)
            yield from expert.put(arm, part, aside, LID.rest_height + LID.grasp_offset + 0.004)
        elif job == "be ready":
            yield Wish(over(world.grasp_point(part), CLEARANCE_M), OPEN_M)
        else:
            yield from expert.wait(arm, changed)


def _cover(expert: Expert, arm: str, changed: Callable[[], bool]) -> Script:
    yield from expert.pick(arm, "lid")
    if changed():
        return
    on: NDArray[np.float64] = expert.world.position("pot") + [0.0, 0.0, _LID_ON_Z_M + LID.grasp_offset]
    yield from expert.carry(arm, "lid", over(on, 0.04), exact=True)
    yield from expert.carry(arm, "lid", over(on, 0.003), exact=True)
    if expert.world.held(arm) == "lid":
        yield from expert.let_go(arm)


def _job(expert: Expert, arm: str) -> tuple[str, str]:
    """What an arm has to do now, and with what."""
    world = expert.world
    if world.done():
        jobs: _Jobs = {}
    elif world.holder("pot") is None and (not pot_stands(world) or _is_turned(expert, "pot")):
        jobs = {"right": ("put down", "pot")}
    else:
        jobs = _make(expert)
    job = jobs.get(arm, (_WAIT, ""))
    held = world.held(arm)
    return job if held in (None, job[1]) else (_PUT_AWAY.get(held, "put aside"), held)


def _make(expert: Expert) -> _Jobs:
    """While there is not enough tea in the glass."""
    world = expert.world
    named, other = world.goal.item, other_leaves(world.goal)
    if is_in_the_pot(world, named) and amount(world) >= WATER_ENOUGH and not is_in_the_pot(world, other):
        return _close_and_serve(expert)
    fetching = world.holder(named) or ("left" if world.position(named)[0] < -0.12 else "right")
    jobs: _Jobs = {fetching: ("fetch", named)}
    if not lid_is_off(world):
        return {**jobs, world.holder("lid") or "left": ("uncover", "lid")}
    if is_in_the_pot(world, other):
        return {"right": ("put aside", other)}
    if not is_in_the_pot(world, named):
        free = _is_clear(expert, "left" if fetching == "right" else "right")
        return {"left": ("fetch", "kettle"), fetching: ("put in" if free else "fetch", named)}
    if _is_turned(expert, "kettle"):
        return {"left": ("put back", "kettle")}
    return {
        "left": ("pour" if _is_clear(expert, "right") else "fetch", "kettle"),
        "right": ("fetch", "lid"),
    }


def _close_and_serve(expert: Expert) -> _Jobs:
    """When the named leaves and water are in the pot."""
    world = expert.world
    if not lid_is_on(world) or world.holder("lid") is not None:
        arm = world.holder("lid") or "right"
        free = _is_clear(expert, "left" if arm == "right" else "right")
        return {arm: ("cover" if free else "fetch", "lid")}
    return {"right": ("pour" if _is_clear(expert, "left") else "be ready", "pot")}


def _is_clear(expert: Expert, arm: str) -> bool:
    """Whether an arm is not over the pot."""
    offset = expert.world.tool(arm) - expert.world.position("pot")
    return bool(np.hypot(offset[0], offset[1]) > _CLEAR_M)


def _is_turned(expert: Expert, vessel: str) -> bool:
    """Whether its spout points too far away from where arms pour to."""
    return bool(abs(expert.world.heading(vessel)) > _TURNED_RAD)


TEA = Task(
    name="tea",
    summary="Open the pot, put the named leaves in, pour water over them, close it, pour the tea into the glass.",
    time_limit_s=22.0,
    sub_steps=("lid off", "named leaves in the pot", "water over them", "lid on", "tea in the glass"),
    goals=tuple(Goal(leaves, "glass") for leaves in LEAF_NAMES),
    parts=Parts((*LEAVES, POT, KETTLE, LID), (GLASS,)),
    keypoints=(*LEAF_NAMES, "pot", liquid_name("pot"), "kettle", "lid", "glass", liquid_name("glass")),
    wordings={
        "train": (
            "brew a glass of {item}",
            "make {item} in the pot and pour it into the glass",
            "put the {item} into the pot, add hot water, close the lid and serve",
            "i would like {item}, please",
            "prepare a pot of {item} and fill the glass",
            "open the pot, drop the {item} in, pour water over it, and serve the tea",
            "steep the {item} and pour it out",
            "please make me some {item}",
            "the guest wants {item} in the glass",
            "use the {item}, fill the pot with hot water, put the lid on, then pour",
            "cook up a pot of {item} for the glass",
        ),
        "heldout": (
            "could you brew some {item}",
            "a glass of {item}, freshly steeped",
            "take the {item} for the pot, add water and serve it",
            "pour me a glass of {item} once it has steeped",
            "today it is {item} in the pot",
        ),
    },
    layout=_layout,
    progress=TeaProgress,
    scripts=_scripts,
    mechanism=steep,
)
