# SPDX-License-Identifier: Apache-2.0
"""The scripted demonstrators solve their tasks, recover from misses, and repeat themselves exactly."""

import numpy as np
import pytest

from lwd_fleet.sim.experts import STEP_S, Expert
from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.shift import Shift
from lwd_fleet.sim.tasks import TASKS
from lwd_fleet.sim.world import World

TICKS = round(STEP_S / TICK_S)


def _episode(
    world: World, seed: int, noise: float = 1.0, sees_the_tool: bool = True
) -> tuple[bool, np.ndarray]:
    """Returns success and the commands [steps, 14]."""
    world.reset(seed)
    expert = Expert(world, np.random.default_rng(seed), noise, sees_the_tool)
    commands = [world.joint_positions]
    while world.time_s < world.time_limit_s - 1e-9 and not world.done():
        target = expert.command()
        for tick in range(1, TICKS + 1):
            world.step(commands[-1] + (target - commands[-1]) * tick / TICKS)
        commands.append(target)
    return world.done(), np.stack(commands)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_expert_solves_its_task(task: str) -> None:
    world = World(task)
    results = [_episode(world, seed)[0] for seed in range(20)]
    assert np.mean(results) >= 0.95
    assert world.sub_step_scores() == (1.0,) * len(world.task.sub_steps)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_demonstration_stays_within_the_limits_of_the_robot(task: str) -> None:
    world = World(task)
    for seed in range(5):
        _, commands = _episode(world, seed)
        velocity = np.abs(np.diff(commands, axis=0)) / STEP_S
        assert (velocity <= world.embodiment.max_velocity + 1e-9).all()
        assert (commands >= world.embodiment.lower - 1e-9).all()
        assert (commands <= world.embodiment.upper + 1e-9).all()


def test_the_expert_repeats_itself_bit_by_bit_and_varies_with_its_seed() -> None:
    world = World("place")
    np.testing.assert_array_equal(_episode(world, 3)[1], _episode(World("place"), 3)[1])
    world.reset(3)
    first = Expert(world, np.random.default_rng(0)).command()
    second = Expert(world, np.random.default_rng(1)).command()
    assert not np.array_equal(first, second)


def test_a_missed_grasp_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expert, "_stray", lambda self: np.array([0.04, 0.0, 0.0]))  # every first try misses
    world = World("place")
    attempts = []
    for seed in range(5):
        success, commands = _episode(world, seed)
        assert success
        gripper = commands[:, 6 if world.goal.side == "left" else 13]
        attempts.append(int(((gripper[1:] < 0.01) & (gripper[:-1] > 0.03)).sum()))
    assert min(attempts) >= 2


def test_a_demonstrator_who_sees_the_tool_corrects_a_calibration_error() -> None:
    shift = Shift(calibration_offset_m=(0.04, -0.03, -0.04, 0.03))
    world = World("place", shift)
    seeing = [_episode(world, seed)[0] for seed in range(6)]
    blind = [_episode(world, seed, sees_the_tool=False)[0] for seed in range(6)]
    assert all(seeing) and not any(blind)
