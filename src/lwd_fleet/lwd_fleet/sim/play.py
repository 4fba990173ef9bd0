# SPDX-License-Identifier: Apache-2.0
"""Play: exploration of what goes wrong. A demonstrator who begins with the task, and then does anything but finish it.

The paper's offline data are to more than a quarter human play, all of it failures (algorithm.md 1.3). Here things are
dropped, put in wrong places, poured beside, panels moved back and forth. Should the task be fulfilled all the same, the
episode says so: its label is the judge's, as always.
"""

from __future__ import annotations

import numpy as np

from lwd_fleet.sim.experts import CLOSED_M, OPEN_M, STEP_S, Expert, Script, Wish

_TASK_SHARE = 0.7  # of the time limit, at most, until play begins
_REACH_ACROSS_M = 0.12  # that an arm reaches beyond the middle
_ZONE = ((-0.34, -0.12), (0.34, 0.20))  # of places where things are put, x and y, m


def scripts(expert: Expert) -> dict[str, Script]:
    """One per arm: the task's, until a moment of chance that both share or until only its end is missing, then nonsense."""
    begins = round(expert.rng.uniform(0.0, _TASK_SHARE) * expert.world.time_limit_s / STEP_S)
    return {
        arm: _play(expert, arm, script, begins) for arm, script in expert.world.task.scripts(expert).items()
    }


def _play(expert: Expert, arm: str, task: Script, begins: int) -> Script:
    for _ in range(begins):
        if expert.world.sub_step_scores().count(0.0) <= 1:
            break
        yield next(task)
    while True:
        yield from expert.rng.choice([_misplace, _fiddle, _spill, _wander])(expert, arm)  # type: ignore[arg-type]


def _misplace(expert: Expert, arm: str) -> Script:
    """Take anything within reach, if nothing is held, and let it fall anywhere."""
    world = expert.world
    if world.held(arm) is None:
        things = [thing.name for thing in world.task.parts.things if _within_reach(expert, arm, thing.name)]
        if not things:
            yield from _wander(expert, arm)
            return
        thing = str(expert.rng.choice(things))
        for _, wish in zip(range(40), expert.pick(arm, thing), strict=False):
            yield wish
    held = world.held(arm)
    if held is not None:
        yield from expert.carry(arm, held, _anywhere(expert, arm))
        yield from expert.let_go(arm)


def _fiddle(expert: Expert, arm: str) -> Script:
    """Move a panel to any opening, and let go."""
    world = expert.world
    panels = [panel.name for panel in world.task.parts.panels if _within_reach(expert, arm, panel.name)]
    if not panels or world.held(arm) not in (None, *panels):
        yield from _wander(expert, arm)
        return
    for _, wish in zip(
        range(40), expert.lead(arm, str(expert.rng.choice(panels)), expert.rng.uniform()), strict=False
    ):
        yield wish
    yield from expert.let_go(arm)


def _spill(expert: Expert, arm: str) -> Script:
    """Lean what is held, wherever it is."""
    tilt, here = expert.rng.uniform(-1.2, 1.2), expert.world.tool(arm)
    if expert.world.held(arm) is None:
        yield from _wander(expert, arm)
        return
    for _ in range(12):
        yield Wish(here, CLOSED_M, tilt=float(tilt))


def _wander(expert: Expert, arm: str) -> Script:
    """Go somewhere with the gripper as it pleases."""
    gripper = float(expert.rng.choice([OPEN_M, CLOSED_M])) if expert.world.held(arm) is None else CLOSED_M
    point = _anywhere(expert, arm)
    for _ in range(expert.rng.integers(5, 15)):
        yield Wish(point, gripper)


def _anywhere(expert: Expert, arm: str) -> np.ndarray:
    """A point over the table within the arm's reach, [3] m."""
    (left, near), (right, far) = _ZONE
    low, high = (left, _REACH_ACROSS_M) if arm == "left" else (-_REACH_ACROSS_M, right)
    return np.array(
        [expert.rng.uniform(low, high), expert.rng.uniform(near, far), expert.rng.uniform(0.05, 0.18)]
    )


def _within_reach(expert: Expert, arm: str, part: str) -> bool:
    x = expert.world.grasp_point(part)[0] * (1.0 if arm == "right" else -1.0)
    return expert.world.holder(part) is None and bool(x > -_REACH_ACROSS_M)
