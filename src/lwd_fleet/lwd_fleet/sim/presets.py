# SPDX-License-Identifier: Apache-2.0
"""What a policy of the simulated robot sees: the observation and the trunk, for images and for the quick mode."""

from __future__ import annotations

from pathlib import Path

from lwd_fleet.share import share_directory
from lwd_fleet.sim.robot import JOINT_NAMES
from lwd_fleet.sim.scene import CAMERAS
from lwd_fleet.sim.tasks import SUITES
from lwd_fleet.sim.world import ABSENT
from lwd_policy.observation import COMMAND, INSTRUCTION, JOINT_POSITIONS, KEYPOINTS, ObservationSpec, Stream
from lwd_policy.trunk import TrunkConfig

_LATCHED = 0.0  # any age will do


def observation_spec(
    kind: str, image_size: int = 96, history: int = 2, suite: str = "demo"
) -> ObservationSpec:
    """kind: "images" (three cameras) or "keypoints" (the quick mode: a stand-in for an object detector)."""
    joints = len(JOINT_NAMES)
    streams = [
        Stream(JOINT_POSITIONS, "joint_states", "joints", (joints,), max_age_s=0.2),
        Stream(COMMAND, "executed_action", "command", (joints,), max_age_s=_LATCHED, required=False),
        Stream(INSTRUCTION, "task", "text", (), max_age_s=_LATCHED),
    ]
    if kind == "keypoints":
        streams.append(
            Stream(KEYPOINTS, "keypoints", "points", (len(SUITES[suite].keypoints), 3), max_age_s=0.3)
        )
    elif kind == "images":
        shape = (image_size, image_size, 3)
        streams += [
            Stream(f"camera_{name}", f"camera_{name}/image_raw/compressed", "image", shape, max_age_s=0.3)
            for name in CAMERAS
        ]
    else:
        raise ValueError(f'observation kind {kind!r}; "images" or "keypoints"')
    return ObservationSpec(tuple(streams), history)


def trunk_config(kind: str, suite: str = "demo") -> TrunkConfig:
    """Trunk for `observation_spec(kind)`: every keypoint is a slot; an instruction names an item and a place."""
    slots = SUITES[suite].keypoints
    return TrunkConfig(
        kind=kind,
        slots=len(slots),
        items=tuple(slots.index(name) for name in SUITES[suite].items),
        places=tuple(slots.index(name) for name in SUITES[suite].places),
        cameras=tuple(f"camera_{name}" for name in CAMERAS) if kind == "images" else (),
        absent=ABSENT,
    )


def trunk_directory(suite: str = "demo") -> Path:
    """The pretrained trunk that is shipped for a suite; `experiments/pretrain_trunk.py` made it. Raises FileNotFoundError."""
    share = share_directory("lwd_fleet")
    if share is None:
        raise FileNotFoundError(
            "lwd_fleet is not installed: build the workspace (`make build`), use scripts/run"
        )
    return share / "config" / "trunks" / f"sim_{suite}"
