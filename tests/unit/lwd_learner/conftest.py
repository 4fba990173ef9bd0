# SPDX-License-Identifier: Apache-2.0
"""A run with episodes of the simulated robot, recorded once for all tests of the learner."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import SmallRun

from lwd_learner.gate import CriticCheck
from lwd_learner.learner import Learner


@pytest.fixture(scope="session")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spool with two sealed episodes, recorded once."""
    run = SmallRun(tmp_path_factory.mktemp("episodes"))
    assert len(run.expert([1, 2])) == 2
    return run.root / "spool"


@pytest.fixture
def run(tmp_path: Path, episodes: Path) -> SmallRun:
    """A run with both episodes committed."""
    run = SmallRun(tmp_path)
    for path in sorted(episodes.glob("0*")):
        run.uploader.upload(path)
    return run


@pytest.fixture
def trusted_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy follows the critic from the first step."""
    monkeypatch.setattr(Learner, "_check_critic", lambda learner: CriticCheck(auc=1.0, over_estimate=0.0))
