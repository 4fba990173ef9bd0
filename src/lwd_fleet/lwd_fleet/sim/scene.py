# SPDX-License-Identifier: Apache-2.0
"""The simulated world as MJCF: the robot of `robot.py` on a table, three items, and each task's furniture.

Frame: base_link = world; x right, y away from the robot, z up; the table top is z = 0. Primitives only, no
assets. The arms collide with nothing: objects touch each other, the table and the furniture, and are carried
by welds (`grasp.py`), which makes a grasp a decision of geometry and not of contact solver settings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mujoco

from lwd_fleet.sim import robot
from lwd_fleet.sim.robot import SEGMENTS, Segment, Shape, text

TIMESTEP_S = 0.004
SUBSTEPS = 5
TICK_S = TIMESTEP_S * SUBSTEPS

CAMERAS = ("top", "wrist_left", "wrist_right")
ITEMS = ("red_cube", "green_cylinder", "blue_bar")
KEYPOINT_NAMES = (*ITEMS, "left_tray", "right_tray", "box", "lid")
TABLE_MATERIALS = ("table_plain", "table_checker", "table_gradient", "table_stripes")

TRAY_INNER = (0.065, 0.075)  # half extents, m
TRAY_WALL_HEIGHT = 0.022
BOX_INNER = 0.052  # half extent, m
BOX_HEIGHT = 0.056
WALL = 0.004
LID_HALF = 0.060
LID_THICKNESS = 0.006
KNOB_HEIGHT = 0.034


@dataclass(frozen=True)
class Thing:
    """An object that an arm can carry."""

    name: str
    shapes: tuple[Shape, ...]
    mass: float  # kg
    rest_height: float  # of its centre over what it stands on
    grasp_offset: float  # of its grasp point over its centre
    grip: float  # gripper position at which the fingers touch it


ITEM_THINGS = (
    Thing("red_cube", (Shape("box", (0.021, 0.021, 0.021), colour="red"),), 0.06, 0.021, 0.0, 0.020),
    Thing("green_cylinder", (Shape("cylinder", (0.021, 0.023), colour="green"),), 0.06, 0.023, 0.0, 0.020),
    Thing("blue_bar", (Shape("box", (0.016, 0.034, 0.018), colour="blue"),), 0.06, 0.018, 0.0, 0.015),
)
LID = Thing(
    "lid",
    (
        Shape("box", (LID_HALF, LID_HALF, LID_THICKNESS / 2), colour="lid"),
        Shape("cylinder", (0.010, KNOB_HEIGHT / 2), (0, 0, (LID_THICKNESS + KNOB_HEIGHT) / 2), colour="knob"),
    ),
    0.10,
    LID_THICKNESS / 2,
    (LID_THICKNESS + KNOB_HEIGHT) / 2,
    0.009,
)
THINGS = {thing.name: thing for thing in (*ITEM_THINGS, LID)}
FURNITURE = {"place": ("left_tray", "right_tray"), "stow": ("box",)}
CARRIED = {"place": ITEMS, "stow": (*ITEMS, "lid")}

_COLOURS = {
    "red": (0.85, 0.12, 0.10, 1.0),
    "green": (0.10, 0.65, 0.20, 1.0),
    "blue": (0.12, 0.25, 0.85, 1.0),
    "lid": (0.93, 0.80, 0.20, 1.0),
    "knob": (0.25, 0.12, 0.30, 1.0),
    "left_tray": (0.22, 0.24, 0.30, 1.0),
    "right_tray": (0.22, 0.24, 0.30, 1.0),
    "box": (0.45, 0.28, 0.14, 1.0),
}
_WRIST_CAMERA = ((0.085, 0.0, 0.03), (0.018, 0.0, -0.12))  # in the hand: where it is, what it looks at
_TOP_CAMERA = ((0.0, 0.10, 1.15), (0.0, 0.03, 0.0))
_TOP_FOV_DEG, _WRIST_FOV_DEG = 38.0, 72.0
_GAINS = (
    3000.0,
    3000.0,
    3000.0,
    800.0,
    800.0,
    800.0,
)  # N m / rad: 2-6 cm of lag would show at the speeds in use


def build_model(task: str, item_scale: float = 1.0) -> mujoco.MjModel:
    """Compile the scene of a task ("place" or "stow").

    Each robot needs a model of its own: welds and shifts are written into it.
    """
    return mujoco.MjModel.from_xml_string(mjcf(task, item_scale))


def mjcf(task: str, item_scale: float = 1.0) -> str:
    """The scene of a task as MJCF text, its items larger or smaller by a factor."""
    if task not in FURNITURE:
        raise ValueError(f"no scene for task {task!r}; there are {', '.join(FURNITURE)}")
    bodies = "\n".join(_arm(arm) for arm in robot.ARMS)
    furniture = "\n".join(_container(name) for name in FURNITURE[task])
    things = "\n".join(_thing(THINGS[name], item_scale if name in ITEMS else 1.0) for name in CARRIED[task])
    welds = "\n".join(
        f'<weld name="{weld_name(arm, name)}" body1="{arm}_hand" body2="{name}" '
        'active="false" solref="0.008 1"/>'
        for arm in robot.ARMS
        for name in CARRIED[task]
    )
    actuators = "\n".join(_actuators(arm) for arm in robot.ARMS)
    square = 'type="2d" width="128" height="128"'
    return f"""<mujoco model="{robot.NAME}_{task}">
