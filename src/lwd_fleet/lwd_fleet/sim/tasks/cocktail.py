# SPDX-License-Identifier: Apache-2.0
"""`cocktail`: the named spirit into the shaker, then the lemon juice; the lid on, shaken until it foams, poured through its
strainer into the glass.

Bottles hold as much as a drink takes and are emptied: how much has flowed is then not a matter of tenths of a second, which
is finer than a policy decides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.experts import CLEARANCE_M, CLOSED_M, OPEN_M, Expert, Script, Wish, over
from lwd_fleet.sim.parts import GLASS, Parts, Thing, Vessel
from lwd_fleet.sim.robot import ARMS, Shape
from lwd_fleet.sim.scene import TICK_S, liquid_name
from lwd_fleet.sim.tasks.task import Goal, Layout, Scene, SceneView, Task

SPIRIT_PORTIONS, LEMON_PORTIONS = 0.8, 0.5  # in their bottles
SPIRIT_AT_LEAST, LEMON_AT_LEAST = 0.6, 0.3
WRONG_AT_MOST = 0.15  # portions of the other spirit
FOAM = "foam"
FOAM_ENOUGH = 0.4  # portions
SERVED = 0.7  # of what was shaken is in the glass
SPILL_FLAW = 0.1  # portions during a sub-step
_FOAM_PORTIONS = 0.8  # at most
_FOAM_PER_M = 1.5  # portions per metre of the way, while the shaker moves faster than:
_SHAKEN_M_S = 0.15
_FOAMS_FROM = 0.3  # portions of anything else
_CAPACITY = 2.2  # portions, of the shaker

SHAKER_HALF, SHAKER_RADIUS, HANDLE_M = 0.055, 0.030, 0.090
_LID_RADIUS, _LID_HALF, _SKIRT = 0.056, 0.004, 0.008
_RIM = _LID_RADIUS - 0.0015  # of the skirt, its middle
_ON_Z_M = SHAKER_HALF + _LID_HALF  # of the lid over the shaker
_LID_ON_XY_M, _LID_ON_Z_M = 0.030, (0.046, 0.068)  # also while it is shaken


def _bottle(name: str, colour: str, portions: float) -> Thing:
    return Thing(
        name,
        (
            Shape("cylinder", (0.019, 0.034), colour=colour),
            Shape("cylinder", (0.009, 0.016), (0, 0, 0.050), colour=colour),
        ),
        0.12,
        rest_height=0.034,
        grasp_offset=0.030,
        grip=0.010,
        vessel=Vessel(-0.030, 0.066, 0.010, 0.009, portions, holds=name, colour=colour),
    )


LEMON = "lemon"
SPIRITS = (_bottle("gin", "blue", SPIRIT_PORTIONS), _bottle("rum", "red", SPIRIT_PORTIONS))
BOTTLES = (*SPIRITS, _bottle(LEMON, "yellow", LEMON_PORTIONS))
SHAKER = Thing(
    "shaker",
    (
        Shape("cylinder", (SHAKER_RADIUS, SHAKER_HALF), colour="glass"),
        Shape("cylinder", (0.042, 0.004), (0, 0, 0.004 - SHAKER_HALF), colour="steel"),
        Shape("box", (0.008, 0.006, 0.005), (-0.038, 0, 0.035), colour="steel"),
        Shape("box", (0.027, 0.006, 0.005), (SHAKER_RADIUS + 0.027, 0, 0.01), colour="steel"),
        Shape("box", (0.008, 0.010, 0.012), (HANDLE_M, 0, 0.01), colour="plum"),
    ),
    0.15,
    rest_height=SHAKER_HALF,
    grasp_offset=0.0,
    grip=0.008,
    vessel=Vessel(
        0.003 - SHAKER_HALF,
        SHAKER_HALF,
        SHAKER_RADIUS,
        SHAKER_RADIUS,
        _CAPACITY,
        colour="orange",
        spout=(-0.048, 0.0, 0.038),
    ),
    other_grasp=(HANDLE_M, 0.0, 0.012),
)
LID = Thing(
    "lid",
    (
        Shape("cylinder", (_LID_RADIUS, _LID_HALF), colour="teal"),
        Shape("cylinder", (0.009, 0.014), (0, 0, 0.018), colour="yellow"),
        *(
            Shape(
                "box",
                (0.0015, 0.012, _SKIRT / 2),
                (_RIM * np.cos(angle), _RIM * np.sin(angle), -_LID_HALF - _SKIRT / 2),
                (0, 0, angle),
                colour="teal",
            )
            for angle in (0.0, np.pi / 2, np.pi, -np.pi / 2)
        ),
    ),
    0.05,
    rest_height=_LID_HALF + _SKIRT,
    grasp_offset=0.020,
    grip=0.009,
    covers=True,
)


def wrong_spirit(goal: Goal) -> str:
    """Of which nothing is wanted."""
    return next(bottle.name for bottle in SPIRITS if bottle.name != goal.item)


def lid_is_on(scene: SceneView) -> bool:
    """Whether the lid lies on the shaker, held or not."""
    offset = scene.position("lid") - scene.position("shaker")
    low, high = _LID_ON_Z_M
    return bool(np.hypot(offset[0], offset[1]) < _LID_ON_XY_M and low < offset[2] < high)


def foam(scene: Scene) -> None:
    """What is in the closed shaker foams, and rises, as far as the shaker is moved fast."""
    content, speed = scene.content("shaker"), scene.speed("shaker")
    amount = content.get(FOAM, 0.0)
    liquid = sum(content.values()) - amount
    if speed > _SHAKEN_M_S and lid_is_on(scene) and liquid > _FOAMS_FROM and amount < _FOAM_PORTIONS:
        room = _CAPACITY - liquid - amount
        scene.add("shaker", FOAM, min(room, _FOAM_PER_M * speed * TICK_S))


class Drink:
    """How far the drink is, from what is in shaker and glass."""

    def __init__(self, scene: SceneView, goal: Goal) -> None:
        shaker, glass = scene.content("shaker"), scene.content("glass")
        self.spirit, self.lemon, self.foam, self.wrong = (
            shaker.get(name, 0.0) + glass.get(name, 0.0)
            for name in (goal.item, LEMON, FOAM, wrong_spirit(goal))
        )
        self.served = sum(glass.values()) / max(1e-9, sum(glass.values()) + sum(shaker.values()))

    @property
    def begun(self) -> bool:
        """Enough of the right spirit, and at most a dash of the other."""
        return self.spirit >= SPIRIT_AT_LEAST and self.wrong <= WRONG_AT_MOST

    @property
    def mixed(self) -> bool:
        """Lemon juice, too."""
        return self.begun and self.lemon >= LEMON_AT_LEAST

    @property
    def shaken(self) -> bool:
        """It foams."""
        return self.mixed and self.foam >= FOAM_ENOUGH


class CocktailProgress:
    """Sub-steps: enough of the named spirit is in the shaker, and at most 0.15 portions of the other; enough lemon juice is;
    the lid is on; it foams; the drink is in the glass.

    In this order, each counted once reached. Half a score: more than 0.1 portions were spilled since the sub-step before
    (pouring), or the lid or the shaker had to be taken more than once (lid on; foam).
    """

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._scores: list[float] = []
        self._spilled = 0.0
        self._takings = {"lid": 0, "shaker": 0}
        self._held = dict.fromkeys(self._takings, False)
        self._done = False

    def update(self, scene: SceneView) -> None:
        for thing in self._takings:
            held = scene.holder(thing) is not None
            self._takings[thing] += held and not self._held[thing]
            self._held[thing] = held
        drink = Drink(scene, self._goal)
        on = lid_is_on(scene)
        self._done = drink.shaken and drink.served >= SERVED
        reached = (
            drink.begun,
            drink.mixed,
            drink.mixed and on and scene.holder("lid") is None,
            drink.shaken,
            self._done,
        )
        while len(self._scores) < len(reached) and reached[len(self._scores)]:
            self._scores.append(self._neatness(scene.spilled))
            self._spilled = scene.spilled

    def _neatness(self, spilled: float) -> float:
        """Of the sub-step that is reached now."""
        flaws = {
            2: self._takings["lid"] > 1,
            3: self._takings["shaker"] > 1,
        }
        flaw = flaws.get(len(self._scores), spilled - self._spilled > SPILL_FLAW)
        return 0.5 if flaw else 1.0

    @property
    def scores(self) -> tuple[float, ...]:
        return (*self._scores, *[0.0] * (5 - len(self._scores)))

    @property
    def done(self) -> bool:
        return self._done


_SHAKER_HOME = np.array([0.0, 0.03])
_LID_HOME = (-0.13, -0.08)
_SPIRIT_HOME = (0.23, 0.06)  # on the right; mirrored on the left
_LEMON_HOME = (0.25, -0.08)
_SPARE_HOME = (0.30, -0.01)  # where something else stands already


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    sides = rng.permutation([-1.0, 1.0])
    spread = rng.uniform(-1, 1, (3, 2)) * (0.035, 0.045) * placement_range
    jitter = rng.uniform(-0.012, 0.012, (3, 2))
    places = {
        spirit.name: (side * _SPIRIT_HOME[0] + shift[0], _SPIRIT_HOME[1] + shift[1])
        for spirit, side, shift in zip(SPIRITS, sides, spread, strict=False)
    }
    places[LEMON] = (_LEMON_HOME[0] + jitter[2, 0], _LEMON_HOME[1] + jitter[2, 1])
    things = {
        bottle.name: (float(places[bottle.name][0]), float(places[bottle.name][1]), bottle.rest_height, 0.0)
        for bottle in BOTTLES
    }
    things["lid"] = (
        float(_LID_HOME[0] + 0.6 * spread[2, 0]),
        float(_LID_HOME[1] + 0.4 * spread[2, 1]),
        LID.rest_height,
        0.0,
    )
    x, y = _SHAKER_HOME + jitter[0]
    things["shaker"] = (float(x), float(y), SHAKER.rest_height, float(rng.uniform(-0.1, 0.1)))
    glass = np.array([-0.02, 0.17]) + jitter[1]
    return Layout(things, {"glass": (float(glass[0]), float(glass[1]))})


# The script ------------------------------------------------------------------------------------------

_HIGH_M = 0.19  # of what is carried over the shaker
_ALL = 5.0  # portions: more than there are
_SHAKE = np.array([0.02, -0.02, 0.19])  # where the shaker is shaken
_SWING = np.array([0.07, 0.0, 0.0])
_BESIDE = np.array([0.10, 0.0, 0.0])  # where the right arm waits, from the handle
_FOAM_WANTED = 0.5
_CLEAR_M = 0.11
_WAIT = "wait"
_PUT_AWAY = {"gin": "put back", "rum": "put back", LEMON: "put back", "lid": "uncover", "shaker": "put down"}
_Jobs = dict[str, tuple[str, str]]


def _scripts(expert: Expert) -> dict[str, Script]:
    return {arm: _mix(expert, arm) for arm in ARMS}


def _mix(expert: Expert, arm: str) -> Script:
    """Do what is this arm's to do now, again and again."""
    world = expert.world
    while True:
        job, part = _job(expert, arm)
        if job == "fetch":
            yield from expert.pick(arm, part, _HIGH_M)
            yield from expert.hold(arm, lambda: _job(expert, arm)[0] != "fetch")
        elif job == "pour":
            yield from expert.pick(arm, part, _HIGH_M)
            yield from expert.pour(arm, part, "shaker", _ALL)
        elif job == "put back":
            yield from expert.put(
                arm, part, _home(expert, arm, part), BOTTLES[0].rest_height + 0.034, _HIGH_M
            )
        elif job == "cover":
            yield from _cover(expert, arm)
        elif job == "uncover":
            home = np.array([*_LID_HOME, 0.0]) + expert.scatter(0.01)
            yield from expert.put(
                arm, "lid", home, LID.rest_height + LID.grasp_offset + 0.004, _HIGH_M + 0.06
            )
        elif job == "shake":
            yield from _shake(expert, arm)
        elif job == "be ready":
            yield Wish(over(world.grasp_point("shaker", 1) + _BESIDE, CLEARANCE_M), OPEN_M)
        elif job == "put down":
            yield from expert.put(arm, part, _SHAKER_HOME, SHAKER_HALF + 0.004)
        elif job == "serve":
            yield from _take_shaker(expert, arm)
            yield from expert.pour(arm, "shaker", "glass", _ALL)
        else:
            yield from expert.wait(arm, lambda: _job(expert, arm)[0] != _WAIT)


