# SPDX-License-Identifier: Apache-2.0
"""From an observation to a feature vector: where things are, what the instruction refers to, where the tools are.

The trunk is pretrained once and frozen; its features are cached by the learner. Three trunks share one downstream:
`ImageTrunk` finds the things in camera images, `KeypointTrunk` is told them (the quick mode), `JointTrunk` knows only
the robot (bodies without a kinematic description). Lengths are m in base_link until the last step scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lwd_policy.embodiment import Embodiment
from lwd_policy.observation import (
    COMMAND,
    INSTRUCTION,
    JOINT_POSITIONS,
    KEYPOINTS,
    Observation,
    reference_position,
)
from lwd_policy.text import TextEncoder, encode_bytes

_TEXT_FEATURES = 16
_POSITION_SCALE = 4.0  # a table's half width becomes about 1
_OFFSET_SCALE = 8.0
_NEAR_M = 0.04  # offsets are repeated through tanh(d / this): fine where a grasp is decided
_GRIPPED = (
    0.1  # of its range, how far a gripper stays open against its command with something between its fingers
)
_UNLIKELY = -1e4  # a logit; finite, so that a mean over nothing is not NaN
_PER_ARM = 3 + 6 + 2  # tool position, first two columns of its rotation, gripper measured and commanded


@dataclass(frozen=True)
class TrunkConfig:
    """What is fixed when a trunk is built. items, places: slots of the keypoints that an instruction can name.

    cameras: stream names, the overview first; all others look from the tools and share their weights.
    """

    kind: str  # "keypoints", "images" or "joints"
    slots: int = 0
    items: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    cameras: tuple[str, ...] = ()
    absent: tuple[float, ...] = (0.0, 0.0, -1.0)  # where a slot is said to be that the scene does not have, m

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrunkConfig:
        """Inverse of `to_json`. Raises ValueError."""
        try:
            return cls(
                kind=str(content["kind"]),
                slots=int(content["slots"]),
                items=tuple(int(i) for i in content["items"]),
                places=tuple(int(i) for i in content["places"]),
                cameras=tuple(str(name) for name in content["cameras"]),
                absent=tuple(float(x) for x in content["absent"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a trunk configuration: {error}") from error


@dataclass(frozen=True)
class Perception:
    """What a trunk believes. keypoints [B, N, 3] and presence_logits [B, N]: where each slot is, if it is there;
    item_logits [B, items], place_logits [B, places]: what the instruction refers to; tool_offsets [B, T, 3]: nearest
    item minus tool, of each tool camera (T may be 0); heat [B, N, h, w]: log-probability of each slot over the
    overview image (h = w = 0 without one)."""

    keypoints: Tensor
    presence_logits: Tensor
    item_logits: Tensor
    place_logits: Tensor
    tool_offsets: Tensor
    heat: Tensor


class Trunk(nn.Module):
    """Base of all trunks: proprioception and instruction. Subclasses say where things are."""

    def __init__(self, config: TrunkConfig, embodiment: Embodiment) -> None:
        super().__init__()
        self.config = config
        self.embodiment = embodiment
        self.text = TextEncoder()
        self.text_feature = nn.Linear(self.text.dim, _TEXT_FEATURES)
        self.item_query = nn.Linear(self.text.dim, max(1, len(config.items)))
        self.place_query = nn.Linear(self.text.dim, max(1, len(config.places)))

    @property
    def tool_cameras(self) -> int:
        """Cameras whose image gives an offset from a tool."""
        return 0

    @property
    def feature_dim(self) -> int:
        """F."""
        arms, slots, references = len(self.embodiment.arms), self.config.slots, 2
        located = 3 * (slots + references) * (1 + 2 * arms)
        return located + (_PER_ARM + 1) * arms + _TEXT_FEATURES + 3 * self.tool_cameras

    def inputs(self, observations: Sequence[Observation]) -> dict[str, Tensor]:
        """Collate observations: body [B, arms * 11], tokens [B, L], and what the subclass adds."""
        return {
            "body": torch.from_numpy(body_state(self.embodiment, observations)),
            "tokens": encode_bytes([observation.values[INSTRUCTION] for observation in observations]),
        }

    def perceive(self, inputs: dict[str, Tensor]) -> Perception:
        """What the feature is made of; the targets of pretraining."""
        return self._perceive(inputs, self._read(inputs["tokens"]))

    def _perceive(self, inputs: dict[str, Tensor], embedding: Tensor) -> Perception:
        raise NotImplementedError

    def _read(self, tokens: Tensor) -> Tensor:
        """Text embedding [B, E]. Most of a batch says the same: every wording is read once."""
        wordings, which = torch.unique(tokens, dim=0, return_inverse=True)
        embedding: Tensor = self.text(wordings)[which]
        return embedding

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Feature [B, F]."""
        embedding = self._read(inputs["tokens"])
        seen = self._perceive(inputs, embedding)
        nowhere = seen.keypoints.new_tensor(self.config.absent)
        present = (seen.presence_logits > 0) & (seen.keypoints != nowhere).any(-1)
        things, known = [seen.keypoints], [present]
        for slots, logits in (
            (list(self.config.items), seen.item_logits),
            (list(self.config.places), seen.place_logits),
        ):
            things.append(_meant(logits, seen.keypoints[:, slots], present[:, slots]))
            known.append(present[:, slots].any(1, keepdim=True))
        return self._feature(inputs["body"], torch.cat(things, 1), torch.cat(known, 1), embedding, seen)

    def _feature(
        self, body: Tensor, things: Tensor, known: Tensor, embedding: Tensor, seen: Perception
    ) -> Tensor:
        """body [B, arms * 11], things [B, N + 2, 3] and whether they are known [B, N + 2], the two meant ones last."""
        body = body.view(len(things), len(self.embodiment.arms), _PER_ARM)
        tools = body[..., :3]
        offsets = things.unsqueeze(1) - tools.unsqueeze(2)  # [B, arms, N + 2, 3]
        # Were what is absent said to be somewhere far away, its many offsets, all alike, would drown those of what is
        # there: cloning a task with 6 of 31 slots, that cost three quarters of the success.
        things = torch.where(known.unsqueeze(-1), things, 0.0)
        offsets = torch.where(known[:, None, :, None], offsets, 0.0)
        return torch.cat(
            [
                (things * _POSITION_SCALE).flatten(1),
                (offsets * _OFFSET_SCALE).flatten(1),
                torch.tanh(offsets / _NEAR_M).flatten(1),
                torch.cat([tools * _POSITION_SCALE, body[..., 3:]], dim=-1).flatten(1),
                torch.tanh((body[..., -2] - body[..., -1]) / _GRIPPED),
                self.text_feature(embedding),
                (seen.tool_offsets * _OFFSET_SCALE).flatten(1),
            ],
            dim=1,
        )


