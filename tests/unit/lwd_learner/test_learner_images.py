# SPDX-License-Identifier: Apache-2.0
"""A learner whose critic looks at the recorded images itself: from bags of the simulated robot to its updates."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import pytest
import torch
from small_run import SmallRun

from lwd_learner.critic import CriticConfig
from lwd_learner.image_encoder import ImageEncoderConfig
from lwd_learner.learner import Learner, LearnerConfig
from lwd_learner.replay import ReplayMismatch
from lwd_learner.trainer import TrainerConfig

OWN = CriticConfig(features="own", encoder=ImageEncoderConfig(channels=(4, 4), view=8, width=16))
CONFIG = LearnerConfig(TrainerConfig(batch=8, critic=OWN))


def learner(run: SmallRun, config: LearnerConfig = CONFIG) -> Learner:
    return Learner(run.root / "learner", run.catalog, run.store, run.policy(), config)


def test_a_critic_with_eyes_of_its_own_learns_from_recorded_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SmallRun(tmp_path, "images")
    kept, _ = run.commit([1, 2])
    monkeypatch.setattr(Learner, "_is_held_out", lambda learner, name: name != kept)
    made = learner(run)
    assert made.ingest("offline").episodes == 2 and len(made.held_out) > 0
    made.clone(1)
    made.trainer.freeze_reference()
    encoder = made.trainer.values.features.modules["encoder"]
    before = [parameter.detach().clone() for parameter in encoder.parameters()]
    made.learn(2)
    assert not any(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert isfinite(made.check.over_estimate), "held-out episodes were judged with their images"
    cameras = [camera.name for camera in made.replay.layout.cameras]
    assert cameras == ["camera_top", "camera_wrist_left", "camera_wrist_right"]
    made.close()
    with pytest.raises(ReplayMismatch, match="cameras"):
        learner(run, LearnerConfig(TrainerConfig(batch=8)))


def test_a_policy_without_cameras_has_no_images_for_a_critic(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no camera"):
        learner(SmallRun(tmp_path))
