# SPDX-License-Identifier: Apache-2.0
"""How a deployment differs from the demonstrations (`Shift`) and what pretraining ignores (`Randomisation`).

Both are applied to the model at reset, from random streams of their own: with the same seed the objects lie
in the same places whatever the shift, so that success rates with and without it are paired.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim import robot
from lwd_fleet.sim.parts import Parts
from lwd_fleet.sim.scene import CAMERAS, TABLE_MATERIALS


@dataclass(frozen=True)
class Shift:
    """Deployment shift; the default is none. Random parts are drawn anew for each episode."""

    placement_range_scale: float = 1.0  # of the zones where items are put
    calibration_offset_m: tuple[float, float, float, float] = (
        0.0,
        0.0,
        0.0,
        0.0,
    )  # mounts: left x, y, right x, y
    calibration_sigma_m: float = 0.0  # more of the same, random
    camera_offset_m: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the top camera
    camera_jitter_m: float = 0.0  # sigma of the position of every camera
    friction: float = 1.0  # factor, all contacts
    colour_jitter: float = 0.0  # sigma per channel (0..1), objects and table
    light_jitter: float = 0.0  # relative sigma of brightness, and of the light's direction
    object_scale: float = 1.0  # factor of the items' size
    command_latency_ticks: int = 0  # output ticks between a command and its effect

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                if len(value) != len(field.default):
                    raise ValueError(f"shift.{field.name} needs {len(field.default)} numbers, got {value!r}")
                object.__setattr__(self, field.name, tuple(float(number) for number in value))
            numbers = value if isinstance(field.default, tuple) else (value,)
            if not all(math.isfinite(number) for number in numbers):
                raise ValueError(f"shift.{field.name} is not finite: {value!r}")
        for name in ("placement_range_scale", "friction", "object_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"shift.{name} must be positive, got {getattr(self, name)}")
        if self.command_latency_ticks < 0:
            raise ValueError("shift.command_latency_ticks must not be negative")

    def to_json(self) -> str:
        """Only what differs from the default."""
        default = Shift()
        items = dataclasses.asdict(self).items()
        return json.dumps(
            {key: value for key, value in items if value != getattr(default, key)}, sort_keys=True
        )

    @classmethod
    def parse(cls, text: str) -> Shift:
        """A name of SHIFTS, or JSON; an empty text is no shift. Raises ValueError."""
        if not text.strip() or text.lstrip().startswith("{"):
            return cls.from_json(text)
        if text not in SHIFTS:
            raise ValueError(f"no shift {text!r}; there are {', '.join(SHIFTS)}, or give one as JSON")
        return SHIFTS[text]

    @classmethod
    def from_json(cls, text: str) -> Shift:
        """Inverse of `to_json`; an empty text is no shift. Raises ValueError."""
        content = json.loads(text) if text.strip() else {}
        if not isinstance(content, dict):
            raise ValueError(f"a shift is a JSON object, got {text!r}")
        unknown = content.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown shift: {', '.join(sorted(unknown))}")
        return cls(**content)


SHIFTS = {
    "none": Shift(),
    "placement": Shift(placement_range_scale=1.3),
    "calibration": Shift(calibration_sigma_m=0.012),
    "moderate": Shift(placement_range_scale=1.3, calibration_sigma_m=0.006),
    "camera": Shift(camera_offset_m=(0.01, 0.0, 0.0), camera_jitter_m=0.003),
    "appearance": Shift(colour_jitter=0.05, light_jitter=0.15),
    "latency": Shift(command_latency_ticks=4),
    "demo": Shift(placement_range_scale=1.15, calibration_offset_m=(0.024, 0.016, 0.024, 0.016)),
}
"""Shifts by name, for deployments and experiments."""


@dataclass(frozen=True)
class Randomisation:
    """Wide randomisation of what a picture shows, for pretraining; never used when policies are compared."""

    camera_position_m: float = 0.03  # uniform +-, per axis, every camera
    camera_angle_rad: float = 0.05  # uniform +-, per axis
    camera_fov_deg: float = 2.5  # uniform +-
    light: float = 0.45  # relative, uniform +-
    colour: float = 0.14  # uniform +- per channel
    table: bool = True  # any texture and colour
    arms: bool = True  # tools anywhere over the table, grippers anyhow


class SceneVariation:
    """Writes a shift and a randomisation into a model, starting from its nominal values each time.

    (The size of items is compiled into the model: its collision trees cannot be scaled afterwards.)
    """

    def __init__(self, model: mujoco.MjModel, parts: Parts) -> None:
        self._model = model
        self._fields = (
            "body_pos", "cam_pos", "cam_quat", "cam_fovy", "light_diffuse", "light_dir",
            "geom_rgba", "geom_matid", "geom_friction", "mat_rgba",
        )  # fmt: skip
        self._nominal = {name: getattr(model, name).copy() for name in self._fields}
        self._mounts = [model.body(f"{arm}_mount").id for arm in robot.ARMS]
        self._coloured = self._geoms(parts.bodies)
        self._table = model.geom("table").id
        self._materials = [model.material(name).id for name in TABLE_MATERIALS]
        self._top = model.camera("top").id
        self._cameras = [model.camera(name).id for name in CAMERAS]

    def reset(self) -> None:
        """Back to the nominal scene."""
        for name, value in self._nominal.items():
            getattr(self._model, name)[:] = value

    def apply_shift(self, shift: Shift, rng: np.random.Generator) -> None:
        """Call after `reset`. Always draws the same amount of random numbers."""
        model = self._model
        offset = np.array(shift.calibration_offset_m).reshape(2, 2)
        offset = offset + rng.normal(size=(2, 2)) * shift.calibration_sigma_m
        model.body_pos[self._mounts, :2] += offset
        model.cam_pos[self._top] += shift.camera_offset_m
        model.cam_pos[self._cameras] += rng.normal(size=(len(self._cameras), 3)) * shift.camera_jitter_m
        model.geom_friction[:, 0] *= shift.friction
        self._recolour(rng.normal(size=(len(self._coloured), 3)) * shift.colour_jitter)
        model.mat_rgba[self._materials, :3] += rng.normal(size=3) * shift.colour_jitter
        model.light_diffuse *= max(0.2, 1.0 + rng.normal() * shift.light_jitter)
        self._tilt_light(rng.normal(size=2) * shift.light_jitter)

    def apply_randomisation(self, how: Randomisation, rng: np.random.Generator) -> None:
        """Call after `apply_shift`. (The arms are the world's business.)"""
        model = self._model
        model.cam_pos[self._cameras] += rng.uniform(-1, 1, (len(self._cameras), 3)) * how.camera_position_m
        for camera in self._cameras:
            turn, turned = np.zeros(4), np.zeros(4)
            mujoco.mju_euler2Quat(turn, rng.uniform(-1, 1, 3) * how.camera_angle_rad, "xyz")
            mujoco.mju_mulQuat(turned, model.cam_quat[camera], turn)
            model.cam_quat[camera] = turned
        model.cam_fovy[self._cameras] += rng.uniform(-1, 1, len(self._cameras)) * how.camera_fov_deg
        model.light_diffuse *= 1.0 + rng.uniform(-1, 1) * how.light
        self._tilt_light(rng.uniform(-1, 1, 2) * how.light)
        self._recolour(rng.uniform(-1, 1, (len(self._coloured), 3)) * how.colour)
        if how.table:
            model.geom_matid[self._table] = rng.choice(self._materials)
            grey, tint = rng.uniform(0.2, 0.95), rng.uniform(-0.12, 0.12, 3)
            model.mat_rgba[self._materials, :3] = np.clip(grey + tint, 0, 1)

    def _geoms(self, bodies: tuple[str, ...]) -> NDArray[np.intp]:
        ids = [self._model.body(name).id for name in bodies]
        return np.flatnonzero(np.isin(self._model.geom_bodyid, ids))

    def _recolour(self, change: NDArray[np.float64]) -> None:
        rgba = self._model.geom_rgba
        rgba[self._coloured, :3] = np.clip(rgba[self._coloured, :3] + change, 0.0, 1.0)

    def _tilt_light(self, change: NDArray[np.float64]) -> None:
        direction = self._model.light_dir[0]
        direction[:2] += change
        direction /= np.linalg.norm(direction)
