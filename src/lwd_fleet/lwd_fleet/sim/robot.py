# SPDX-License-Identifier: Apache-2.0
"""The simulated dual-arm robot: one set of numbers, written out as URDF, as robot YAML and as MJCF.

Two six-joint arms on the far side of a table from the operator's view (y < 0), tools pointing down at home,
parallel grippers. A gripper's position is how far each of its two fingers is from the middle: 0 closed,
0.04 m open.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from lwd_policy.embodiment import Embodiment

NAME = "sim_dual_arm"
BASE_LINK = "base_link"
ARMS = ("left", "right")
MOUNT = {"left": (-0.22, -0.38, 0.0), "right": (0.22, -0.38, 0.0)}  # m; arm x points along the table's y
MOUNT_YAW = math.pi / 2
GRIPPER_OPEN_M = 0.04
TCP_DISTANCE_M = 0.10  # hand -> between the finger pads, along the tool


@dataclass(frozen=True)
class Shape:
    """A primitive. size: box half extents, cylinder (radius, half length); rpy as in URDF (fixed axes)."""

    kind: str
    size: tuple[float, ...]
    xyz: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rpy: tuple[float, float, float] = (0.0, 0.0, 0.0)
    colour: str = "body"


@dataclass(frozen=True)
class Segment:
    """A link and the revolute joint that carries it."""

    xyz: tuple[float, float, float]  # joint origin in the parent link
    axis: tuple[float, float, float]
    lower: float
    upper: float
    velocity: float  # rad/s
    acceleration: float  # rad/s^2
    home: float  # rad
    mass: float  # kg
    shapes: tuple[Shape, ...]


_ACROSS = (math.pi / 2, 0.0, 0.0)  # turns a cylinder's axis from z to y
_ALONG = (0.0, math.pi / 2, 0.0)  # to x

SEGMENTS = (
    Segment((0, 0, 0.10), (0, 0, 1), -2.6, 2.6, 2.5, 12.0, 0.0, 2.0, (
        Shape("cylinder", (0.055, 0.06), (0, 0, 0.05)),
        Shape("cylinder", (0.05, 0.065), (0, 0, 0.15), _ACROSS, "joint"),
    )),
    Segment((0, 0, 0.15), (0, 1, 0), -1.2, 1.7, 2.5, 12.0, -0.25, 2.0, (
        Shape("cylinder", (0.038, 0.18), (0, 0, 0.18)),
        Shape("cylinder", (0.043, 0.055), (0, 0, 0.36), _ACROSS, "joint"),
    )),
    Segment((0, 0, 0.36), (0, 1, 0), -1.3, 2.2, 2.5, 12.0, 0.95, 1.2, (
        Shape("cylinder", (0.032, 0.09), (0.09, 0, 0), _ALONG),
    )),
    Segment((0.18, 0, 0), (1, 0, 0), -2.8, 2.8, 3.5, 20.0, 0.0, 0.8, (
        Shape("cylinder", (0.028, 0.09), (0.09, 0, 0), _ALONG),
    )),
    Segment((0.18, 0, 0), (0, 1, 0), -2.0, 2.0, 3.5, 20.0, -0.70, 0.5, (
        Shape("cylinder", (0.032, 0.04), (0, 0, 0), _ACROSS, "joint"),
    )),
    Segment((0, 0, -0.06), (0, 0, -1), -3.0, 3.0, 3.5, 20.0, 0.0, 0.4, (
        Shape("cylinder", (0.024, 0.02), (0, 0, 0.01)),
        Shape("box", (0.014, 0.055, 0.010), (0, 0, -0.02), (0, 0, 0), "accent"),
    )),
)  # fmt: skip

# The hand is the last link. Its tool frame: z along the approach (down at home), x as the link's x.
TOOL_RPY = (math.pi, 0.0, 0.0)
FINGER_ORIGIN = (0.0, 0.0, -0.03)  # in the hand, fingers closed
FINGER_SHAPE = Shape("box", (0.010, 0.005, 0.040), (0.0, 0.005, -0.04), (0, 0, 0), "finger")
FINGER_MASS = 0.05
FINGER_VELOCITY = 0.5  # m/s
FINGER_ACCELERATION = 4.0  # m/s^2
FINGER_HOME = GRIPPER_OPEN_M

COLOURS = {  # rgba; the accent tells the arms apart
    "body": (0.82, 0.83, 0.85, 1.0),
    "joint": (0.35, 0.36, 0.40, 1.0),
    "finger": (0.15, 0.15, 0.17, 1.0),
    "left_accent": (0.10, 0.62, 0.68, 1.0),
    "right_accent": (0.72, 0.28, 0.66, 1.0),
}


def arm_joints(arm: str) -> tuple[str, ...]:
    """Names of the arm's six joints."""
    return tuple(f"{arm}_joint_{index + 1}" for index in range(len(SEGMENTS)))


