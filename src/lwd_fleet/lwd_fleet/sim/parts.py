# SPDX-License-Identifier: Apache-2.0
"""What scenes are made of: things that an arm can carry, fixtures with moving panels, and vessels that hold liquid.

Lengths in m, angles in rad, masses in kg; z is up. A body's frame is at its centre (things) or at its foot on the
table (fixtures).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lwd_fleet.sim.robot import Shape

WALL = 0.004
SHELF_BAY_M = 0.042  # half extent of a shelf's bay, inside its rim
SHELF_HEIGHT_M = 0.045  # of the board over the table
SHELF_RIM_M = 0.010

COLOURS = {
    "red": (0.85, 0.12, 0.10, 1.0),
    "green": (0.10, 0.65, 0.20, 1.0),
    "blue": (0.12, 0.25, 0.85, 1.0),
    "yellow": (0.93, 0.80, 0.20, 1.0),
    "plum": (0.25, 0.12, 0.30, 1.0),
    "slate": (0.22, 0.24, 0.30, 1.0),
    "wood": (0.45, 0.28, 0.14, 1.0),
    "white": (0.92, 0.93, 0.94, 1.0),
    "steel": (0.55, 0.58, 0.62, 1.0),
    "orange": (0.95, 0.50, 0.08, 1.0),
    "lime": (0.55, 0.85, 0.20, 1.0),
    "pink": (0.92, 0.45, 0.62, 1.0),
    "teal": (0.10, 0.55, 0.55, 1.0),
    "glass": (0.75, 0.88, 0.95, 0.45),
    "clear": (0.75, 0.88, 0.95, 0.20),
}
"""rgba by name, for `Shape.colour`."""


@dataclass(frozen=True)
class Vessel:
    """The hollow of a thing or fixture. Amounts of liquid are portions; heights are along the body's z.

    radius: of the opening, which is also the reach of what is poured; lip: how far from the axis liquid leaves
    when the body leans. With a spout it leaves there, covered or not, as soon as that dips.
    """

    floor: float  # m, of an empty vessel's liquid
    mouth: float  # m, of the opening
    radius: float
    lip: float
    capacity: float  # portions
    holds: str = ""  # ingredient that fills it at reset; empty: nothing
    colour: str = "teal"  # of the liquid
    spout: tuple[float, float, float] | None = None  # its tip, in the body's frame


@dataclass(frozen=True)
class Thing:
    """An object that an arm can carry."""

    name: str
    shapes: tuple[Shape, ...]
    mass: float
    rest_height: float  # of its centre over what it stands on
    grasp_offset: float  # of its grasp point over its centre
    grip: float  # gripper position at which the fingers touch it
    scalable: bool = False  # a shift of object sizes applies to it
    vessel: Vessel | None = None
    covers: bool = False  # nothing flows through a mouth that it lies on
    grasp_aside: tuple[float, float] = (0.0, 0.0)  # of its grasp point from its axis, in its frame
    other_grasp: tuple[float, float, float] | None = (
        None  # a second grasp point, for the other arm, in its frame
    )

    @property
    def grasps(self) -> tuple[tuple[float, float, float], ...]:
        """All grasp points in its frame; the first is the usual one."""
        first = (*self.grasp_aside, self.grasp_offset)
        return (first,) if self.other_grasp is None else (first, self.other_grasp)


@dataclass(frozen=True)
class Panel:
    """A part of a fixture that moves on one joint, with a handle: a door, a lid, a lever.

    Its position is the joint's, `closed` at reset; it stays where it is put unless a spring drives it.
    """

    name: str
    shapes: tuple[Shape, ...]
    joint: str  # "hinge" or "slide"
    origin: tuple[float, float, float]  # of its frame in the fixture's
    axis: tuple[float, float, float]
    closed: float  # rad or m, an end of its range
    open: float  # the other end
    handle: tuple[float, float, float]  # grasp point in its frame
    grip: float  # gripper position at which the fingers touch the handle
    mass: float = 0.15
    spring: float = 0.0  # N m/rad or N/m towards `closed`
    friction: float = 0.05  # N m or N that hold it where it is


@dataclass(frozen=True)
class Spot:
    """A place on a fixture that has a name of its own."""

    name: str
    point: tuple[float, float, float]  # in the fixture's frame, m


@dataclass(frozen=True)
class Fixture:
    """What stands on the table and is not carried; its place is set at reset."""

    name: str
    shapes: tuple[Shape, ...]
    panels: tuple[Panel, ...] = ()
    vessel: Vessel | None = None
    spots: tuple[Spot, ...] = ()


@dataclass(frozen=True)
class Parts:
    """Everything in a task's scene besides robot and table."""

    things: tuple[Thing, ...]
    fixtures: tuple[Fixture, ...] = ()

    @cached_property
    def panels(self) -> tuple[Panel, ...]:
        """Of all fixtures."""
        return tuple(panel for fixture in self.fixtures for panel in fixture.panels)

    @cached_property
    def spots(self) -> dict[str, tuple[str, Spot]]:
        """By name: the fixture that it is on, and the spot."""
        return {spot.name: (fixture.name, spot) for fixture in self.fixtures for spot in fixture.spots}

    @cached_property
    def bodies(self) -> tuple[str, ...]:
        """Names of everything."""
        parts: tuple[Thing | Fixture | Panel, ...] = (*self.things, *self.fixtures, *self.panels)
        return tuple(part.name for part in parts)

    @cached_property
    def vessels(self) -> dict[str, Vessel]:
        """By the name of what they are the hollow of."""
        parts: tuple[Thing | Fixture, ...] = (*self.things, *self.fixtures)
        return {part.name: part.vessel for part in parts if part.vessel is not None}


