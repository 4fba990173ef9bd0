# SPDX-License-Identifier: Apache-2.0
"""`freezer`: the left arm slides the lid of the chest open, the right arm puts the named item in, the left arm
slides the lid shut."""

from __future__ import annotations

import numpy as np

from lwd_fleet.sim.experts import CLEARANCE_M, OPEN_M, Expert, Script, Wish, over
from lwd_fleet.sim.parts import GROCERIES, WALL, Fixture, Panel, Parts, open_box
from lwd_fleet.sim.robot import Shape
from lwd_fleet.sim.tasks.task import Goal, Layout, SceneView, Task, lies_in, scatter

CHEST_INNER = (0.072, 0.056)  # half extents, m
CHEST_HEIGHT = 0.064
OPEN_ENOUGH, SHUT = 0.75, 0.12  # of the lid's way: it covers the chest from here on, as it is wider
_RELEASE_M = 0.035
_LID_THICKNESS = 0.006
_KNOB_HEIGHT = 0.034
_OVERHANG = 0.008  # half of what the lid is wider than the chest, on the right
_LID = Panel(
    "lid",
    (
        Shape(
            "box",
            (CHEST_INNER[0] + WALL + _OVERHANG, CHEST_INNER[1] + WALL, _LID_THICKNESS / 2),
            (_OVERHANG, 0, 0),
            colour="teal",
        ),
        Shape(
            "box",
            (0.008, 0.022, _KNOB_HEIGHT / 2),
            (0, 0, (_LID_THICKNESS + _KNOB_HEIGHT) / 2),
            colour="plum",
        ),
    ),
    joint="slide",
    origin=(0.0, 0.0, CHEST_HEIGHT + 0.001 + _LID_THICKNESS / 2),
    axis=(-1.0, 0.0, 0.0),
    closed=0.0,
    open=0.170,
    handle=(0.0, 0.0, 0.5 * (_LID_THICKNESS + _KNOB_HEIGHT)),
    grip=0.018,
    friction=1.0,
)
CHEST = Fixture("chest", open_box("chest", *CHEST_INNER, CHEST_HEIGHT, "white").shapes, (_LID,))


class FreezerProgress:
    """Sub-steps in order: the lid was slid open; the named item lies in the chest, released; the lid is shut, released."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._opened = False
        self._inside = False
        self._done = False

    def update(self, scene: SceneView) -> None:
        self._inside = in_chest(scene, self._goal.item)
        self._opened |= scene.opening("lid") > OPEN_ENOUGH or self._inside
        self._done = self._inside and scene.opening("lid") < SHUT and scene.holder("lid") is None

    @property
    def scores(self) -> tuple[float, ...]:
        return float(self._opened), float(self._inside), float(self._done)

    @property
    def done(self) -> bool:
        return self._done


def in_chest(scene: SceneView, item: str) -> bool:
    """Whether the item lies in the chest, released."""
    return lies_in(scene, item, "chest", CHEST_INNER, CHEST_HEIGHT)


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    x, y = rng.uniform([-0.025, 0.10], [0.025, 0.14])
    half = (0.075 * placement_range, 0.085 * placement_range)
    things = scatter(rng, GROCERIES, (0.235, 0.0), half, scale, avoid=((x, y),), margin=0.135)
    return Layout(things, {"chest": (float(x), float(y))})


def _scripts(expert: Expert) -> dict[str, Script]:
    return {"left": _slide_lid(expert), "right": _fill_chest(expert)}


def _slide_lid(expert: Expert) -> Script:
    world, arm, item = expert.world, "left", expert.world.goal.item

    def aim() -> str:
        if in_chest(world, item):
            return "open" if _right_arm_inside(expert) else "shut"
        return "open" if expert.can_take("right", item) or not expert.can_take(arm, item) else "bring"

    while True:
        yield from expert.wait(arm, lambda: not world.done())
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


def _right_arm_inside(expert: Expert) -> bool:
    """Whether the right tool is where the lid would slide."""
    clear = expert.world.tool("right") - expert.world.position("chest")
    return bool((np.abs(clear[:2]) < (0.10, 0.09)).all() and clear[2] < 0.13)


def _fill_chest(expert: Expert) -> Script:
    world, arm, item = expert.world, "right", expert.world.goal.item

    def mine() -> bool:
        return not in_chest(world, item) and expert.can_take(arm, item)

    while True:
        yield from expert.wait(arm, mine)
        while mine() and world.opening("lid") < OPEN_ENOUGH:
            if world.held(arm) == item:
                yield from expert.hold(arm, lambda: world.opening("lid") >= OPEN_ENOUGH)
            else:
                yield Wish(over(world.grasp_point(item), 2 * CLEARANCE_M), OPEN_M)
        if mine():
            chest = world.position("chest") + [0.018, 0.0, 0.0] + expert.scatter(0.006)
            yield from expert.put(arm, item, chest, _RELEASE_M)


FREEZER = Task(
    name="freezer",
    summary="Slide the freezer's lid open with one arm, put the named item in with the other, shut the lid.",
    time_limit_s=11.0,
    sub_steps=("lid open", "item in the chest", "lid shut"),
    goals=tuple(Goal(item.name, "chest") for item in GROCERIES),
    parts=Parts(GROCERIES, (CHEST,)),
    keypoints=(*(item.name for item in GROCERIES), "chest", "lid"),
    wordings={
        "train": (
            "put the {item} into the freezer",
            "freeze the {item}",
            "slide the freezer open, put the {item} in and shut it",
            "open the freezer, place the {item} inside, close it",
            "the {item} has to go into the freezer",
            "store the {item} in the freezer chest",
            "place the {item} in the freezer and slide the lid shut",
            "please keep the {item} cold in the freezer",
            "slide the lid aside, drop the {item} into the freezer, slide it back",
            "move the {item} into the freezer and close the lid",
        ),
        "heldout": (
            "the freezer needs the {item}, shut it afterwards",
            "could you put the {item} in the freezer",
            "into the freezer with the {item}",
            "open the freezer lid, add the {item}, shut the lid",
            "stock the freezer with the {item}",
        ),
    },
    layout=_layout,
    progress=FreezerProgress,
    scripts=_scripts,
)
