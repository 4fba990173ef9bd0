# SPDX-License-Identifier: Apache-2.0
"""Grasping by welds: a gripper that closes around a thing's grasp point carries it until it opens.

One attempt per closing: a gripper that closed on nothing has to open before it can grasp, so that a miss is a
miss. While it holds something the fingers stop at its width, which the measured gripper position shows, as on
a real robot.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.robot import ARMS
from lwd_fleet.sim.scene import CARRIED, THINGS, Thing, weld_name

GRASP_RADIUS_M = 0.028
CLOSE_BELOW_M = 0.024  # measured and commanded gripper position under which a closing gripper has closed
OPEN_ABOVE_M = 0.030  # commanded above: it lets go; measured above: it can grasp again


@dataclass
class _Hand:
    body: int
    site: int
    finger: int  # address in qpos
    ready: bool = True  # has been open since the last attempt
    held: Thing | None = None


class Grasps:
    """The state of both grippers of one world."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, task: str) -> None:
        self._model, self._data = model, data
        self._things = [THINGS[name] for name in CARRIED[task]]
        self._bodies = {thing.name: model.body(thing.name).id for thing in self._things}
        self._welds = {
            (arm, thing.name): model.equality(weld_name(arm, thing.name)).id
            for arm in ARMS
            for thing in self._things
        }
        self._hands = {
            arm: _Hand(
                body=model.body(f"{arm}_hand").id,
                site=model.site(f"{arm}_tcp").id,
                finger=int(model.joint(f"{arm}_gripper").qposadr[0]),
            )
            for arm in ARMS
        }

    def reset(self) -> None:
        """Nothing is held. (mj_resetData has opened the welds.)"""
        for hand in self._hands.values():
            hand.ready = bool(self._data.qpos[hand.finger] > OPEN_ABOVE_M)
            hand.held = None

    def held(self, arm: str) -> str | None:
        """Name of what the arm carries."""
        thing = self._hands[arm].held
        return None if thing is None else thing.name

    def holder(self, name: str) -> str | None:
        """The arm that carries the thing."""
        for arm in ARMS:
            if self.held(arm) == name:
                return arm
        return None

    def grasp_point(self, name: str) -> NDArray[np.float64]:
        """Where to take the thing, [3] m in base_link."""
        body = self._bodies[name]
        point: NDArray[np.float64] = (
            self._data.xpos[body] + THINGS[name].grasp_offset * self._data.xmat[body, 2::3]
        )
        return point

    def command(self, arm: str, opening: float) -> float:
        """Grasp or let go as the gripper is commanded. Returns where the fingers shall go [m]."""
        hand = self._hands[arm]
        if hand.held is not None and opening > OPEN_ABOVE_M:
            self._data.eq_active[self._welds[arm, hand.held.name]] = 0
            hand.held = None
        if hand.held is not None:
            return max(opening, hand.held.grip)
        measured = float(self._data.qpos[hand.finger])
        if measured > OPEN_ABOVE_M:
            hand.ready = True
        elif hand.ready and measured < CLOSE_BELOW_M and opening < CLOSE_BELOW_M:
            hand.ready = False
            self._attempt(arm, hand)
        return opening

    def _attempt(self, arm: str, hand: _Hand) -> None:
        free = [thing for thing in self._things if self.holder(thing.name) is None]
        tool = self._data.site_xpos[hand.site]
        distances = [float(np.linalg.norm(self.grasp_point(thing.name) - tool)) for thing in free]
        if not free or min(distances) > GRASP_RADIUS_M:
            return
        thing = free[int(np.argmin(distances))]
        body, weld = self._bodies[thing.name], self._welds[arm, thing.name]
        inverse_position, inverse_quaternion = np.zeros(3), np.zeros(4)
        relative_position, relative_quaternion = np.zeros(3), np.zeros(4)
        mujoco.mju_negPose(
            inverse_position, inverse_quaternion, self._data.xpos[hand.body], self._data.xquat[hand.body]
        )
        mujoco.mju_mulPose(
            relative_position,
            relative_quaternion,
            inverse_position,
            inverse_quaternion,
            self._data.xpos[body],
            self._data.xquat[body],
        )
        self._model.eq_data[weld, :3] = 0.0  # anchor: the thing's own origin
        self._model.eq_data[weld, 3:6] = relative_position
        self._model.eq_data[weld, 6:10] = relative_quaternion
        self._data.eq_active[weld] = 1
        hand.held = thing
