# SPDX-License-Identifier: Apache-2.0
"""The simulated tasks, by suite. The tasks of a suite share one vocabulary of keypoints, and so one policy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lwd_fleet.sim.tasks.cocktail import COCKTAIL
from lwd_fleet.sim.tasks.correct import CORRECT
from lwd_fleet.sim.tasks.freezer import FREEZER
from lwd_fleet.sim.tasks.juice import JUICE
from lwd_fleet.sim.tasks.open_cooler import OPEN_COOLER
from lwd_fleet.sim.tasks.place import PLACE
from lwd_fleet.sim.tasks.restock import RESTOCK
from lwd_fleet.sim.tasks.shoebox import SHOEBOX
from lwd_fleet.sim.tasks.stow import STOW
from lwd_fleet.sim.tasks.task import SPLITS, Goal, Layout, Progress, Scene, SceneView, Task
from lwd_fleet.sim.tasks.tea import TEA

__all__ = [
    "SPLITS",
    "SUITES",
    "TASKS",
    "Goal",
    "Layout",
    "Progress",
    "Scene",
    "SceneView",
    "Suite",
    "Task",
    "suite_of",
]


@dataclass(frozen=True)
class Suite:
    """Tasks that one policy is to do."""

    name: str
    tasks: tuple[Task, ...]

    @cached_property
    def keypoints(self) -> tuple[str, ...]:
        """What a detector may report in any of the tasks; items and places that can be named come first."""
        named = [*self.items, *self.places]
        return tuple(dict.fromkeys([*named, *(name for task in self.tasks for name in task.keypoints)]))

    @cached_property
    def items(self) -> tuple[str, ...]:
        """Things that an instruction can name."""
        return tuple(dict.fromkeys(goal.item for task in self.tasks for goal in task.goals))

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Places that an instruction can name, or mean."""
        return tuple(dict.fromkeys(goal.place for task in self.tasks for goal in task.goals))


SUITES = {
    suite.name: suite
    for suite in (
        Suite("demo", (PLACE, STOW)),
        Suite("eight", (RESTOCK, CORRECT, FREEZER, OPEN_COOLER, TEA, JUICE, COCKTAIL, SHOEBOX)),
    )
}
TASKS = {task.name: task for suite in SUITES.values() for task in suite.tasks}


def suite_of(task: str) -> Suite:
    """The suite that a task belongs to. Raises ValueError."""
    for suite in SUITES.values():
        if any(task == member.name for member in suite.tasks):
            return suite
    raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
