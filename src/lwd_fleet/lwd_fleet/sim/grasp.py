# SPDX-License-Identifier: Apache-2.0
"""Grasping by equality constraints: a gripper that closes around a grasp point holds it until it opens.

A thing is welded to the hand; the handle of a panel is a ball joint to it, so that an arm can lead a door along its
arc without turning the wrist. One attempt per closing: a gripper that closed on nothing has to open before it can
grasp, so that a miss is a miss. While it holds something the fingers stop at its width, which the measured gripper
position shows, as on a real robot. A thing with a second grasp point can be taken by the other arm while one holds it:
that is how it is handed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.parts import Panel, Parts, Thing
from lwd_fleet.sim.robot import ARMS
from lwd_fleet.sim.scene import constraint_name

GRASP_RADIUS_M = 0.028
CLOSE_BELOW_M = 0.024  # measured and commanded gripper position under which a closing gripper has closed
OPEN_ABOVE_M = 0.030  # commanded above: it lets go; measured above: it can grasp again


@dataclass(frozen=True)
class _Hold:
    """A place where something can be held. point: in the frame of its body."""

    part: Thing | Panel
    body: int
    point: tuple[float, float, float]

    def leaves_room_for(self, other: _Hold) -> bool:
        """Whether one arm can hold here while another holds there."""
        shared = isinstance(self.part, Thing) and self.part.other_grasp is not None
        return self.body != other.body or (shared and self.point != other.point)


@dataclass
class _Hand:
    body: int
    site: int
    finger: int  # address in qpos
    ready: bool = True  # has been open since the last attempt
    held: _Hold | None = None


class Grasps:
    """The state of both grippers of one world."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, parts: Parts) -> None:
        self._model, self._data = model, data
        holdable: tuple[Thing | Panel, ...] = (*parts.things, *parts.panels)
        self._holds = [
            _Hold(part, model.body(part.name).id, point)
            for part in holdable
            for point in (part.grasps if isinstance(part, Thing) else (part.handle,))
        ]
        self._constraints = {
            (arm, hold.part.name): model.equality(constraint_name(arm, hold.part.name)).id
            for arm in ARMS
            for hold in self._holds
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
        """Nothing is held. (mj_resetData has opened the constraints.)"""
        for hand in self._hands.values():
            hand.ready = bool(self._data.qpos[hand.finger] > OPEN_ABOVE_M)
            hand.held = None

    def held(self, arm: str) -> str | None:
        """Name of what the arm holds."""
        hold = self._hands[arm].held
        return None if hold is None else hold.part.name

    def grip(self, arm: str) -> int | None:
        """At which of its grasp points the arm holds what it holds, as an index of `grasp_points`."""
        hold = self._hands[arm].held
        if hold is None:
            return None
        return [other for other in self._holds if other.body == hold.body].index(hold)

    def holder(self, name: str) -> str | None:
        """The arm that holds a thing or panel; the left one if both do."""
        for arm in ARMS:
            if self.held(arm) == name:
                return arm
        return None

    def grasp_points(self, name: str) -> list[NDArray[np.float64]]:
        """Where a thing or panel can be taken, [3] m in base_link each; the usual place first."""
        return [self._position(hold) for hold in self._holds if hold.part.name == name]

    def command(self, arm: str, opening: float) -> float:
        """Grasp or let go as the gripper is commanded. Returns where the fingers shall go [m]."""
        hand = self._hands[arm]
        if hand.held is not None and opening > OPEN_ABOVE_M:
            self._data.eq_active[self._constraints[arm, hand.held.part.name]] = 0
            hand.held = None
        if hand.held is not None:
            return max(opening, hand.held.part.grip)
        measured = float(self._data.qpos[hand.finger])
        if measured > OPEN_ABOVE_M:
            hand.ready = True
        elif hand.ready and measured < CLOSE_BELOW_M and opening < CLOSE_BELOW_M:
            hand.ready = False
            self._attempt(arm, hand)
        return opening

    def _position(self, hold: _Hold) -> NDArray[np.float64]:
        rotation = self._data.xmat[hold.body].reshape(3, 3)
        position: NDArray[np.float64] = self._data.xpos[hold.body] + rotation @ hold.point
        return position

    def _attempt(self, arm: str, hand: _Hand) -> None:
        others = [other.held for name, other in self._hands.items() if name != arm and other.held is not None]
        free = [hold for hold in self._holds if all(hold.leaves_room_for(other) for other in others)]
        tool = self._data.site_xpos[hand.site]
        distances = [float(np.linalg.norm(self._position(hold) - tool)) for hold in free]
        if not free or min(distances) > GRASP_RADIUS_M:
            return
        hold = free[int(np.argmin(distances))]
        constraint = self._constraints[arm, hold.part.name]
        if isinstance(hold.part, Thing):
            self._weld(constraint, hand.body, hold.body)
        else:
            self._connect(constraint, hand, hold)
        self._data.eq_active[constraint] = 1
        hand.held = hold

    def _weld(self, constraint: int, hand: int, thing: int) -> None:
        """As the thing is now to the hand, so it shall stay."""
        data = self._data
        inverse_position, inverse_quaternion = np.zeros(3), np.zeros(4)
        position, quaternion = np.zeros(3), np.zeros(4)
        mujoco.mju_negPose(inverse_position, inverse_quaternion, data.xpos[hand], data.xquat[hand])
        mujoco.mju_mulPose(
            position, quaternion, inverse_position, inverse_quaternion, data.xpos[thing], data.xquat[thing]
        )
        self._model.eq_data[constraint, :3] = 0.0  # anchor: the thing's own origin
        self._model.eq_data[constraint, 3:6] = position
        self._model.eq_data[constraint, 6:10] = quaternion

    def _connect(self, constraint: int, hand: _Hand, hold: _Hold) -> None:
        """The point of the panel that is between the fingers now stays there."""
        tool = self._data.site_xpos[hand.site]
        for first, body in ((0, hand.body), (3, hold.body)):
            rotation = self._data.xmat[body].reshape(3, 3)
            self._model.eq_data[constraint, first : first + 3] = rotation.T @ (tool - self._data.xpos[body])