<compiler angle="radian" eulerseq="XYZ" autolimits="true"/>
<option timestep="{TIMESTEP_S}" integrator="implicitfast" iterations="30" ls_iterations="20"/>
<visual>
  <headlight ambient="0.35 0.35 0.35" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
  <global offwidth="640" offheight="640"/><map znear="0.01" zfar="20"/>
  <quality shadowsize="0" offsamples="4"/>
</visual>
<default>
  <geom condim="4" friction="0.8 0.02 0.001" solref="0.008 1" density="0"/>
  <default class="robot">
    <geom contype="0" conaffinity="0"/>
    <joint armature="0.05" damping="2"/>
  </default>
  <default class="furniture"><geom density="1000"/></default>
</default>
<asset>
  <texture name="checker" builtin="checker" {square} rgb1="1 1 1" rgb2="0.6 0.6 0.6"/>
  <texture name="gradient" builtin="gradient" {square} rgb1="1 1 1" rgb2="0.5 0.5 0.5"/>
  <texture name="stripes" builtin="flat" mark="edge" {square} rgb1="0.9 0.9 0.9" markrgb="0.4 0.4 0.4"/>
  <material name="table_plain" rgba="0.62 0.60 0.56 1" specular="0"/>
  <material name="table_checker" texture="checker" texrepeat="9 6" rgba="0.62 0.60 0.56 1" specular="0"/>
  <material name="table_gradient" texture="gradient" texrepeat="1 1" rgba="0.62 0.60 0.56 1" specular="0"/>
  <material name="table_stripes" texture="stripes" texrepeat="5 5" rgba="0.62 0.60 0.56 1" specular="0"/>
