# SPDX-License-Identifier: Apache-2.0
"""`stow`: the left arm lifts the lid off the box and holds it aside, the right arm puts the named item into the
box, the left arm puts the lid back."""

from __future__ import annotations

import numpy as np

from lwd_fleet.sim.experts import CARRY_HEIGHT_M, CLEARANCE_M, CLOSED_M, OPEN_M, Expert, Script, Wish, over
from lwd_fleet.sim.parts import GROCERIES, Parts, Thing, open_box
from lwd_fleet.sim.robot import Shape
from lwd_fleet.sim.tasks.task import AT_REST_M_S, Goal, Layout, SceneView, Task, scatter

BOX_INNER = 0.052  # half extent, m
BOX_HEIGHT = 0.056
LID_HALF = 0.060
LID_THICKNESS = 0.006
KNOB_HEIGHT = 0.034
LID = Thing(
    "lid",
    (
        Shape("box", (LID_HALF, LID_HALF, LID_THICKNESS / 2), colour="yellow"),
        Shape("cylinder", (0.010, KNOB_HEIGHT / 2), (0, 0, (LID_THICKNESS + KNOB_HEIGHT) / 2), colour="plum"),
    ),
    0.10,
    LID_THICKNESS / 2,
    (LID_THICKNESS + KNOB_HEIGHT) / 2,
    0.009,
    covers=True,
)
_LID_ASIDE_M = 0.10
_LID_ON_XY_M, _LID_ON_Z_M = 0.020, 0.010


class StowProgress:
    """Sub-steps in order, each counted once reached: lid off, named item in the box, lid on again."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._stage = 0
        self._done = False

    def update(self, scene: SceneView) -> None:
        box, lid, item = scene.position("box"), scene.position("lid"), scene.position(self._goal.item)
        apart = float(np.hypot(*(lid[:2] - box[:2])))
        inside = bool((np.abs(item[:2] - box[:2]) < BOX_INNER).all() and item[2] < BOX_HEIGHT)
        stowed = (
            inside and scene.holder(self._goal.item) is None and scene.speed(self._goal.item) < AT_REST_M_S
        )
        on = (
            apart < _LID_ON_XY_M
            and abs(float(lid[2]) - BOX_HEIGHT - LID.rest_height) < _LID_ON_Z_M
            and scene.holder("lid") is None
            and scene.speed("lid") < AT_REST_M_S
        )
        if self._stage == 0 and apart > _LID_ASIDE_M:
            self._stage = 1
        if self._stage == 1 and stowed:
            self._stage = 2
        self._done = self._stage >= 2 and stowed and on
        if self._done:
            self._stage = 3

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(float(self._stage > index) for index in range(3))

    @property
    def done(self) -> bool:
        return self._done


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    x, y = rng.uniform([-0.025, 0.105], [0.025, 0.145])
    half = (0.075 * placement_range, 0.075 * placement_range)
    things = scatter(rng, GROCERIES, (0.22, 0.0), half, scale, avoid=((x, y),))
    things["lid"] = (float(x), float(y), BOX_HEIGHT + LID.rest_height, 0.0)
    return Layout(things, {"box": (float(x), float(y))})


def _scripts(expert: Expert) -> dict[str, Script]:
    return {"left": _handle_lid(expert), "right": _fill_box(expert)}


def _handle_lid(expert: Expert) -> Script:
    world, arm = expert.world, "left"
    aside = np.array([-0.22, 0.04, CARRY_HEIGHT_M]) + expert.scatter(0.02)
    on = over(world.position("box"), BOX_HEIGHT + LID.rest_height + LID.grasp_offset + 0.003)
    while not world.done():
        yield from expert.pick(arm, "lid")
        yield from expert.carry(arm, "lid", aside)
        while world.held(arm) == "lid" and not _item_stowed(expert):
            yield Wish(aside, CLOSED_M)
        yield from expert.carry(arm, "lid", over(on, 0.05))
        yield from expert.carry(arm, "lid", on, exact=True)
        if world.held(arm) == "lid":
            yield from expert.let_go(arm)
    yield from expert.rest(arm)


def _fill_box(expert: Expert) -> Script:
    world, arm = expert.world, "right"
    item = world.goal.item
    while world.sub_step_scores()[0] < 1.0:  # the lid is in the way: wait over the item
        yield Wish(over(world.grasp_point(item), 2 * CLEARANCE_M), OPEN_M)
    box = world.position("box") + expert.scatter(0.006)
    yield from expert.deliver(arm, item, box, BOX_HEIGHT + 0.012)
    yield from expert.rest(arm)


def _item_stowed(expert: Expert) -> bool:
    clear = expert.world.tool("right") - expert.world.position("box")
    return expert.world.sub_step_scores()[1] >= 1.0 and bool(np.hypot(clear[0], clear[1]) > 0.12)


STOW = Task(
    name="stow",
    summary="Open the box, put the named item in, close it.",
    time_limit_s=12.0,
    sub_steps=("lid off", "item in the box", "lid on"),
    goals=tuple(Goal(item.name, "box") for item in GROCERIES),
    parts=Parts((*GROCERIES, LID), (open_box("box", BOX_INNER, BOX_INNER, BOX_HEIGHT, "wood"),)),
    keypoints=(*(item.name for item in GROCERIES), "box", "lid"),
    wordings={
        "train": (
            "put the {item} into the box and close the lid",
            "open the box, place the {item} inside and close it",
            "stow the {item} in the box",
            "take the lid off, put the {item} in the box, put the lid back on",
            "pack the {item} into the box and cover it",
            "the {item} goes into the box, with the lid on top",
            "lift the lid, drop the {item} into the box, then close it again",
            "please store the {item} in the closed box",
            "close the {item} into the box",
            "move the {item} into the box and put the lid back",
        ),
        "heldout": (
            "place the {item} in the box and put the lid on",
            "the box needs the {item}, then close the lid",
            "could you pack the {item} in the box and close it",
            "into the box with the {item}, and cover it again",
            "open the lid, stow the {item}, close the lid",
        ),
    },
    layout=_layout,
    progress=StowProgress,
    scripts=_scripts,
)