def _cover(expert: Expert, arm: str) -> Script:
    world = expert.world
    yield from expert.pick(arm, "lid", _HIGH_M)
    on = world.position("shaker") + [0.0, 0.0, _ON_Z_M + LID.grasp_offset]
    yield from expert.carry(arm, "lid", on + [0.0, 0.0, 0.04], exact=True)
    yield from expert.carry(arm, "lid", on + [0.0, 0.0, 0.003], exact=True)
    if world.held(arm) == "lid":
        yield from expert.let_go(arm)


def _take_shaker(expert: Expert, arm: str) -> Script:
    """By its handle, up to where it is shaken."""
    yield from expert.grasp(arm, "shaker", 1)
    yield from expert.carry(arm, "shaker", _SHAKE)


def _shake(expert: Expert, arm: str) -> Script:
    world = expert.world
    yield from _take_shaker(expert, arm)
    side = 1.0
    while world.held(arm) == "shaker" and lid_is_on(world) and Drink(world, world.goal).foam < _FOAM_WANTED:
        tool = _SHAKE + side * _SWING + world.tool(arm) - world.grasp_point("shaker")
        if side * (world.grasp_point("shaker")[0] - _SHAKE[0]) > 0.6 * _SWING[0]:
            side = -side
        yield Wish(tool, CLOSED_M)


