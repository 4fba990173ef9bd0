# SPDX-License-Identifier: Apache-2.0
"""`tea`: the lid off the pot, the named tea in from its caddy, hot water from the kettle, the tea into the cup, the lid
back on. The left arm has lid and caddies, the right arm kettle and pot."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.parts import Fixture, Parts, Thing, Vessel
from lwd_fleet.sim.robot import ARMS, Shape
from lwd_fleet.sim.scene import liquid_name
from lwd_fleet.sim.tasks.task import AT_REST_M_S, Goal, Layout, SceneView, Task

WATER = "water"
TEA_AT_LEAST = 0.25  # portions in the pot
OTHER_TEA_AT_MOST = 0.1
WATER_AT_LEAST = 0.8
SERVED = 0.7  # of what was brewed is in the cup
SPILL_FLAW = 0.1  # portions during a sub-step
_CADDY_PORTIONS = 0.45
_TEA_WANTED, _WATER_WANTED = 0.38, 1.0

POT_HALF, POT_RADIUS, HANDLE_M = 0.035, 0.028, 0.085
_LID_RADIUS, _LID_HALF, _SKIRT = 0.040, 0.004, 0.008
_RIM = _LID_RADIUS - 0.0015  # of the skirt, its middle
_ON_Z_M = POT_HALF + _LID_HALF  # of the lid over the pot
_LID_ON_XY_M, _LID_ON_Z_M = 0.024, (0.028, 0.048)
_LID_OFF_M = 0.09


def _caddy(name: str, colour: str) -> Thing:
    return Thing(
        name,
        (
            Shape("box", (0.019, 0.019, 0.022), colour=colour),
            Shape("box", (0.009, 0.009, 0.014), (0, 0, 0.036), colour="white"),
        ),
        0.06,
        rest_height=0.022,
        grasp_offset=0.024,
        grip=0.018,
        vessel=Vessel(-0.018, 0.050, 0.010, 0.009, _CADDY_PORTIONS, holds=name, colour=colour),
    )


CADDIES = (_caddy("green_tea", "lime"), _caddy("black_tea", "wood"))
KETTLE = Thing(
    "kettle",
    (
        Shape("cylinder", (0.030, 0.028), colour="steel"),
        Shape("box", (0.006, 0.024, 0.012), (0, 0, 0.040), colour="plum"),
        Shape("box", (0.012, 0.007, 0.006), (-0.038, 0, 0.020), colour="steel"),
    ),
    0.15,
    rest_height=0.028,
    grasp_offset=0.042,
    grip=0.008,
    vessel=Vessel(-0.024, 0.026, 0.030, 0.050, 3.0, holds=WATER, colour="blue"),
)
POT = Thing(
    "pot",
    (
        Shape("cylinder", (POT_RADIUS, POT_HALF), colour="pink"),
        Shape("box", (0.028, 0.006, 0.005), (POT_RADIUS + 0.028, 0, 0.005), colour="pink"),
        Shape("box", (0.008, 0.010, 0.012), (HANDLE_M, 0, 0.005), colour="plum"),
    ),
    0.15,
    rest_height=POT_HALF,
    grasp_offset=0.0,
    grip=0.008,
    vessel=Vessel(0.004 - POT_HALF, POT_HALF, POT_RADIUS, POT_RADIUS, 2.4, colour="orange"),
    other_grasp=(HANDLE_M, 0.0, 0.007),
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
CUP_HEIGHT = 0.05
CUP = Fixture(
    "cup",
    (Shape("cylinder", (0.030, CUP_HEIGHT / 2), (0, 0, CUP_HEIGHT / 2), colour="glass"),),
    vessel=Vessel(0.004, CUP_HEIGHT, 0.032, 0.028, 2.4, colour="orange"),
)


def other_tea(goal: Goal) -> str:
    """The one that is not asked for."""
    return next(caddy.name for caddy in CADDIES if caddy.name != goal.item)


def lid_is_on(scene: SceneView) -> bool:
    """Whether the lid lies on the pot, held or not."""
    offset = scene.position("lid") - scene.position("pot")
    low, high = _LID_ON_Z_M
    return bool(np.hypot(offset[0], offset[1]) < _LID_ON_XY_M and low < offset[2] < high)


class Brew:
    """How far the tea is, from what is in pot and cup."""

    def __init__(self, scene: SceneView, goal: Goal) -> None:
        pot, cup = scene.content("pot"), scene.content("cup")
        self.tea, self.other, self.water = (
            pot.get(name, 0.0) + cup.get(name, 0.0) for name in (goal.item, other_tea(goal), WATER)
        )
        self.served = sum(cup.values()) / max(1e-9, sum(cup.values()) + sum(pot.values()))

    @property
    def has_tea(self) -> bool:
        """Enough of the named tea, and hardly any of the other."""
        return self.tea >= TEA_AT_LEAST and self.other <= OTHER_TEA_AT_MOST

    @property
    def brewed(self) -> bool:
        """Tea and water."""
        return self.has_tea and self.water >= WATER_AT_LEAST

    @property
    def poured(self) -> bool:
        """The cup has most of it."""
        return self.brewed and self.served >= SERVED


class TeaProgress:
    """Sub-steps: the lid is off; enough of the named tea is in the pot; enough water; the tea is in the cup; the pot
    stands on the table, released, with the lid on it.

    In this order, each counted once reached. Half a score: more than 0.1 portions were spilled since the sub-step before
    (pouring), or the lid was taken more than twice in all (lid on).
    """

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._scores: list[float] = []
        self._spilled = 0.0
        self._takings = 0  # of the lid
        self._held = False
        self._done = False

    def update(self, scene: SceneView) -> None:
        held = scene.holder("lid") is not None
        self._takings += held and not self._held
        self._held = held
        brew = Brew(scene, self._goal)
        away = float(np.linalg.norm(scene.position("lid") - scene.position("pot")))
        self._done = brew.poured and lid_is_on(scene) and _at_rest(scene)
        reached = (away > _LID_OFF_M, brew.has_tea, brew.brewed, brew.poured, self._done)
        while len(self._scores) < len(reached) and reached[len(self._scores)]:
            self._scores.append(self._neatness(scene.spilled))
            self._spilled = scene.spilled

    def _neatness(self, spilled: float) -> float:
        """Of the sub-step that is reached now."""
        last = len(self._scores) == 4
        flaw = self._takings > 2 if last else spilled - self._spilled > SPILL_FLAW
        return 0.5 if flaw else 1.0

    @property
    def scores(self) -> tuple[float, ...]:
        return (*self._scores, *[0.0] * (5 - len(self._scores)))

    @property
    def done(self) -> bool:
        return self._done


def _at_rest(scene: SceneView) -> bool:
    """Whether pot and lid stand, released."""
    free = scene.holder("pot") is None and scene.holder("lid") is None
    still = scene.speed("pot") < AT_REST_M_S and scene.speed("lid") < AT_REST_M_S
    return free and still and bool(scene.position("pot")[2] < POT_HALF + 0.02) and scene.lean("pot") < 0.2


_POT_HOME = np.array([0.0, 0.0])
_CUP_HOME = np.array([-0.02, 0.15])
_KETTLE_HOME = np.array([0.25, 0.06])
_CADDY_HOMES = np.array([[-0.25, 0.09], [-0.25, -0.02]])
_LID_ASIDE = np.array([-0.13, -0.10])


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    homes = _CADDY_HOMES[rng.permutation(2)] + rng.uniform(-0.022, 0.022, (2, 2)) * placement_range
    things = {
        caddy.name: (float(x), float(y), caddy.rest_height, 0.0)
        for caddy, (x, y) in zip(CADDIES, homes, strict=True)
    }
    x, y = _KETTLE_HOME + rng.uniform(-1, 1, 2) * (0.03, 0.06) * placement_range
    things["kettle"] = (float(x), float(y), KETTLE.rest_height, 0.0)
    x, y = _POT_HOME + rng.uniform(-0.02, 0.02, 2) * placement_range
    things["pot"] = (float(x), float(y), POT.rest_height, float(rng.uniform(-0.1, 0.1)))
    things["lid"] = (float(x), float(y), POT.rest_height + _ON_Z_M, 0.0)
    cup = _CUP_HOME + rng.uniform(-0.012, 0.012, 2)
    return Layout(things, {"cup": (float(cup[0]), float(cup[1]))})


# The script ------------------------------------------------------------------------------------------

_HIGH_M = 0.17  # of what is carried over the pot
_CADDY_POURS_ON, _KETTLE_POURS_ON = 0.02, 0.12  # portions that flow while they are turned up again
_CLEAR_M = 0.13
_WAIT = "wait"
_PUT_AWAY = {
    "green_tea": "put back",
    "black_tea": "put back",
    "kettle": "put back",
    "lid": "uncover",
    "pot": "put down",
}
_Jobs = dict[str, tuple[str, str]]


def _scripts(expert: Expert) -> dict[str, Script]:
    return {arm: _brew(expert, arm) for arm in ARMS}


def _brew(expert: Expert, arm: str) -> Script:
    """Do what is this arm's to do now, again and again."""
    world = expert.world
    while True:
        job, part = _job(expert, arm)
        if job == "fetch":
            yield from expert.pick(arm, part, _HIGH_M)
            yield from expert.hold(arm, lambda: _job(expert, arm)[0] != "fetch")
        elif job == "pour tea":
            yield from expert.pick(arm, part, _HIGH_M)
            missing = _TEA_WANTED - Brew(world, world.goal).tea
            yield from expert.pour(arm, part, "pot", max(0.02, missing - _CADDY_POURS_ON))
        elif job == "pour water":
            yield from expert.pick(arm, part, _HIGH_M)
            missing = _WATER_WANTED - Brew(world, world.goal).water
            yield from expert.pour(arm, part, "pot", max(0.02, missing - _KETTLE_POURS_ON))
        elif job == "serve":
            yield from expert.grasp(arm, "pot", 1)
            yield from expert.carry(arm, "pot", np.array([0.08, 0.06, 0.15]))
            yield from expert.pour(arm, "pot", "cup", 5.0)
        elif job == "put back":
            yield from expert.put(arm, part, _home(expert, part), _REST_GRASP[part] + 0.004, _HIGH_M)
        elif job == "put down":
            yield from expert.put(arm, "pot", np.array([*_POT_HOME, 0.0]), POT_HALF + 0.004)
        elif job == "uncover":
            aside = np.array([*_LID_ASIDE, 0.0]) + expert.scatter(0.01)
            yield from expert.put(arm, "lid", aside, LID.rest_height + LID.grasp_offset + 0.004, _HIGH_M)
        elif job == "cover":
            yield from _cover(expert, arm)
        else:
            yield from expert.wait(arm, lambda: _job(expert, arm)[0] != _WAIT)


