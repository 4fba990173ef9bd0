# SPDX-License-Identifier: Apache-2.0
"""What a phase of training changes and what it leaves alone, what it shows, and what it goes on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from event_files import read_events
from small_run import SmallRun, small_config

from lwd_learner.gate import CriticCheck
from lwd_learner.learner import Learner, feature_key, load_policy
from lwd_learner.loss_mix import LossMixConfig
from lwd_learner.non_finite import save_evidence
from lwd_learner.online import OnlineConfig, OnlineLearner
from lwd_learner.replay_episode import ReplayEpisode
from lwd_learner.training_run import TrainingRun, starting_policy
from lwd_learner.transitions import episode_rows
from lwd_policy import checkpoint


def test_rows_that_hold_what_is_no_number_are_named(run: SmallRun, tmp_path: Path) -> None:
    learner = run.learner(held_out=0.0)
    learner.ingest("offline")
    batch = learner.replay.batch(np.arange(6), 0.99)
    batch.context[4, 0], batch.reward[1] = float("inf"), float("nan")
    path = save_evidence(tmp_path, 7, batch, list("abcdef"), {"error": "why"})
    record = json.loads((path / "record.json").read_text())
    assert record["non_finite_rows"] == {"context": [4], "reward": [1]} and record["error"] == "why"
    learner.close()


@pytest.mark.usefixtures("trusted_critic")
def test_online_learning_leaves_the_trunk_and_the_cached_features_as_they_were(run: SmallRun) -> None:
    learner = run.learner(held_out=0.0)
    before = feature_key(learner.policy)
    expert = [parameter.clone() for parameter in learner.policy.expert.parameters()]
    online = OnlineLearner(learner, OnlineConfig(steps=6, publish_every=3, min_transitions=1))
    while not online.finished:
        online.run_once()
    pairs = zip(expert, learner.policy.expert.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs if old.numel() > 1), "the expert did learn"
    row = run.catalog.desired_policy()
    assert row is not None
    published, _ = checkpoint.load(Path(row.uri.removeprefix("file://")), row.digest)
    assert feature_key(learner.policy) == feature_key(published) == before
    for number, committed in enumerate(run.catalog.episodes_since(0)):
        again = ReplayEpisode.from_rows(episode_rows(learner.trace(committed), published), "online")
        assert again.digest() == learner.replay.episode(number).digest(), "bit for bit what was cached"
    learner.close()


@pytest.mark.parametrize(("over_estimate", "climbs"), [(0.04, True), (0.06, False), (float("nan"), False)])
def test_tau_base_climbs_only_while_the_critic_does_not_over_estimate(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, over_estimate: float, climbs: bool
) -> None:
    monkeypatch.setattr(
        Learner, "_check_critic", lambda learner: CriticCheck(auc=1.0, over_estimate=over_estimate)
    )
    learner = run.learner(held_out=0.0)
    learner.ingest("online")
    learner.trainer.freeze_reference()
    learner.learn(3)
    assert learner.trainer.online_steps == (3 if climbs else 0)
    learner.close()


def test_a_run_goes_on_with_the_normalisation_it_began_with(run: SmallRun) -> None:
    assert starting_policy(run.root / "learner") is None
    learner = run.learner(held_out=0.0)
    learner.ingest("offline")
    work = TrainingRun(learner, "bc")
    work.train(2)
    work.save()
    learner.close()
    begun = starting_policy(run.root / "learner")
    assert begun is not None
    start = load_policy(begun)
    assert feature_key(start) == feature_key(run.policy()), "trunk, observation and action are the run's"
    again = run.learner(start, held_out=0.0)
    assert TrainingRun(again, "bc").steps == 2
    again.close()
    shutil.rmtree(run.root / "learner" / "start")
    assert starting_policy(run.root / "learner") is None


def test_steps_that_were_lost_with_a_replay_that_was_moved_away_are_taken_with_the_new_one(
    run: SmallRun,
) -> None:
    learner = run.learner(held_out=0.0)
    learner.ingest("offline", limit=1)
    work = TrainingRun(learner, "bc")
    work.train(2)
    learner.ingest("offline")  # at a step that no state knows, so that the journal speaks of it
    learner.close()
    (run.root / "learner" / "replay").rename(run.root / "old_replay")
    again = run.learner(held_out=0.0)
    work = TrainingRun(again, "bc")
    assert work.resumed and work.steps == 0
    assert again.ingest("offline").episodes == 2 and len(again.replay.episode_ids) == 2
    work.train(1)
    again.close()


def test_the_rate_of_cloning_falls_over_the_phase_however_it_is_sliced(run: SmallRun, tmp_path: Path) -> None:
    def rates(name: str, slices: list[int]) -> list[float]:
        learner = Learner(
            tmp_path / name, run.catalog, run.store, run.policy(), small_config(held_out=0.0), name=name
        )
        learner.ingest("offline")
        work, seen = TrainingRun(learner, "bc", planned=8), []
        for steps in slices:
            work.train(
                steps, lambda *_: seen.append(learner.trainer.actor.descent.optimiser.param_groups[0]["lr"])
            )
        learner.close()
        return seen

    whole = rates("whole", [8])
    assert whole == rates("sliced", [3, 1, 4])
    peak = small_config().clone_rate
    assert whole[4] == pytest.approx(peak * 0.05 * 0.5), (
        "the fifth of a hundred steps of warm-up, half way down"
    )


def test_the_mix_follows_the_losses(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(small_config(held_out=0.0), loss_mix=LossMixConfig(gain=1.5))
    learner = Learner(run.root / "learner", run.catalog, run.store, run.policy(), config)
    learner.ingest("offline", limit=1)
    learner.ingest("online")
    learner.trainer.freeze_reference()
    shares: list[float] = []
    losses = lambda batch: (shares.append(batch.online.float().mean().item()), 9.0 * batch.online.float())[1]  # noqa: E731
    monkeypatch.setattr(learner.trainer, "critic_losses", losses)
    learner.learn(41)
    assert sum(shares[1:]) / 40 == pytest.approx(0.8, abs=0.05)
    learner.close()


@pytest.mark.usefixtures("trusted_critic")
def test_what_people_look_at_is_logged(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwd_learner.learner.LOOK_EVERY", 5)
    learner = run.learner(held_out=0.0)
    online = OnlineLearner(learner, OnlineConfig(steps=10, publish_every=5, min_transitions=1))
    while not online.finished:
        online.run_once()
    learner.close()
    events = read_events(run.root / "learner" / "tensorboard")
    curves = {
        "value_loss",
        "critic_loss",
        "policy_loss",
        "adjoint",
        "path_kl",
        "saturated",
        "lambda",
        "tau",
        "auc",
    }
    assert curves <= events.keys() and all(list(events[name]) == [10] for name in curves)
    for name in ("value/law", "value/tau", "value/entropy", "critic/q", "policy/q_gain"):
        assert list(events[name]) == [5, 10], name
    raw = Learner(
        run.root / "other", run.catalog, run.store, run.policy(), small_config(held_out=0.0), name="other"
    )
    raw.ingest("offline")
    raw.clone(10)
    raw.close()
    assert not (run.root / "other" / "tensorboard").exists(), "only a run that is saved has curves"


def test_the_critic_is_held_against_what_became_of_held_out_episodes(run: SmallRun) -> None:
    learner = Learner(run.root / "learner", run.catalog, run.store, run.policy(), small_config(held_out=0.0))
    learner._is_held_out = lambda episode_id: len(learner.held_out) == 0  # type: ignore[method-assign]
    learner.ingest("offline")
    work = TrainingRun(learner, "offline")
    work.train(1)
    learner.close()
    events = read_events(run.root / "learner" / "tensorboard")
    check = learner.check
    assert list(events["held_out/q_minus_outcome"]) == [0] and events["held_out/calibration_error"][0] >= 0
    histogram = events["held_out/q_minus_outcome"][0]
    assert histogram.min <= check.over_estimate <= histogram.max
