# SPDX-License-Identifier: Apache-2.0
"""Whether the critic knows anything yet: a policy must not be tilted towards noise (algorithm.md 4.4b)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lwd_learner.batch import Batch
from lwd_learner.replay import ReplayReader
from lwd_learner.trainer import Trainer
from lwd_learner.transitions import AUTHOR_POLICY, OUTCOME_SUCCESS

AUC_MIN = 0.6  # of Q for the outcome
ACTION_AUC_MIN = 0.55  # of the advantage for the outcome: a coin has 0.5, and 512 rows an error of about 0.03

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
    """Judge the critic by episodes that it was not trained on. images: its features need them."""
    spans = held_out.spans
    if not spans:
        return Examination(CriticCheck(), np.zeros(0, np.float32), np.zeros(0))
    rows = np.concatenate([np.arange(first, first + count) for _, first, count in spans])
    place = np.concatenate([np.arange(count) for _, _, count in spans])
    left = np.concatenate([np.arange(count)[::-1] for _, _, count in spans])
    gamma = trainer.config.gamma
    batch = held_out.batch(rows, gamma)
    success = (batch.outcome == OUTCOME_SUCCESS).numpy()
    stratum = batch.task.numpy() * 1000 + place
    q = _in_pieces(trainer.judge, held_out, rows, gamma, images)
    executed = batch.mask.sum(dim=1).float().mean().item()
    outcome = success * gamma ** (executed * left)
    check = CriticCheck(
        auc=outcome_auc(q, success, stratum),
        action_auc=_action_auc(
            trainer, held_out, rows, (batch.author == AUTHOR_POLICY).numpy(), success, stratum, images
        ),
        over_estimate=float(np.median(q - outcome)),
    )
    return Examination(check, q, outcome)


def _action_auc(
    trainer: Trainer,
    held_out: ReplayReader,
    rows: NDArray[np.int64],
    by_policy: NDArray[np.bool_],
    success: NDArray[np.bool_],
    stratum: NDArray[np.int64],
    images: bool,
) -> float:
    """`outcome_auc` of the advantage over the reference, of rows in which a policy acted: those that others did differ
    from what the reference does whether they went well or not."""
    chosen = np.flatnonzero(by_policy)
    if trainer.actor.reference is None or not len(chosen):
        return float("nan")
    if len(chosen) > _RANKED_ROWS:  # the same ones each time, or chance would move the verdict
        chosen = np.sort(np.random.default_rng(0).choice(chosen, _RANKED_ROWS, replace=False))
    advantage = _in_pieces(trainer.advantage, held_out, rows[chosen], trainer.config.gamma, images)
    return outcome_auc(advantage, success[chosen], stratum[chosen])


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
