# SPDX-License-Identifier: Apache-2.0
"""`open_cooler`: a spring shuts the lid of the cooler. One arm holds it open while the other, on the named side, takes the
named carton out and puts it on its shelf; then the lid is let down."""

from __future__ import annotations

import numpy as np

from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.parts import SHELF_HEIGHT_M, SHELVES, WALL, Fixture, Panel, Parts, Thing, open_box
from lwd_fleet.sim.robot import Shape
from lwd_fleet.sim.tasks.restock import on_shelf
from lwd_fleet.sim.tasks.task import Goal, Layout, SceneView, Task

COOLER_INNER = (0.104, 0.054)  # half extents, m
COOLER_HEIGHT = 0.066
OPEN_ENOUGH, SHUT = 0.75, 0.08  # of the lid's way
_CARTON_HALF = (0.019, 0.019, 0.028)
_DEEP = COOLER_INNER[1] + WALL  # from the middle of the cooler to the hinge
_CARRY_M = 0.135  # of a carton's grasp point, over the walls
_RELEASE_M = SHELF_HEIGHT_M + 2 * _CARTON_HALF[2] - 0.012


def _carton(name: str, colour: str, top: str) -> Thing:
    """A block with a coloured top, to be taken near its upper end."""
    width, depth, height = _CARTON_HALF
    return Thing(
        name,
        (
            Shape("box", (width, depth, height - 0.004), (0, 0, -0.004), colour=colour),
            Shape("box", (width, 0.006, 0.004), (0, 0, height - 0.004), colour=top),
        ),
        mass=0.08,
        rest_height=height,
        grasp_offset=height - 0.014,
        grip=0.018,
    )


CARTONS = (_carton("milk_carton", "white", "blue"), _carton("juice_carton", "orange", "green"))
_LID = Panel(
    "lid",
    (
        Shape("box", (COOLER_INNER[0] + WALL, _DEEP, 0.004), (0, -_DEEP, 0), colour="pink"),
        Shape("box", (0.026, 0.014, 0.004), (0, -2 * _DEEP - 0.014, 0), colour="plum"),
    ),
    joint="hinge",
    origin=(0.0, _DEEP, COOLER_HEIGHT + 0.005),
    axis=(-1.0, 0.0, 0.0),
    closed=0.0,
    open=1.35,
    handle=(0.0, -2 * _DEEP - 0.014, 0.0),
    grip=0.006,
    spring=0.12,
    friction=0.002,
)
COOLER = Fixture("cooler", open_box("cooler", *COOLER_INNER, COOLER_HEIGHT, "steel").shapes, (_LID,))