</asset>
<worldbody>
  <light name="ceiling" pos="0.3 0.6 2" dir="-0.15 -0.3 -1" directional="true"
    castshadow="false" diffuse="0.6 0.6 0.6" specular="0 0 0"/>
  <geom name="floor" type="plane" pos="0 0 -0.75" size="4 4 0.1" rgba="0.30 0.30 0.32 1"/>
  <geom name="table" type="box" pos="0 -0.02 -0.02" size="0.65 0.50 0.02"
    material="table_plain" density="1000"/>
  <camera name="top" {_look(*_TOP_CAMERA, right=(1, 0, 0))} fovy="{_TOP_FOV_DEG}"/>
{bodies}
{furniture}
{things}
</worldbody>
<equality>
{welds}
</equality>
<actuator>
{actuators}
</actuator>
</mujoco>
"""


def weld_name(arm: str, thing: str) -> str:
    """Name of the equality constraint with which an arm carries a thing."""
    return f"{arm}_holds_{thing}"


def _look(position: tuple[float, ...], target: tuple[float, ...], right: tuple[float, ...]) -> str:
    """Camera pose at `position` that looks at `target`, with the direction `right` right in the picture."""
    back = tuple(p - t for p, t in zip(position, target, strict=True))
    up = (
        back[1] * right[2] - back[2] * right[1],
        back[2] * right[0] - back[0] * right[2],
        back[0] * right[1] - back[1] * right[0],
    )
    return f'pos="{text(position)}" xyaxes="{text(right)} {text(up)}"'


def _arm(arm: str) -> str:
    base = Shape("cylinder", (0.07, 0.05), (0, 0, 0.05), colour="joint")
    lines = [
        f'<body name="{arm}_mount" childclass="robot" pos="{text(robot.MOUNT[arm])}" '
        + f'euler="0 0 {robot.MOUNT_YAW:.12g}">',
        _geom(base, robot.COLOURS[base.colour]),
    ]
    for index, (joint, segment) in enumerate(zip(robot.arm_joints(arm), SEGMENTS, strict=True)):
        name = f"{arm}_hand" if index == len(SEGMENTS) - 1 else f"{arm}_link_{index + 1}"
        lines += _segment(name, joint, segment, arm)
    lines.append(
        f'<site name="{arm}_tcp" pos="0 0 {-robot.TCP_DISTANCE_M:.12g}" euler="{text(robot.TOOL_RPY)}" '
        'size="0.005" group="4"/>'
    )
    lines.append(
        f'<camera name="wrist_{arm}" {_look(*_WRIST_CAMERA, right=(0, -1, 0))} fovy="{_WRIST_FOV_DEG}"/>'
    )
    for side, sign in (("a", 1.0), ("b", -1.0)):
        shape = robot.mirrored(robot.FINGER_SHAPE, sign)
        lines.append(
            f'<body name="{arm}_finger_{side}" pos="{text(robot.FINGER_ORIGIN)}" gravcomp="1">'
            f'<joint name="{_finger_joint(arm, side)}" type="slide" axis="0 {sign:g} 0" '
            f'range="0 {robot.GRIPPER_OPEN_M}" damping="1" armature="0.02"/>'
            f"{_inertial(robot.FINGER_MASS)}{_geom(shape, robot.COLOURS[shape.colour])}</body>"
        )
    return "\n".join([*lines, "</body>" * (len(SEGMENTS) + 1)])


def _segment(name: str, joint: str, segment: Segment, arm: str) -> list[str]:
    return [
        f'<body name="{name}" pos="{text(segment.xyz)}" gravcomp="1">',
        f'<joint name="{joint}" axis="{text(segment.axis)}" range="{text((segment.lower, segment.upper))}"/>',
        _inertial(segment.mass),
        *(_geom(shape, robot.COLOURS[robot.colour_name(shape, arm)]) for shape in segment.shapes),
    ]


def _finger_joint(arm: str, side: str) -> str:
    return f"{arm}_gripper" if side == "a" else f"{arm}_gripper_mimic"


def _inertial(mass: float) -> str:
    inertia = f"{mass * 0.003:.6g}"
    return f'<inertial pos="0 0 0" mass="{mass:.6g}" diaginertia="{inertia} {inertia} {inertia}"/>'


def _geom(shape: Shape, rgba: tuple[float, ...], extra: str = "") -> str:
    return (
        f'<geom type="{shape.kind}" size="{text(shape.size)}" '
        f'pos="{text(shape.xyz)}" euler="{text(shape.rpy)}" rgba="{text(rgba)}" {extra}/>'
    )


def _actuators(arm: str) -> str:
    lines = [
        f'<position name="{joint}" joint="{joint}" kp="{gain:g}" dampratio="1" inheritrange="1"/>'
        for joint, gain in zip(robot.arm_joints(arm), _GAINS, strict=True)
    ]
    lines += [
        f'<position name="{joint}" joint="{joint}" kp="300" dampratio="1" inheritrange="1"/>'
        for joint in (_finger_joint(arm, "a"), _finger_joint(arm, "b"))
    ]
    return "\n".join(lines)


def _thing(thing: Thing, scale: float) -> str:
    shapes = [
        dataclasses.replace(shape, size=tuple(scale * value for value in shape.size))
        for shape in thing.shapes
    ]
    geoms = "".join(
        _geom(shape, _COLOURS[shape.colour], f'name="{thing.name}_{index}"')
        for index, shape in enumerate(shapes)
    )
    half = max(shapes[0].size)
    inertia = f"{thing.mass * half * half:.6g}"
    return (
        f'<body name="{thing.name}"><freejoint name="{thing.name}"/>'
        f'<inertial pos="0 0 0" mass="{thing.mass}" diaginertia="{inertia} {inertia} {inertia}"/>'
        f"{geoms}</body>"
    )


def _container(name: str) -> str:
    """An open container standing on the table: floor and four walls. Static; its place is set at reset."""
    x, y, height = (BOX_INNER, BOX_INNER, BOX_HEIGHT) if name == "box" else (*TRAY_INNER, TRAY_WALL_HEIGHT)
    half = WALL / 2
    shapes = [Shape("box", (x, y, half), (0, 0, half))]
    for sign in (-1, 1):
        shapes.append(Shape("box", (half, y + WALL, height / 2), (sign * (x + half), 0, height / 2)))
        shapes.append(Shape("box", (x, half, height / 2), (0, sign * (y + half), height / 2)))
    geoms = "".join(
        _geom(shape, _COLOURS[name], f'name="{name}_{index}"') for index, shape in enumerate(shapes)
    )
    return f'<body name="{name}" childclass="furniture">{geoms}</body>'
