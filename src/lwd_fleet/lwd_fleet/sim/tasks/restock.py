# SPDX-License-Identifier: Apache-2.0
"""`restock`: the named item onto the raised shelf on the named side, with the arm of that side.

The items lie about in the middle, so that the one asked for is often nearer to the other arm.
"""

from __future__ import annotations

import numpy as np

from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.parts import GROCERIES, SHELF_BAY_M, SHELF_HEIGHT_M, SHELVES, Parts
from lwd_fleet.sim.tasks.task import LIFTED_M, Goal, Layout, SceneView, Task, lies_in, scatter

ON_SHELF_BELOW_M = SHELF_HEIGHT_M + 0.045  # centre of what lies on it, over the shelf's foot
_RELEASE_M = SHELF_HEIGHT_M + 0.036
_REST_HEIGHT = {thing.name: thing.rest_height for thing in GROCERIES}


class RestockProgress:
    """Sub-steps: the item was lifted by an arm; it lies in the bay of the named shelf, released and at rest."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._lifted = False
        self._on_shelf = False

    def update(self, scene: SceneView) -> None:
        item = self._goal.item
        high = bool(scene.position(item)[2] > _REST_HEIGHT[item] + LIFTED_M)
        self._lifted |= high and scene.holder(item) is not None
        self._on_shelf = on_shelf(scene, item, self._goal.place)

    @property
    def scores(self) -> tuple[float, ...]:
        return float(self._lifted), float(self._on_shelf)

    @property
    def done(self) -> bool:
        return self._on_shelf


def on_shelf(scene: SceneView, item: str, shelf: str) -> bool:
    """Whether the item is in the shelf's bay, released and at rest."""
    on_board = bool(scene.position(item)[2] > SHELF_HEIGHT_M)
    return on_board and lies_in(scene, item, shelf, (SHELF_BAY_M, SHELF_BAY_M), ON_SHELF_BELOW_M)


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    jitter = rng.uniform([-0.015, -0.04], [0.015, 0.04], (2, 2))
    shelves = {
        "left_shelf": (-0.295 + jitter[0, 0], 0.10 + jitter[0, 1]),
        "right_shelf": (0.295 + jitter[1, 0], 0.10 + jitter[1, 1]),
    }
    half = (0.15 * placement_range, 0.10 * placement_range)
    things = scatter(rng, GROCERIES, (0.0, 0.02), half, scale, avoid=tuple(shelves.values()), margin=0.10)
    return Layout(things, shelves)


def _scripts(expert: Expert) -> dict[str, Script]:
    goal = expert.world.goal
    other = "right" if goal.side == "left" else "left"
    return {goal.side: _restock(expert, goal.side), other: expert.help_out(other, goal.item)}


def _restock(expert: Expert, arm: str) -> Script:
    world, goal = expert.world, expert.world.goal
    while True:
        yield from expert.wait(arm, lambda: not world.done() and expert.can_take(arm, goal.item))
        bay = world.position(goal.place) + expert.scatter(0.007)
        yield from expert.put(arm, goal.item, bay, _RELEASE_M)


RESTOCK = Task(
    name="restock",
    summary="Put the named item onto the raised shelf on the named side.",
    time_limit_s=8.0,
    sub_steps=("item lifted", "item on the shelf"),
    goals=tuple(Goal(item.name, f"{side}_shelf", side) for item in GROCERIES for side in ("left", "right")),
    parts=Parts(GROCERIES, SHELVES),
    keypoints=(*(item.name for item in GROCERIES), "left_shelf", "right_shelf"),
    wordings={
        "train": (
            "restock the {side} shelf with the {item}",
            "put the {item} on the {side} shelf",
            "place the {item} on the shelf to the {side}",
            "set the {item} down on the {side} shelf",
            "the {item} belongs on the {side} shelf",
            "fill the {side} shelf with the {item}",
            "take the {item} and put it up on the {side} shelf",
            "move the {item} from the table to the {side} shelf",
            "shelve the {item} on the {side}",
            "on the {side} shelf, please put the {item}",
        ),
        "heldout": (
            "the {side} shelf is missing the {item}",
            "could you restock the {item} on the {side} shelf",
            "pick the {item} up and shelve it on the {side} side",
            "bring the {item} to the shelf on the {side}",
            "stock the {item} on the {side} shelf",
        ),
    },
    layout=_layout,
    progress=RestockProgress,
    scripts=_scripts,
)
