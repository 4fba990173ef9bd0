# SPDX-License-Identifier: Apache-2.0
"""Layouts are reachable and apart; instructions say what is asked; held-out wordings are held out."""

import numpy as np
import pytest

from lwd_fleet.sim import robot
from lwd_fleet.sim.tasks import SPLITS, TASKS, Goal
from lwd_fleet.sim.tasks.stow import BOX_HEIGHT, LID
from lwd_fleet.sim.world import World


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_goal_has_enough_wordings_and_none_is_in_both_splits(task: str) -> None:
    for goal in TASKS[task].goals:
        train, heldout = (TASKS[task].instructions(split, goal) for split in SPLITS)
        assert len(set(train)) >= 8 and len(set(heldout)) >= 4
        assert not set(train) & set(heldout)
        for text in (*train, *heldout):
            assert goal.item.replace("_", " ") in text and goal.side in text


def test_no_wording_belongs_to_two_goals() -> None:
    texts = [text for task in TASKS.values() for split in SPLITS for text in task.instructions(split)]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("split", SPLITS)
def test_the_instruction_of_an_episode_names_its_goal(split: str) -> None:
    world = World("place", split=split)
    for seed in range(20):
        world.reset(seed)
        assert world.instruction in world.task.instructions(split, world.goal)
    world.reset(0, Goal("blue_bar", "right_tray", "right"))
    assert "blue bar" in world.instruction and "right" in world.instruction


def test_all_goals_are_drawn() -> None:
    world = World("place")
    goals = set()
    for seed in range(80):
        world.reset(seed)
        goals.add(world.goal)
    assert goals == set(TASKS["place"].goals)


def test_a_goal_of_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match="not a goal of stow"):
        World("stow").reset(0, Goal("red_cube", "left_tray", "left"))


PICKED_BY = {
    "place": ("left", "right"),
    "stow": ("right",),
    "restock": ("left", "right"),
    "freezer": ("right",),
}
"""Arms that each must reach everything that lies on the table."""


@pytest.mark.parametrize("task", sorted(PICKED_BY))
@pytest.mark.parametrize("scale", [0.3, 1.0, 1.3])
def test_everything_to_pick_is_apart_and_within_reach_of_its_arm(task: str, scale: float) -> None:
    for seed in range(15):
        layout = TASKS[task].layout(np.random.default_rng(seed), TASKS[task].goals[0], scale, 1.0)
        points = np.array([pose[:3] for name, pose in layout.things.items() if name != "lid"])
        pairs = [(i, j) for i in range(len(points)) for j in range(i)]
        distances = [np.linalg.norm(points[i] - points[j]) for i, j in pairs]
        assert min(distances) > (0.03 if scale < 1 else 0.06)
        for arm in PICKED_BY[task]:
            for target in (points, points + [0, 0, 0.1]):
                np.testing.assert_allclose(_reached(arm, target), target, atol=1e-3)


def _reached(arm: str, points: np.ndarray) -> np.ndarray:
    """Where the tool gets, pointing down, when it is to be at the points: [N, 3] m."""
    body = robot.embodiment()
    chain = body.arm(arm).chain
    home = body.home[body.arm_columns(arm)[:-1]]
    _, down = chain.forward(home)
    return chain.forward(chain.inverse(points, down, home, 60))[0]


class Still:
    """A scene in which nothing moves and nobody holds anything."""

    def __init__(self, **positions: tuple[float, float, float]) -> None:
        self.positions = positions

    def position(self, name: str) -> np.ndarray:
        return np.array(self.positions[name])

    def speed(self, name: str) -> float:
        return 0.0

    def holder(self, name: str) -> str | None:
        return None


def test_whether_it_is_done_can_be_written_down_at_every_stage() -> None:
    """A lid that lay over the box but too high once made a result that JSON refused, and ended the worker."""
    task = TASKS["stow"]
    goal = task.goals[0]
    progress = task.progress(goal)
    lying = LID.rest_height + BOX_HEIGHT
    for lid, done in [((0.5, 0, 0), False), ((0, 0, lying + 0.1), False), ((0, 0, lying), True)]:
        progress.update(Still(box=(0, 0, 0), lid=lid, **{goal.item: (0, 0, 0.01)}))
        assert progress.done is done
