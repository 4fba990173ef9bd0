# SPDX-License-Identifier: Apache-2.0
"""What a robot body is: joints in order, limits, arms with kinematics. Loaded from `config/robots/*.yaml`.

The YAML names a URDF beside it (geometry, position and velocity limits) and adds what a URDF cannot say:
the order of the joints on the wire, arms, grippers, acceleration limits, home.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lwd_policy.kinematics import KinematicsError, SerialChain, joint_limits

Array = NDArray[np.float64]


class EmbodimentError(ValueError):
    """A robot description is incomplete or contradicts itself; the text says where."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm: its joints in order of the chain and, if it has one, its gripper joint."""

    name: str
    joints: tuple[str, ...]
    gripper: str | None
    chain: SerialChain  # base link of the robot -> tool centre point


@dataclass(frozen=True, eq=False)
class Embodiment:
    """A robot body. Arrays have one entry per joint, in the order of `joint_names`; rad or m, per s, per s^2.

    Two embodiments are equal when their descriptions are (`to_json`).
    """

    name: str
    joint_names: tuple[str, ...]
    lower: Array
    upper: Array
    max_velocity: Array
    max_acceleration: Array
    home: Array
    arms: tuple[Arm, ...]
    description: str  # canonical JSON with the URDF's text inside: all of the above can be rebuilt from it

    @classmethod
    def load(cls, path: str | Path) -> Embodiment:
        """Read a robot YAML and the URDF it names. Raises EmbodimentError."""
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise EmbodimentError(f"{path}: cannot be read as YAML: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("urdf"), str):
            raise EmbodimentError(f"{path}: expected a mapping with the key 'urdf' (a file name beside it)")
        urdf_path = path.parent / content["urdf"]
        try:
            content["urdf"] = urdf_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EmbodimentError(f"{path}: the URDF {urdf_path} cannot be read: {error}") from error
        try:
            return cls._build(content)
        except EmbodimentError as error:
            raise EmbodimentError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Embodiment:
        """Inverse of `to_json`. Raises EmbodimentError."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise EmbodimentError(f"not JSON: {error}") from error
        if not isinstance(content, dict):
            raise EmbodimentError("not a JSON object")
        return cls._build(content)

    def to_json(self) -> str:
        """Self-contained canonical description (the URDF's text is inside)."""
        return self.description

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Embodiment) and self.description == other.description

    def __hash__(self) -> int:
        return hash(self.description)

    @property
    def gripper_columns(self) -> NDArray[np.intp]:
        """Indices of the gripper joints, in the order of the arms."""
        return np.array(
            [self.joint_names.index(arm.gripper) for arm in self.arms if arm.gripper], dtype=np.intp
        )

    @property
    def from_data(self) -> bool:
        """True where the limits are ranges seen in recordings: to train on, never to move a robot with."""
        return bool(json.loads(self.description).get("limits_from") == "data")

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises EmbodimentError."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise EmbodimentError(
            f"{self.name} has no arm {name!r}; it has {', '.join(a.name for a in self.arms)}"
        )

    def arm_columns(self, arm: Arm | str) -> NDArray[np.intp]:
        """Indices of the arm's joints in `joint_names`, in the order of its chain, its gripper last."""
        arm = self.arm(arm) if isinstance(arm, str) else arm
        names = arm.joints if arm.gripper is None else (*arm.joints, arm.gripper)
        return np.array([self.joint_names.index(name) for name in names], dtype=np.intp)

    @classmethod
    def _build(cls, content: dict[str, Any]) -> Embodiment:
        missing = {
            "name",
            "urdf",
            "base_link",
            "joint_names",
            "max_acceleration",
            "home",
            "arms",
        } - content.keys()
        if missing:
            raise EmbodimentError(f"keys missing: {', '.join(sorted(missing))}")
        names = tuple(str(name) for name in content["joint_names"])
        if len(set(names)) != len(names) or not names:
            raise EmbodimentError("joint_names is empty or names a joint twice")
        try:
            limits = joint_limits(content["urdf"])
            arms = tuple(_arm(content["urdf"], content["base_link"], entry) for entry in content["arms"])
        except KinematicsError as error:
            raise EmbodimentError(str(error)) from error
        for name in names:
            if name not in limits:
                raise EmbodimentError(f"joint {name!r} is not a movable joint of the URDF")
            if limits[name]["velocity"] is None or not limits[name]["velocity"] > 0:
                raise EmbodimentError(f"joint {name!r} needs a positive velocity limit in the URDF")
        commanded = [name for arm in arms for name in (*arm.joints, *([arm.gripper] if arm.gripper else []))]
        # Without arms there are no kinematics: a joint space alone, for the joint representations of actions.
        if arms and sorted(commanded) != sorted(names):
            raise EmbodimentError(
                "joint_names and the joints of the arms differ; every joint belongs to one arm"
            )
        lower = np.array([limits[name]["lower"] for name in names])
        upper = np.array([limits[name]["upper"] for name in names])
        home = _per_joint(content["home"], names, "home")
        if (home < lower).any() or (home > upper).any():
            raise EmbodimentError("home is outside the joint limits")
        acceleration = _per_joint(content["max_acceleration"], names, "max_acceleration")
        if (acceleration <= 0).any():
            raise EmbodimentError("max_acceleration must be positive")
        return cls(
            name=str(content["name"]),
            joint_names=names,
            lower=lower,
            upper=upper,
            max_velocity=np.array([limits[name]["velocity"] for name in names]),
            max_acceleration=acceleration,
            home=home,
            arms=arms,
            description=json.dumps(content, sort_keys=True, separators=(",", ":")),
        )


def _arm(urdf_text: str, base_link: str, entry: Any) -> Arm:
    if not isinstance(entry, dict) or not {"name", "tip_link"} <= entry.keys():
        raise EmbodimentError(f"an arm needs 'name' and 'tip_link', got {entry!r}")
    chain = SerialChain.from_urdf(urdf_text, base_link, entry["tip_link"])
    gripper = entry.get("gripper")
    return Arm(str(entry["name"]), chain.joint_names, None if gripper is None else str(gripper), chain)


def _per_joint(values: Any, names: tuple[str, ...], key: str) -> Array:
    if not isinstance(values, dict) or set(values) != set(names):
        raise EmbodimentError(f"{key} must give one number for each joint of joint_names")
    array = np.array([float(values[name]) for name in names])
    if not np.isfinite(array).all():
        raise EmbodimentError(f"{key} has a number that is not finite")
    return array
