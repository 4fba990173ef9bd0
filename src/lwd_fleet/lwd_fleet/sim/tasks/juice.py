# SPDX-License-Identifier: Apache-2.0
"""`juice`: the press opened, the named fruit in, the glass under its spout, the lid pressed down until the glass is full,
the lid up again and the fruit out; the arm on the named side serves the glass on its shelf."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.experts import CLEARANCE_M, OPEN_M, Expert, Script, Wish, over
from lwd_fleet.sim.parts import SHELF_HEIGHT_M, SHELVES, WALL, Fixture, Panel, Parts, Spot, Thing, Vessel
from lwd_fleet.sim.robot import ARMS, Shape
from lwd_fleet.sim.scene import TICK_S, liquid_name
from lwd_fleet.sim.tasks.task import AT_REST_M_S, Goal, Layout, Scene, SceneView, Task

JUICE_PER_S = 0.4  # portions, while the lid is pressed down on a fruit
JUICE_ENOUGH = 0.7  # portions of the named fruit's juice in the glass
PURE = 0.85  # its share of what is in the glass
SPILL_FLAW = 0.1  # portions
LID_UP, LID_DOWN = 0.9, 0.06
FRUIT_OUT_M = 0.09

PRESS_HALF, PRESS_HEIGHT = 0.042, 0.064  # of its block, m; the bowl is on it
_BOWL_INNER, _BOWL_RIM = 0.030, 0.012
_HINGE = (0.0, PRESS_HALF, PRESS_HEIGHT + 0.050)
_HANDLE_Y, _HANDLE_Z = -0.066, 0.022  # from the hinge, lid down
SPOUT = np.array([0.0, -0.092, 0.072])  # from where the juice falls, from the press's foot
_UNDER_SPOUT_M = 0.026
_STANDS_RAD = 0.2
_BAY_M = 0.03  # from the middle of a shelf

_GLASS_MOUTH = 0.029  # it widens at the top: what is put under the spout need not be put exactly there

FRUIT_RADIUS, FRUIT_HALF = 0.019, 0.016
GLASS_HALF, GLASS_RADIUS, GLASS_REST = 0.026, 0.023, 0.013  # heavy below: its centre of mass is low


def _fruit(name: str) -> Thing:
    """As thick as it is wide, so that the lid closes over it however it lies."""
    return Thing(
        name,
        (
            Shape("cylinder", (FRUIT_RADIUS, FRUIT_HALF), colour=name),
            Shape("cylinder", (0.5 * FRUIT_RADIUS, 0.001), (0, 0, FRUIT_HALF), colour="white"),
        ),
        0.06,
        rest_height=FRUIT_HALF,
        grasp_offset=0.004,
        grip=0.018,
        scalable=True,
    )


FRUITS = (_fruit("orange"), _fruit("lime"))
FRUIT_NAMES = tuple(fruit.name for fruit in FRUITS)
GLASS = Thing(
    "glass",
    (
        Shape("cylinder", (GLASS_RADIUS, GLASS_HALF), (0, 0, GLASS_HALF - GLASS_REST), colour="clear"),
        Shape("cylinder", (GLASS_RADIUS, 0.003), (0, 0, 0.003 - GLASS_REST), colour="steel"),
        Shape("cylinder", (_GLASS_MOUTH, 0.003), (0, 0, 2 * GLASS_HALF - GLASS_REST - 0.003), colour="clear"),
    ),
    0.12,
    rest_height=GLASS_REST,
    grasp_offset=0.024,
    grip=0.021,
    vessel=Vessel(
        0.007 - GLASS_REST, 2 * GLASS_HALF - GLASS_REST, _GLASS_MOUTH, _GLASS_MOUTH, 1.4, colour="orange"
    ),
)
_LID = Panel(
    "lid",
    (
        Shape("box", (0.036, 0.038, 0.003), (0, -PRESS_HALF, 0), colour="slate"),
        Shape("box", (0.010, 0.008, 0.015), (0, _HANDLE_Y, 0.018), colour="pink"),
    ),
    joint="hinge",
    origin=_HINGE,
    axis=(-1.0, 0.0, 0.0),
    closed=0.0,
    open=1.4,
    handle=(0.0, _HANDLE_Y, _HANDLE_Z),
    grip=0.008,
)


def _press() -> Fixture:
    """A block with a bowl on it, a spout in front and a lid that stays where it is put."""
    middle, half, rim = _BOWL_INNER + WALL / 2, WALL / 2, _BOWL_RIM / 2
    bowl = [
        shape
        for sign in (-1, 1)
        for shape in (
            Shape(
                "box", (half, _BOWL_INNER + WALL, rim), (sign * middle, 0, PRESS_HEIGHT + rim), colour="white"
            ),
            Shape("box", (_BOWL_INNER, half, rim), (0, sign * middle, PRESS_HEIGHT + rim), colour="white"),
        )
    ]
    return Fixture(
        "press",
        (
            Shape(
                "box", (PRESS_HALF, PRESS_HALF, PRESS_HEIGHT / 2), (0, 0, PRESS_HEIGHT / 2), colour="steel"
            ),
            *bowl,
            Shape(
                "box", (0.008, 0.003, 0.004), (0, -PRESS_HALF - 0.003, PRESS_HEIGHT - 0.005), colour="white"
            ),
        ),
        (_LID,),
        spots=(
            Spot("bowl", (0.0, 0.0, PRESS_HEIGHT + FRUIT_HALF)),
            Spot("spout", (0.0, float(SPOUT[1]), GLASS.rest_height + GLASS.grasp_offset)),
        ),
    )


PRESS = _press()


def opposite(side: str) -> str:
    """The other arm."""
    return "right" if side == "left" else "left"


def other_fruit(goal: Goal) -> str:
    """The one that is not asked for."""
    return next(fruit for fruit in FRUIT_NAMES if fruit != goal.item)


def is_in_the_press(scene: SceneView, fruit: str) -> bool:
    """Whether a fruit is in the bowl, released."""
    offset = scene.position(fruit) - scene.position("press")
    low = PRESS_HEIGHT < offset[2] < PRESS_HEIGHT + 2 * FRUIT_HALF
    return bool((np.abs(offset[:2]) < _BOWL_INNER).all() and low) and scene.holder(fruit) is None


def is_under_the_spout(scene: SceneView) -> bool:
    """Whether the glass stands where the juice falls, released."""
    offset = scene.position("glass") - scene.position("press") - SPOUT
    near = np.hypot(offset[0], offset[1]) < _UNDER_SPOUT_M
    low = scene.position("glass")[2] < GLASS_REST + 0.01
    return bool(near and low) and scene.holder("glass") is None and scene.lean("glass") < _STANDS_RAD


def is_served(scene: SceneView, shelf: str) -> bool:
    """Whether the glass stands on a shelf, released; it may still be settling."""
    offset = scene.position("glass") - scene.position(shelf)
    inside = (np.abs(offset[:2]) < _BAY_M).all() and abs(offset[2] - SHELF_HEIGHT_M - GLASS_REST) < 0.01
    return bool(inside) and scene.holder("glass") is None and scene.lean("glass") < _STANDS_RAD


def has_juice(scene: SceneView, fruit: str) -> bool:
    """Whether enough juice of a fruit is in the glass, and hardly any other."""
    glass = scene.content("glass")
    named = glass.get(fruit, 0.0)
    return named >= JUICE_ENOUGH and named >= PURE * sum(glass.values())


def press(scene: Scene) -> None:
    """While the lid is held down on a fruit, its juice falls from the spout."""
    if scene.holder("lid") is None or scene.opening("lid") > LID_DOWN:
        return
    for fruit in FRUIT_NAMES:
        if is_in_the_press(scene, fruit):
            scene.fall(scene.position("press") + SPOUT, fruit, JUICE_PER_S * TICK_S)


class JuiceProgress:
    """Sub-steps: the lid was opened; the named fruit was put into the press, alone; the glass was put under the spout; the glass has enough
    juice of it and hardly any other; the lid is up again; the fruit is out of the press; the glass stands on the named
    shelf, with the juice.

    The first three stay counted, the others count as they are now, after the juice was made. Half a score: the fruit or
    the glass had to be taken more than once until then (fruit in, glass), more than 0.1 portions were spilled until
    there was enough juice (juice) or until it was served (served).
    """

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._takings = {goal.item: 0, "glass": 0}
        self._held = dict.fromkeys(self._takings, False)
        self._first = {"fruit": 0.0, "glass": 0.0, "juice": 0.0, "served": 0.0}
        self._opened = False
        self._scores = (0.0,) * 7

    def update(self, scene: SceneView) -> None:
        for thing in self._takings:
            held = scene.holder(thing) is not None
            self._takings[thing] += held and not self._held[thing]
            self._held[thing] = held
        named, other = self._goal.item, other_fruit(self._goal)
        cleanly = _neatly(scene.spilled <= SPILL_FLAW)
        inside = is_in_the_press(scene, named)
        juice = has_juice(scene, named)
        made = self._first["juice"] > 0.0 or juice
        served = is_served(scene, self._goal.place) and scene.speed("glass") < AT_REST_M_S
        self._reach("fruit", inside and not is_in_the_press(scene, other), _neatly(self._takings[named] <= 1))
        self._reach("glass", is_under_the_spout(scene), _neatly(self._takings["glass"] <= 1))
        self._reach("juice", juice, cleanly)
        self._reach("served", juice and served, cleanly)
        away = np.linalg.norm(scene.position(named)[:2] - scene.position("press")[:2]) > FRUIT_OUT_M
        out = bool(away) and scene.holder(named) is None
        up = scene.opening("lid") > LID_UP
        self._opened |= up
        self._scores = (
            float(self._opened),
            self._first["fruit"],
            self._first["glass"],
            juice * self._first["juice"],
            float(made and up and scene.holder("lid") is None),
            float(made and out),
            (juice and served) * self._first["served"],
        )

    def _reach(self, what: str, reached: bool, score: float) -> None:
        if reached and not self._first[what]:
            self._first[what] = score

    @property
    def scores(self) -> tuple[float, ...]:
        return self._scores

    @property
    def done(self) -> bool:
        return all(self._scores)


def _neatly(neat: bool) -> float:
    return 1.0 if neat else 0.5


_PRESS_HOME, _GLASS_START = (0.0, 0.14), (0.0, -0.06)
_FRUIT_HOME, _SHELF_HOME = (0.21, -0.03), (0.29, 0.12)


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    sides = rng.permutation([-1.0, 1.0])
    spread = rng.uniform(-1, 1, (3, 2)) * ((0.045, 0.05), (0.045, 0.05), (0.06, 0.025)) * placement_range
    jitter = rng.uniform(-1, 1, (3, 2)) * ((0.015, 0.012), (0.012, 0.02), (0.012, 0.02))
    turned = rng.uniform(-0.4, 0.4, 2)
    things = {
        fruit.name: (
            float(side * _FRUIT_HOME[0] + shift[0]),
            float(_FRUIT_HOME[1] + shift[1]),
            fruit.rest_height * scale,
            float(yaw),
        )
        for fruit, side, shift, yaw in zip(FRUITS, sides, spread, turned, strict=False)
    }
    x, y = spread[2] + _GLASS_START
    things["glass"] = (float(x), float(y), GLASS.rest_height, 0.0)
    homes = np.array([_PRESS_HOME, (-_SHELF_HOME[0], _SHELF_HOME[1]), _SHELF_HOME]) + jitter
    fixtures = {
        name: (float(x), float(y))
        for name, (x, y) in zip(("press", "left_shelf", "right_shelf"), homes, strict=True)
    }
    return Layout(things, fixtures)


# The script ------------------------------------------------------------------------------------------

_JUICE_WANTED = 0.9  # portions
_STOPS = 0.3  # opening of the lid at which no more juice is to come
_PUT_IN_HEIGHT_M = PRESS_HEIGHT + FRUIT_HALF + 0.012  # of a fruit's grasp point when it is let go
_CARRY_M = 0.15
_WAIT = "wait"
_PUT_AWAY = {"lid": "open", "glass": "put down"}
_Jobs = dict[str, tuple[str, str]]


def _scripts(expert: Expert) -> dict[str, Script]:
    return {arm: _make(expert, arm) for arm in ARMS}


def _make(expert: Expert, arm: str) -> Script:
    """Do what is this arm's to do now, again and again."""
    world = expert.world
    while True:
        job, part = _job(expert, arm)

        def changed(now: tuple[str, str] = (job, part)) -> bool:
            return _job(expert, arm) != now

        if job == "fetch":
            yield from expert.pick(arm, part)
            yield from expert.hold(arm, changed)
        elif job == "put in":
            inside = world.position("press") + expert.scatter(0.003)
            yield from expert.put(arm, part, inside, _PUT_IN_HEIGHT_M, _CARRY_M)
        elif job == "put aside":
            yield from expert.put(arm, part, _aside(expert, arm, part), 0.03)
        elif job == "place":
            under = world.position("press") + SPOUT + expert.scatter(0.003)
            yield from expert.put(arm, part, under, _glass_height(0.0))
        elif job == "serve":
            shelf = world.position(world.goal.place) + expert.scatter(0.003)
            yield from expert.put(arm, part, shelf, _glass_height(SHELF_HEIGHT_M))
        elif job == "put down":
            here = world.tool(arm) * [1.0, 0.0, 0.0] + [0.0, _GLASS_START[1], 0.0]
            yield from expert.put(arm, part, here.clip(-0.1, 0.1), _glass_height(0.0))
        elif job == "press":
            yield from expert.lead(arm, part, 0.0)
            yield from expert.hold(arm, changed)
        elif job == "open":
            yield from expert.lead(arm, part, 1.0)
            yield from expert.let_go(arm)
        elif job == "be ready":
            yield Wish(over(world.grasp_point(part), CLEARANCE_M), OPEN_M)
        else:
            yield from expert.wait(arm, changed)


