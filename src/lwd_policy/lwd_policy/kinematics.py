# SPDX-License-Identifier: Apache-2.0
"""Forward and inverse kinematics of one arm, batched, in numpy. Reads URDF; needs nothing of ROS.

Rotations are matrices whose columns are the axes of the rotated frame; rotation vectors are axis * angle
(rad). All poses are in the chain's base link.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_POSITION_TOLERANCE_M = 2e-5
_ROTATION_TOLERANCE_RAD = 2e-4
_ROTATION_WEIGHT_M = 0.2  # 1 rad of rotation error weighs like 0.2 m: about the size of a hand and forearm
_DAMPING_M2 = 1e-6  # floor of the damping: keeps the system regular where the arm is singular
_LARGEST_STEP_RAD = 0.6  # per iteration: the linearisation does not hold further


class KinematicsError(ValueError):
    """A URDF does not describe the chain asked for; the text names the link or joint."""


@dataclass(frozen=True, eq=False)
class SerialChain:
    """The movable joints between two links of a URDF. Fixed joints are folded into their neighbours.

    Mimic joints are refused: inside an arm they would be joints that no command reaches.
    """

    joint_names: tuple[str, ...]
    lower: Array  # [d] rad or m; -inf where the URDF sets no limit
    upper: Array  # [d]
    # Transform of joint i: constant[i] + sine[i] * sin(q) + cosine[i] * cos(q) + linear[i] * q
    _constant: Array  # [d, 4, 4]
    _sine: Array
    _cosine: Array
    _linear: Array
    _axes: Array  # [d, 3] in the frame after the joint
    _prismatic: NDArray[np.bool_]  # [d]
    _tip: Array  # [4, 4] fixed transform after the last joint

    @classmethod
    def from_urdf(cls, urdf_text: str, base_link: str, tip_link: str) -> SerialChain:
        """The chain from `base_link` to `tip_link`. Raises KinematicsError."""
        joints = _path(urdf_text, base_link, tip_link)
        names: list[str] = []
        limits: list[tuple[float, float]] = []
        constant: list[Array] = []  # _constant and so on, one [4, 4] per joint
        sine: list[Array] = []
        cosine: list[Array] = []
        linear: list[Array] = []
        axes: list[Array] = []
        prismatic: list[bool] = []
        pending = np.eye(4)  # fixed transforms since the last movable joint
        for joint in joints:
            name, kind = joint.get("name", ""), joint.get("type", "")
            pending = pending @ _origin(joint)
            if kind == "fixed":
                continue
            if kind not in ("revolute", "continuous", "prismatic") or joint.find("mimic") is not None:
                raise KinematicsError(
                    f"joint {name!r} of the chain to {tip_link!r} is of type {kind!r} or a mimic"
                )
            axis = _axis(joint)
            names.append(name)
            limits.append(_limits(joint, kind))
            axes.append(axis)
            prismatic.append(kind == "prismatic")
            unit, turn, turn_squared, slide = np.eye(4), np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4))
            if kind == "prismatic":
                slide[:3, 3] = axis
            else:
                cross = _cross_matrix(axis)
                turn[:3, :3], turn_squared[:3, :3] = cross, cross @ cross
            # Rodrigues: R(q) = I + sin(q) K + (1 - cos(q)) K^2, here multiplied by the fixed part once and
            # for all.
            constant.append(pending @ (unit + turn_squared))
            sine.append(pending @ turn)
            cosine.append(-pending @ turn_squared)
            linear.append(pending @ slide)
            pending = np.eye(4)
        if not names:
            raise KinematicsError(f"no movable joint between {base_link!r} and {tip_link!r}")
        return cls(
            joint_names=tuple(names),
            lower=np.array([low for low, _ in limits]),
            upper=np.array([high for _, high in limits]),
            _constant=np.array(constant),
            _sine=np.array(sine),
            _cosine=np.array(cosine),
            _linear=np.array(linear),
            _axes=np.array(axes),
            _prismatic=np.array(prismatic),
            _tip=pending,
        )

    def forward(self, q: ArrayLike) -> tuple[Array, Array]:
        """Pose of the tip. q: [..., d] rad or m. Returns position [..., 3] in m and rotation [..., 3, 3]."""
        joints = np.asarray(q, dtype=np.float64)
        self._check_columns(joints)
        steps = self._steps(joints)
        pose = steps[..., 0, :, :]
        for index in range(1, len(self.joint_names)):
            pose = pose @ steps[..., index, :, :]
        pose = pose @ self._tip
        return pose[..., :3, 3].copy(), pose[..., :3, :3].copy()

    def inverse(
        self, position: ArrayLike, rotation: ArrayLike, seed: ArrayLike, iterations: int = 20
    ) -> Array:
        """Joints near `seed`, within the limits, that put the tip at the pose, or near one out of reach.

        position: [..., 3] m, rotation: [..., 3, 3], seed: [..., d]; they broadcast. Returns [..., d].

        Damped least squares with a damping that shrinks with the error, so that it is stable far from the
        target and converges quadratically at it. Stops as soon as every target is reached.
        """
        target_position = np.asarray(position, dtype=np.float64)
        target_rotation = np.asarray(rotation, dtype=np.float64)
        start = np.asarray(seed, dtype=np.float64)
        self._check_columns(start)
        shape = np.broadcast_shapes(target_position.shape[:-1], target_rotation.shape[:-2], start.shape[:-1])
        columns = start.shape[-1]
        target_position = np.broadcast_to(target_position, (*shape, 3)).reshape(-1, 3)
        target_rotation = np.broadcast_to(target_rotation, (*shape, 3, 3)).reshape(-1, 3, 3)
        q = np.broadcast_to(start, (*shape, columns)).reshape(-1, columns).clip(self.lower, self.upper)

        unfinished = np.arange(len(q))
        for _ in range(iterations):
            current = q[unfinished]
            jacobian, reached_position, reached_rotation = self._jacobian(current)
            error = np.empty((len(unfinished), 6))
            error[:, :3] = target_position[unfinished] - reached_position
            error[:, 3:] = rotation_vector(target_rotation[unfinished] @ reached_rotation.swapaxes(-1, -2))
            far = (np.abs(error[:, :3]).max(axis=1) > _POSITION_TOLERANCE_M) | (
                np.abs(error[:, 3:]).max(axis=1) > _ROTATION_TOLERANCE_RAD
            )
            if not far.any():
                break
            if not far.all():
                unfinished, current, jacobian, error = (
                    unfinished[far],
                    current[far],
                    jacobian[far],
                    error[far],
                )
            jacobian[:, 3:] *= _ROTATION_WEIGHT_M
            error[:, 3:] *= _ROTATION_WEIGHT_M
            # A joint that sits at its limit and would be pushed further is left out, so that the others do
            # its part.
            gradient = np.einsum("bij,bi->bj", jacobian, error)
            stuck = ((current <= self.lower) & (gradient < 0)) | ((current >= self.upper) & (gradient > 0))
            jacobian *= ~stuck[:, None, :]
            gradient *= ~stuck
            normal = jacobian.swapaxes(-1, -2) @ jacobian
            damping = 0.05 * np.einsum("bi,bi->b", error, error) + _DAMPING_M2
            normal[:, range(columns), range(columns)] += damping[:, None]
            step = np.linalg.solve(normal, gradient[..., None])[..., 0]
            step *= np.minimum(
                1.0, _LARGEST_STEP_RAD / np.abs(step).max(axis=1, keepdims=True).clip(min=1e-12)
            )
            q[unfinished] = (current + step).clip(self.lower, self.upper)
        return q.reshape(*shape, columns)

    def _check_columns(self, q: Array) -> None:
        if q.shape[-1:] != (len(self.joint_names),):
            raise ValueError(f"expected {len(self.joint_names)} joints in the last axis, got shape {q.shape}")

    def _steps(self, q: Array) -> Array:
        """Transform of each joint. q: [..., d]. Returns [..., d, 4, 4]."""
        column = q[..., None, None]
        steps: Array = self._constant + self._sine * np.sin(column) + self._cosine * np.cos(column)
        if self._prismatic.any():
            steps = steps + self._linear * column
        return steps

    def _jacobian(self, q: Array) -> tuple[Array, Array, Array]:
        """Jacobian and pose of the tip. q: [B, d]. Returns [B, 6, d] (linear, angular), [B, 3], [B, 3, 3]."""
        frames = self._steps(q)
        for index in range(1, len(self.joint_names)):
            frames[:, index] = frames[:, index - 1] @ frames[:, index]
        tip = frames[:, -1] @ self._tip
        axes = np.einsum("bdij,dj->bdi", frames[..., :3, :3], self._axes)
        lever = tip[:, None, :3, 3] - frames[..., :3, 3]
        jacobian = np.empty((len(q), 6, q.shape[-1]))
        jacobian[:, :3] = _cross(axes, lever).swapaxes(-1, -2)
        jacobian[:, 3:] = axes.swapaxes(-1, -2)
        if self._prismatic.any():
            jacobian[:, :3, self._prismatic] = axes[:, self._prismatic].swapaxes(-1, -2)
            jacobian[:, 3:, self._prismatic] = 0.0
        return jacobian, tip[:, :3, 3], tip[:, :3, :3]


def rotation_vector(rotation: ArrayLike) -> Array:
    """Axis times angle of a rotation. rotation: [..., 3, 3]. Returns [..., 3] rad, norm in [0, pi]."""
    matrix = np.asarray(rotation, dtype=np.float64)
    doubled = np.stack(  # 2 sin(angle) * axis
        [
            matrix[..., 2, 1] - matrix[..., 1, 2],
            matrix[..., 0, 2] - matrix[..., 2, 0],
            matrix[..., 1, 0] - matrix[..., 0, 1],
        ],
        axis=-1,
    )
    double_sine = np.sqrt((doubled * doubled).sum(axis=-1))
    double_cosine = matrix[..., 0, 0] + matrix[..., 1, 1] + matrix[..., 2, 2] - 1.0
    angle = np.arctan2(double_sine, double_cosine)
    factor = np.where(double_sine > 1e-9, angle / np.where(double_sine > 1e-9, double_sine, 1.0), 0.5)
    vector: Array = doubled * factor[..., None]
    half_turn = (
        angle > np.pi - 1e-4
    )  # the antisymmetric part vanishes here: take the axis from R + I = 2 a a^T
    if np.any(half_turn):
        outer = (matrix + np.eye(3))[half_turn]
        column = np.einsum("...ii->...i", outer).argmax(axis=-1)
        axis = np.take_along_axis(outer, column[..., None, None], axis=-1)[..., 0]
        axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
        sign = np.where((axis * doubled[half_turn]).sum(axis=-1, keepdims=True) < 0, -1.0, 1.0)
        vector[half_turn] = sign * axis * angle[half_turn][..., None]
    return vector


def rotation_matrix(vector: ArrayLike) -> Array:
    """Rotation by |vector| about vector. vector: [..., 3] rad. Returns [..., 3, 3]."""
    v = np.asarray(vector, dtype=np.float64)
    squared = (v * v).sum(axis=-1)[..., None, None]
    angle = np.sqrt(squared)
    small = angle < 1e-4  # series to the fourth order: exact in double precision
    safe = np.where(small, 1.0, angle)
    first = np.where(small, 1.0 - squared / 6.0, np.sin(safe) / safe)
    second = np.where(small, 0.5 - squared / 24.0, (1.0 - np.cos(safe)) / (safe * safe))
    cross = _cross_matrix(v)
    result: Array = np.eye(3) + first * cross + second * (cross @ cross)
    return result


def _cross(a: Array, b: Array) -> Array:
    # np.cross spends most of its time on generality; this is called in the innermost loop of `inverse`.
    return np.stack(
        [
            a[..., 1] * b[..., 2] - a[..., 2] * b[..., 1],
            a[..., 2] * b[..., 0] - a[..., 0] * b[..., 2],
            a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0],
        ],
        axis=-1,
    )


def _cross_matrix(v: Array) -> Array:
    matrix = np.zeros((*v.shape[:-1], 3, 3))
    matrix[..., 0, 1], matrix[..., 0, 2], matrix[..., 1, 2] = -v[..., 2], v[..., 1], -v[..., 0]
    matrix[..., 1, 0], matrix[..., 2, 0], matrix[..., 2, 1] = v[..., 2], -v[..., 1], v[..., 0]
    return matrix


# URDF ------------------------------------------------------------------------------------------------


def parse_urdf(urdf_text: str) -> ElementTree.Element:
    """Root element of a URDF. Raises KinematicsError."""
    try:
        root = ElementTree.fromstring(urdf_text)
    except ElementTree.ParseError as error:
        raise KinematicsError(f"the URDF is not well-formed XML: {error}") from error
    if root.tag != "robot":
        raise KinematicsError(f"the URDF's root element is <{root.tag}>, not <robot>")
    return root


def _path(urdf_text: str, base_link: str, tip_link: str) -> list[ElementTree.Element]:
    """Joint elements from base to tip, in order."""
    root = parse_urdf(urdf_text)
    by_child = {_link(joint, "child"): joint for joint in root.findall("joint")}
    path: list[ElementTree.Element] = []
    link = tip_link
    while link != base_link:
        joint = by_child.get(link)
        if joint is None or len(path) > len(by_child):
            raise KinematicsError(
                f"no chain of joints from link {base_link!r} to {tip_link!r}: stuck at {link!r}"
            )
        path.append(joint)
        link = _link(joint, "parent")
    return path[::-1]


def _link(joint: ElementTree.Element, role: str) -> str:
    element = joint.find(role)
    if element is None or "link" not in element.attrib:
        raise KinematicsError(f"joint {joint.get('name')!r} has no <{role} link=...>")
    return element.attrib["link"]


def _numbers(joint: ElementTree.Element, text: str, count: int) -> Array:
    try:
        values = np.array([float(part) for part in text.split()])
    except ValueError as error:
        raise KinematicsError(f"joint {joint.get('name')!r}: {text!r} is not {count} numbers") from error
    if values.shape != (count,) or not np.isfinite(values).all():
        raise KinematicsError(f"joint {joint.get('name')!r}: {text!r} is not {count} finite numbers")
    return values


def _origin(joint: ElementTree.Element) -> Array:
    pose = np.eye(4)
    origin = joint.find("origin")
    if origin is None:
        return pose
    roll, pitch, yaw = _numbers(joint, origin.get("rpy", "0 0 0"), 3)
    about_x, about_y, about_z = (rotation_matrix(v) for v in ([roll, 0, 0], [0, pitch, 0], [0, 0, yaw]))
    pose[:3, :3] = about_z @ about_y @ about_x
    pose[:3, 3] = _numbers(joint, origin.get("xyz", "0 0 0"), 3)
    return pose


def _axis(joint: ElementTree.Element) -> Array:
    element = joint.find("axis")
    axis = _numbers(joint, "1 0 0" if element is None else element.get("xyz", "1 0 0"), 3)
    norm = float(np.linalg.norm(axis))
    if norm < 1e-9:
        raise KinematicsError(f"joint {joint.get('name')!r} has a zero axis")
    return axis / norm


def _limits(joint: ElementTree.Element, kind: str) -> tuple[float, float]:
    limit = joint.find("limit")
    if kind == "continuous":
        return -np.inf, np.inf
    if limit is None:
        raise KinematicsError(f"joint {joint.get('name')!r} is {kind} and has no <limit>")
    low, high = (float(_numbers(joint, limit.get(side, "0"), 1)[0]) for side in ("lower", "upper"))
    if low >= high:
        raise KinematicsError(f"joint {joint.get('name')!r}: lower limit {low} is not below the upper {high}")
    return low, high


def joint_limits(urdf_text: str) -> dict[str, dict[str, Any]]:
    """Limits of every movable, non-mimic joint: {name: {lower, upper, velocity}}, velocity None if absent."""
    result: dict[str, dict[str, Any]] = {}
    for joint in parse_urdf(urdf_text).findall("joint"):
        kind = joint.get("type", "")
        if kind not in ("revolute", "continuous", "prismatic") or joint.find("mimic") is not None:
            continue
        lower, upper = _limits(joint, kind)
        limit = joint.find("limit")
        speed = None if limit is None else limit.get("velocity")
        velocity = None if speed is None else float(_numbers(joint, speed, 1)[0])
        result[joint.get("name", "")] = {"lower": lower, "upper": upper, "velocity": velocity}
    return result