JOINT_NAMES = tuple(name for arm in ARMS for name in (*arm_joints(arm), f"{arm}_gripper"))


def text(values: tuple[float, ...]) -> str:
    """Numbers as XML attributes want them; the same digits in every file."""
    return " ".join(f"{value:.12g}" for value in values)


def colour_name(shape: Shape, arm: str) -> str:
    """Key of COLOURS for a shape of an arm."""
    return f"{arm}_accent" if shape.colour == "accent" else shape.colour


# URDF and YAML ---------------------------------------------------------------------------------------


def urdf() -> str:
    """The robot as URDF: geometry, limits, visuals; no collisions, as the arms collide with nothing."""
    lines = ['<?xml version="1.0"?>', f'<robot name="{NAME}">']
    lines += [
        f'  <material name="{name}"><color rgba="{text(rgba)}"/></material>' for name, rgba in COLOURS.items()
    ]
    lines.append(f'  <link name="{BASE_LINK}"/>')
    for arm in ARMS:
        base = Shape("cylinder", (0.07, 0.05), (0, 0, 0.05), colour="joint")
        lines += _urdf_link(f"{arm}_mount", (base,), arm, mass=4.0)
        lines += _urdf_fixed(f"{arm}_mount_joint", BASE_LINK, f"{arm}_mount", MOUNT[arm], (0, 0, MOUNT_YAW))
        parent = f"{arm}_mount"
        for index, (joint, segment) in enumerate(zip(arm_joints(arm), SEGMENTS, strict=True)):
            link = f"{arm}_hand" if index == len(SEGMENTS) - 1 else f"{arm}_link_{index + 1}"
            lines += _urdf_link(link, segment.shapes, arm, segment.mass)
            limit = (segment.lower, segment.upper, segment.velocity, 80.0)
            lines += _urdf_joint(joint, "revolute", parent, link, segment.xyz, segment.axis, limit)
            parent = link
        lines += _urdf_fixed(f"{arm}_tcp_joint", parent, f"{arm}_tcp", (0, 0, -TCP_DISTANCE_M), TOOL_RPY)
        lines.append(f'  <link name="{arm}_tcp"/>')
        for side, sign in (("a", 1.0), ("b", -1.0)):
            finger, joint = (
                f"{arm}_finger_{side}",
                f"{arm}_gripper" if side == "a" else f"{arm}_gripper_mimic",
            )
            lines += _urdf_link(finger, (mirrored(FINGER_SHAPE, sign),), arm, FINGER_MASS)
            limit = (0.0, GRIPPER_OPEN_M, FINGER_VELOCITY, 40.0)
            mimic = None if side == "a" else f"{arm}_gripper"
            lines += _urdf_joint(
                joint, "prismatic", parent, finger, FINGER_ORIGIN, (0, sign, 0), limit, mimic
            )
    return "\n".join([*lines, "</robot>", ""])


def mirrored(shape: Shape, sign: float) -> Shape:
    """The shape for the finger on the +y (1) or -y (-1) side."""
    x, y, z = shape.xyz
    return Shape(shape.kind, shape.size, (x, sign * y, z), shape.rpy, shape.colour)


