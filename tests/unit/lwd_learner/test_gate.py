# SPDX-License-Identifier: Apache-2.0
"""What the gate finds: whether the critic tells outcomes apart, and whether by actions or only by states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lwd_learner.gate import CriticCheck, decisions, examine, outcome_auc, rankable
from lwd_learner.replay import Replay
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.transitions import (
    AUTHOR_EXPERT,
    AUTHOR_POLICY,
    OUTCOME_FAILURE,
    OUTCOME_SUCCESS,
    OUTCOME_UNLABELLED,
)

C, H, A = 3, 2, 1
EPISODES = 40


def test_the_auc_counts_pairs_within_strata() -> None:
    assert outcome_auc([0.1, 0.9], [False, True], [0, 0]) == 1.0
    assert outcome_auc([0.9, 0.1], [False, True], [0, 0]) == 0.0
    assert outcome_auc([0.5, 0.5], [False, True], [0, 0]) == 0.5
    late_is_high = outcome_auc([0.1, 0.1, 0.9, 0.9], [False, True, False, True], [0, 0, 1, 1])
    assert late_is_high == 0.5  # knowing the time is not knowing the outcome
    assert isnan(outcome_auc([0.1, 0.9], [True, True], [0, 0]))


@pytest.mark.parametrize(
    ("auc", "action_auc", "trusted"),
    [
        (0.8, 0.7, True),
        (0.8, 0.5, False),  # it knows states, not actions
        (0.5, 0.7, False),
        (0.8, nan, True),  # nothing to rank actions by
        (nan, nan, False),
    ],
)
def test_a_critic_is_followed_if_it_tells_outcomes_apart_and_is_not_blind_to_actions(
    auc: float, action_auc: float, trusted: bool
) -> None:
    assert CriticCheck(auc, action_auc, 0.0).knows_something is trusted


class Still(nn.Module):
    """A flow that leaves its noise where it is: the reference's actions are clipped normal numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        return noisy * self.weight


@pytest.fixture
def held_out(tmp_path: Path) -> Iterator[Replay]:
    """Episodes of one chunk; its action is 0.5 where it succeeds and -0.5 where it fails, and so is its state."""
    with Replay(tmp_path, ReplayLayout(C, H, A, history=1)) as replay:
        replay.extend(_episode(number, AUTHOR_POLICY) for number in range(EPISODES))
        yield replay


def _episode(number: int, author: int) -> ReplayEpisode:
    success = number % 2 == 0
    table = np.zeros(1, TRANSITION)
    table["next_point"], table["done"], table["reward"] = -1, True, float(success)
    table["executed"] = table["planned"] = H
    table["author"] = author
    sign = 0.5 if success else -0.5
    return ReplayEpisode(
        f"{author}/{number}",
        "t",
        "offline",
        OUTCOME_SUCCESS if success else OUTCOME_FAILURE,
        np.full((1, C), sign, np.float32),
        np.zeros(1, np.int64),
        np.full((1, H, A), sign, np.float32),
        table,
    )