def _home(expert: Expert, arm: str, bottle: str) -> NDArray[np.float64]:
    """Where an arm puts a bottle back."""
    sign = 1.0 if arm == "right" else -1.0
    x, y = _LEMON_HOME if bottle == LEMON else _SPIRIT_HOME
    others = [expert.world.position(each.name)[:2] for each in BOTTLES if each.name != bottle]
    if any(np.hypot(*(other - (sign * x, y))) < 0.09 for other in others):
        x, y = _SPARE_HOME
    return np.array([sign * x, y, 0.0]) + expert.scatter(0.01)


def _job(expert: Expert, arm: str) -> tuple[str, str]:
    """What an arm has to do now, and with what."""
    world = expert.world
    drink, on = Drink(world, world.goal), lid_is_on(world)
    if world.done():
        jobs = {}
    elif drink.shaken:
        jobs = {"right": ("serve", "shaker")}
    elif drink.mixed:
        jobs = _close_and_shake(expert, on)
    elif on:
        jobs = {"left": ("uncover", "lid")}
    else:
        jobs = _fill(expert, drink)
    job = jobs.get(arm, (_WAIT, ""))
    held = world.held(arm)
    return job if held in (None, job[1]) else (_PUT_AWAY[held], held)


def _fill(expert: Expert, drink: Drink) -> _Jobs:
    """While something is missing, the spirit first: one arm pours, the other fetches what comes next."""
    world = expert.world
    bottle = LEMON if drink.begun else world.goal.item
    arm = _nearest(world, bottle)
    other = "right" if arm == "left" else "left"
    job = "pour" if _is_clear(expert, other) else "fetch"
    if other == "left":
        return {arm: (job, bottle), other: ("fetch", "lid")}
    return {arm: (job, bottle), other: ("fetch", LEMON)} if not drink.begun else {arm: (job, bottle)}


