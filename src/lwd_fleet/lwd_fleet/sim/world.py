# SPDX-License-Identifier: Apache-2.0
"""One simulated robot with its task: reset, step, look, judge. A seed fixes every bit of an episode."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lwd_fleet.sim import robot
from lwd_fleet.sim.grasp import Grasps
from lwd_fleet.sim.liquid import Liquids, lean
from lwd_fleet.sim.rendering import shared_renderer
from lwd_fleet.sim.scene import CAMERAS, SUBSTEPS, TICK_S, build_model, liquid_name
from lwd_fleet.sim.shift import Randomisation, SceneVariation, Shift
from lwd_fleet.sim.tasks import TASKS, Goal, Progress, suite_of

Array = NDArray[np.float64]

ABSENT = (0.0, 0.0, -1.0)  # keypoint of what the scene does not have
_KEYPOINT_SIGMA_M = 0.005
# Each use of chance has a stream of its own: one more draw in one of them moves nothing in the others.
_LAYOUT, _SHIFT, _RANDOMISATION, _KEYPOINT, _ARMS = range(5)


class World:
    """A scene with one robot. Positions are in base_link; joints in the order of `robot.JOINT_NAMES`."""

    def __init__(
        self,
        task: str,
        shift: Shift = Shift(),  # noqa: B008 - frozen
        image_size: int = 96,
        randomisation: Randomisation | None = None,
        split: str = "train",
    ) -> None:
        """Call `reset` before anything else. split: which wordings are used, "train" or "heldout"."""
        self.keypoint_names = suite_of(task).keypoints
        self.task = TASKS[task]
        parts = self.task.parts
        self.shift = shift
        self.image_size = image_size
        self.embodiment = robot.embodiment()
        self.goal: Goal = self.task.goals[0]
        self.instruction = ""
        self._randomisation = randomisation
        self._split = split
        self._model = build_model(parts, task, shift.object_scale)
        self._data = mujoco.MjData(self._model)
        self._variation = SceneVariation(self._model, parts)
        self._grasps = Grasps(self._model, self._data, parts)
        self._liquids = Liquids(self._model, self._data, parts)
        self._progress: Progress = self.task.progress(self.goal)
        self._ticks = 0
        self._delayed: deque[Array] = deque()
        self._keypoint_rng = np.random.default_rng(0)
        names = robot.JOINT_NAMES
        self._qpos = np.array([int(self._model.joint(name).qposadr[0]) for name in names])
        self._qvel = np.array([int(self._model.joint(name).dofadr[0]) for name in names])
        self._control = np.array([self._model.actuator(name).id for name in names])
        self._mimic_qpos = [int(self._model.joint(f"{arm}_gripper_mimic").qposadr[0]) for arm in robot.ARMS]
        self._mimic_control = [self._model.actuator(f"{arm}_gripper_mimic").id for arm in robot.ARMS]
        self._grippers = self.embodiment.gripper_columns
        self._bodies = {name: self._model.body(name).id for name in parts.bodies}
        self._free = {thing.name: self._model.joint(thing.name) for thing in parts.things}
        self._panels = {panel.name: panel for panel in parts.panels}

    # Episode -----------------------------------------------------------------------------------------

    def reset(self, seed: int, goal: Goal | None = None) -> None:
        """Set up the episode of a seed (>= 0): layout, goal, wording, shift. A `goal` replaces the drawn."""
        if goal is not None and goal not in self.task.goals:
            raise ValueError(f"{goal} is not a goal of {self.task.name}")
        rng = np.random.default_rng([seed, _LAYOUT])
        drawn = self.task.goals[rng.integers(len(self.task.goals))]
        self.goal = drawn if goal is None else goal
        layout = self.task.layout(rng, self.goal, self.shift.placement_range_scale, self.shift.object_scale)
        wordings = self.task.instructions(self._split, self.goal)
        self.instruction = wordings[rng.integers(len(wordings))]

        self._variation.reset()
        self._variation.apply_shift(self.shift, np.random.default_rng([seed, _SHIFT]))
        if self._randomisation is not None:
            self._variation.apply_randomisation(
                self._randomisation, np.random.default_rng([seed, _RANDOMISATION])
            )
        mujoco.mj_resetData(self._model, self._data)
        for name, (x, y) in layout.fixtures.items():
            self._model.body_pos[self._bodies[name], :2] = x, y
        for name, (x, y, z, yaw) in layout.things.items():
            address = int(self._free[name].qposadr[0])
            self._data.qpos[address : address + 7] = x, y, z, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)
        for name, panel in self._panels.items():
            opening = (layout.panels or {}).get(name, 0.0)
            address = int(self._model.joint(name).qposadr[0])
            self._data.qpos[address] = panel.closed + opening * (panel.open - panel.closed)
        self._liquids.reset()
        self._set_arms(self._starting_joints(seed))
        mujoco.mj_forward(self._model, self._data)
        self._grasps.reset()
        self._progress = self.task.progress(self.goal)
        self._ticks = 0
        self._delayed = deque([self._data.ctrl[self._control].copy()] * self.shift.command_latency_ticks)
        self._keypoint_rng = np.random.default_rng([seed, _KEYPOINT])

    def step(self, command: ArrayLike) -> None:
        """Advance one output tick (0.02 s). command: [14] absolute joint positions, clipped to the limits."""
        wanted = np.array(command, dtype=np.float64)
        if wanted.shape != self._control.shape or not np.isfinite(wanted).all():
            raise ValueError(f"a command is {len(self._control)} finite numbers, got {wanted!r}")
        self._delayed.append(wanted.clip(self.embodiment.lower, self.embodiment.upper))
        target = self._delayed.popleft()
        for arm, column, mimic in zip(robot.ARMS, self._grippers, self._mimic_control, strict=True):
            target[column] = self._data.ctrl[mimic] = self._grasps.command(arm, float(target[column]))
        self._data.ctrl[self._control] = target
        mujoco.mj_step(self._model, self._data, nstep=SUBSTEPS)
        mujoco.mj_kinematics(
            self._model, self._data
        )  # a step ends with the poses before its last integration
        self._ticks += 1
        self._liquids.step(TICK_S)
        if self.task.mechanism is not None:
            self.task.mechanism(self)
        self._progress.update(self)

    @property
    def time_s(self) -> float:
        """Simulated time since reset."""
        return self._ticks * TICK_S

    @property
    def time_limit_s(self) -> float:
        """After which an episode is a failure."""
        return self.task.time_limit_s

    def done(self) -> bool:
        """Whether the task is fulfilled now."""
        return self._progress.done

    def sub_step_scores(self) -> tuple[float, ...]:
        """One number per entry of `task.sub_steps`: 1 reached, 0.5 with a flaw, 0 not."""
        return self._progress.scores

    # What the robot senses ---------------------------------------------------------------------------

    @property
    def joint_positions(self) -> Array:
        """Measured joints, [14] rad or m."""
        return np.array(self._data.qpos[self._qpos])

    @property
    def joint_velocities(self) -> Array:
        """[14] rad/s or m/s."""
        return np.array(self._data.qvel[self._qvel])

    def render(self, camera: str, size: int | None = None) -> NDArray[np.uint8]:
        """Picture of "top", "wrist_left" or "wrist_right": [size, size, 3] RGB (default: image_size)."""
        if camera not in CAMERAS:
            raise ValueError(f"no camera {camera!r}; there are {', '.join(CAMERAS)}")
        pixels = size or self.image_size
        mujoco.mj_camlight(self._model, self._data)
        renderer = shared_renderer(self._model)
        return renderer.render(self._model, self._data, self._model.camera(camera).id, pixels, pixels)

    def field_of_view(self, camera: str) -> float:
        """Nominal vertical (and horizontal) field of view, rad."""
        return float(np.deg2rad(self._model.camera(camera).fovy[0]))

    def keypoints(self, noise: bool = True) -> NDArray[np.float32]:
        """Points of `keypoint_names`, [N, 3] m in base_link, as of a detector: with 5 mm of noise per axis.

        What the scene does not have is at ABSENT. Each noisy call draws anew from the episode's
        own random stream.
        """
        points = np.tile(np.array(ABSENT), (len(self.keypoint_names), 1))
        error = (
            self._keypoint_rng.normal(size=points.shape) * _KEYPOINT_SIGMA_M
            if noise
            else np.zeros_like(points)
        )
        for index, name in enumerate(self.keypoint_names):
            if name in self.task.keypoints:
                points[index] = self._keypoint(name) + error[index]
        return points.astype(np.float32)

    def _keypoint(self, name: str) -> Array:
        for vessel in self.task.parts.vessels:
            if name == liquid_name(vessel):
                return self._liquids.surface(vessel)
        if name in self.task.parts.spots:
            fixture, spot = self.task.parts.spots[name]
            return self.position(fixture) + spot.point
        return self.grasp_point(name) if name in self._free else self.position(name)

    # The truth, for judges, experts and auxiliary targets ----------------------------------------------

    def position(self, name: str) -> Array:
        """True centre of a thing, foot of a fixture, handle of a panel: [3] m."""
        if name in self._panels:
            return self.grasp_point(name)
        return np.array(self._data.xpos[self._bodies[name]])

    def speed(self, name: str) -> float:
        """Of a thing's centre, m/s."""
        address = int(self._free[name].dofadr[0])
        return float(np.linalg.norm(self._data.qvel[address : address + 3]))

    def grasp_point(self, name: str, number: int = 0) -> Array:
        """Where to take a thing or panel, [3] m; number 1 is the place for the other arm, where there is one."""
        return self._grasps.grasp_points(name)[number]

    def held(self, arm: str) -> str | None:
        """What the arm holds."""
        return self._grasps.held(arm)

    def grip(self, arm: str) -> int | None:
        """At which of its grasp points the arm holds what it holds, as in `grasp_point`."""
        return self._grasps.grip(arm)

    def holder(self, name: str) -> str | None:
        """Which arm holds the thing or panel."""
        return self._grasps.holder(name)

    def opening(self, panel: str) -> float:
        """How far a panel is open, 0 to 1."""
        part, value = self._panels[panel], float(self._data.qpos[self._model.joint(panel).qposadr[0]])
        return (value - part.closed) / (part.open - part.closed)

    def panel_handle(self, panel: str, opening: float) -> Array:
        """Where a panel's handle would be at an opening, [3] m."""
        part, body = self._panels[panel], self._bodies[panel]
        value, axis = part.closed + opening * (part.open - part.closed), np.array(part.axis)
        handle = np.array(part.handle)
        if part.joint == "slide":
            handle = handle + value * axis
        else:
            turn = np.zeros(4)
            mujoco.mju_axisAngle2Quat(turn, axis / np.linalg.norm(axis), value)
            handle, unturned = np.zeros(3), handle
            mujoco.mju_rotVecQuat(handle, unturned, turn)
        foot: Array = self._data.xpos[self._model.body_parentid[body]]
        return foot + part.origin + handle

    def lean(self, name: str) -> float:
        """Angle between a thing's axis and the vertical, rad."""
        return lean(self._data, self._bodies[name])

    def heading(self, name: str) -> float:
        """Angle from base_link's y axis to a thing's, about the vertical, rad."""
        axes = self._data.xmat[self._bodies[name]]
        return float(np.arctan2(-axes[1], axes[4]))

    def content(self, vessel: str) -> Mapping[str, float]:
        """Portions of each ingredient in a vessel."""
        return self._liquids.content(vessel)

    def mouth(self, vessel: str) -> Array:
        """Centre of a vessel's opening, [3] m."""
        return self._liquids.mouth(vessel)

    def spout(self, vessel: str) -> Array | None:
        """Tip of a vessel's spout, if it has one, [3] m."""
        return self._liquids.spout(vessel)

    @property
    def spilled(self) -> float:
        """Portions of liquid that ended outside of any vessel."""
        return self._liquids.spilled

    def add(self, vessel: str, ingredient: str, portions: float) -> None:
        """Put liquid into a vessel (take it out, if negative); what does not fit is spilled."""
        self._liquids.add(vessel, ingredient, portions)

    def fall(self, point: Array, ingredient: str, portions: float) -> None:
        """Let liquid fall from a point, [3] m: into the vessel below, or it is spilled."""
        self._liquids.fall(point, ingredient, portions)

    def tool(self, arm: str) -> Array:
        """True tool centre point, [3] m; differs from forward kinematics by the calibration error."""
        return np.array(self._data.site(f"{arm}_tcp").xpos)

    def state(self) -> Array:
        """Everything that moves, for comparing episodes bit by bit."""
        levels = [sum(self.content(vessel).values()) for vessel in self.task.parts.vessels]
        data = self._data
        return np.concatenate([data.qpos, data.qvel, data.ctrl, data.eq_active, levels])

    def _starting_joints(self, seed: int) -> Array:
        joints = self.embodiment.home.copy()
        if self._randomisation is None or not self._randomisation.arms:
            return joints
        rng = np.random.default_rng([seed, _ARMS])
        for arm in self.embodiment.arms:
            columns = self.embodiment.arm_columns(arm)
            _, down = arm.chain.forward(joints[columns[:-1]])
            x = rng.uniform(-0.36, 0.16) * (1.0 if arm.name == "left" else -1.0)
            target = [x, rng.uniform(-0.16, 0.18), rng.uniform(0.02, 0.22)]
            joints[columns[:-1]] = arm.chain.inverse(target, down, joints[columns[:-1]])
            joints[columns[-1]] = rng.uniform(0.0, robot.GRIPPER_OPEN_M)
        return joints

    def _set_arms(self, joints: Array) -> None:
        self._data.qpos[self._qpos] = joints
        self._data.qpos[self._mimic_qpos] = joints[self._grippers]
        self._data.ctrl[self._control] = joints
        self._data.ctrl[self._mimic_control] = joints[self._grippers]