_REST_GRASP = {thing.name: thing.rest_height + thing.grasp_offset for thing in (*CADDIES, KETTLE)}


def _home(expert: Expert, part: str) -> NDArray[np.float64]:
    """Where a kettle or caddy is put back."""
    if part == "kettle":
        return np.array([*_KETTLE_HOME, 0.0]) + expert.scatter(0.015)
    (other,) = [caddy.name for caddy in CADDIES if caddy.name != part]
    taken = expert.world.position(other)[:2]
    free = max(_CADDY_HOMES.tolist(), key=lambda home: float(np.hypot(*(taken - home))))
    return np.array([*free, 0.0]) + expert.scatter(0.01)


def _cover(expert: Expert, arm: str) -> Script:
    world = expert.world
    yield from expert.pick(arm, "lid", _HIGH_M)
    on = world.position("pot") + [0.0, 0.0, _ON_Z_M + LID.grasp_offset]
    yield from expert.carry(arm, "lid", on + [0.0, 0.0, 0.04], exact=True)
    yield from expert.carry(arm, "lid", on + [0.0, 0.0, 0.003], exact=True)
    if world.held(arm) == "lid":
        yield from expert.let_go(arm)


def _job(expert: Expert, arm: str) -> tuple[str, str]:
    """What an arm has to do now, and with what."""
    world = expert.world
    job = _jobs(expert, Brew(world, world.goal)).get(arm, (_WAIT, ""))
    held = world.held(arm)
    return job if held in (None, job[1]) else (_PUT_AWAY[held], held)