def _glass_height(floor: float) -> float:
    return floor + GLASS.rest_height + GLASS.grasp_offset + 0.004


def _aside(expert: Expert, arm: str, fruit: str) -> NDArray[np.float64]:
    """Where an arm puts a fruit that is not to be in the press: on its side, not onto the other fruit."""
    x = _FRUIT_HOME[0] if arm == "right" else -_FRUIT_HOME[0]
    (other,) = [expert.world.position(name)[:2] for name in FRUIT_NAMES if name != fruit]
    places = np.array([[x, -0.03, 0.0], [x, -0.11, 0.0]])
    place: NDArray[np.float64] = max(places, key=lambda each: float(np.hypot(*(other - each[:2]))))
    return place + expert.scatter(0.01)


def _job(expert: Expert, arm: str) -> tuple[str, str]:
    """What an arm has to do now, and with what."""
    world = expert.world
    if world.done():
        jobs: _Jobs = {}
    elif has_juice(world, world.goal.item) and (_is_full(world) or world.opening("lid") > _STOPS):
        jobs = _finish(expert)
    else:
        jobs = _squeeze(expert)
    job = jobs.get(arm, (_WAIT, ""))
    held = world.held(arm)
    return job if held in (None, job[1]) else (_PUT_AWAY.get(held, "put aside"), held)