class KeypointTrunk(Trunk):
    """Things are given as a stream of points (a detector, or the simulator's stand-in for one)."""

    def inputs(self, observations: Sequence[Observation]) -> dict[str, Tensor]:
        points = np.stack([observation.values[KEYPOINTS] for observation in observations])
        return {**super().inputs(observations), "keypoints": torch.from_numpy(points)}

    def _perceive(self, inputs: dict[str, Tensor], embedding: Tensor) -> Perception:
        points = inputs["keypoints"]
        return Perception(
            keypoints=points,
            presence_logits=points.new_ones(points.shape[:2]),
            item_logits=self.item_query(embedding),
            place_logits=self.place_query(embedding),
            tool_offsets=points.new_zeros(len(points), 0, 3),
            heat=points.new_zeros(*points.shape[:2], 0, 0),
        )


class ImageTrunk(Trunk):
    """Things are found in the images of one overview camera and of cameras at the tools."""

    def __init__(self, config: TrunkConfig, embodiment: Embodiment, points: int = 8) -> None:
        super().__init__(config, embodiment)
        self.overview = _PointFinder(config.slots + points, channels=24, first_stride=2)
        self.tool_view = _PointFinder(2 * points, channels=16, first_stride=4)
        tools = self.tool_cameras
        seen = 3 * (config.slots + points) + 3 * 2 * points * tools + _PER_ARM * len(embodiment.arms)
        self.locate = nn.Sequential(
            nn.Linear(seen, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 4 * config.slots)
        )
        self.approach = nn.Sequential(nn.Linear(3 * 2 * points + _PER_ARM, 64), nn.SiLU(), nn.Linear(64, 3))
        self.overview_to_base = nn.Linear(2, 3)

    @property
    def tool_cameras(self) -> int:
        return len(self.config.cameras) - 1

    def inputs(self, observations: Sequence[Observation]) -> dict[str, Tensor]:
        images = np.stack([[o.values[camera] for camera in self.config.cameras] for o in observations])
        return {**super().inputs(observations), "images": torch.from_numpy(images)}

    def _perceive(self, inputs: dict[str, Tensor], embedding: Tensor) -> Perception:
        """inputs["images"]: uint8 [B, cameras, height, width, 3]."""
        images = inputs["images"].permute(0, 1, 4, 2, 3).to(self.overview_to_base.weight.dtype) / 127.5 - 1.0
        batch, slots = len(images), self.config.slots
        body = inputs["body"].view(batch, -1, _PER_ARM)
        top, heat = self.overview(images[:, 0])
        near = self.tool_view(images[:, 1:].flatten(0, 1))[0].view(batch, self.tool_cameras, -1)
        coarse = self.overview_to_base(top[:, :slots, :2])
        located = self.locate(torch.cat([top.flatten(1), near.flatten(1), body.flatten(1)], dim=1))
        fine, presence = located.view(batch, slots, 4).split([3, 1], dim=-1)
        return Perception(
            keypoints=coarse + 0.1 * fine,
            presence_logits=presence.squeeze(-1),
            item_logits=self.item_query(embedding),
            place_logits=self.place_query(embedding),
            tool_offsets=0.1 * self.approach(torch.cat([near, body[:, : self.tool_cameras]], dim=-1)),
            heat=heat[:, :slots],
        )