def _jobs(expert: Expert, brew: Brew) -> _Jobs:
    world = expert.world
    if world.done():
        return {}
    if brew.poured:
        standing = world.holder("pot") is None and world.lean("pot") < 0.2
        return {"left": ("cover" if standing and _is_clear(expert, "right") else "fetch", "lid")}
    if lid_is_on(world) or world.holder("lid") is not None:
        return {"left": ("uncover", "lid"), "right": ("fetch", "kettle")}
    if not brew.has_tea:
        jobs: _Jobs = {"right": ("fetch", "kettle")}
        if _is_clear(expert, "right"):
            jobs["left"] = ("pour tea", world.goal.item)
        else:
            jobs["left"] = ("fetch", world.goal.item)
        return jobs
    if not brew.brewed:
        return {"right": ("pour water" if _is_clear(expert, "left") else "fetch", "kettle")}
    return {"right": ("serve", "pot")}


def _is_clear(expert: Expert, arm: str) -> bool:
    """Whether an arm is not over the pot."""
    offset = expert.world.tool(arm) - expert.world.position("pot")
    return bool(np.hypot(offset[0], offset[1]) > _CLEAR_M)


TEA = Task(
    name="tea",
    summary="Brew the named tea: lid off, tea in, water in, pour it into the cup, lid on.",
    time_limit_s=30.0,
    sub_steps=("lid off", "tea in the pot", "water in the pot", "tea in the cup", "lid on"),
    goals=tuple(Goal(caddy.name, "cup") for caddy in CADDIES),
    parts=Parts((*CADDIES, KETTLE, POT, LID), (CUP,)),
    keypoints=(
        "green_tea",
        "black_tea",
        "kettle",
        "pot",
        liquid_name("pot"),
        "lid",
        "cup",
        liquid_name("cup"),
    ),
    wordings={
        "train": (
            "brew {item}",
            "make a cup of {item}",
            "please prepare some {item}",
            "put {item} in the pot, add water and pour it into the cup",
            "take the lid off, add the {item} and hot water, fill the cup",
            "i would like a cup of {item}",
            "serve {item} in the cup",
            "brew the {item} with water from the kettle and put the lid back",
            "fill the cup with freshly brewed {item}",
            "{item} with hot water, then into the cup, please",
        ),
        "heldout": (
            "could you make me some {item}",
            "a cup of {item}, please",
            "open the pot, {item} and water in, pour a cup",
            "prepare the {item} and serve a cup of it",
            "let us have {item} from the pot",
        ),
    },
    layout=_layout,
    progress=TeaProgress,
    scripts=_scripts,
)
