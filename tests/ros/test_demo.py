# SPDX-License-Identifier: Apache-2.0
"""The whole loop once, small: demonstrations, learning, two robots over DDS that receive what was learned, a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lwd_learner.demo import Demo
from lwd_learner.demo_plan import DemoPlan
from lwd_learner.gate import CriticCheck
from lwd_learner.learner import Learner


@pytest.mark.timeout(600)
def test_the_loop_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So few episodes tell nothing of the critic; a policy that may not follow it would never be a new version.
    trusted = CriticCheck(auc=1.0, over_estimate=0.0)
    monkeypatch.setattr(Learner, "_check_critic", lambda learner: trusted)
    torch.set_num_threads(1)
    plan = replace(
        DemoPlan().quick(),
        demonstrations=10,
        second_demonstrations=2,
        clone_steps=40,
        rollouts=4,
        online_s=15.0,
        evaluation_episodes=2,
        second_evaluation_episodes=1,
    )
    run = tmp_path / "run"
    summary = Demo(run, plan, Console(quiet=True)).run()

    on_the_wire = [source for source in summary.sources if source.kind == "ros"]
    assert {source.robot for source in on_the_wire} == {"sim_r1", "sim_r2"}
    assert all(source.episodes >= 1 for source in on_the_wire)
    assert len(summary.versions) >= 2, "before and offline; the learner node judges its critic itself"
    assert any(set(version.robots) & {"sim_r1", "sim_r2"} for version in summary.versions)
    written = json.loads((run / "summary.json").read_text())
    assert {"success_before", "success_offline", "success_after", "success_filtered_bc"} <= written[
        "metrics"
    ].keys()
    assert written["metrics"]["eval_episodes"] == 2
    assert (run / "report.html").read_text().startswith("<!")
    assert not list((run / "spool").rglob("*.partial")), "no recording was left open"