def open_box(name: str, half_x: float, half_y: float, height: float, colour: str) -> Fixture:
    """A container without a top: floor and four walls around an inside of the given half extents."""
    half = WALL / 2
    shapes = [Shape("box", (half_x, half_y, half), (0, 0, half), colour=colour)]
    for sign in (-1, 1):
        beside, behind = (sign * (half_x + half), 0.0, height / 2), (0.0, sign * (half_y + half), height / 2)
        shapes.append(Shape("box", (half, half_y + WALL, height / 2), beside, colour=colour))
        shapes.append(Shape("box", (half_x, half, height / 2), behind, colour=colour))
    return Fixture(name, tuple(shapes))


def shelf(name: str) -> Fixture:
    """A raised board with a low rim around one bay, and a back wall away from the robot."""
    inside, rim, half = SHELF_BAY_M, SHELF_RIM_M / 2, WALL / 2
    shapes = [
        Shape(
            "box",
            (inside + WALL, inside + WALL, SHELF_HEIGHT_M / 2),
            (0, 0, SHELF_HEIGHT_M / 2),
            colour="wood",
        ),
        Shape(
            "box",
            (inside + WALL, half, 3 * rim),
            (0, inside + half, SHELF_HEIGHT_M + 3 * rim),
            colour="slate",
        ),
        Shape("box", (inside + WALL, half, rim), (0, -inside - half, SHELF_HEIGHT_M + rim), colour="slate"),
    ]
    shapes += [
        Shape("box", (half, inside, rim), (sign * (inside + half), 0, SHELF_HEIGHT_M + rim), colour="slate")
        for sign in (-1, 1)
    ]
    return Fixture(name, tuple(shapes))


RED_CUBE = Thing(
    "red_cube", (Shape("box", (0.021, 0.021, 0.021), colour="red"),), 0.06, 0.021, 0.0, 0.020, scalable=True
)
GREEN_CYLINDER = Thing(
    "green_cylinder",
    (Shape("cylinder", (0.021, 0.023), colour="green"),),
    0.06,
    0.023,
    0.0,
    0.020,
    scalable=True,
)
BLUE_BAR = Thing(
    "blue_bar", (Shape("box", (0.016, 0.034, 0.018), colour="blue"),), 0.06, 0.018, 0.0, 0.015, scalable=True
)
GROCERIES = (RED_CUBE, GREEN_CYLINDER, BLUE_BAR)
SHELVES = (shelf("left_shelf"), shelf("right_shelf"))

GLASS_HEIGHT = 0.06
GLASS = Fixture(
    "glass",
    (Shape("cylinder", (0.030, GLASS_HEIGHT / 2), (0, 0, GLASS_HEIGHT / 2), colour="glass"),),
    vessel=Vessel(0.004, GLASS_HEIGHT, 0.032, 0.028, 3.0, colour="orange"),
)
