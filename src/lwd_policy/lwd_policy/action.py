# SPDX-License-Identifier: Apache-2.0
"""What a policy's actions mean: from absolute joint positions to its own representation and back.

On the wire there are only absolute joint positions. A chunk is encoded relative to one reference position, the
command at the time of the observation, identically in the policy node and in the learner.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lwd_policy.embodiment import Arm, Embodiment
from lwd_policy.kinematics import rotation_matrix, rotation_vector

Array = NDArray[np.float64]

REPRESENTATIONS = ("joint_absolute", "joint_relative", "ee_relative")
_POSE = 6  # position and rotation vector
_MIN_SCALE = 1e-3  # m or rad: what varies less than this over all demonstrations is not amplified
_OUTERMOST = (
    2e-3  # share of actions beyond the range on either side; at 1e-2 the short turns of long tasks were
)


@dataclass(frozen=True, eq=False)
class ActionSpec:
    """A chunk of `horizon` actions, `step_s` apart, of which `execute_steps` are executed before the next.

    representation "ee_relative": per arm, in the order of the embodiment, tool position minus the reference's
    (3, m, base_link), rotation vector of R_target R_reference^T (3, rad, base_link), gripper position (1,
    absolute). "joint_relative": joints minus the reference; "joint_absolute": joints; grippers absolute in both.
    center, scale: [horizon, dim] of the normalisation x = (raw - center) / scale, about [-1, 1].
    """

    embodiment: Embodiment
    representation: str
    horizon: int
    step_s: float
    execute_steps: int
    center: Array
    scale: Array

    def __post_init__(self) -> None:
        if self.representation not in REPRESENTATIONS:
            raise ValueError(f"representation {self.representation!r}; one of {', '.join(REPRESENTATIONS)}")
        if self.representation == "ee_relative" and not self.embodiment.arms:
            raise ValueError(
                f"{self.embodiment.name} has no arm whose tool could be moved; use a joint representation"
            )
        if not 1 <= self.execute_steps <= self.horizon or not self.step_s > 0:
            raise ValueError("execute_steps must be within 1 and horizon, step_s positive")
        for name in ("center", "scale"):
            values = getattr(self, name)
            if values.shape != (self.horizon, self.dim) or not np.isfinite(values).all():
                raise ValueError(
                    f"{name} must be finite with shape {(self.horizon, self.dim)}, has {values.shape}"
                )
        if not (self.scale > 0).all():
            raise ValueError("scale must be positive")

    @classmethod
    def unnormalised(
        cls, embodiment: Embodiment, representation: str, horizon: int, step_s: float, execute_steps: int
    ) -> ActionSpec:
        """A spec whose normalisation is the identity; `with_statistics` gives it one."""
        dim = action_dim(embodiment, representation)
        ones = np.ones((horizon, dim))
        return cls(embodiment, representation, horizon, step_s, execute_steps, np.zeros((horizon, dim)), ones)

    @property
    def dim(self) -> int:
        """A: numbers per action."""
        return action_dim(self.embodiment, self.representation)

    def encode(self, positions: Array, reference: Array) -> Array:
        """Raw representation [..., L, A] of absolute positions [..., L, n], relative to reference [..., n]."""
        positions = np.asarray(positions, np.float64)
        reference = np.asarray(reference, np.float64)[..., None, :]
        if self.representation != "ee_relative":
            return self._joint_offset(positions, reference, sign=-1.0)
        raw = np.empty((*positions.shape[:-1], self.dim))
        for arm, columns, first in self._arms():
            joints = columns[: len(arm.joints)]
            target_position, target_rotation = arm.chain.forward(positions[..., joints])
            base_position, base_rotation = arm.chain.forward(reference[..., joints])
            raw[..., first : first + 3] = target_position - base_position
            turn = target_rotation @ np.swapaxes(base_rotation, -1, -2)
            raw[..., first + 3 : first + _POSE] = rotation_vector(turn)
            if arm.gripper:
                raw[..., first + _POSE] = positions[..., columns[-1]]
        return raw

    def decode(self, raw: Array, reference: Array) -> Array:
        """Absolute joint positions [..., H, n] of a raw chunk [..., H, A]. Poses out of reach come as near as the
        joint limits allow (inverse kinematics started from the reference, all actions at once)."""
        raw = np.asarray(raw, np.float64)
        reference = np.asarray(reference, np.float64)[..., None, :]
        if self.representation != "ee_relative":
            return self._joint_offset(raw, reference, sign=1.0)
        positions = np.empty((*raw.shape[:-1], len(self.embodiment.joint_names)))
        for arm, columns, first in self._arms():
            joints = columns[: len(arm.joints)]
            base_position, base_rotation = arm.chain.forward(reference[..., joints])
            position = base_position + raw[..., first : first + 3]
            rotation = rotation_matrix(raw[..., first + 3 : first + _POSE]) @ base_rotation
            seed = np.broadcast_to(reference[..., joints], (*raw.shape[:-1], len(joints)))
            positions[..., joints] = arm.chain.inverse(position, rotation, seed)
            if arm.gripper:
                positions[..., columns[-1]] = raw[..., first + _POSE]
        return positions

    def normalise(self, raw: Array) -> Array:
        """[..., H, A] -> about [-1, 1]."""
        return (raw - self.center) / self.scale

    def denormalise(self, normalised: Array) -> Array:
        """Inverse of `normalise`."""
        return normalised * self.scale + self.center

    def with_statistics(
        self, raw: Array, valid: NDArray[np.bool_], task: NDArray[np.int64] | None = None
    ) -> ActionSpec:
        """Normalisation by the outermost quantiles (`_OUTERMOST`) per step and number. raw: [N, H, A]; valid: [N, H], a step of
        the horizon that no sample has takes the last one's statistics.

        task: [N], None if all are of one. The range covers the quantiles of every task: policies act within it, and a
        turn of the wrist that one task of eight is about, and the others do without, is rare among all.
        """
        of = np.zeros(len(raw), np.int64) if task is None else task
        center, scale = np.zeros((self.horizon, self.dim)), np.ones((self.horizon, self.dim))
        for step in range(self.horizon):
            here = valid[:, step]
            seen = [raw[here & (of == one), step] for one in np.unique(of[here])]
            if seen:
                quantiles = np.array([np.quantile(one, [_OUTERMOST, 1 - _OUTERMOST], axis=0) for one in seen])
                low, high = quantiles[:, 0].min(axis=0), quantiles[:, 1].max(axis=0)
                center[step], scale[step] = (low + high) / 2, np.maximum((high - low) / 2, _MIN_SCALE)
            elif step:
                center[step], scale[step] = center[step - 1], scale[step - 1]
        return dataclasses.replace(self, center=center, scale=scale)

    def to_json(self) -> str:
        """Canonical JSON, the embodiment inside."""
        content = {
            "embodiment": json.loads(self.embodiment.to_json()),
            "representation": self.representation,
            "horizon": self.horizon,
            "step_s": self.step_s,
            "execute_steps": self.execute_steps,
            "center": self.center.tolist(),
            "scale": self.scale.tolist(),
        }
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ActionSpec:
        """Inverse of `to_json`. Raises ValueError."""
        try:
            content = json.loads(text)
            return cls(
                embodiment=Embodiment.from_json(json.dumps(content["embodiment"])),
                representation=content["representation"],
                horizon=int(content["horizon"]),
                step_s=float(content["step_s"]),
                execute_steps=int(content["execute_steps"]),
                center=np.array(content["center"], np.float64),
                scale=np.array(content["scale"], np.float64),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an action spec: {error}") from error

    def _joint_offset(self, values: Array, reference: Array, sign: float) -> Array:
        if self.representation == "joint_absolute":
            return values.copy()
        result: Array = values + sign * reference
        grippers = self.embodiment.gripper_columns
        result[..., grippers] = values[..., grippers]
        return result

    def _arms(self) -> Iterator[tuple[Arm, NDArray[np.intp], int]]:
        """Each arm with its columns of the joint positions and the first of its numbers in the action."""
        first = 0
        for arm in self.embodiment.arms:
            yield arm, self.embodiment.arm_columns(arm), first
            first += _POSE + (arm.gripper is not None)


def action_dim(embodiment: Embodiment, representation: str) -> int:
    """A: numbers per action in a representation."""
    if representation != "ee_relative":
        return len(embodiment.joint_names)
    return sum(_POSE + (arm.gripper is not None) for arm in embodiment.arms)