def robot_yaml() -> str:
    """The robot description that `Embodiment.load` reads."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# Generated from lwd_fleet/sim/robot.py (python -m lwd_fleet.sim.robot config/robots). Do not edit.",
        f"name: {NAME}",
        f"urdf: {NAME}.urdf",
        f"base_link: {BASE_LINK}",
        "joint_names:  # order of every command and state on the wire",
        *(f"  - {name}" for name in JOINT_NAMES),
        "arms:",
    ]
    for arm in ARMS:
        lines += [f"  - name: {arm}", f"    tip_link: {arm}_tcp", f"    gripper: {arm}_gripper"]
    lines.append("home:  # rad; grippers m")
    lines += [f"  {name}: {value:.12g}" for name, value in _per_joint("home", FINGER_HOME).items()]
    lines.append("max_acceleration:  # rad/s^2; grippers m/s^2")
    lines += [
        f"  {name}: {value:.12g}" for name, value in _per_joint("acceleration", FINGER_ACCELERATION).items()
    ]
    return "\n".join([*lines, ""])


def embodiment() -> Embodiment:
    """What `config/robots/sim_dual_arm.yaml` describes, for code that has no configuration directory."""
    content = yaml.safe_load(robot_yaml())
    content["urdf"] = urdf()
    return Embodiment.from_json(json.dumps(content))


def home() -> dict[str, float]:
    """Home position of every joint, rad or m."""
    return _per_joint("home", FINGER_HOME)


def _per_joint(field: str, gripper: float) -> dict[str, float]:
    values: dict[str, float] = {}
    for arm in ARMS:
        values.update(zip(arm_joints(arm), (getattr(segment, field) for segment in SEGMENTS), strict=True))
        values[f"{arm}_gripper"] = gripper
    return values


def _urdf_link(name: str, shapes: tuple[Shape, ...], arm: str, mass: float) -> list[str]:
    inertia = f"{mass * 0.003:.6g}"
    lines = [
        f'  <link name="{name}">',
        f'    <inertial><mass value="{mass:.6g}"/>'
        + f'<inertia ixx="{inertia}" iyy="{inertia}" izz="{inertia}" ixy="0" ixz="0" iyz="0"/></inertial>',
    ]
    for shape in shapes:
        if shape.kind == "box":
            geometry = f'<box size="{text(tuple(2 * value for value in shape.size))}"/>'
        else:
            geometry = f'<cylinder radius="{shape.size[0]:.12g}" length="{2 * shape.size[1]:.12g}"/>'
        lines.append(
            f'    <visual><origin xyz="{text(shape.xyz)}" rpy="{text(shape.rpy)}"/>'
            f'<geometry>{geometry}</geometry><material name="{colour_name(shape, arm)}"/></visual>'
        )
    return [*lines, "  </link>"]


def _urdf_fixed(
    name: str, parent: str, child: str, xyz: tuple[float, float, float], rpy: tuple[float, float, float]
) -> list[str]:
    return [
        f'  <joint name="{name}" type="fixed"><parent link="{parent}"/><child link="{child}"/>'
        + f'<origin xyz="{text(xyz)}" rpy="{text(rpy)}"/></joint>'
    ]


def _urdf_joint(
    name: str,
    kind: str,
    parent: str,
    child: str,
    xyz: tuple[float, float, float],
    axis: tuple[float, float, float],
    limit: tuple[float, float, float, float],
    mimic: str | None = None,
) -> list[str]:
    lower, upper, velocity, effort = limit
    return [
        f'  <joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>',
        f'    <origin xyz="{text(xyz)}"/><axis xyz="{text(axis)}"/>'
        f'<limit lower="{lower:.12g}" upper="{upper:.12g}" '
        f'velocity="{velocity:.12g}" effort="{effort:.12g}"/>'
        + (f'<mimic joint="{mimic}"/>' if mimic else ""),
        "  </joint>",
    ]


def write(directory: Path) -> Path:
    """Write the URDF and the robot YAML; returns the latter."""
    (directory / f"{NAME}.urdf").write_text(urdf(), encoding="utf-8")
    file = directory / f"{NAME}.yaml"
    file.write_text(robot_yaml(), encoding="utf-8")
    return file


if __name__ == "__main__":
    import sys

    write(Path(sys.argv[1]))
