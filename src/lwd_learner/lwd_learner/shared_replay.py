# SPDX-License-Identifier: Apache-2.0
"""One replay for all ranks: the first one writes it, all see equally much of it, and each draws from a part of its own.

On the first rank's host the others read its directory. Every other host has a copy that its own first process keeps:
rows with their cached features, handed on by the first rank, so that nobody else fetches a bag or runs a trunk.
Copies hold the same episodes in the same order; how many of them are seen is the number that ranks agree on.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwd_learner.ranks import Ranks
from lwd_learner.replay import Replay, ReplayMismatch, ReplayReader
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout

_ARRAYS = ("features", "previous", "actions", "images", "image_places")


class SharedReplay:
    """One rank's end of it. All ranks make it, and call `agree`, at the same moments."""

    def __init__(self, directory: Path, layout: ReplayLayout, ranks: Ranks) -> None:
        """Open or create. Raises ReplayLocked, ReplayMismatch, ReplayMissing, ColumnTooShort."""
        self._ranks = ranks
        with ExitStack() as opening:
            self._copy = opening.enter_context(Replay(directory, layout)) if ranks.keeper else None
            ranks.wait()  # until there is something to open
            self.whole: ReplayReader
            self.whole = opening.enter_context(ReplayReader(directory)) if self._copy is None else self._copy
            self._require_same(directory)
            self.part = self.whole if ranks.size == 1 else self.whole.shard(ranks.index, ranks.size)
            self._resources = opening.pop_all()

    def _require_same(self, directory: Path) -> None:
        """Copies would go on from where they end. Raises ReplayMismatch on all ranks if one of them is no beginning of
        what the first rank has, as where that was moved away and ingested anew."""
        if self._ranks.size == 1:
            return
        stored = self.whole.stored
        mine = self.whole.fingerprint(self._ranks.least(stored))
        firsts = (
            self._ranks.newest(mine),
            self._ranks.newest(stored),
        )  # every rank asks both, whatever it is told
        other = mine != firsts[0] or stored > firsts[1]
        if self._ranks.any(other):
            raise ReplayMismatch(
                f"{directory}: {'this copy is' if other else 'the copy of another host is'} not of the first rank's"
                " replay; remove such copies, and they are made anew"
            )

    def close(self) -> None:
        """Release the files."""
        self._resources.close()

    @property
    def written(self) -> Replay:
        """The replay that episodes are appended to; the first rank's only."""
        assert self._copy is not None and self._ranks.first
        return self._copy

    def agree(self) -> int:
        """See what the first rank sees, after it was copied to where it is missing; returns how many episodes that is."""
        if self._ranks.size == 1:
            return self.whole.seen
        seen = self._ranks.newest(self.whole.seen)
        for number in range(self._ranks.least(self.whole.stored), seen):
            self._hand_on(number)
        self._ranks.wait()  # readers of a copy must not look before its keeper has written
        if not self._ranks.first:
            self.whole.see(seen)
        self.part.see(seen)
        return seen

    def _hand_on(self, number: int) -> None:
        """Append the first rank's episode with this number to the copies that end before it."""
        sent = _as_tensors(self.whole.episode(number)) if self._ranks.first else ({}, {})
        tensors, record = self._ranks.given(*sent)
        if self._copy is not None and self._copy.stored == number:
            self._copy.append(_from_tensors(tensors, record))


def _as_tensors(episode: ReplayEpisode) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: torch.tensor(getattr(episode, name)) for name in _ARRAYS}
    tensors["transitions"] = torch.from_numpy(episode.transitions.view(np.uint8))
    names = ("episode_id", "task", "source", "outcome")
    return tensors, {name: getattr(episode, name) for name in names}


def _from_tensors(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> ReplayEpisode:
    return ReplayEpisode(
        episode_id=record["episode_id"],
        task=record["task"],
        source=record["source"],
        outcome=record["outcome"],
        transitions=tensors["transitions"].numpy().view(TRANSITION),
        **{name: tensors[name].numpy() for name in _ARRAYS},
    )
