# SPDX-License-Identifier: Apache-2.0
"""The simulated world as MJCF: the robot of `robot.py` on a table, and the parts of a task.

Frame: base_link = world; x right, y away from the robot, z up; the table top is z = 0. Primitives only, no
assets. The arms collide with nothing: things touch each other, the table and the fixtures, and are carried by
welds (`grasp.py`), which makes a grasp a decision of geometry and not of contact solver settings.
"""

from __future__ import annotations

import dataclasses

import mujoco

from lwd_fleet.sim import robot
from lwd_fleet.sim.parts import COLOURS, Fixture, Panel, Parts, Thing, Vessel
from lwd_fleet.sim.robot import SEGMENTS, Segment, Shape, text

TIMESTEP_S = 0.004
SUBSTEPS = 5
TICK_S = TIMESTEP_S * SUBSTEPS

CAMERAS = ("top", "wrist_left", "wrist_right")
TABLE_MATERIALS = ("table_plain", "table_checker", "table_gradient", "table_stripes")

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


def build_model(parts: Parts, name: str, item_scale: float = 1.0) -> mujoco.MjModel:
    """Compile a scene. Each robot needs a model of its own: grasps, levels and shifts are written into it."""
    return mujoco.MjModel.from_xml_string(mjcf(parts, name, item_scale))


def mjcf(parts: Parts, name: str, item_scale: float = 1.0) -> str:
    """A scene as MJCF text, its scalable things larger or smaller by a factor."""
    bodies = "\n".join(_arm(arm) for arm in robot.ARMS)
    fixtures = "\n".join(_fixture(fixture) for fixture in parts.fixtures)
    things = "\n".join(_thing(thing, item_scale if thing.scalable else 1.0) for thing in parts.things)
    constraints = "\n".join(
        [
            f'<weld name="{constraint_name(arm, thing.name)}" body1="{arm}_hand" body2="{thing.name}" '
            'active="false" solref="0.008 1"/>'
            for arm in robot.ARMS
            for thing in parts.things
        ]
        + [
            f'<connect name="{constraint_name(arm, panel.name)}" body1="{arm}_hand" body2="{panel.name}" '
            'anchor="0 0 0" active="false" solref="0.008 1"/>'
            for arm in robot.ARMS
            for panel in parts.panels
        ]
    )
    actuators = "\n".join(_actuators(arm) for arm in robot.ARMS)
    square = 'type="2d" width="128" height="128"'
    return f"""<mujoco model="{robot.NAME}_{name}">
<compiler angle="radian" eulerseq="XYZ" autolimits="true"/>
<option timestep="{TIMESTEP_S}" integrator="implicitfast" iterations="30" ls_iterations="20"/>
<visual>
  <headlight ambient="0.35 0.35 0.35" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
  <global offwidth="640" offheight="640"/><map znear="0.01" zfar="20"/>
  <quality shadowsize="0" offsamples="4"/>
</visual>
<default>
  <geom contype="1" conaffinity="3" condim="4" friction="0.8 0.02 0.001" solref="0.008 1" density="0"/>
  <default class="robot">
    <geom contype="0" conaffinity="0"/>
    <joint armature="0.05" damping="2"/>
  </default>
  <default class="fixture"><geom contype="2" conaffinity="1" density="1000"/></default>
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
    contype="2" conaffinity="1" material="table_plain" density="1000"/>
  <camera name="top" {_look(*_TOP_CAMERA, right=(1, 0, 0))} fovy="{_TOP_FOV_DEG}"/>
{bodies}
{fixtures}
{things}
</worldbody>
<equality>
{constraints}
</equality>
<actuator>
{actuators}
</actuator>
</mujoco>
"""


def constraint_name(arm: str, part: str) -> str:
    """Name of the equality constraint with which an arm holds a thing or panel."""
    return f"{arm}_holds_{part}"


def liquid_name(vessel: str) -> str:
    """Name of the geom, and of the keypoint, that shows the level in a vessel."""
    return f"{vessel}_liquid"


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
    half = max(shapes[0].size)
    inertia = f"{thing.mass * half * half:.6g}"
    return (
        f'<body name="{thing.name}"><freejoint name="{thing.name}"/>'
        f'<inertial pos="0 0 0" mass="{thing.mass}" diaginertia="{inertia} {inertia} {inertia}"/>'
        f"{_geoms(thing.name, tuple(shapes))}{_liquid(thing.name, thing.vessel)}</body>"
    )


def _fixture(fixture: Fixture) -> str:
    """Static; its place is set at reset."""
    panels = "".join(_panel(panel) for panel in fixture.panels)
    return (
        f'<body name="{fixture.name}" childclass="fixture">{_geoms(fixture.name, fixture.shapes)}'
        f"{_liquid(fixture.name, fixture.vessel)}{panels}</body>"
    )


def _panel(panel: Panel) -> str:
    low, high = sorted((panel.closed, panel.open))
    inertia = f"{panel.mass * 0.004:.6g}"
    return (
        f'<body name="{panel.name}" pos="{text(panel.origin)}" gravcomp="1">'
        f'<joint name="{panel.name}" type="{panel.joint}" axis="{text(panel.axis)}" '
        f'range="{text((low, high))}" ref="0" springref="{panel.closed:.12g}" stiffness="{panel.spring:.12g}" '
        f'frictionloss="{panel.friction:.12g}" damping="0.02" armature="0.002" '
        'solreflimit="0.008 1" solimplimit="0.98 0.999 0.001"/>'  # an arm that pulls on gives way, not the stop
        f'<inertial pos="0 0 0" mass="{panel.mass}" diaginertia="{inertia} {inertia} {inertia}"/>'
        f"{_geoms(panel.name, panel.shapes)}</body>"
    )


def _geoms(name: str, shapes: tuple[Shape, ...]) -> str:
    return "".join(
        _geom(shape, COLOURS[shape.colour], f'name="{name}_{index}"') for index, shape in enumerate(shapes)
    )


def _liquid(name: str, vessel: Vessel | None) -> str:
    """A disc that touches nothing; `liquid.py` moves it with the level."""
    if vessel is None:
        return ""
    disc = Shape("cylinder", (0.9 * vessel.radius, 0.001), (0, 0, vessel.floor), colour=vessel.colour)
    extra = f'name="{liquid_name(name)}" contype="0" conaffinity="0" density="0"'
    return _geom(disc, COLOURS[disc.colour], extra)
