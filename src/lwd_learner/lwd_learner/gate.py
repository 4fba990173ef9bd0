# SPDX-License-Identifier: Apache-2.0
"""Whether the critic knows anything yet: a policy must not be tilted towards noise (algorithm.md 4.4b)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lwd_learner.batch import Batch
from lwd_learner.replay import ReplayReader
from lwd_learner.trainer import Trainer
from lwd_learner.transitions import AUTHOR_POLICY, OUTCOME_SUCCESS, OUTCOME_UNLABELLED

AUC_MIN = 0.6  # of Q for the outcome
# Of the advantage for the outcome. A coin has 0.5; rows of one episode are much alike, so with 20 successes and 20 failures
# its error is up to 0.09. This keeps out what is blind or inverted, it does not prove that a critic sees.
ACTION_AUC_MIN = 0.55

_TIME_BIN_S = 1.0  # s of executed time in which rows of different episodes are compared
_ROWS_WITH_IMAGES = 64  # that are judged at a time
_RANKED_ROWS = 512  # of the policy, that its own alternatives are drawn for


@dataclass(frozen=True)
class CriticCheck:
    """What held-out episodes say of the critic. nan: nothing to judge by."""

    auc: float = float("nan")  # `outcome_auc` of Q: does it know which episodes go well?
    action_auc: float = float("nan")  # `outcome_auc` of the advantage: does it know which actions make them?
    over_estimate: float = float("nan")  # median of Q minus the discounted outcome

    @property
    def knows_something(self) -> bool:
        """Whether the policy may follow it: it tells outcomes apart, and is not known to be blind to actions.

        A critic may rank states well (0.8 in the demonstration) and actions not at all; its gradient is noise then. Where
        no policy was deployed yet, or none of its episodes failed, there is nothing to rank actions by.
        """
        return self.auc >= AUC_MIN and not self.action_auc < ACTION_AUC_MIN


@dataclass(frozen=True)
class Examination:
    """A check and what it was made from: Q and the discounted outcome [N] of held-out rows."""

    check: CriticCheck
    q: NDArray[np.float32]
    outcome: NDArray[np.float64]


def examine(trainer: Trainer, held_out: ReplayReader, images: bool = False) -> Examination:
    """Judge the critic by labelled episodes that it was not trained on. images: its features need them."""
    rows, elapsed, left = _moments(held_out)
    if not len(rows):
        return Examination(CriticCheck(), np.zeros(0, np.float32), np.zeros(0))
    gamma = trainer.config.gamma
    batch = held_out.batch(rows, gamma)
    success = (batch.outcome == OUTCOME_SUCCESS).numpy()
    time_bin = (elapsed * trainer.config.step_s / _TIME_BIN_S).astype(np.int64)
    stratum = batch.task.numpy() * (time_bin.max() + 1) + time_bin
    q = _in_pieces(trainer.judge, held_out, rows, gamma, images)
    outcome = success * gamma ** (left - 1.0)  # the reward lies on the last step
    by_policy = np.flatnonzero(batch.author.numpy() == AUTHOR_POLICY)
    check = CriticCheck(
        auc=outcome_auc(q, success, stratum),
        action_auc=_action_auc(
            trainer, held_out, rows[by_policy], success[by_policy], stratum[by_policy], images
        ),
        over_estimate=float(np.median(q - outcome)),
    )
    return Examination(check, q, outcome)


def _moments(replay: ReplayReader) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Decisions of labelled episodes: their rows, and how many steps were executed before each and from it on; all [N]."""
    found = [np.zeros((3, 0), np.int64)]
    for _, first, count in replay.spans:
        table = replay.transitions(np.arange(first, first + count))
        if count and table["outcome"][0] != OUTCOME_UNLABELLED:
            chosen = decisions(table)
            executed = table["executed"][chosen].astype(np.int64)
            elapsed = np.cumsum(executed) - executed
            found.append(np.stack([first + chosen, elapsed, executed.sum() - elapsed]))
    rows, elapsed, left = np.concatenate(found, axis=1)
    return rows, elapsed, left


def decisions(table: NDArray[Any]) -> NDArray[np.int64]:
    """Places of the rows of an episode that follow one another, from the first on. table: [R] TRANSITION, in order.

    A demonstrator's windows may overlap. All of them would count one moment several times, and lie on another grid of
    time than the decisions of a policy: two rows of one number would be of different moments. Where nothing begins at the
    end of a window, the next row that there is follows.
    """
    rows = len(table)
    following = np.maximum(np.searchsorted(table["point"], table["next_point"]), np.arange(1, rows + 1))
    following = np.where(table["done"], rows, following).tolist()
    chain, row = [], 0
    while row < rows:
        chain.append(row)
        row = following[row]
    return np.array(chain, np.int64)


def _action_auc(
    trainer: Trainer,
    held_out: ReplayReader,
    rows: NDArray[np.int64],
    success: NDArray[np.bool_],
    stratum: NDArray[np.int64],
    images: bool,
) -> float:
    """`outcome_auc` of the advantage over the reference. rows: in which a policy acted; those that others did differ
    from what the reference does whether they went well or not."""
    chosen = rankable(success, stratum, _RANKED_ROWS)
    if trainer.actor.reference is None or not len(chosen):
        return float("nan")
    advantage = _in_pieces(trainer.advantage, held_out, rows[chosen], trainer.config.gamma, images)
    return outcome_auc(advantage, success[chosen], stratum[chosen])


def rankable(success: NDArray[np.bool_], stratum: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Places of at most `most` rows that have something to be ranked against. success, stratum: [N].

    Stratum by stratum, of those with both outcomes: of rows drawn from everywhere, few would find a partner. The same
    ones each time, or chance would move the verdict.
    """
    _, of = np.unique(stratum, return_inverse=True)
    rows, won = np.bincount(of), np.bincount(of, success)
    generator = np.random.default_rng(0)
    turn = generator.permutation(len(rows))[of]
    order = generator.permutation(len(of))
    order = order[((won > 0) & (won < rows))[of[order]]]
    return np.sort(order[np.argsort(turn[order], kind="stable")][:most])


def _in_pieces(
    judge: Callable[[Batch], Tensor],
    replay: ReplayReader,
    rows: NDArray[np.int64],
    gamma: float,
    images: bool,
) -> NDArray[np.float32]:
    """[N] what `judge` says of rows; with their images a few at a time, as these are large."""
    pieces = -(-len(rows) // _ROWS_WITH_IMAGES) if images else 1
    batches = (replay.batch(some, gamma, images=images) for some in np.array_split(rows, pieces))
    return torch.cat([judge(batch) for batch in batches]).numpy()


def outcome_auc(value: ArrayLike, success: ArrayLike, stratum: ArrayLike) -> float:
    """Chance that `value` ranks a row of a success above a row of a failure of the same stratum; ties count half.

    value: [N], of held-out rows; success: [N] bool; stratum: [N] integers, task and time bin in one number, so that
    knowing how far an episode has come counts for nothing. nan if no stratum has both outcomes.
    """
    values, won, strata = np.asarray(value), np.asarray(success, bool), np.asarray(stratum)
    better = pairs = 0.0
    for each in np.unique(strata):
        high, low = values[(strata == each) & won], values[(strata == each) & ~won]
        ordered = np.sort(low)
        below, up_to = np.searchsorted(ordered, high, "left"), np.searchsorted(ordered, high, "right")
        better += float((below + up_to).sum()) / 2
        pairs += len(high) * len(low)
    return better / pairs if pairs else float("nan")
