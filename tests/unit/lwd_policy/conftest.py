# SPDX-License-Identifier: Apache-2.0
"""The simulated robot, what it sees, and small untrained policies for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lwd_policy.action import ActionSpec
from lwd_policy.embodiment import Embodiment
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import (
    COMMAND,
    INSTRUCTION,
    JOINT_POSITIONS,
    KEYPOINTS,
    Observation,
    ObservationSpec,
    Stream,
)
from lwd_policy.trunk import TrunkConfig, build_trunk

SLOTS = 5
CAMERAS = ("camera_top", "camera_wrist_left", "camera_wrist_right")


@pytest.fixture(scope="session")
def robot() -> Embodiment:
    return Embodiment.load(Path(__file__).parents[3] / "config/robots/sim_dual_arm.yaml")


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ObservationSpec]:
    """Factory: the observation for a trunk of this kind."""

    def make(kind: str = "keypoints", history: int = 2) -> ObservationSpec:
        streams = [
            Stream(JOINT_POSITIONS, "joint_states", "joints", (14,), 0.2),
            Stream(COMMAND, "executed_action", "command", (14,), 0.0, required=False),
            Stream(INSTRUCTION, "task", "text", (), 0.0),
        ]
        if kind == "keypoints":
            streams.append(Stream(KEYPOINTS, "keypoints", "points", (SLOTS, 3), 0.3))
        if kind == "images":
            streams += [Stream(n, f"{n}/image_raw/compressed", "image", (96, 96, 3), 0.3) for n in CAMERAS]
        return ObservationSpec(tuple(streams), history)

    return make


@pytest.fixture(scope="session")
def trunk_config() -> Callable[[str], TrunkConfig]:
    """Factory: five slots, of which the first three are items and the last two places."""

    def make(kind: str) -> TrunkConfig:
        return TrunkConfig(kind, SLOTS, (0, 1, 2), (3, 4), CAMERAS if kind == "images" else ())

    return make


@pytest.fixture(scope="session")
def make_policy(robot: Embodiment, make_spec: Any, trunk_config: Any) -> Callable[..., FlowPolicy]:
    """Factory: an untrained policy whose expert does move (its last layer is not zero)."""

    def make(
        kind: str = "keypoints", representation: str = "ee_relative", seed: int = 0, **options: Any
    ) -> FlowPolicy:
        torch.manual_seed(seed)
        action = ActionSpec.unnormalised(robot, representation, 4, 0.1, 2)
        spec = make_spec(kind, options.pop("history", 2))
        policy = FlowPolicy(build_trunk(trunk_config(kind), robot), spec, action, **options)
        torch.nn.init.normal_(policy.expert.leave.weight, std=0.02)
        return policy.eval()

    return make


@pytest.fixture(scope="session")
def observe(robot: Embodiment) -> Callable[..., Observation]:
    """Factory: an observation of the robot near home; `seed` moves the robot and the things."""

    def make(
        seed: int = 0, instruction: str = "put the cube into the bowl", images: bool = False
    ) -> Observation:
        random = np.random.default_rng(seed)
        joints = np.clip(robot.home + random.uniform(-0.2, 0.2, 14), robot.lower, robot.upper)
        values: dict[str, Any] = {
            JOINT_POSITIONS: joints,
            INSTRUCTION: instruction,
            KEYPOINTS: random.uniform(-0.3, 0.3, (SLOTS, 3)).astype(np.float32),
        }
        if images:
            values |= {name: random.integers(0, 256, (96, 96, 3), dtype=np.uint8) for name in CAMERAS}
        return Observation(seed, values, dict.fromkeys(values, seed))

    return make