def _close_and_shake(expert: Expert, on: bool) -> _Jobs:
    """The left arm puts the lid on, the right arm shakes."""
    if not on:
        return {
            "left": ("cover" if _is_clear(expert, "right") else "fetch", "lid"),
            "right": ("be ready", ""),
        }
    released = expert.world.held("left") != "lid"
    return {"right": ("shake", "shaker") if released else ("be ready", "")}


def _is_clear(expert: Expert, arm: str) -> bool:
    """Whether an arm is not over the shaker."""
    offset = expert.world.tool(arm) - expert.world.position("shaker")
    return bool(np.hypot(offset[0], offset[1]) > _CLEAR_M)


def _nearest(world: SceneView, bottle: str) -> str:
    """The arm that holds a bottle, else the one on whose side it is."""
    return world.holder(bottle) or ("left" if world.position(bottle)[0] < 0 else "right")


COCKTAIL = Task(
    name="cocktail",
    summary="Pour the named spirit and the lemon juice, close, shake, pour into the glass.",
    time_limit_s=28.0,
    sub_steps=(
        "named spirit in the shaker",
        "lemon juice in the shaker",
        "lid on",
        "shaken",
        "drink in the glass",
    ),
    goals=tuple(Goal(spirit.name, "glass") for spirit in SPIRITS),
    parts=Parts((*BOTTLES, SHAKER, LID), (GLASS,)),
    keypoints=("gin", "rum", LEMON, "shaker", liquid_name("shaker"), "lid", "glass", liquid_name("glass")),
    wordings={
        "train": (
            "mix a {item} cocktail",
            "make a {item} sour",
            "shake a {item} drink and pour it into the glass",
            "pour the {item} first, then the lemon juice, shake and serve",
            "a {item} cocktail, please",
            "mix a drink of {item} and lemon",
            "start with the {item}, add the juice, shake it, pour it out",
            "put the {item} in the shaker, then the lemon, and shake",
            "please shake up a cocktail based on {item}",
            "serve a shaken {item} cocktail in the glass",
            "{item} and lemon, shaken",
        ),
        "heldout": (
            "could you make a cocktail from {item}",
            "i would like a {item} cocktail",
            "shake a cocktail, the spirit is {item}",
            "{item} in the shaker, the juice too, then shake and serve it",
            "the drink should be {item} with lemon, shaken and poured",
        ),
    },
    layout=_layout,
    progress=CocktailProgress,
    scripts=_scripts,
    mechanism=foam,
)