def _trainer(q: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer(Still(), C, H, A, TrainerConfig(batch=8))
    trainer.freeze_reference()
    monkeypatch.setattr(trainer.values, "slow_state", lambda batch: batch.context)
    monkeypatch.setattr(trainer.values, "q", lambda state, chunk, mask: q(state, chunk).expand(2, len(chunk)))
    return trainer


def test_a_critic_that_knows_states_only_ranks_no_action(
    held_out: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = examine(_trainer(lambda state, chunk: state[:, 0], monkeypatch), held_out).check
    assert check.auc == 1.0 and check.action_auc == 0.5 and not check.knows_something


def test_a_critic_that_knows_actions_ranks_them(held_out: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    check = examine(_trainer(lambda state, chunk: chunk[:, 0, 0], monkeypatch), held_out).check
    assert check.auc == 1.0 and check.knows_something
    # The advantage of a success is 0.5 - m, of a failure -0.5 - m', with m a mean of four clipped normal numbers (0.36): it
    # is higher with probability Phi(1 / (0.36 sqrt 2)) = 0.97.
    assert 0.9 < check.action_auc <= 1.0


def test_the_advantage_is_q_minus_the_mean_over_the_references_chunks(
    held_out: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(lambda state, chunk: chunk[:, 0, 0] + 7.0 * state[:, 0], monkeypatch)
    batch = held_out.batch(held_out.rows(), 0.99)
    generator = torch.Generator().manual_seed(0)
    usual = [torch.randn(EPISODES, H, A, generator=generator).clamp(-1, 1)[:, 0, 0] for _ in range(3)]
    expected = batch.action[:, 0, 0] - torch.stack(usual).mean(dim=0)
    torch.testing.assert_close(trainer.advantage(batch, draws=3), expected)


def test_actions_are_ranked_among_those_of_policies_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demonstrator acts differently whether it goes well or not: that would rank who acted, not how."""
    trainer = _trainer(lambda state, chunk: chunk[:, 0, 0], monkeypatch)
    with Replay(tmp_path / "demonstrated", ReplayLayout(C, H, A, history=1)) as replay:
        replay.extend(_episode(number, AUTHOR_EXPERT) for number in range(EPISODES))
        check = examine(trainer, replay).check
        assert check.auc == 1.0 and isnan(check.action_auc) and check.knows_something
        assert isnan(examine(Trainer(Still(), C, H, A, TrainerConfig(batch=8)), replay).check.action_auc)


def test_without_held_out_episodes_there_is_no_verdict(tmp_path: Path) -> None:
    with Replay(tmp_path, ReplayLayout(C, H, A, history=1)) as empty:
        found = examine(Trainer(Still(), C, H, A, TrainerConfig(batch=8)), empty)
    assert isnan(found.check.auc) and not found.check.knows_something and len(found.q) == 0


# --- moments ------------------------------------------------------------------------------------------------


def _timed(name: str, author: int, outcome: int, steps: int, stride: int) -> ReplayEpisode:
    """Of `steps` executed steps, decided on every `stride`; each window lasts H. Its state is the time that has passed."""
    places = np.arange(0, steps, stride)
    table = np.zeros(len(places), TRANSITION)
    table["point"] = np.arange(len(places))
    table["executed"] = table["planned"] = np.minimum(H, steps - places)
    table["done"] = places + H >= steps
    table["next_point"] = np.where(table["done"], -1, table["point"] + H // stride)
    table["reward"] = table["done"] * float(outcome == OUTCOME_SUCCESS)
    table["author"] = author
    features = np.repeat(places[:, None], C, axis=1).astype(np.float32)
    previous = np.arange(len(places), dtype=np.int64)
    actions = np.zeros((len(places), H, A), np.float32)
    return ReplayEpisode(name, "t", "offline", outcome, features, previous, actions, table)


def test_a_demonstrators_overlapping_windows_are_thinned_to_those_that_follow_one_another() -> None:
    dense = _timed("dense", AUTHOR_EXPERT, OUTCOME_SUCCESS, steps=7, stride=1).transitions
    assert decisions(dense).tolist() == [0, 2, 4, 6]
    plain = _timed("plain", AUTHOR_POLICY, OUTCOME_SUCCESS, steps=7, stride=H).transitions
    assert decisions(plain).tolist() == [0, 1, 2, 3]


def test_after_a_gap_the_next_row_that_there_is_follows() -> None:
    """Nothing begins at point 2: it was held there."""
    table = _timed("held", AUTHOR_POLICY, OUTCOME_FAILURE, steps=8, stride=1).transitions[[0, 1, 3, 5, 6, 7]]
    assert table["next_point"].tolist() == [2, 3, 5, 7, -1, -1]
    assert decisions(table).tolist() == [0, 2, 3, 5]
    assert decisions(table[:2]).tolist() == [0], "an episode that is cut off there ends"


def test_a_critic_that_knows_nothing_but_the_time_ranks_nobody_however_densely_they_were_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More decisions than any fixed number would keep apart by task, too."""
    trainer = _trainer(lambda state, chunk: state[:, 0], monkeypatch)
    with Replay(tmp_path, ReplayLayout(C, H, A, history=1)) as replay:
        replay.append(_timed("demonstration", AUTHOR_EXPERT, OUTCOME_SUCCESS, steps=2400, stride=1))
        replay.append(_timed("deployment", AUTHOR_POLICY, OUTCOME_FAILURE, steps=2400, stride=H))
        found = examine(trainer, replay)
    assert found.check.auc == 0.5 and len(found.q) == 2400


@pytest.mark.parametrize("stride", [1, H])
def test_the_outcome_is_discounted_by_the_time_that_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    """A critic that says it exactly neither over- nor under-estimates: the reward lies on the last of 7 steps."""
    gamma = TrainerConfig().gamma
    trainer = _trainer(lambda state, chunk: gamma ** (6 - state[:, 0]), monkeypatch)
    with Replay(tmp_path, ReplayLayout(C, H, A, history=1)) as replay:
        replay.append(_timed("won", AUTHOR_EXPERT, OUTCOME_SUCCESS, steps=7, stride=stride))
        found = examine(trainer, replay)
    np.testing.assert_allclose(found.outcome, gamma ** np.array([6, 4, 2, 0]), atol=1e-12)
    np.testing.assert_allclose(found.q, found.outcome, atol=1e-6)


def test_an_episode_without_a_label_judges_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(lambda state, chunk: state[:, 0], monkeypatch)
    with Replay(tmp_path, ReplayLayout(C, H, A, history=1)) as replay:
        replay.append(_timed("won", AUTHOR_POLICY, OUTCOME_SUCCESS, steps=7, stride=H))
        replay.append(_timed("open", AUTHOR_POLICY, OUTCOME_UNLABELLED, steps=7, stride=H))
        found = examine(trainer, replay)
    assert len(found.q) == 4 and isnan(found.check.auc), "it is no failure"


def test_rows_are_drawn_with_those_that_they_are_ranked_against() -> None:
    """600 strata of which every third has both outcomes: of rows drawn anywhere, one in twenty would find a partner."""
    stratum = np.repeat(np.arange(600), 4)
    success = (stratum % 3 == 0) & (np.arange(2400) % 2 == 0)
    chosen = rankable(success, stratum, 100)
    assert len(chosen) == 100 and chosen.tolist() == sorted(set(chosen.tolist()))
    assert (np.unique(stratum[chosen], return_counts=True)[1] == 4).all() and (stratum[chosen] % 3 == 0).all()
    assert len(rankable(success, stratum, 5000)) == 800
    assert len(rankable(np.ones(2400, bool), stratum, 100)) == 0
