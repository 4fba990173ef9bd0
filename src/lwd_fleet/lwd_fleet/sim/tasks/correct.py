# SPDX-License-Identifier: Apache-2.0
"""`correct`: each item belongs on the mat of its colour; two are not there. Find the named one, put it back.

The misplaced items lie on the table, or one of them on the mat of the other. The arm on the mat's side does it; before
the mat in the middle, the arm on whose side the item lies.
"""

from __future__ import annotations

import numpy as np

from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.parts import GROCERIES, Fixture, Parts, Thing
from lwd_fleet.sim.robot import Shape
from lwd_fleet.sim.tasks.task import LIFTED_M, Goal, Layout, SceneView, Task, lies_in, scatter

MAT_HALF = 0.040
MAT_THICKNESS = 0.004
_SPOTS = ((-0.24, 0.13), (0.0, 0.16), (0.24, 0.13))
_MIDDLE_M = 0.1  # a mat nearer to the middle than this belongs to both arms
_RELEASE_M = MAT_THICKNESS + 0.028
_REST_HEIGHT = {thing.name: thing.rest_height for thing in GROCERIES}


def mat_of(item: str) -> str:
    """Name of the mat on which an item belongs."""
    return f"{item.split('_')[0]}_mat"


def _mat(item: Thing) -> Fixture:
    """Square, white with a broad edge in the item's colour."""
    edge, half = MAT_HALF + 0.012, MAT_THICKNESS / 2
    return Fixture(
        mat_of(item.name),
        (
            Shape("box", (edge, edge, 0.8 * half), (0, 0, 0.8 * half), colour=item.shapes[0].colour),
            Shape("box", (MAT_HALF - 0.008, MAT_HALF - 0.008, half), (0, 0, half), colour="white"),
        ),
    )


class CorrectProgress:
    """Sub-steps: the named item was lifted by an arm; it lies on its mat, released and at rest."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._lifted = False
        self._back = False

    def update(self, scene: SceneView) -> None:
        item = self._goal.item
        high = bool(scene.position(item)[2] > MAT_THICKNESS + _REST_HEIGHT[item] + LIFTED_M)
        self._lifted |= high and scene.holder(item) is not None
        self._back = lies_in(scene, item, self._goal.place, (MAT_HALF, MAT_HALF), 0.045)

    @property
    def scores(self) -> tuple[float, ...]:
        return float(self._lifted), float(self._back)

    @property
    def done(self) -> bool:
        return self._back


def _layout(rng: np.random.Generator, goal: Goal, placement_range: float, scale: float) -> Layout:
    jitter = rng.uniform(-0.012, 0.012, (3, 2))
    spots = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(_SPOTS, jitter, strict=True)]
    mats = {
        mat_of(item.name): spots[index] for item, index in zip(GROCERIES, rng.permutation(3), strict=True)
    }
    named = next(item for item in GROCERIES if item.name == goal.item)
    rest = [item for item in GROCERIES if item is not named]
    other, right = (rest[index] for index in rng.permutation(2))
    on_wrong_mat = rng.random() < 0.5
    half = (0.20 * placement_range, 0.06 * placement_range)
    things = scatter(rng, (named, other), (0.0, -0.02), half, scale, avoid=tuple(mats.values()), margin=0.095)
    on_mats = [(right, mat_of(right.name))] + on_wrong_mat * [(named, mat_of(other.name))]
    for item, mat in on_mats:
        x, y = np.array(mats[mat]) + rng.uniform(-0.008, 0.008, 2)
        height = MAT_THICKNESS + item.rest_height * (scale if item.scalable else 1.0)
        things[item.name] = (float(x), float(y), height, float(rng.uniform(-0.4, 0.4)))
    return Layout(things, mats)


def _scripts(expert: Expert) -> dict[str, Script]:
    return {arm: _put_back(expert, arm) for arm in ("left", "right")}


def _put_back(expert: Expert, arm: str) -> Script:
    world, goal = expert.world, expert.world.goal
    other = "right" if arm == "left" else "left"
    while True:
        yield from expert.wait(
            arm,
            lambda: (
                not world.done()
                and expert.can_take(arm, goal.item)
                and (_arm_for(expert) == arm or not expert.can_take(other, goal.item))
            ),
        )
        if _arm_for(expert) == arm:
            mat = world.position(goal.place) + expert.scatter(0.007)
            yield from expert.put(arm, goal.item, mat, _RELEASE_M)
        else:
            yield from expert.bring_near(arm, goal.item)


def _arm_for(expert: Expert) -> str:
    """The arm that is to put the named item on its mat."""
    world, goal = expert.world, expert.world.goal
    x = float(world.position(goal.place)[0])
    if abs(x) < _MIDDLE_M:
        holder = world.holder(goal.item)
        if holder is not None:
            return holder
        x = float(world.position(goal.item)[0])
    return "left" if x < 0 else "right"


CORRECT = Task(
    name="correct",
    summary="Find the named item, which is in the wrong place, and put it back on the mat of its colour.",
    time_limit_s=8.5,
    sub_steps=("item lifted", "item back on its mat"),
    goals=tuple(Goal(item.name, mat_of(item.name)) for item in GROCERIES),
    parts=Parts(GROCERIES, tuple(_mat(item) for item in GROCERIES)),
    keypoints=(*(item.name for item in GROCERIES), *(mat_of(item.name) for item in GROCERIES)),
    wordings={
        "train": (
            "put the {item} back where it belongs",
            "the {item} is in the wrong place, put it back",
            "return the {item} to its own mat",
            "correct the place of the {item}",
            "the {item} is misplaced, move it to its mat",
            "find the {item} and put it back on its mat",
            "tidy up the {item}",
            "move the {item} back to its place",
            "the {item} goes back on the mat of its colour",
            "please return the {item} to where it should be",
        ),
        "heldout": (
            "someone left the {item} in the wrong place, please correct it",
            "the {item} should be on its own mat",
            "bring the misplaced {item} back",
            "could you put the {item} back in its place",
            "sort the {item} back to its mat",
        ),
    },
    layout=_layout,
    progress=CorrectProgress,
    scripts=_scripts,
)
