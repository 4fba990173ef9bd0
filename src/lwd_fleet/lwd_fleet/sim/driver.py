# SPDX-License-Identifier: Apache-2.0
"""The simulated robot's driver: checks commands, follows the newest, holds when they stop, keeps time.

No ROS here. Times are seconds of any one steady clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.world import World

_LARGEST_CATCH_UP_TICKS = (
    10  # a longer gap is lost time: to simulate it in one go would only make the next one
)
_IN_STEP = 0.05  # rad or m: a command this near to the arms starts from where they are


class SimulatedDriver:
    """Runs a world in real time."""

    def __init__(self, world: World, command_timeout_s: float) -> None:
        """The world must have been reset."""
        self.world = world
        self.refused = 0  # commands since start
        self.lost_s = 0.0  # real time that was not simulated because the machine was late
        self._timeout_s = command_timeout_s
        self._columns = {name: index for index, name in enumerate(world.embodiment.joint_names)}
        self._command = world.joint_positions
        self._in_step = True
        self._commanded_at_s: float | None = None
        self._next_tick_s: float | None = None

    def reset(self, world: World) -> None:
        """Continue with a world that was just reset: it stays where it is until a command that starts from there.

        Commands for where the arms were before are on their way still, and would carry them off.
        """
        self.world = world
        self._in_step = False
        self._command = world.joint_positions
        self._commanded_at_s = None

    def accept(self, names: Sequence[str], positions: Sequence[float], now_s: float) -> str | None:
        """Take a command for some or all joints. Returns why it was refused, None if it was not."""
        refusal = self._problem(names, positions)
        if refusal is not None:
            self.refused += 1
            return refusal
        command = self._command.copy()
        command[[self._columns[name] for name in names]] = positions
        distance = float(np.abs(command - self.world.joint_positions).max())
        if not self._in_step and distance > _IN_STEP:
            self.refused += 1
            return f"command refused: {distance:.2f} rad from where the reset put the arms; start from there"
        self._in_step = True
        self._command, self._commanded_at_s = command, now_s
        return None

    def _problem(self, names: Sequence[str], positions: Sequence[float]) -> str | None:
        unknown = [name for name in names if name not in self._columns]
        if unknown:
            return f"command refused: this robot has no joint {', '.join(unknown)}"
        if not names or len(names) != len(positions) or len(set(names)) != len(names):
            return f"command refused: {len(names)} joint names (each once), {len(positions)} positions"
        if not np.isfinite(np.asarray(positions, dtype=np.float64)).all():
            return f"command refused: positions are not finite: {list(positions)}"
        return None

    def command_age_s(self, now_s: float) -> float | None:
        """Since the newest command; None if none came since the last reset."""
        return None if self._commanded_at_s is None else now_s - self._commanded_at_s

    def holding(self, now_s: float) -> bool:
        """Whether the arms are held because no command came, or none for too long."""
        age = self.command_age_s(now_s)
        return age is None or age > self._timeout_s

    def advance(self, now_s: float) -> int:
        """Simulate up to now; returns how many ticks that were.

        When commands stop, the last one is held: the arms come to rest there, and a grasp is kept.
        """
        if self._next_tick_s is None:
            self._next_tick_s = now_s
        ticks = 0
        while self._next_tick_s <= now_s:
            if ticks == _LARGEST_CATCH_UP_TICKS:
                self.lost_s += now_s - self._next_tick_s
                self._next_tick_s = now_s + TICK_S
                break
            self.world.step(self._command)
            self._next_tick_s += TICK_S
            ticks += 1
        return ticks


def camera_matrix(fovy_rad: float, size: int) -> NDArray[np.float64]:
    """Pinhole matrix [3, 3] of a square picture, principal point in its centre."""
    focal = 0.5 * size / np.tan(0.5 * fovy_rad)
    centre = 0.5 * size - 0.5
    return np.array([[focal, 0.0, centre], [0.0, focal, centre], [0.0, 0.0, 1.0]])
