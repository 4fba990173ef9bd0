# SPDX-License-Identifier: Apache-2.0
"""What one episode is to the replay: its observation points, its chunk transitions, and what they must satisfy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lwd_learner.transitions import EpisodeRows

Source = Literal["offline", "online"]

TRANSITION = np.dtype(
    [
        ("point", "i8"),  # row of `features` decided on
        ("next_point", "i8"),  # row of `features` after it, -1 where the episode ended
        ("next_row", "i8"),  # transition that starts at next_point, -1: none
        ("episode", "i8"),  # number in the ledger
        ("task", "i4"),  # number in the ledger
        ("executed", "i4"),  # steps until the next decision
        ("planned", "i4"),  # steps of the same author, up to the horizon
        ("policy_version", "i4"),
        ("reward", "f4"),  # of the last executed step, not discounted
        ("done", "?"),
        ("cut", "?"),
        ("online", "?"),  # of the episode, as its outcome
        ("outcome", "u1"),
        ("author", "u1"),
    ],
    align=True,
)


@dataclass(frozen=True)
class ReplayLayout:
    """What a row is made of, and how files are cut; fixed for the life of a directory."""

    feature_dim: int  # F
    horizon: int  # H
    action_dim: int  # A
    history: int = 2  # observation points in a context
    feature_key: str = ""  # digest of trunk, preprocessing and normaliser that made features and actions
    segment_bytes: int = 64 << 20  # of one file; a map of it takes no memory, so small ones only cost time


@dataclass(frozen=True)
class ReplayEpisode:
    """One episode to append. K observations, R transitions; indices count from the episode's start."""

    episode_id: str
    task: str
    source: Source
    outcome: int
    features: NDArray[np.float32]  # [K, F]
    previous: NDArray[np.int64]  # [K] the observation before in a context, itself at the start of one
    actions: NDArray[np.float32]  # [R, H, A]
    # [R] TRANSITION; `next_row`, `episode`, `task`, `online` and `outcome` are filled in on append
    transitions: NDArray[Any]

    @staticmethod
    def from_rows(rows: EpisodeRows, source: Source) -> ReplayEpisode:
        """From what `transitions.episode_rows` returns."""
        table = np.zeros(len(rows.transitions), TRANSITION)
        for i, transition in enumerate(rows.transitions):
            for name in ("point", "next_point", "executed", "planned", "policy_version", "reward"):
                table[name][i] = getattr(transition, name)
            table["done"][i], table["cut"][i] = transition.done, transition.cut
            table["author"][i] = transition.author
        trace = rows.trace
        return ReplayEpisode(
            trace.episode_id,
            trace.task,
            source,
            trace.outcome,
            rows.features,
            rows.previous,
            rows.actions,
            table,
        )

    def digest(self) -> str:
        """sha256 of everything that training would see."""
        hasher = hashlib.sha256(repr((self.task, self.source, self.outcome)).encode())
        columns = [self.transitions[name] for name in TRANSITION.names or ()]  # not the padding between them
        for array in (self.features, self.previous, self.actions, *columns):
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()

    def check(self, layout: ReplayLayout) -> None:
        """Raise ValueError naming what does not fit together."""
        table, points = self.transitions, len(self.features)
        problems = {
            "features": self.features.shape != (points, layout.feature_dim),
            "previous": self.previous.shape != (points,)
            or bool(((self.previous < 0) | (self.previous > np.arange(points))).any()),
            "actions": self.actions.shape != (len(table), layout.horizon, layout.action_dim),
            "finiteness": not (np.isfinite(self.features).all() and np.isfinite(self.actions).all()),
            "executed": bool(((table["executed"] < 1) | (table["executed"] > layout.horizon)).any()),
            "point": bool(((table["point"] < 0) | (table["point"] >= points)).any()),
            "next_point": bool((table["next_point"] >= points).any())
            or bool((table["next_point"] < -1).any()),
            "done": bool(((table["next_point"] < 0) & ~table["done"]).any()),  # nothing to bootstrap from
            "source": self.source not in ("offline", "online"),
        }
        wrong = [name for name, problem in problems.items() if problem]
        if wrong:
            raise ValueError(f"{self.episode_id}: not a replayable episode, wrong {', '.join(wrong)}")
