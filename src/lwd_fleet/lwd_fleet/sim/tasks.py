# SPDX-License-Identifier: Apache-2.0
"""The simulated tasks: where things start, what is asked, how far it got, when it is done.

`place` is short: one item of three into the tray on the side that the instruction names, with the arm of that
side. `stow` is long: the left arm lifts the lid off the box and holds it aside, the right arm puts the named
item into the box, the left arm puts the lid back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim import language
from lwd_fleet.sim.scene import (
    BOX_HEIGHT,
    BOX_INNER,
    ITEMS,
    KEYPOINT_NAMES,
    LID,
    THINGS,
    TRAY_INNER,
    TRAY_WALL_HEIGHT,
)
from lwd_fleet.sim.shift import Randomisation, Shift

__all__ = [
    "KEYPOINT_NAMES",
    "TASKS",
    "Goal",
    "Layout",
    "Progress",
    "Randomisation",
    "SceneView",
    "Shift",
    "Task",
]

_LIFTED_M = 0.03
_AT_REST_M_S = 0.05
_LID_ASIDE_M = 0.10
_LID_ON_XY_M, _LID_ON_Z_M = 0.020, 0.010


@dataclass(frozen=True)
class Goal:
    """What one episode asks for. side: "left" or "right" tray of `place`; empty for `stow`."""

    item: str
    side: str = ""


@dataclass(frozen=True)
class Layout:
    """Where everything starts, in base_link. Things stand upright, turned by yaw."""

    things: dict[str, tuple[float, float, float, float]]  # name: x, y, z of the centre [m], yaw [rad]
    furniture: dict[str, tuple[float, float]]  # name: x, y [m]


class SceneView(Protocol):
    """What a judge may look at: the true state."""

    def position(self, name: str) -> NDArray[np.float64]: ...
    def speed(self, name: str) -> float: ...
    def holder(self, name: str) -> str | None: ...


class Progress(Protocol):
    """Judges one episode. `update` is called after every output tick."""

    def update(self, scene: SceneView) -> None: ...
    @property
    def scores(self) -> tuple[float, ...]: ...
    @property
    def done(self) -> bool: ...


@dataclass(frozen=True)
class Task:
    """One kind of episode."""

    name: str
    time_limit_s: float
    sub_steps: tuple[str, ...]  # what the entries of `Progress.scores` mean
    goals: tuple[Goal, ...]
    layout: Callable[[np.random.Generator, float, float], Layout]  # (rng, placement range, item scale)
    progress: Callable[[Goal], Progress]

    def instructions(self, split: str = "train", goal: Goal | None = None) -> tuple[str, ...]:
        """All wordings of a goal (of every goal). split: "train" or "heldout"."""
        goals = self.goals if goal is None else (goal,)
        return tuple(text for g in goals for text in language.instructions(self.name, g.item, g.side, split))


# place -----------------------------------------------------------------------------------------------


class PlaceProgress:
    """Sub-steps: the item was lifted by an arm; it lies in the named tray, released and at rest."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._lifted = False
        self._in_tray = False

    def update(self, scene: SceneView) -> None:
        item, tray = self._goal.item, scene.position(f"{self._goal.side}_tray")
        position, held = scene.position(item), scene.holder(item) is not None
        self._lifted |= held and bool(position[2] > THINGS[item].rest_height + _LIFTED_M)
        inside = bool(
            (np.abs(position[:2] - tray[:2]) < TRAY_INNER).all() and position[2] < 2.5 * TRAY_WALL_HEIGHT
        )
        self._in_tray = inside and not held and scene.speed(item) < _AT_REST_M_S

    @property
    def scores(self) -> tuple[float, ...]:
        return float(self._lifted), float(self._in_tray)

    @property
    def done(self) -> bool:
        return self._in_tray


def _place_layout(rng: np.random.Generator, placement_range: float, scale: float) -> Layout:
    jitter = rng.uniform(-0.012, 0.012, (2, 2))
    trays = {
        "left_tray": (-0.30 + jitter[0, 0], 0.04 + jitter[0, 1]),
        "right_tray": (0.30 + jitter[1, 0], 0.04 + jitter[1, 1]),
    }
    half = np.array([0.13, 0.09]) * placement_range
    return Layout(_scatter(rng, np.array([0.0, 0.05]), half, scale, avoid=()), trays)


# stow ------------------------------------------------------------------------------------------------


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
            inside and scene.holder(self._goal.item) is None and scene.speed(self._goal.item) < _AT_REST_M_S
        )
        on = (
            apart < _LID_ON_XY_M
            and abs(float(lid[2]) - BOX_HEIGHT - LID.rest_height) < _LID_ON_Z_M
            and scene.holder("lid") is None
            and scene.speed("lid") < _AT_REST_M_S
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


def _stow_layout(rng: np.random.Generator, placement_range: float, scale: float) -> Layout:
    x, y = rng.uniform([-0.025, 0.105], [0.025, 0.145])
    half = np.array([0.075, 0.075]) * placement_range
    things = _scatter(rng, np.array([0.22, 0.0]), half, scale, avoid=((x, y),))
    things["lid"] = (float(x), float(y), BOX_HEIGHT + LID.rest_height, 0.0)
    return Layout(things, {"box": (float(x), float(y))})


def _scatter(
    rng: np.random.Generator,
    centre: NDArray[np.float64],
    half: NDArray[np.float64],
    scale: float,
    avoid: tuple[tuple[float, float], ...],
) -> dict[str, tuple[float, float, float, float]]:
    """Items at random in a zone, apart from each other and from `avoid`. A zone too small for that grows."""
    spacing, margin = 0.08 * max(1.0, scale), 0.115
    for attempt in itertools.count():
        points = centre + rng.uniform(-1, 1, (len(ITEMS), 2)) * half
        pairs = [np.hypot(*(points[i] - points[j])) for i in range(len(ITEMS)) for j in range(i)]
        clear = [np.hypot(*(point - np.array(place))) for point in points for place in avoid]
        if min(pairs) >= spacing and all(distance >= margin for distance in clear):
            break
        if attempt > 100:
            half = half * 1.01
    yaws = rng.uniform(-0.4, 0.4, len(ITEMS))
    return {
        name: (float(point[0]), float(point[1]), THINGS[name].rest_height * scale, float(yaw))
        for name, point, yaw in zip(ITEMS, points, yaws, strict=True)
    }


TASKS = {
    "place": Task(
        name="place",
        time_limit_s=6.0,
        sub_steps=("item lifted", "item in the tray"),
        goals=tuple(Goal(item, side) for item in ITEMS for side in ("left", "right")),
        layout=_place_layout,
        progress=PlaceProgress,
    ),
    "stow": Task(
        name="stow",
        time_limit_s=12.0,
        sub_steps=("lid off", "item in the box", "lid on"),
        goals=tuple(Goal(item) for item in ITEMS),
        layout=_stow_layout,
        progress=StowProgress,
    ),
}
