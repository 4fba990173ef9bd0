# SPDX-License-Identifier: Apache-2.0
"""A run directory with real episodes of the simulated robot and an untrained policy; several tests use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.data.store import LocalStore
from lwd_fleet.data.uploader import Uploader
from lwd_fleet.robot.arbiter import ArbiterTiming
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_expert
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_learner.learner import Learner, LearnerConfig
from lwd_learner.trainer import TrainerConfig
from lwd_policy import checkpoint
from lwd_policy.action import ActionSpec
from lwd_policy.embodiment import Embodiment
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.trunk import build_trunk

ROBOT_FILE = Path(__file__).parents[3] / "config" / "robots" / "sim_dual_arm.yaml"
HORIZON = 10


def small_config(**options: float) -> LearnerConfig:
    return LearnerConfig(TrainerConfig(batch=32), **options)


class SmallRun:
    """Everything below `root`, laid out as `lwd up` does."""

    def __init__(self, root: Path, observation: str = "keypoints") -> None:
        self.observation = observation
        torch.set_num_threads(1)
        self.root = root
        self.embodiment = Embodiment.load(ROBOT_FILE)
        self.store = LocalStore(root / "store")
        self.catalog = Catalog(root / "catalog.db")
        self.uploader = Uploader(root / "spool", self.store, self.catalog)

    def policy(self, seed: int = 0) -> FlowPolicy:
        torch.manual_seed(seed)
        action = ActionSpec.unnormalised(self.embodiment, "joint_relative", HORIZON, 0.1, 5)
        width = np.ones((HORIZON, action.dim))
        action = ActionSpec(self.embodiment, "joint_relative", HORIZON, 0.1, 5, 0 * width, 0.3 * width)
        return FlowPolicy(
            build_trunk(trunk_config(self.observation), self.embodiment),
            observation_spec(self.observation),
            action,
        )

    def first_version(self) -> int:
        """Register an untrained policy and make it active."""
        folder = checkpoint.save(self.root / "policies", self.policy())
        version = self.catalog.register_policy(folder.name, folder.as_uri(), (0, 0))
        self.catalog.set_policy_state(version, "active")
        return version

    def expert(self, seeds: Sequence[int]) -> list[Path]:
        """Sealed episodes of the scripted expert."""
        setup = HeadlessSetup(
            self.embodiment, ArbiterTiming(), observation_spec(self.observation), spool=self.root / "spool"
        )
        results = run_expert(setup, [EpisodeRequest("place", seed) for seed in seeds])
        return [result.path for result in results if result.path is not None]

    def commit(self, seeds: Sequence[int]) -> list[str]:
        """Episodes of the scripted expert, committed; returns their ids."""
        return [self.uploader.upload(path).episode_id for path in self.expert(seeds)]

    def learner(self, policy: FlowPolicy | None = None, **options: float) -> Learner:
        return Learner(
            self.root / "learner", self.catalog, self.store, policy or self.policy(), small_config(**options)
        )
