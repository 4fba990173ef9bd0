# SPDX-License-Identifier: Apache-2.0
"""What a simulated task is: its scene, where things start, what is asked, how far it got, how it is demonstrated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.parts import Parts, Thing

if TYPE_CHECKING:
    from lwd_fleet.sim.experts import Expert, Script

Array = NDArray[np.float64]

SPLITS = ("train", "heldout")
AT_REST_M_S = 0.05
LIFTED_M = 0.03


@dataclass(frozen=True)
class Goal:
    """What one episode asks for: a thing, the place it is to go to (both names of keypoints), and words for them."""

    item: str
    place: str
    side: str = ""  # "left" or "right" where the wording says so


@dataclass(frozen=True)
class Layout:
    """Where everything starts, in base_link. Things stand upright, turned by yaw."""

    things: Mapping[str, tuple[float, float, float, float]]  # name: x, y, z of the centre [m], yaw [rad]
    fixtures: Mapping[str, tuple[float, float]]  # name: x, y [m]
    panels: Mapping[str, float] | None = (
        None  # name: opening, 0 closed to 1 open; closed where it is not named
    )


class SceneView(Protocol):
    """What judges and mechanisms may look at: the true state. Names are those of the task's parts."""

    def position(self, name: str) -> Array:
        """Centre of a thing, foot of a fixture, handle of a panel: [3] m."""
        ...

    def speed(self, name: str) -> float:
        """Of a thing's centre, m/s."""
        ...

    def holder(self, name: str) -> str | None:
        """The arm that holds a thing or a panel."""
        ...

    def held(self, arm: str) -> str | None:
        """What an arm holds."""
        ...

    def opening(self, panel: str) -> float:
        """0 closed to 1 open."""
        ...

    def lean(self, name: str) -> float:
        """Angle between a thing's axis and the vertical, rad."""
        ...

    def content(self, vessel: str) -> Mapping[str, float]:
        """Portions of each ingredient."""
        ...

    @property
    def spilled(self) -> float:
        """Portions that ended outside of any vessel."""
        ...


class Scene(SceneView, Protocol):
    """What a mechanism may change besides."""

    def add(self, vessel: str, ingredient: str, portions: float) -> None:
        """Put liquid into a vessel (take it out, if negative); what does not fit is spilled."""
        ...

    def fall(self, point: Array, ingredient: str, portions: float) -> None:
        """Let liquid fall from a point, [3] m: into the vessel below, or it is spilled."""
        ...


class Progress(Protocol):
    """Judges one episode. `update` is called after every output tick."""

    def update(self, scene: SceneView) -> None: ...
    @property
    def scores(self) -> tuple[float, ...]:
        """One per sub-step: 1 reached, 0.5 with a flaw, 0 not."""
        ...

    @property
    def done(self) -> bool:
        """Whether the whole task is fulfilled now."""
        ...


@dataclass(frozen=True)
class Task:
    """One kind of episode."""

    name: str
    summary: str  # one sentence for people
    time_limit_s: float
    sub_steps: tuple[str, ...]  # what the entries of `Progress.scores` mean
    goals: tuple[Goal, ...]
    parts: Parts
    keypoints: tuple[str, ...]  # names of parts, or "<vessel>_liquid": what a detector reports
    wordings: Mapping[str, Sequence[str]]  # split: texts with {item} and {side}
    layout: Callable[
        [np.random.Generator, Goal, float, float], Layout
    ]  # (rng, goal, placement range, item scale)
    progress: Callable[[Goal], Progress]
    scripts: Callable[[Expert], dict[str, Script]]  # one per arm
    mechanism: Callable[[Scene], None] | None = None  # called after every output tick: presses, foam, ...

    def instructions(self, split: str = "train", goal: Goal | None = None) -> tuple[str, ...]:
        """All wordings of a goal (of every goal). split: "train" or "heldout"."""
        if split not in self.wordings:
            raise ValueError(f"no wordings {split!r} of task {self.name}; splits are {', '.join(SPLITS)}")
        goals = self.goals if goal is None else (goal,)
        return tuple(
            text.format(item=g.item.replace("_", " "), side=g.side)
            for g in goals
            for text in self.wordings[split]
        )


def lies_in(scene: SceneView, item: str, place: str, half: tuple[float, float], below: float) -> bool:
    """Whether nobody holds the item and it is at rest in a place.

    half: of the place around its foot, m; below: height over the foot that its centre stays under, m.
    """
    offset = scene.position(item) - scene.position(place)
    inside = bool((np.abs(offset[:2]) < half).all()) and bool(0.0 < offset[2] < below)
    return inside and scene.holder(item) is None and scene.speed(item) < AT_REST_M_S


def scatter(
    rng: np.random.Generator,
    things: Sequence[Thing],
    centre: tuple[float, float],
    half: tuple[float, float],
    scale: float,
    avoid: Sequence[tuple[float, float]] = (),
    margin: float = 0.115,
) -> dict[str, tuple[float, float, float, float]]:
    """Things at random in a zone, 8 cm from each other and `margin` from `avoid`. A zone too small for that grows."""
    spacing, extent = 0.08 * max(1.0, scale), np.array(half)
    for attempt in itertools.count():
        points = np.array(centre) + rng.uniform(-1, 1, (len(things), 2)) * extent
        pairs = [np.hypot(*(points[i] - points[j])) for i in range(len(things)) for j in range(i)]
        clear = [np.hypot(*(point - np.array(place))) for point in points for place in avoid]
        if min(pairs, default=spacing) >= spacing and all(distance >= margin for distance in clear):
            break
        if attempt > 100:
            extent = extent * 1.01
    yaws = rng.uniform(-0.4, 0.4, len(things))
    return {
        thing.name: (
            float(point[0]),
            float(point[1]),
            thing.rest_height * (scale if thing.scalable else 1.0),
            float(yaw),
        )
        for thing, point, yaw in zip(things, points, yaws, strict=True)
    }