class JointTrunk(Trunk):
    """Only the body: joint positions and command, scaled to their limits, and the instruction."""

    @property
    def feature_dim(self) -> int:
        return 2 * len(self.embodiment.joint_names) + _TEXT_FEATURES

    def inputs(self, observations: Sequence[Observation]) -> dict[str, Tensor]:
        middle = (self.embodiment.upper + self.embodiment.lower) / 2
        half = (self.embodiment.upper - self.embodiment.lower) / 2
        joints = np.stack([o.values[JOINT_POSITIONS] for o in observations])
        command = np.stack([reference_position(o) for o in observations])
        state = np.concatenate([(joints - middle) / half, 10 * (command - joints) / half], axis=-1)
        tokens = encode_bytes([observation.values[INSTRUCTION] for observation in observations])
        return {"joints": torch.from_numpy(state.astype(np.float32)), "tokens": tokens}

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat([inputs["joints"], self.text_feature(self._read(inputs["tokens"]))], dim=1)


TRUNKS: dict[str, type[Trunk]] = {"keypoints": KeypointTrunk, "images": ImageTrunk, "joints": JointTrunk}


def build_trunk(config: TrunkConfig, embodiment: Embodiment) -> Trunk:
    """A trunk with fresh weights. Raises ValueError for an unknown kind."""
    if config.kind not in TRUNKS:
        raise ValueError(f"trunk kind {config.kind!r}; one of {', '.join(TRUNKS)}")
    return TRUNKS[config.kind](config, embodiment)


def _meant(logits: Tensor, points: Tensor, present: Tensor) -> Tensor:
    """Where is what an instruction names: mean of points [B, N, 3] by logits [B, N] over what is present [B, N].
    Returns [B, 1, 3].

    What is absent has no share, however little of it: a hundredth of a point a metre away is a centimetre.
    """
    weight = logits.masked_fill(~present, _UNLIKELY).softmax(-1)
    return (weight.unsqueeze(-1) * points).sum(1, keepdim=True)


def body_state(embodiment: Embodiment, observations: Sequence[Observation]) -> NDArray[np.float32]:
    """Per arm: tool position (m, base_link), two columns of its rotation, gripper measured and commanded in units
    of its range. [B, arms * 11]. Kinematics in float64, so that live and recorded features agree."""
    joints = np.stack([observation.values[JOINT_POSITIONS] for observation in observations])
    command = np.stack(
        [observation.values.get(COMMAND, reference_position(observation)) for observation in observations]
    )
    span = embodiment.upper - embodiment.lower
    parts = []
    for arm in embodiment.arms:
        columns = embodiment.arm_columns(arm)
        position, rotation = arm.chain.forward(joints[:, columns[: len(arm.joints)]])
        grip = columns[-1:]
        opening = [
            (q[:, grip] - embodiment.lower[grip]) / span[grip] * bool(arm.gripper) for q in (joints, command)
        ]
        parts += [position, rotation[:, :, 0], rotation[:, :, 1], *opening]
    return np.concatenate(parts, axis=1).astype(np.float32)


class _PointFinder(nn.Module):
    """Convolutions, one heat map per point, and the centre of each map (spatial soft-argmax)."""

    def __init__(self, points: int, channels: int, first_stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 5, stride=first_stride, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=3, dilation=3),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )
        self.maps = nn.Conv2d(channels, points, 1)
        self.sharpness = nn.Parameter(torch.ones(points, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image: [B, 3, H, W] in [-1, 1]. Returns [B, points, 3]: x, y in [-1, 1] and how sharp the map is; and the
        maps' log-probabilities [B, points, h, w]."""
        maps: Tensor = self.maps(self.body(image))
        height, width = maps.shape[-2:]
        heat = (maps.flatten(2) * self.sharpness).log_softmax(-1)
        weight = heat.exp()
        rows = torch.linspace(-1, 1, height, device=maps.device)
        columns = torch.linspace(-1, 1, width, device=maps.device)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        place = torch.stack([x.flatten(), y.flatten()], dim=-1)
        centre = weight @ place
        peak = weight.pow(2).sum(-1, keepdim=True)
        return torch.cat([centre, peak], dim=-1), heat.view_as(maps)
