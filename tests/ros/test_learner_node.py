# SPDX-License-Identifier: Apache-2.0
"""The learner as a process: it takes in what is committed while it runs, publishes versions, and ends cleanly."""

from __future__ import annotations

import os
import signal

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lwd_msgs.msg import LearnerStatus
from small_run import SmallRun

from lwd_fleet.deployment import NodeSpec
from lwd_learner.training_state import saved_states
from lwd_policy import checkpoint
from lwd_policy.qos import EVENTS, LATCHED


def learner(run: SmallRun, **parameters) -> NodeSpec:
    return NodeSpec(
        "lwd_learner",
        "learner_node",
        "learner",
        "/fleet",
        {
            "store": str(run.root / "store"),
            "catalog": str(run.root / "catalog.db"),
            "run_dir": str(run.root / "learner"),
            "batch": 16,
            "held_out": 0.0,
            "min_transitions": 1,
            "publish_every": 5,
            **parameters,
        },
        respawn=False,
        stop_timeout_s=30.0,
    )


def test_episodes_committed_while_it_runs_become_a_version_and_sigint_saves(stage, tmp_path):
    """It begins with another policy than the active one. Held out is nothing here: the critic is not trusted, the
    policy stays as it is, and no further version is published."""
    run = SmallRun(tmp_path / "run")
    first = run.first_version()
    start = checkpoint.save(tmp_path / "start", run.policy(seed=1))
    states = stage.collect(LearnerStatus, "/fleet/learner/status", LATCHED)
    supervisor = stage.bring_up([learner(run, policy=str(start))])
    stage.until(lambda: states and states[-1].phase == "ingest", "a status that waits for data")
    run.commit([1])
    stage.until(lambda: states[-1].snapshot == 1 and states[-1].step > 0, "training on the first episode")
    rows = states[-1].transitions
    run.commit([2])
    stage.until(lambda: states[-1].transitions > rows > 0, "the second episode in the replay")
    stage.until(lambda: states[-1].policy_version > first, "a version")
    step = states[-1].step
    stage.until(lambda: states[-1].step >= step + 10, "the time of two more versions")
    desired = run.catalog.desired_policy()
    assert desired is not None and desired.version == states[-1].policy_version == first + 1
    assert desired.parent == first
    assert "critic_loss" in states[-1].metric_names
    assert len(states[-1].metric_names) == len(states[-1].metric_values)
    steps = [state.step for state in states]
    assert steps == sorted(steps)
    (process, _) = supervisor.status()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    stage.until(lambda: supervisor.status()[0].pid is None, "the end of the process")
    assert supervisor.status()[0].exit_status == 0
    assert saved_states(run.root / "learner" / "state")


def test_a_policy_that_is_damaged_shows_in_the_diagnostics_and_the_node_stays(stage, tmp_path):
    run = SmallRun(tmp_path / "run")
    run.first_version()
    row = run.catalog.desired_policy()
    assert row is not None
    (run.root / "policies" / row.digest / "card.json").write_text("{}")
    heard = stage.collect(DiagnosticArray, "/diagnostics", EVENTS)
    stage.bring_up([learner(run)])

    def training() -> list[DiagnosticStatus]:
        found = [one for array in heard for one in array.status if one.name == "/fleet/learner: training"]
        return [one for one in found if one.level == DiagnosticStatus.ERROR]

    stage.until(training, "an error in the diagnostics")
    assert "damaged" in training()[-1].message
