# SPDX-License-Identifier: Apache-2.0
"""Arms that do single skills, for tests of judges and scripts."""

from collections.abc import Callable

import numpy as np

from lwd_fleet.sim.experts import STEP_S, Expert, Script
from lwd_fleet.sim.robot import ARMS
from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.world import World

TICKS = round(STEP_S / TICK_S)


def drive(world: World, expert: Expert, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Let the expert command the robot for a time, or until something is the case."""
    command, end = world.joint_positions, world.time_s + seconds
    while world.time_s < end - 1e-9 and not until():
        target = expert.command()
        for tick in range(1, TICKS + 1):
            world.step(command + (target - command) * tick / TICKS)
        command = target


def act(world: World, limit_s: float = 12.0, **skills: Callable[[Expert], Script]) -> None:
    """Arms (left=, right=) do one skill each, with a steady hand, then stay; an arm without one holds still."""
    busy = set(skills)

    def script(expert: Expert, arm: str) -> Script:
        if arm in skills:
            yield from skills[arm](expert)
            busy.discard(arm)
        yield from expert.hold(arm, lambda: False)

    def scripts(expert: Expert) -> dict[str, Script]:
        return {arm: script(expert, arm) for arm in ARMS}

    drive(world, Expert(world, np.random.default_rng(0), 0.0, scripts=scripts), limit_s, lambda: not busy)
    assert not busy, f"did not get through: {', '.join(busy)}"