class OpenCoolerProgress:
    """Sub-steps in order: the lid was opened; the named carton stands on the named shelf, released; the lid is down."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._opened = False
        self._out = False
        self._done = False

    def update(self, scene: SceneView) -> None:
        self._out = on_shelf(scene, self._goal.item, self._goal.place)
        self._opened |= scene.opening("lid") > OPEN_ENOUGH or self._out
        self._done = self._out and scene.opening("lid") < SHUT and scene.holder("lid") is None

    @property
    def scores(self) -> tuple[float, ...]:
        return float(self._opened), float(self._out), float(self._done)

    @property
    def done(self) -> bool:
        return self._done


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    jitter = rng.uniform([-0.015, -0.04], [0.015, 0.04], (2, 2))
    shelves = {
        "left_shelf": (-0.295 + jitter[0, 0], 0.08 + jitter[0, 1]),
        "right_shelf": (0.295 + jitter[1, 0], 0.08 + jitter[1, 1]),
    }
    x, y = np.array([0.0, 0.12]) + rng.uniform(-1, 1, 2) * [0.035, 0.025] * placement_range
    things = {}
    for carton in CARTONS:  # the named one stands on the side of its shelf: the arms do not cross
        column = 0.066 if (carton.name == goal.item) == (goal.side == "right") else -0.066
        dx, dy = rng.uniform(-1, 1, 2) * [0.012, 0.018]
        things[carton.name] = (x + column + dx, y + dy, WALL + carton.rest_height, rng.uniform(-0.15, 0.15))
    return Layout(things, {**shelves, "cooler": (float(x), float(y))})


def _scripts(expert: Expert) -> dict[str, Script]:
    taker = expert.world.goal.side
    opener = "right" if taker == "left" else "left"
    return {taker: _take_out(expert, taker), opener: _hold_lid(expert, opener, taker)}


def _hold_lid(expert: Expert, arm: str, taker: str) -> Script:
    world, item = expert.world, expert.world.goal.item

    def aim() -> str:
        if _over_cooler(expert, item):
            return "open"
        return "down" if expert.can_take(taker, item) or not expert.can_take(arm, item) else "bring"

    while True:
        yield from expert.wait(arm, lambda: not world.done() and (aim() != "down" or not _down(expert)))
        wanted = aim()
        if wanted == "bring":
            yield from expert.bring_near(arm, item)
        elif wanted == "open":
            yield from expert.lead(arm, "lid", 1.0)
            yield from expert.hold(arm, lambda: aim() != "open" or world.opening("lid") < OPEN_ENOUGH)
        else:
            yield from expert.lead(arm, "lid", 0.0)
            if world.opening("lid") < SHUT:
                yield from expert.let_go(arm)


def _down(expert: Expert) -> bool:
    """Whether the lid is down, released."""
    return expert.world.opening("lid") < SHUT and expert.world.holder("lid") is None


def _over_cooler(expert: Expert, item: str) -> bool:
    """Whether the carton is in the cooler, or over it."""
    offset = np.abs(expert.world.position(item) - expert.world.position("cooler"))
    return bool((offset[:2] < (COOLER_INNER[0] + 0.035, COOLER_INNER[1] + 0.06)).all())


def _take_out(expert: Expert, arm: str) -> Script:
    world, goal = expert.world, expert.world.goal
    while True:
        yield from expert.wait(
            arm,
            lambda: (
                not on_shelf(world, goal.item, goal.place)
                and expert.can_take(arm, goal.item)
                and (world.opening("lid") > OPEN_ENOUGH or not _over_cooler(expert, goal.item))
            ),
        )
        shelf = world.position(goal.place) + expert.scatter(0.007)
        yield from expert.put(arm, goal.item, shelf, _RELEASE_M, _CARRY_M)


OPEN_COOLER = Task(
    name="open_cooler",
    summary="Hold the cooler open with one arm, put the named carton on the named shelf with the other, let the lid down.",
    time_limit_s=10.0,
    sub_steps=("lid open", "carton on the shelf", "lid down"),
    goals=tuple(Goal(item.name, f"{side}_shelf", side) for item in CARTONS for side in ("left", "right")),
    parts=Parts(CARTONS, (*SHELVES, COOLER)),
    keypoints=(*(item.name for item in CARTONS), "left_shelf", "right_shelf", "lid"),
    wordings={
        "train": (
            "take the {item} out of the cooler and put it on the {side} shelf",
            "hold the cooler open and move the {item} to the {side} shelf",
            "get the {item} from the cooler onto the {side} shelf",
            "open the cooler, the {item} goes on the {side} shelf",
            "fetch the {item} from the cooler for the {side} shelf",
            "unload the {item} from the cooler to the {side} shelf",
            "the {side} shelf gets the {item} from the cooler",
            "lift the cooler lid, take the {item} out, put it on the shelf on the {side}",
            "please bring the {item} from the cooler to the {side} shelf",
            "out of the cooler with the {item}, onto the {side} shelf",
        ),
        "heldout": (
            "from the cooler, put the {item} on the shelf to the {side}",
            "could you get the {item} out of the cooler and onto the {side} shelf",
            "the {item} in the cooler belongs on the {side} shelf",
            "open the cooler and set the {item} on the {side} shelf",
            "take the {item} from the cooler to the shelf on the {side}",
        ),
    },
    layout=_layout,
    progress=OpenCoolerProgress,
    scripts=_scripts,
)
