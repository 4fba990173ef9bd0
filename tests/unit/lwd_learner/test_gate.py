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

from lwd_learner.gate import CriticCheck, examine, outcome_auc
from lwd_learner.replay import Replay
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.transitions import (
    AUTHOR_EXPERT,
    AUTHOR_POLICY,
    OUTCOME_FAILURE,
    OUTCOME_SUCCESS,
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
