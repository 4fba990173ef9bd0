# SPDX-License-Identifier: Apache-2.0
"""One simulated robot with its task: reset, step, look, judge. A seed fixes every bit of an episode."""

from __future__ import annotations

from collections import deque

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lwd_fleet.sim import robot
from lwd_fleet.sim.grasp import Grasps
from lwd_fleet.sim.rendering import shared_renderer
from lwd_fleet.sim.scene import CAMERAS, CARRIED, FURNITURE, KEYPOINT_NAMES, SUBSTEPS, TICK_S, build_model
from lwd_fleet.sim.shift import Randomisation, SceneVariation, Shift
from lwd_fleet.sim.tasks import TASKS, Goal, Progress

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
        if task not in TASKS:
            raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
        self.task = TASKS[task]
        self.shift = shift
        self.image_size = image_size
        self.embodiment = robot.embodiment()
        self.goal: Goal = self.task.goals[0]
        self.instruction = ""
        self._randomisation = randomisation
        self._split = split
        self._model = build_model(task, shift.object_scale)
        self._data = mujoco.MjData(self._model)
        self._variation = SceneVariation(self._model, task)
        self._grasps = Grasps(self._model, self._data, task)
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
        self._bodies = {name: self._model.body(name).id for name in (*CARRIED[task], *FURNITURE[task])}
        self._free = {name: self._model.joint(name) for name in CARRIED[task]}

    # Episode -----------------------------------------------------------------------------------------

    def reset(self, seed: int, goal: Goal | None = None) -> None:
        """Set up the episode of a seed (>= 0): layout, goal, wording, shift. A `goal` replaces the drawn."""
        if goal is not None and goal not in self.task.goals:
            raise ValueError(f"{goal} is not a goal of {self.task.name}")
        rng = np.random.default_rng([seed, _LAYOUT])
        layout = self.task.layout(rng, self.shift.placement_range_scale, self.shift.object_scale)
        drawn = self.task.goals[rng.integers(len(self.task.goals))]
        self.goal = drawn if goal is None else goal
        wordings = self.task.instructions(self._split, self.goal)
        self.instruction = wordings[rng.integers(len(wordings))]

        self._variation.reset()
        self._variation.apply_shift(self.shift, np.random.default_rng([seed, _SHIFT]))
        if self._randomisation is not None:
            self._variation.apply_randomisation(
                self._randomisation, np.random.default_rng([seed, _RANDOMISATION])
            )
        mujoco.mj_resetData(self._model, self._data)
        for name, (x, y) in layout.furniture.items():
            self._model.body_pos[self._bodies[name], :2] = x, y
        for name, (x, y, z, yaw) in layout.things.items():
            address = int(self._free[name].qposadr[0])
            self._data.qpos[address : address + 7] = x, y, z, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)
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
        """One number per entry of `task.sub_steps`, 1 where it was reached."""
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
        """Points of KEYPOINT_NAMES, [7, 3] m in base_link, as of a detector: with 5 mm of noise per axis.

        What the scene does not have is at ABSENT. Each noisy call draws anew from the episode's
        own random stream.
        """
        points = np.tile(np.array(ABSENT), (len(KEYPOINT_NAMES), 1))
        error = (
            self._keypoint_rng.normal(size=points.shape) * _KEYPOINT_SIGMA_M
            if noise
            else np.zeros_like(points)
        )
        for index, name in enumerate(KEYPOINT_NAMES):
            if name in self._bodies:
                points[index] = self.grasp_point(name) if name in self._free else self.position(name)
                points[index] += error[index]
        return points.astype(np.float32)

    # The truth, for judges, experts and auxiliary targets ----------------------------------------------

    def position(self, name: str) -> Array:
        """True centre of an object (of the foot of a piece of furniture), [3] m."""
        return np.array(self._data.xpos[self._bodies[name]])

    def speed(self, name: str) -> float:
        """Of a thing's centre, m/s."""
        address = int(self._free[name].dofadr[0])
        return float(np.linalg.norm(self._data.qvel[address : address + 3]))

    def grasp_point(self, name: str) -> Array:
        """Where to take a thing, [3] m."""
        return self._grasps.grasp_point(name)

    def held(self, arm: str) -> str | None:
        """What the arm carries."""
        return self._grasps.held(arm)

    def holder(self, name: str) -> str | None:
        """Which arm carries the thing."""
        return self._grasps.holder(name)

    def tool(self, arm: str) -> Array:
        """True tool centre point, [3] m; differs from forward kinematics by the calibration error."""
        return np.array(self._data.site(f"{arm}_tcp").xpos)

    def state(self) -> Array:
        """Everything that moves, for comparing episodes bit by bit."""
        return np.concatenate([self._data.qpos, self._data.qvel, self._data.ctrl, self._data.eq_active])

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