def _squeeze(expert: Expert) -> _Jobs:
    """While there is too little juice. The arm that does not serve presses; the fruit is its who is nearest."""
    world = expert.world
    named, other = world.goal.item, other_fruit(world.goal)
    server, presser = world.goal.side, opposite(world.goal.side)
    up, ready = world.opening("lid") > LID_UP, is_under_the_spout(world)
    if is_in_the_press(world, other):
        return {presser: ("put aside", other) if up else ("open", "lid")}
    if is_in_the_press(world, named):
        if not ready:
            mover = world.holder("glass") or _nearest(expert, "glass")
            return {
                opposite(mover): ("be ready", "lid") if up else ("open", "lid"),
                mover: ("place", "glass"),
            }
        return {presser: ("press", "lid"), server: ("be ready", "glass")}
    picker = world.holder(named) or ("left" if world.position(named)[0] < 0 else "right")
    jobs: _Jobs = {} if up else {opposite(picker): ("open", "lid")}
    jobs[picker] = ("put in" if up else "fetch", named)
    if not ready:
        jobs.setdefault(opposite(picker), ("place", "glass"))
    return jobs


def _is_full(world: SceneView) -> bool:
    return sum(world.content("glass").values()) >= _JUICE_WANTED


def _nearest(expert: Expert, thing: str) -> str:
    """The arm whose tool is nearest to a thing."""
    place = expert.world.position(thing)
    return min(ARMS, key=lambda arm: float(np.linalg.norm(expert.world.tool(arm) - place)))


