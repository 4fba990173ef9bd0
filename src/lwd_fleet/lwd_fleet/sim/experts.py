# SPDX-License-Identifier: Apache-2.0
"""Scripted demonstrators: they know the truth of the scene and move like a careful, slightly unsteady person.

One script per arm, written as a generator that yields where the tool shall go and how the gripper shall be,
once per policy step. The way there (speed, acceleration, unsteadiness) and the joints are the expert's
business, not the script's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim import robot
from lwd_fleet.sim.liquid import full_flow_lean

if TYPE_CHECKING:
    from lwd_fleet.sim.world import World

Array = NDArray[np.float64]

STEP_S = 0.1  # one command per policy step
CLEARANCE_M = 0.075  # above a grasp point while approaching
CARRY_HEIGHT_M = 0.13
OPEN_M, CLOSED_M = robot.GRIPPER_OPEN_M, 0.0
_NEAR_M = 0.012
_AT_M = 0.007
_PATIENCE_STEPS = 12  # that an arm tries to get closer to a point before its script goes on
_CARRY_STEPS = 60
_CLOSING_STEPS = (
    3  # at rest: who learns to close and to lift from this may be a step early or late with either
)
_POUR_BEYOND_RAD = 0.05  # that a vessel leans more than for the fastest flow
_TILT_RAD_S = 1.2  # of the tool, and about the vertical, too
_YAW_RAD = 1.2  # that a tool turns, at most
_STRAIGHT_RAD = 0.05
_POUR_HEIGHT_M = 0.035  # of the lip over the mouth
_POUR_CLEARANCE_M = 0.025  # under a vessel that is about to lean: its bottom, and some air
_POUR_STEPS = 80
_REACH_ACROSS_M = 0.19  # beyond the middle, with the tool pointing down
_MIDDLE = np.array([0.0, -0.06, 0.035])  # free in every scene
_OFFERED_M = 0.03  # from where it was agreed to hand a thing over
_LEAD_STEP = 0.25  # how far ahead on its way a panel is led, of its range
_LEAD_STEPS = 80


@dataclass(frozen=True)
class Wish:
    """Where a script wants the tool to be, and how exactly it has to be there."""

    point: Array  # [3] m, base_link
    gripper: float  # m
    steady: bool = False  # no unsteadiness: about to grasp or let go
    tilt: float = 0.0  # rad about base_link's y: positive leans the top of what is carried towards +x
    yaw: float = 0.0  # rad about the vertical, before the tilt


Script = Generator[Wish, None, None]


class Expert:
    """Demonstrates the world's current episode; make a new one after each reset, or whenever it is to take over.

    noise scales everything random: 0 is the same motion each time, 1 gives demonstrations of useful variety.
    A demonstrator who `sees_the_tool` corrects a calibration error as a person watching the gripper would;
    one who does not trusts the robot's own kinematics.

    The methods below `command` are the skills that the scripts of the tasks are made of: generators that yield until
    they are through. Each looks at the truth while it runs, and begins from wherever things are.
    """

    def __init__(
        self,
        world: World,
        rng: np.random.Generator,
        noise: float = 1.0,
        sees_the_tool: bool = True,
        scripts: Callable[[Expert], dict[str, Script]] | None = None,
    ) -> None:
        """scripts: what to do, one per arm; by default the task."""
        self.world = world
        self.rng, self._noise = rng, noise
        self._sees_the_tool = sees_the_tool
        self._body = world.embodiment
        joints = world.joint_positions
        self._hands = {arm.name: _Hand(world, arm.name, joints) for arm in self._body.arms}
        self._target = joints.copy()
        self._speed = 0.38 * np.exp(rng.normal() * 0.12 * noise)  # m/s
        self._scripts = (scripts or world.task.scripts)(self)

    def command(self) -> Array:
        """Absolute joint targets for the end of the next policy step, [14]. Call once per policy step."""
        for arm in self._body.arms:
            wish = next(self._scripts[arm.name])
            hand = self._hands[arm.name]
            columns = self._body.arm_columns(arm)
            if hand.advance(wish, self._speed, self._unsteadiness(hand, wish)):
                point = hand.reference + hand.wobble - self._calibration(hand)
                joints = self._target[columns[:-1]]
                change = arm.chain.inverse(point, hand.rotation, joints, 8) - joints
                fastest = np.max(np.abs(change) / self._body.max_velocity[columns[:-1]]) / STEP_S
                self._target[columns[:-1]] = joints + change / max(1.0, fastest)
            self._target[columns[-1]] = wish.gripper
        return self._target.copy()

    # Things ------------------------------------------------------------------------------------------

    def deliver(self, arm: str, item: str, place: Array, height: float) -> Script:
        """Pick the item, carry it over the place, lower it to `height`, let go, go home. Again if lost."""
        yield from self.put(arm, item, place, height)
        yield from self.rest(arm)

    def put(
        self,
        arm: str,
        item: str,
        place: Array,
        height: float,
        carry_height: float = CARRY_HEIGHT_M,
        straight: bool = False,
    ) -> Script:
        """Pick the item, carry it over the place, lower it to `height`, let go. Again if lost on the way.

        carry_height: of its grasp point on the way, at least. straight: turned so that its y axis is along base_link's.
        """
        while True:
            yield from self.pick(arm, item, carry_height)
            above = np.array([place[0], place[1], max(carry_height, height + 0.06)])
            yield from self.carry(arm, item, above, straight=straight)
            yield from self.carry(arm, item, np.array([place[0], place[1], height]), True, straight)
            if self.world.held(arm) == item:
                break
        yield from self.let_go(arm)

    def pick(self, arm: str, thing: str, carry_height: float = CARRY_HEIGHT_M) -> Script:
        """Until the arm holds the thing and has lifted it."""
        yield from self.grasp(arm, thing)
        here = self.world.grasp_point(thing)
        rise = np.array([here[0], here[1], max(here[2] + 0.06, carry_height - 0.02)])
        yield from self.carry(arm, thing, rise)

    def grasp(
        self, arm: str, part: str, number: int = 0, while_: Callable[[], bool] = lambda: True
    ) -> Script:
        """Until the arm holds the thing or the panel's handle. After a miss comes another try, better aimed.

        number: which of a thing's grasp points. while_: what makes it worth while; it is given up when that ends.
        """
        world = self.world
        stray = self._stray()
        while world.held(arm) != part:
            aim = self.scatter(0.004) + stray
            stray = np.zeros(3)

            def above(aim: Array = aim) -> Array:
                return over(world.grasp_point(part, number) + aim, CLEARANCE_M)

            def at(aim: Array = aim) -> Array:
                return over(world.grasp_point(part, number) + aim, 0.0)

            if world.held(arm) is not None:  # took something else: put it down where it was
                yield from self.let_go(arm)
            yield from self._go(arm, above, OPEN_M, _NEAR_M, while_=while_)
            yield from self._go(arm, at, OPEN_M, _AT_M, steady=True, while_=while_)
            if not while_():
                return
            here = at()
            yield Wish(here, OPEN_M, steady=True)
            for _ in range(_CLOSING_STEPS):
                yield Wish(here, CLOSED_M, steady=True)

    def carry(
        self, arm: str, thing: str, point: Array, exact: bool = False, straight: bool = False
    ) -> Script:
        """Move the held thing so that its usual grasp point is at `point`, or gets no closer; ends at once when it is
        lost.

        straight: turned so that its y axis is along base_link's.
        """
        steps, yaw, hand = 0, 0.0, self._hands[arm]
        hand.arrived_steps = 0
        while self.world.held(arm) == thing and steps < _CARRY_STEPS:
            offset = self.world.grasp_point(thing) - self.world.tool(arm)
            crooked = straight and abs(self.world.heading(thing)) > _STRAIGHT_RAD
            if self._distance(arm, point - offset) < (_AT_M if exact else 0.025) and not crooked:
                return
            if hand.arrived_steps > _PATIENCE_STEPS:  # something is in the way
                return
            if straight:
                yaw = float(np.clip(hand.yaw - self.world.heading(thing), -_YAW_RAD, _YAW_RAD))
            yield Wish(point - offset, CLOSED_M, steady=exact, yaw=yaw)
            steps += 1

    def let_go(self, arm: str) -> Script:
        """Open, wait, rise."""
        here, yaw = self._hands[arm].reference.copy(), self._hands[arm].yaw
        for _ in range(3):
            yield Wish(here, OPEN_M, steady=True, yaw=yaw)
        for _ in range(3):
            yield Wish(over(here, 0.08), OPEN_M)

    def can_take(self, arm: str, thing: str) -> bool:
        """Whether the arm holds the thing, or it lies free and is not too far on the other arm's side."""
        side = 1.0 if arm == "right" else -1.0
        near = bool(side * self.world.grasp_point(thing)[0] > -_REACH_ACROSS_M)
        return self.world.holder(thing) == arm or (near and self.world.holder(thing) is None)

    def help_out(self, arm: str, item: str) -> Script:
        """At home; for ever. What the other arm is to take but cannot reach is put down in the middle for it."""
        other = "right" if arm == "left" else "left"
        while True:
            yield from self.wait(arm, lambda: not self.can_take(other, item) and self.can_take(arm, item))
            yield from self.bring_near(arm, item)

    def bring_near(self, arm: str, item: str) -> Script:
        """Put a thing down in the middle, where both arms reach it."""
        yield from self.put(arm, item, _MIDDLE, _MIDDLE[2])

    def offer(self, arm: str, taker: str, thing: str, point: Array) -> Script:
        """Pick the thing, hold it at the point until the other arm has it, let go. Again if lost before.

        point: of the thing's usual grasp point, [3] m.
        """
        world = self.world
        while world.held(taker) != thing:
            yield from self.pick(arm, thing)
            yield from self.carry(arm, thing, point, exact=True)
            yield from self.hold(arm, lambda: world.held(taker) == thing or world.held(arm) != thing)
        if world.held(arm) == thing:
            yield from self.let_go(arm)

    def receive(self, arm: str, giver: str, thing: str, point: Array) -> Script:
        """Take a thing that the other arm offers at the point, by the grasp point that it leaves free.

        Ends when the giver has let go. Until the thing is offered, the arm waits beside the point, on its own side.
        """
        world = self.world
        aside = 0.11 if arm == "right" else -0.11

        def offered() -> bool:
            near = np.linalg.norm(world.grasp_point(thing) - point) < _OFFERED_M
            return world.held(giver) == thing and bool(near)

        while world.held(arm) != thing or world.held(giver) == thing:
            if world.held(arm) == thing:
                yield from self.hold(arm, lambda: world.held(giver) != thing)
            elif offered():
                free = 1 if world.grip(giver) == 0 else 0
                yield from self.grasp(arm, thing, free, while_=offered)
            else:
                yield Wish(over(point, 0.04) + [aside, 0.0, 0.0], OPEN_M)

    # Liquids and panels ------------------------------------------------------------------------------

    def pour(self, arm: str, vessel: str, into: str, portions: float) -> Script:
        """Pour from the held vessel until `into` has gained the portions, or there is no more; ends when it is lost.

        The vessel leans to the side of its spout; without one, towards the receiver from the side on which the tool is.
        It comes down to the receiver as it leans, and rises before it is upright again: then its bottom has to clear
        the receiver's mouth.
        """
        world, hand = self.world, self._hands[arm]
        hollow = world.task.parts.vessels[vessel]
        clear = max(_POUR_HEIGHT_M, hollow.mouth - hollow.floor + _POUR_CLEARANCE_M)
        mouth = world.mouth(into) + self.scatter(0.004)
        spout, middle = world.spout(vessel), world.mouth(vessel)
        towards = mouth - world.tool(arm) if spout is None else spout - middle
        side = 1.0 if towards[0] > 0.0 else -1.0
        if spout is None:
            outlet = _turned(middle - world.tool(arm), -hand.tilt) + [side * hollow.lip, 0.0, 0.0]
        else:
            outlet = _turned(spout - world.tool(arm), -hand.tilt)
        tilt = full_flow_lean(hollow) + _POUR_BEYOND_RAD
        wanted = sum(world.content(into).values()) + portions

        def high() -> Array:
            return over(mouth - _turned(outlet, hand.tilt), clear)

        def tool() -> Array:
            lean = min(1.0, abs(hand.tilt) / tilt)
            return over(high(), lean * (_POUR_HEIGHT_M - clear))

        def poured() -> bool:
            return sum(world.content(into).values()) >= wanted or not any(world.content(vessel).values())

        yield from self._go(arm, tool, CLOSED_M, _NEAR_M)
        for _ in range(_POUR_STEPS):
            if poured() or world.held(arm) != vessel:
                break
            yield Wish(tool(), CLOSED_M, steady=True, tilt=side * tilt)
        while abs(hand.tilt) > 0.05:
            yield Wish(high(), CLOSED_M, steady=True)

    def lead(self, arm: str, panel: str, opening: float) -> Script:
        """Take the panel's handle, unless it is held, and move the panel to an opening (0 to 1); keeps the handle.

        Ends, too, when the panel gets no closer.
        """
        world, hand = self.world, self._hands[arm]
        hand.arrived_steps = 0
        for _ in range(_LEAD_STEPS):
            if world.held(arm) != panel:
                yield from self.grasp(arm, panel)
            now = float(np.clip(world.opening(panel), 0.0, 1.0))
            if abs(now - opening) < 0.03 or hand.arrived_steps > _PATIENCE_STEPS:
                hand.arrived_steps = 0
                return
            ahead = now + float(np.clip(opening - now, -_LEAD_STEP, _LEAD_STEP))
            slack = world.position(panel) - world.tool(arm)
            yield Wish(world.panel_handle(panel, ahead) - slack, CLOSED_M, steady=True)

    # Waiting -----------------------------------------------------------------------------------------

    def hold(self, arm: str, until: Callable[[], bool]) -> Script:
        """Stay, with the gripper as it was, until something is the case."""
        here, gripper = (
            self._hands[arm].reference.copy(),
            self._target[self._body.arm_columns(self._body.arm(arm))[-1]],
        )
        while not until():
            yield Wish(here, float(gripper))

    def wait(self, arm: str, until: Callable[[], bool]) -> Script:
        """At home, until something is the case."""
        while not until():
            yield Wish(self._hands[arm].home, OPEN_M)

    def rest(self, arm: str) -> Script:
        """At home, for ever."""
        yield from self.wait(arm, lambda: False)

    # Motion ------------------------------------------------------------------------------------------

    def _go(
        self,
        arm: str,
        point: Callable[[], Array],
        gripper: float,
        tolerance: float,
        steady: bool = False,
        while_: Callable[[], bool] = lambda: True,
    ) -> Script:
        """Until the tool is within `tolerance` of a (moving) point, or gets no closer, or `while_` ends."""
        for _ in range(10 * _PATIENCE_STEPS):
            wish = Wish(point(), gripper, steady)
            if self._distance(arm, wish.point) < tolerance or not while_():
                return
            hand = self._hands[arm]
            if hand.arrived_steps > _PATIENCE_STEPS:
                hand.arrived_steps = 0
                return
            yield wish

    def _distance(self, arm: str, point: Array) -> float:
        """Of the tool, where the demonstrator believes it to be."""
        hand = self._hands[arm]
        believed = self.world.tool(arm) if self._sees_the_tool else hand.nominal_tool()
        return float(np.linalg.norm(believed - point))

    def _calibration(self, hand: _Hand) -> Array:
        if not self._sees_the_tool:
            return np.zeros(3)
        return self.world.tool(hand.arm) - hand.nominal_tool()

    def scatter(self, sigma: float) -> Array:
        """Horizontal error, [3] m: at most two sigma along x and y."""
        x, y = self.rng.normal(size=2).clip(-2, 2) * sigma * self._noise
        return np.array([x, y, 0.0])

    def _stray(self) -> Array:
        """Now and then the first try is aimed so badly that it misses: demonstrations must show recovery."""
        misses = self.rng.random() < 0.08 * self._noise
        angle, distance = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0.03, 0.045)
        return np.array([np.cos(angle), np.sin(angle), 0.0]) * distance * misses

    def _unsteadiness(self, hand: _Hand, wish: Wish) -> Array:
        """Ornstein-Uhlenbeck process, 3.5 mm and 0.5 s; fades when the wish is to be steady."""
        kick = self.rng.normal(size=3) * 0.002 * self._noise
        decay = 0.5 if wish.steady else 0.82
        return hand.wobble * decay + kick * (0.2 if wish.steady else 1.0)


