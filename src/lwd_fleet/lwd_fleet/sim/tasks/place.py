# SPDX-License-Identifier: Apache-2.0
"""`place`: one item of three into the tray on the side that the instruction names, with the arm of that side."""

from __future__ import annotations

import numpy as np

from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.parts import GROCERIES, Parts, open_box
from lwd_fleet.sim.tasks.task import AT_REST_M_S, LIFTED_M, Goal, Layout, SceneView, Task, scatter

TRAY_INNER = (0.065, 0.075)  # half extents, m
TRAY_WALL_HEIGHT = 0.022
_REST_HEIGHT = {thing.name: thing.rest_height for thing in GROCERIES}


class PlaceProgress:
    """Sub-steps: the item was lifted by an arm; it lies in the named tray, released and at rest."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._lifted = False
        self._in_tray = False

    def update(self, scene: SceneView) -> None:
        item, tray = self._goal.item, scene.position(self._goal.place)
        position, held = scene.position(item), scene.holder(item) is not None
        self._lifted |= held and bool(position[2] > _REST_HEIGHT[item] + LIFTED_M)
        inside = bool(
            (np.abs(position[:2] - tray[:2]) < TRAY_INNER).all() and position[2] < 2.5 * TRAY_WALL_HEIGHT
        )
        self._in_tray = inside and not held and scene.speed(item) < AT_REST_M_S

    @property
    def scores(self) -> tuple[float, ...]:
        return float(self._lifted), float(self._in_tray)

    @property
    def done(self) -> bool:
        return self._in_tray


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    jitter = rng.uniform(-0.012, 0.012, (2, 2))
    trays = {
        "left_tray": (-0.30 + jitter[0, 0], 0.04 + jitter[0, 1]),
        "right_tray": (0.30 + jitter[1, 0], 0.04 + jitter[1, 1]),
    }
    half = (0.13 * placement_range, 0.09 * placement_range)
    return Layout(scatter(rng, GROCERIES, (0.0, 0.05), half, scale), trays)


def _scripts(expert: Expert) -> dict[str, Script]:
    goal = expert.world.goal
    tray = expert.world.position(goal.place) + expert.scatter(0.022)
    other = "right" if goal.side == "left" else "left"
    return {goal.side: expert.deliver(goal.side, goal.item, tray, 0.05), other: expert.rest(other)}


PLACE = Task(
    name="place",
    summary="Put the named item into the tray on the named side.",
    time_limit_s=7.0,
    sub_steps=("item lifted", "item in the tray"),
    goals=tuple(Goal(item.name, f"{side}_tray", side) for item in GROCERIES for side in ("left", "right")),
    parts=Parts(
        GROCERIES,
        tuple(open_box(f"{side}_tray", *TRAY_INNER, TRAY_WALL_HEIGHT, "slate") for side in ("left", "right")),
    ),
    keypoints=(*(item.name for item in GROCERIES), "left_tray", "right_tray"),
    wordings={
        "train": (
            "put the {item} into the {side} tray",
            "place the {item} in the {side} tray",
            "move the {item} to the tray on the {side}",
            "pick up the {item} and put it in the {side} tray",
            "take the {item} and drop it into the tray on the {side}",
            "the {item} goes into the {side} tray",
            "grab the {item}, then set it down in the {side} tray",
            "into the {side} tray, please put the {item}",
            "bring the {item} over to the {side} tray",
            "please sort the {item} into the {side} tray",
        ),
        "heldout": (
            "in the tray on the {side}, place the {item}",
            "could you move the {item} into the {side} tray",
            "the {side} tray needs the {item}",
            "pick the {item} and drop it in the {side} tray",
            "take the {item} to the {side} tray",
        ),
    },
    layout=_layout,
    progress=PlaceProgress,
    scripts=_scripts,
)
