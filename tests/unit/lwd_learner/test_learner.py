# SPDX-License-Identifier: Apache-2.0
"""From episodes to a policy version, with real episodes; and going on after an end, wherever it was."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import SmallRun, small_config

from lwd_learner import learner as learner_module
from lwd_learner import value_learner
from lwd_learner.batch import Batch
from lwd_learner.extraction.edit import EditConfig
from lwd_learner.extraction.headed import HeadConfig
from lwd_learner.extraction.one_step import OneStepConfig
from lwd_learner.learner import Learner, LearnerConfig, load_policy
from lwd_learner.learner_worker import LearnerJob, LearnerWorker
from lwd_learner.online import OnlineConfig, OnlineLearner
from lwd_learner.ranks import Ranks
from lwd_learner.replay import Replay
from lwd_learner.selections import DEMONSTRATIONS
from lwd_learner.trainer import TrainerConfig
from lwd_learner.training_run import TrainingRun
from lwd_learner.training_state import saved_states
from lwd_learner.transitions import AUTHOR_HUMAN, AUTHOR_POLICY, OUTCOME_FAILURE, OUTCOME_SUCCESS
from lwd_policy import checkpoint


def test_episodes_become_a_policy_version(run: SmallRun) -> None:
    first = run.first_version()
    learner = run.learner(held_out=0.0)
    told: list[tuple[int, int]] = []
    ingested = learner.ingest("offline", lambda done, total: told.append((done, total)))
    assert ingested.episodes == 2 and not ingested.refused and told == [(1, 2), (2, 2)]
    assert len(learner.replay) == ingested.transitions > 10
    losses: list[float] = []
    learner.clone(80, progress=lambda step, metrics: losses.append(metrics["clone_loss"]))
    assert sum(losses[-20:]) < sum(losses[:20])
    learner.trainer.freeze_reference()
    learner.learn(3)
    version = learner.publish(learner.trainer.report() | {"auc": float("nan")})
    row = run.catalog.desired_policy()
    assert row is not None and row.version == version == first + 1
    assert (
        row.parent == first
        and row.snapshot_n == 2
        and "critic_loss" in row.metrics
        and "auc" not in row.metrics
    )
    policy, card = checkpoint.load(Path(row.uri.removeprefix("file://")), row.digest)
    assert card.origin["learner_steps"] == 83
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), learner.policy.parameters(), strict=True)
    )


def test_a_refit_changes_nothing_before_anything_of_a_deployment_succeeded(run: SmallRun) -> None:
    learner = run.learner(held_out=0.0)
    learner.ingest("offline")
    learner.trainer.freeze_reference()
    digest = learner.trainer.actor.reference_digest()
    assert not learner.refit(3), "demonstrations show what succeeds without the shift"
    assert learner.trainer.steps == 0 and learner.trainer.actor.reference_digest() == digest


def test_a_refit_clones_deployed_successes_and_begins_a_phase_with_a_new_reference(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lwd_learner.learner.DEPLOYED", DEMONSTRATIONS)  # all that this run has
    learner = run.learner(held_out=0.0)
    learner.ingest("offline")
    learner.trainer.freeze_reference()
    digest = learner.trainer.actor.reference_digest()
    assert learner.refit(3) and learner.trainer.steps == 3
    assert learner.trainer.actor.reference_digest() != digest
    assert learner.trainer.actor.reference is not None
    pairs = zip(learner.trainer.actor.reference.parameters(), learner.policy.expert.parameters(), strict=True)
    assert all(torch.equal(reference, policy) for reference, policy in pairs)


def test_a_refit_clones_what_policies_and_people_who_took_over_did_in_successes(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside two demonstrations: a deployment that a person saved, one that nobody could, and play."""
    learner = run.learner(held_out=0.0)
    learner.ingest("offline")
    assert isinstance(learner.replay, Replay)
    recorded = learner.replay.episode(0)
    taken_over = np.where(np.arange(len(recorded.transitions)) < 3, AUTHOR_POLICY, AUTHOR_HUMAN)
    for name, author, outcome in (
        ("saved", taken_over, OUTCOME_SUCCESS),
        ("lost", taken_over, OUTCOME_FAILURE),
        ("played", np.full_like(taken_over, AUTHOR_HUMAN), OUTCOME_FAILURE),
    ):
        table = recorded.transitions.copy()
        table["author"] = author
        learner.replay.append(replace(recorded, episode_id=name, outcome=outcome, transitions=table))
    clone, drawn = learner.trainer.clone, []

    def spy(batch: Batch, rate: float | None = None) -> dict[str, float]:
        drawn.append(batch)
        return clone(batch, rate)

    monkeypatch.setattr(learner.trainer, "clone", spy)
    learner.trainer.freeze_reference()
    assert learner.refit(8)
    (saved,) = [range(first, first + rows) for name, first, rows in learner.replay.spans if name == "saved"]
    assert all(int(row) in saved for batch in drawn for row in batch.row)
    assert set(torch.cat([batch.author for batch in drawn]).tolist()) == {AUTHOR_POLICY, AUTHOR_HUMAN}
    learner.close()