def over(point: Array, height: float) -> Array:
    """The point `height` above another, [3] m."""
    return np.array([point[0], point[1], point[2] + height])


def _turned(vector: Array, tilt: float) -> Array:
    """A vector [3] turned about base_link's y."""
    return _turn(tilt) @ vector


def _turn(tilt: float, yaw: float = 0.0) -> Array:
    """Rotation about the vertical, then about base_link's y, [3, 3]."""
    cosine, sine = np.cos(tilt), np.sin(tilt)
    about_y = np.array([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]])
    cosine, sine = np.cos(yaw), np.sin(yaw)
    turned: Array = about_y @ np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    return turned


class _Hand:
    """The moving set point of one tool: where it is, and how far it is tilted and turned (rad, as in `Wish`)."""

    def __init__(self, world: World, arm: str, joints: Array) -> None:
        self.arm = arm
        self._world = world
        self._chain = world.embodiment.arm(arm).chain
        self._columns = world.embodiment.arm_columns(arm)[:-1]
        self.reference, _ = self._chain.forward(joints[self._columns])
        self.home, self._upright = self._chain.forward(world.embodiment.home[self._columns])
        self.tilt, self.yaw = 0.0, 0.0
        self.wobble = np.zeros(3)
        self.arrived_steps = 0
        self._velocity = np.zeros(3)

    @property
    def rotation(self) -> Array:
        """Of the tool, [3, 3]."""
        return _turn(self.tilt, self.yaw) @ self._upright

    def nominal_tool(self) -> Array:
        """Where the robot's own kinematics say that the tool is."""
        position, _ = self._chain.forward(self._world.joint_positions[self._columns])
        return position

    def advance(self, wish: Wish, speed: float, wobble: Array) -> bool:
        """Move the set point one step towards the wish at bounded speed and acceleration. False: at rest."""
        offset = wish.point - self.reference
        distance = float(np.linalg.norm(offset))
        tilt, yaw = wish.tilt - self.tilt, wish.yaw - self.yaw
        self.tilt += float(np.clip(tilt, -_TILT_RAD_S * STEP_S, _TILT_RAD_S * STEP_S))
        self.yaw += float(np.clip(yaw, -_TILT_RAD_S * STEP_S, _TILT_RAD_S * STEP_S))
        if distance < 1e-6 and not self._velocity.any() and not (tilt or yaw) and wish.point is self.home:
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
