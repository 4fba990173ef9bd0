# SPDX-License-Identifier: Apache-2.0
"""Every way to learn that has a name: what it draws, that it trains, and that robots can load what it publishes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import SmallRun, small_config
from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.learner import Learner, load_policy
from lwd_learner.methods import DEFAULT, METHODS, UnknownMethod, named
from lwd_learner.replay import Replay
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout, Source
from lwd_learner.schedule import Schedule
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.training_run import TrainingRun
from lwd_learner.transitions import (
    AUTHOR_EXPERT,
    AUTHOR_HUMAN,
    AUTHOR_POLICY,
    OUTCOME_FAILURE,
    OUTCOME_SUCCESS,
)

LAYOUT = ReplayLayout(feature_dim=2, horizon=1, action_dim=1, history=1)
P, H, E = AUTHOR_POLICY, AUTHOR_HUMAN, AUTHOR_EXPERT


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spool with one sealed episode, for the `run` of these tests: many of them take it in."""
    run = SmallRun(tmp_path_factory.mktemp("episodes"))
    run.expert([1])
    return run.root / "spool"


def learner_of(run: SmallRun, method: str) -> Learner:
    config = replace(small_config(held_out=0.0), method=method)
    return Learner(run.root / "learner", run.catalog, run.store, run.policy(), config)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("trusted_critic")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_goes_on_and_publishes_a_policy_that_robots_can_load(
    run: SmallRun, name: str
) -> None:
    learner = learner_of(run, name)
    learner.ingest("offline")
    phase = TrainingRun(learner, "offline")
    before, critic = weights(learner.policy.expert), weights(learner.trainer.values.critic)
    phase.train(2)
    phase.save()
    phase.train(1)
    assert phase.steps == 3
    assert same(critic, weights(learner.trainer.values.critic)) != named(name).judges
    version = learner.publish()
    learner.close()
    row = run.catalog.policy(version)
    policy = load_policy(Path(row.uri.removeprefix("file://")))
    assert row.state == "active"
    assert same(weights(policy.expert), weights(learner.policy.expert)) and not same(
        before, weights(policy.expert)
    )
    noise = torch.randn(2, policy.action_spec.horizon, policy.action_spec.dim)
    assert policy.sample(torch.zeros(2, policy.context_dim), noise).isfinite().all()

    again = learner_of(run, name)
    resumed = TrainingRun(again, "offline")
    resumed.train(1)
    assert resumed.steps == 3 and same(weights(again.policy.expert), weights(learner.policy.expert))
    again.close()


def test_an_unknown_method_is_refused_with_those_that_there_are(run: SmallRun) -> None:
    with pytest.raises(UnknownMethod, match="no method 'magic'; there are lwd, .*recap.*hg_dagger"):
        learner_of(run, "magic")


def test_the_default_method_takes_the_settings_that_it_is_given() -> None:
    config = TrainerConfig(batch=7)
    assert named(DEFAULT).adapt(config) is config
    for method in METHODS.values():
        adapted = method.adapt(config)
        assert (adapted.batch, adapted.critic, adapted.policy_rate) == (7, config.critic, config.policy_rate)


def episode(
    name: str, outcome: int, authors: Sequence[int], action: float = 0.0, source: Source = "offline"
) -> ReplayEpisode:
    """One chunk after the other, by these authors."""
    rows = len(authors)
    table = np.zeros(rows, TRANSITION)
    table["point"], table["next_point"] = np.arange(rows), np.arange(1, rows + 1)
    table["executed"], table["planned"], table["author"] = 1, 1, authors
    table["next_point"][-1], table["done"][-1] = -1, True
    features, previous = np.zeros((rows, 2), np.float32), np.arange(rows, dtype=np.int64)
    actions = np.full((rows, 1, 1), action, np.float32)
    return ReplayEpisode(name, "place", source, outcome, features, previous, actions, table)


@pytest.fixture
def replay(tmp_path: Path) -> Iterator[Replay]:
    with Replay(tmp_path, LAYOUT) as replay:
        for name, outcome, authors in (
            ("demonstration", OUTCOME_SUCCESS, [E, E]),  # rows 0, 1
            ("failed demonstration", OUTCOME_FAILURE, [H, H]),  # 2, 3
            ("deployment", OUTCOME_SUCCESS, [P, P]),  # 4, 5
            ("failed deployment", OUTCOME_FAILURE, [P, P]),  # 6, 7
            ("saved by a person", OUTCOME_SUCCESS, [P, H]),  # 8, 9
            ("not saved by a person", OUTCOME_FAILURE, [P, H, P]),  # 10, 11, 12
        ):
            replay.append(episode(name, outcome, authors))
        yield replay


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("bc", [0, 1, 9]),
        ("sft_continued", [0, 1, 9]),
        ("filtered_bc", [4, 5, 8, 9]),
        ("hg_dagger", [0, 1, 9, 11]),
        ("hg_dagger_offline", [0, 1, 4, 5, 8, 9, 11]),
        ("recap", list(range(13))),
        ("iql_awr", list(range(13))),
        ("lwd", list(range(13))),
    ],
)
def test_methods_differ_in_what_they_draw(replay: Replay, name: str, rows: list[int]) -> None:
    assert replay.rows(named(name).draws).tolist() == rows
    drawn = replay.sample(200, torch.Generator().manual_seed(0), 0.9, selection=named(name).draws)
    assert sorted(set(drawn.row.tolist())) == rows


class Constant(nn.Module):
    """A velocity that is one number, so that what it was trained on can be read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.zeros(()))

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        return (self.target - noisy) / (1.05 - flow_time)[:, None, None]


@pytest.mark.parametrize(("name", "expected"), [("filtered_bc", 0.5), ("hg_dagger", -0.4)])
def test_what_is_not_drawn_is_not_imitated(tmp_path: Path, name: str, expected: float) -> None:
    """The policy succeeds at .5 and fails at .9; a person who took over in vain did -.4."""
    with Replay(tmp_path, LAYOUT) as replay:
        replay.append(episode("won", OUTCOME_SUCCESS, [P], 0.5))
        replay.append(episode("lost", OUTCOME_FAILURE, [P], 0.9))
        taken_over = episode("taken over", OUTCOME_FAILURE, [P, H])
        taken_over.actions[:, 0, 0] = 0.9, -0.4
        replay.append(taken_over)
        expert, method = Constant(), named(name)
        trainer = Trainer(expert, 2, 1, 1, method.adapt(TrainerConfig(policy_rate=1e-2, batch=64)))

        def draw() -> Batch:
            return replay.sample(64, trainer.sampling, 0.9, selection=method.draws)

        for _ in range(250):
            trainer.clone(draw())
    assert expert.target.item() == pytest.approx(expected, abs=0.1)


def test_the_rate_of_a_method_that_clones_falls_to_zero_over_its_phase(replay: Replay) -> None:
    expert = Constant()
    trainer = Trainer(expert, 2, 1, 1, TrainerConfig(policy_schedule=Schedule("cosine"), batch=16))
    batch = replay.sample(16, trainer.sampling, 0.9)
    trainer.planned = 4
    moves = []
    for _ in range(6):
        before = expert.target.item()
        trainer.clone(batch)
        moves.append(abs(expert.target.item() - before))
    assert all(move > 0 for move in moves[:4]) and moves[4:] == [0.0, 0.0]
    trainer.begin_phase()
    trainer.clone(batch)
    assert expert.target.item() != before