@pytest.mark.usefixtures("trusted_critic")
def test_the_online_learner_refits_at_its_pace(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwd_learner.learner.DEPLOYED", DEMONSTRATIONS)  # all that this run has
    learner = run.learner(held_out=0.0)
    config = OnlineConfig(
        steps=30, publish_every=4, min_transitions=1, slice_steps=4, refit_every=8, refit_steps=5
    )
    online = OnlineLearner(learner, config)
    references = {0: learner.trainer.actor.reference_digest()}
    while not online.finished:
        online.run_once()
        references[online.run.steps] = learner.trainer.actor.reference_digest()
    assert len(set(references.values())) == 3, "refits after 8 and after 8 + 5 + 8 steps"


def test_an_episode_that_cannot_be_used_is_set_aside_and_the_rest_taken_in(run: SmallRun) -> None:
    rows = run.catalog.episodes_since(0)
    (file,) = rows[0].summary.files
    blob = run.root / "store" / "blobs" / "sha256" / file.sha256
    blob.write_bytes(blob.read_bytes()[:-1000])
    learner = run.learner(held_out=0.0)
    ingested = learner.ingest("offline")
    assert ingested.episodes == 1 and rows[0].episode_id in ingested.refused[0]
    (note,) = run.catalog.quarantined()
    assert note.episode_id == rows[0].episode_id and "not ingested" in note.reason
    assert run.catalog.cursor("learner") == 2


def test_the_same_episodes_are_held_out_by_every_learner(run: SmallRun) -> None:
    one = run.learner(held_out=0.5)
    names = [f"episode {number}" for number in range(400)]
    held_out = {name for name in names if one._is_held_out(name)}
    assert 150 < len(held_out) < 250
    one.close()
    again = run.learner(held_out=0.5)
    assert held_out == {name for name in names if again._is_held_out(name)}
    assert again.ingest("offline").episodes == 2
    ids = again.replay.episode_ids | again.held_out.episode_ids
    assert ids == {row.episode_id for row in run.catalog.episodes_since(0)}
    assert again.held_out.episode_ids == {name for name in ids if again._is_held_out(name)}


def test_a_restart_goes_on_from_the_cursor(run: SmallRun) -> None:
    learner = run.learner(held_out=0.0)
    assert learner.ingest("offline", limit=1).episodes == 1
    learner.close()
    again = run.learner(held_out=0.0)
    assert again.snapshot == 1 and len(again.replay) > 0
    assert again.ingest("offline").episodes == 1
    assert again.ingest("offline").episodes == 0
    assert len(again.replay.episode_ids) == 2


def test_a_long_ingest_notes_how_far_it_has_come_and_tells_ranks_that_wait(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = run.learner(held_out=0.0)
    told: list[tuple[int, int]] = []

    def newest(ranks: Ranks, number: int) -> int:
        told.append((number, run.catalog.cursor("learner")))
        return number

    monkeypatch.setattr(learner_module, "_NOTE_EVERY", 1)
    monkeypatch.setattr(Ranks, "newest", newest)
    assert learner.ingest("offline").episodes == 2
    assert told[:3] == [(learner_module._MORE, 1), (learner_module._MORE, 2), (learner_module._DONE, 2)]
    learner.close()


def test_where_the_replay_was_moved_away_everything_is_ingested_anew(run: SmallRun) -> None:
    first = run.learner(held_out=0.0)
    assert first.ingest("offline").episodes == 2
    transitions = len(first.replay)
    first.close()
    (run.root / "learner" / "replay").rename(run.root / "old_replay")
    again = run.learner(held_out=0.0)
    assert again.ingest("offline").episodes == 2 and len(again.replay) == transitions
    again.close()


def test_a_phase_counts_its_steps_over_restarts(run: SmallRun) -> None:
    learner = run.learner(held_out=0.0)
    learner.ingest("offline")
    cloning = TrainingRun(learner, "bc")
    cloning.train(3)
    cloning.save()
    cloning.train(2)  # lost with the process
    learner.close()
    learner = run.learner(held_out=0.0)
    assert TrainingRun(learner, "bc").steps == 3
    offline = TrainingRun(learner, "offline")
    assert offline.resumed and offline.steps == 0 and learner.trainer.actor.reference is not None
    offline.train(2)
    assert offline.steps == 2 and learner.trainer.steps == 5


@pytest.mark.usefixtures("trusted_critic")
def test_the_online_learner_waits_for_data_publishes_at_its_pace_and_stops_after_its_steps(
    run: SmallRun,
) -> None:
    learner = run.learner(held_out=0.0)
    poor = OnlineLearner(learner, OnlineConfig(min_transitions=10**6))
    assert poor.run_once() and poor.phase == "ingest" and poor.run.steps == 0
    assert not poor.run_once()
    online = OnlineLearner(learner, OnlineConfig(steps=7, publish_every=3, min_transitions=1, slice_steps=2))
    looks: list[int] = []
    while not online.finished:
        assert online.run_once(lambda one: looks.append(one.run.steps))
    assert online.phase == "idle" and not online.run_once() and online.run.steps == 7
    assert len(run.catalog.policies()) == 3 and set(looks) == set(range(8))
    assert online.metrics["critic_loss"] > 0
    learner.close()
    again = OnlineLearner(run.learner(held_out=0.0), OnlineConfig(steps=9, min_transitions=1))
    assert again.run.steps == 7 and not again.finished


def test_a_policy_that_did_not_change_is_not_published_again(run: SmallRun) -> None:
    """Held out is nothing here, so that nothing vouches for the critic and the policy is left alone."""
    first = run.first_version()
    learner = run.learner(held_out=0.0)
    online = OnlineLearner(learner, OnlineConfig(steps=7, publish_every=3, min_transitions=1, slice_steps=2))
    news = []
    while not online.finished:
        online.run_once()
        news.append((online.run.steps, online.news))
    unchanged = f"policy unchanged, still version {first}"
    assert [(step, text) for step, text in news if text] == [(3, unchanged), (6, unchanged), (7, unchanged)]
    assert [row.version for row in run.catalog.policies()] == [first] == [learner.version]
    assert len(list((run.root / "policies").iterdir())) == 1
    assert saved_states(learner.run_dir / "state"), "what the critic learned is kept"
    assert not online.run_once() and not online.news
    learner.clone(1)
    assert learner.publish() == first + 1 == learner.publish()
    row = run.catalog.desired_policy()
    assert row is not None and row.version == first + 1 and row.parent == first


def test_a_version_whose_learner_died_before_it_was_active_becomes_active(run: SmallRun) -> None:
    folder = checkpoint.save(run.root / "policies", run.policy())
    version = run.catalog.register_policy(folder.name, folder.as_uri(), (0, 0))
    assert run.learner().publish() == version
    assert run.catalog.policy(version).state == "active"


def job(run: SmallRun, steps: int) -> LearnerJob:
    return LearnerJob(
        run.root / "learner",
        str(run.root / "store"),
        str(run.root / "catalog.db"),
        learner=small_config(held_out=0.0),
        online=OnlineConfig(steps=steps, publish_every=2, min_transitions=1),
    )


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.usefixtures("trusted_critic")
def test_the_worker_waits_for_a_first_policy_and_says_so(run: SmallRun) -> None:
    worker = LearnerWorker(job(run, steps=4))
    try:
        wait_for(lambda: "waits for a first policy" in worker.view.problem)
        run.first_version()
        wait_for(lambda: worker.view.phase == "idle" and worker.view.step == 4)
        wait_for(lambda: worker.view.policy_version == 3)
        assert not worker.view.problem and not worker.view.failure and worker.view.snapshot == 2
    finally:
        worker.close()


def test_a_loss_that_is_no_number_ends_training_keeps_its_batch_and_leaves_the_good_version(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.first_version()
    whole = value_learner.divl.critic_loss
    calls = iter(range(100))
    spoil = lambda q, target: (q * float("nan")).mean() if next(calls) == 3 else whole(q, target)  # noqa: E731
    monkeypatch.setattr(value_learner.divl, "critic_loss", spoil)
    said: list[str] = []
    worker = LearnerWorker(job(run, steps=9), said.append)
    try:
        wait_for(lambda: worker.view.failure)
    finally:
        worker.close()
    kept = run.root / "learner" / "non_finite" / "step_3"
    assert "the critic loss is nan at step 3" in worker.view.failure and str(kept) in worker.view.failure
    assert any("the last published version stays" in text for text in said)
    batch = load_file(kept / "batch.safetensors")
    record = json.loads((kept / "record.json").read_text())
    assert len(batch["row"]) == len(record["episodes"]) == 32
    assert set(record["episodes"]) <= {row.episode_id for row in run.catalog.episodes_since(0)}
    assert record["step"] == 3 and "critic loss is nan" in record["error"]
    assert record["metrics"]["value_loss"] > 0, "the steps before"
    desired = run.catalog.desired_policy()
    assert desired is not None and desired.version == first
    learner = run.learner(held_out=0.0)
    assert TrainingRun(learner, "online").steps == 2, "the last saved state is from before"
    learner.close()


@pytest.mark.parametrize("head", [EditConfig(acts_after=4), OneStepConfig(acts_after=4)])
def test_a_version_has_its_head_once_that_acts_and_training_goes_on_from_its_flow(
    run: SmallRun, trusted_critic: None, head: HeadConfig
) -> None:
    config = LearnerConfig(TrainerConfig(batch=32, head=head), held_out=0.0)
    learner = Learner(run.root / "learner", run.catalog, run.store, run.policy(), config)
    learner.ingest("offline")
    learner.trainer.freeze_reference()
    learner.learn(3)
    plain = learner.publish()
    learner.learn(1)
    headed = learner.publish()
    paths = [Path(run.catalog.policy(version).uri.removeprefix("file://")) for version in (plain, headed)]
    assert [checkpoint.read_card(path).head is None for path in paths] == [True, False]
    assert learner.publish() == headed, "it did not change"
    policy, _ = checkpoint.load(paths[1])
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(5, policy.context_dim, generator=generator)
    noise = torch.randn(5, *policy.noise_shape, generator=generator)
    assert policy.noise_shape == learner.trainer.noise_shape
    torch.testing.assert_close(policy.act(context, noise), learner.trainer.act(context, noise))
    start = load_policy(paths[1])
    assert start.head is None and torch.equal(start.expert.leave.weight, learner.policy.expert.leave.weight)
    learner.close()


def test_a_task_that_is_never_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of task tea is 0"):
        LearnerConfig(task_weights={"tea": 0.0})