def _finish(expert: Expert) -> _Jobs:
    """Once there is enough juice: the lid up, the fruit out, and the glass to its shelf."""
    world = expert.world
    server, presser = world.goal.side, opposite(world.goal.side)
    jobs: _Jobs = {}
    if world.opening("lid") <= LID_UP:
        jobs[presser] = ("open", "lid")
    else:
        for fruit in FRUIT_NAMES:
            if is_in_the_press(world, fruit):
                jobs[presser] = ("put aside", fruit)
    if not is_served(world, world.goal.place):
        jobs[server] = ("serve" if world.opening("lid") > _STOPS else "be ready", "glass")
    return jobs


JUICE = Task(
    name="juice",
    summary="Press the named fruit into the glass, empty the press, serve the glass on the shelf on the named side.",
    time_limit_s=24.0,
    sub_steps=(
        "press open",
        "named fruit in the press",
        "glass under the spout",
        "juice in the glass",
        "lid up again",
        "fruit out of the press",
        "glass on the named shelf",
    ),
    goals=tuple(Goal(fruit, f"{side}_shelf", side) for fruit in FRUIT_NAMES for side in ("left", "right")),
    parts=Parts((*FRUITS, GLASS), (PRESS, *SHELVES)),
    keypoints=(
        *FRUIT_NAMES,
        "left_shelf",
        "right_shelf",
        "lid",
        "bowl",
        "spout",
        "glass",
        liquid_name("glass"),
    ),
    wordings={
        "train": (
            "make {item} juice and serve it on the {side} shelf",
            "press the {item} and put the glass on the {side} shelf",
            "squeeze the {item} into the glass, then set it on the shelf on the {side}",
            "{item} juice for the {side} shelf, please",
            "put the {item} into the press, fill the glass, bring it to the {side} shelf",
            "a glass of {item} juice goes on the {side} shelf",
            "juice the {item}, empty the press and serve the glass on the {side}",
            "please serve fresh {item} juice on the {side}",
            "the guest on the {side} wants {item} juice",
            "press some {item} juice and take it to the {side} shelf",
            "fill the glass with {item} juice and stand it on the {side} shelf",
        ),
        "heldout": (
            "could you make some {item} juice for the {side} shelf",
            "on the {side} shelf, a glass of freshly pressed {item}",
            "use the press on the {item} and serve the juice on the {side}",
            "bring a glass of {item} juice to the shelf on the {side}",
            "i would like {item} juice, served on the {side} shelf",
        ),
    },
    layout=_layout,
    progress=JuiceProgress,
    scripts=_scripts,
    mechanism=press,
)
