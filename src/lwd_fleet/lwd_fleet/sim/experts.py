# SPDX-License-Identifier: Apache-2.0
"""Scripted demonstrators: they know the truth of the scene and move like a careful, slightly unsteady person.

One script per arm, written as a generator that yields where the tool shall go and how the gripper shall be,
once per policy step. The way there (speed, acceleration, unsteadiness) and the joints are the expert's
business, not the script's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim import robot
from lwd_fleet.sim.scene import BOX_HEIGHT, LID
from lwd_fleet.sim.world import World

Array = NDArray[np.float64]

STEP_S = 0.1  # one command per policy step
_CLEARANCE_M = 0.075  # above a grasp point while approaching
_CARRY_HEIGHT_M = 0.13
_NEAR_M = 0.012
_AT_M = 0.007
_PATIENCE_STEPS = 12  # that an arm tries to get closer to a point before its script goes on
_OPEN, _CLOSED = robot.GRIPPER_OPEN_M, 0.0


@dataclass(frozen=True)
class Wish:
    """Where a script wants the tool to be, and how exactly it has to be there."""

    point: Array  # [3] m, base_link
    gripper: float  # m
    steady: bool = False  # no unsteadiness: about to grasp or let go


Script = Generator[Wish, None, None]


class Expert:
    """Demonstrates the world's current episode; make a new one after each reset.

    noise scales everything random: 0 is the same motion each time, 1 gives demonstrations of useful variety.
    A demonstrator who `sees_the_tool` corrects a calibration error as a person watching the gripper would;
    one who does not trusts the robot's own kinematics.
    """

    def __init__(
        self, world: World, rng: np.random.Generator, noise: float = 1.0, sees_the_tool: bool = True
    ) -> None:
        self._world, self._rng, self._noise = world, rng, noise
        self._sees_the_tool = sees_the_tool
        self._body = world.embodiment
        joints = world.joint_positions
        self._hands = {arm.name: _Hand(world, arm.name, joints) for arm in self._body.arms}
        self._target = joints.copy()
        self._speed = 0.38 * np.exp(rng.normal() * 0.12 * noise)  # m/s
        self._scripts = {"place": self._place, "stow": self._stow}[world.task.name]()

    def command(self) -> Array:
        """Absolute joint targets for the end of the next policy step, [14]. Call once per policy step."""
        for arm in self._body.arms:
            wish = next(self._scripts[arm.name])
            hand = self._hands[arm.name]
            columns = self._body.arm_columns(arm)
            if hand.advance(wish, self._speed, self._unsteadiness(hand, wish)):
                point = hand.reference + hand.wobble - self._calibration(hand)
                self._target[columns[:-1]] = arm.chain.inverse(
                    point, hand.rotation, self._target[columns[:-1]], 8
                )
            self._target[columns[-1]] = wish.gripper
        return self._target.copy()

    # Scripts -----------------------------------------------------------------------------------------

    def _place(self) -> dict[str, Script]:
        goal = self._world.goal
        tray = self._world.position(f"{goal.side}_tray") + self._scatter(0.022)
        other = "right" if goal.side == "left" else "left"
        return {goal.side: self._deliver(goal.side, goal.item, tray, 0.05), other: self._rest(other)}

    def _stow(self) -> dict[str, Script]:
        return {"left": self._handle_lid(), "right": self._fill_box()}

    def _handle_lid(self) -> Script:
        world, arm = self._world, "left"
        aside = np.array([-0.22, 0.04, _CARRY_HEIGHT_M]) + self._scatter(0.02)
        box = world.position("box")
        on = _over(box, BOX_HEIGHT + LID.rest_height + LID.grasp_offset + 0.003)
        while not world.done():
            yield from self._pick(arm, "lid")
            yield from self._carry(arm, "lid", aside)
            while world.held(arm) == "lid" and not self._item_stowed():
                yield Wish(aside, _CLOSED)
            yield from self._carry(arm, "lid", _over(on, 0.05))
            yield from self._carry(arm, "lid", on, exact=True)
            if world.held(arm) == "lid":
                yield from self._let_go(arm)
        yield from self._rest(arm)

    def _fill_box(self) -> Script:
        world, arm = self._world, "right"
        item = world.goal.item
        while world.sub_step_scores()[0] < 1.0:  # the lid is in the way: wait over the item
            yield Wish(_over(world.grasp_point(item), 2 * _CLEARANCE_M), _OPEN)
        box = world.position("box") + self._scatter(0.006)
        yield from self._deliver(arm, item, box, BOX_HEIGHT + 0.012)
        yield from self._rest(arm)

    def _item_stowed(self) -> bool:
        clear = self._world.tool("right") - self._world.position("box")
        return self._world.sub_step_scores()[1] >= 1.0 and bool(np.hypot(clear[0], clear[1]) > 0.12)

    def _deliver(self, arm: str, item: str, place: Array, height: float) -> Script:
        """Pick the item, carry it over the place, lower it to `height` let go. Again if lost."""
        while True:
            yield from self._pick(arm, item)
            yield from self._carry(arm, item, np.array([place[0], place[1], _CARRY_HEIGHT_M]))
            yield from self._carry(arm, item, np.array([place[0], place[1], height]), exact=True)
            if self._world.held(arm) == item:
                break
        yield from self._let_go(arm)
        yield from self._rest(arm)

    def _pick(self, arm: str, thing: str) -> Script:
        """Until the arm holds the thing and has lifted it. After a miss comes another try, better aimed."""
        world = self._world
        stray = self._stray()
        while world.held(arm) != thing:
            aim = self._scatter(0.004) + stray
            stray = np.zeros(3)

            def over(aim: Array = aim) -> Array:
                return _over(world.grasp_point(thing) + aim, _CLEARANCE_M)

            def at(aim: Array = aim) -> Array:
                return _over(world.grasp_point(thing) + aim, 0.0)

            yield from self._go(arm, over, _OPEN, _NEAR_M)
            yield from self._go(arm, at, _OPEN, _AT_M, steady=True)
            here = at()
            for _ in range(4):
                yield Wish(here, _CLOSED, steady=True)
                if world.held(arm) == thing:
                    break
            if world.held(arm) not in (None, thing):  # took something else: put it down where it was
                yield from self._let_go(arm)
        here = world.tool(arm)
        rise = np.array([here[0], here[1], max(here[2] + 0.06, _CARRY_HEIGHT_M - 0.02)])
        yield from self._carry(arm, thing, rise)

    def _carry(self, arm: str, thing: str, point: Array, exact: bool = False) -> Script:
        """Move the held thing so that its grasp point is at `point`; ends at once when it is lost."""
        steps = 0
        while self._world.held(arm) == thing and steps < 60:
            offset = self._world.grasp_point(thing) - self._world.tool(arm)
            if not exact:
                offset[:] = 0.0
            if self._distance(arm, point - offset) < (_AT_M if exact else 0.025):
                return
            yield Wish(point - offset, _CLOSED, steady=exact)
            steps += 1

    def _let_go(self, arm: str) -> Script:
        here = self._hands[arm].reference.copy()
        for _ in range(3):
            yield Wish(here, _OPEN, steady=True)
        for _ in range(3):
            yield Wish(_over(here, 0.08), _OPEN)

    def _go(
        self, arm: str, point: Callable[[], Array], gripper: float, tolerance: float, steady: bool = False
    ) -> Script:
        """Until the tool is within `tolerance` of a (moving) point, or gets no closer."""
        for _ in range(10 * _PATIENCE_STEPS):
            wish = Wish(point(), gripper, steady)
            if self._distance(arm, wish.point) < tolerance:
                return
            hand = self._hands[arm]
            if hand.arrived_steps > _PATIENCE_STEPS:
                hand.arrived_steps = 0
                return
            yield wish

    def _rest(self, arm: str) -> Script:
        home = self._hands[arm].home
        while True:
            yield Wish(home, _OPEN)

    # Motion ------------------------------------------------------------------------------------------

    def _distance(self, arm: str, point: Array) -> float:
        """Of the tool, where the demonstrator believes it to be."""
        hand = self._hands[arm]
        believed = self._world.tool(arm) if self._sees_the_tool else hand.nominal_tool()
        return float(np.linalg.norm(believed - point))

    def _calibration(self, hand: _Hand) -> Array:
        if not self._sees_the_tool:
            return np.zeros(3)
        return self._world.tool(hand.arm) - hand.nominal_tool()

    def _scatter(self, sigma: float) -> Array:
        """Horizontal error, [3] m: at most two sigma along x and y."""
        x, y = self._rng.normal(size=2).clip(-2, 2) * sigma * self._noise
        return np.array([x, y, 0.0])

    def _stray(self) -> Array:
        """Now and then the first try is aimed so badly that it misses: demonstrations must show recovery."""
        misses = self._rng.random() < 0.08 * self._noise
        angle, distance = self._rng.uniform(0, 2 * np.pi), self._rng.uniform(0.03, 0.045)
        return np.array([np.cos(angle), np.sin(angle), 0.0]) * distance * misses

    def _unsteadiness(self, hand: _Hand, wish: Wish) -> Array:
        """Ornstein-Uhlenbeck process, 3.5 mm and 0.5 s; fades when the wish is to be steady."""
        kick = self._rng.normal(size=3) * 0.002 * self._noise
        decay = 0.5 if wish.steady else 0.82
        return hand.wobble * decay + kick * (0.2 if wish.steady else 1.0)


def _over(point: Array, height: float) -> Array:
    """The point `height` above another, [3] m."""
    return np.array([point[0], point[1], point[2] + height])


class _Hand:
    """The moving set point of one tool."""

    def __init__(self, world: World, arm: str, joints: Array) -> None:
        self.arm = arm
        self._world = world
        self._chain = world.embodiment.arm(arm).chain
        self._columns = world.embodiment.arm_columns(arm)[:-1]
        self.reference, _ = self._chain.forward(joints[self._columns])
        self.home, self.rotation = self._chain.forward(world.embodiment.home[self._columns])
        self.wobble = np.zeros(3)
        self.arrived_steps = 0
        self._velocity = np.zeros(3)

    def nominal_tool(self) -> Array:
        """Where the robot's own kinematics say that the tool is."""
        position, _ = self._chain.forward(self._world.joint_positions[self._columns])
        return position

    def advance(self, wish: Wish, speed: float, wobble: Array) -> bool:
        """Move the set point one step towards the wish at bounded speed and acceleration. False: at rest."""
        offset = wish.point - self.reference
        distance = float(np.linalg.norm(offset))
        if distance < 1e-6 and not self._velocity.any() and wish.point is self.home:
            self.wobble = np.zeros(3)  # an arm with nothing to do is still
            return False
        self.wobble = wobble
        wanted = offset / STEP_S * min(1.0, speed * STEP_S / max(distance, 1e-9))
        slow_down = np.sqrt(2 * 1.8 * distance)  # m/s: what 1.8 m/s^2 can still stop in time
        wanted *= min(1.0, slow_down / max(float(np.linalg.norm(wanted)), 1e-9))
        change = wanted - self._velocity
        largest = 2.4 * STEP_S
        change *= min(1.0, largest / max(float(np.linalg.norm(change)), 1e-9))
        self._velocity = self._velocity + change
        if distance < 0.004 and float(np.linalg.norm(self._velocity)) < 0.05:
            self.reference, self._velocity = wish.point.copy(), np.zeros(3)
            self.arrived_steps += 1
        else:
            self.reference = self.reference + self._velocity * STEP_S
            self.arrived_steps = 0
        return True
