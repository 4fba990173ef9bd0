# SPDX-License-Identifier: Apache-2.0
"""Which rows of a replay a minibatch is drawn from: by task, source, author, outcome, and by shard.

Nothing here is as long as the replay. Rows of one episode by one author follow each other; an index holds where such
spans begin, and grows with what is appended.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwd_learner.replay_episode import Source

SPAN = np.dtype(
    [
        ("first_row", "i8"),
        ("episode", "i8"),  # number in the ledger
        ("rows", "i4"),
        ("task", "i4"),  # number in the ledger
        ("ordinal", "i4"),  # of the episode among those of its task and source: what shards deal out
        ("author", "u1"),
        ("outcome", "u1"),
        ("online", "?"),
    ],
    align=True,
)


@dataclass(frozen=True)
class Selection:
    """Which transitions to draw from. None: no restriction."""

    authors: frozenset[int] | None = None
    outcomes: frozenset[int] | None = None
    source: Source | None = None
    beside: int | None = None  # only of episodes in which this author acted, too
    also: Selection | None = None  # what this one takes as well, whatever stands above
    otherwise: Selection | None = None  # what of tasks that there is nothing of


EVERYTHING = Selection()


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the episodes, dealt out in turn within each task and source."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count} does not exist")


WHOLE = Shard(0, 1)


class ReplayIndex:
    """The spans that count, and the groups that were asked for so far."""

    def __init__(self) -> None:
        self._spans: list[NDArray[Any]] = []
        self._groups: dict[tuple[Selection, Shard], dict[int, _Group]] = {}

    def extend(self, spans: NDArray[Any]) -> None:
        """Add [N] SPAN of whole episodes that count, in the order of their rows."""
        self._spans.append(spans)
        for (selection, shard), groups in self._groups.items():
            _sort(spans, selection, shard, groups)

    def count(self, selection: Selection, shard: Shard) -> int:
        """Rows in a selection."""
        return sum(group.count for group in self._of(selection, shard).values())

    def rows(self, selection: Selection, shard: Shard) -> NDArray[np.int64]:
        """All of them, ascending."""
        groups = self._of(selection, shard).values()
        return np.sort(np.concatenate([np.zeros(0, np.int64), *(group.rows() for group in groups)]))

    def draw(
        self,
        selection: Selection,
        shard: Shard,
        uniform: NDArray[np.float64],
        online_share: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """Rows [B] for numbers [3, B] in [0, 1). Of each task in proportion to its weight [T]; inside a task, where both
        have rows, online with the chance `online_share` [T]. Empty if the selection is. algorithm.md 4.17."""
        groups = self._of(selection, shard)
        tasks = np.array(sorted({key // 2 for key in groups}), np.int64)
        if len(tasks) == 0:
            return tasks
        present = np.array([[2 * task + source in groups for source in (0, 1)] for task in tasks])
        ends = weights[tasks].cumsum()
        drawn = np.searchsorted(ends[:-1], uniform[0] * ends[-1], side="right")
        online = np.where(
            present[drawn].all(axis=1), uniform[1] < online_share[tasks[drawn]], present[drawn, 1]
        )
        key = 2 * tasks[drawn] + online
        order = np.argsort(key, kind="stable")
        begins = np.flatnonzero(np.diff(key[order], prepend=-1)).tolist()
        rows = np.empty(len(key), np.int64)
        for begin, end in pairwise([*begins, len(key)]):
            here = order[begin:end]
            group = groups[int(key[here[0]])]
            rows[here] = group.pick(_floor(uniform[2, here], group.count))
        return rows

    def _of(self, selection: Selection, shard: Shard) -> dict[int, _Group]:
        """The groups that have rows: 2 t holds the offline and 2 t + 1 the online rows of task t. A group with fewer
        episodes than there are shards is nobody's own: whoever got none of it draws from all of it."""
        whole = self._sorted(selection, WHOLE)
        mine = self._sorted(selection, shard)
        groups = {key: mine.get(key, group) for key, group in whole.items()}
        if selection.otherwise is not None:
            here = {key // 2 for key in groups}
            others = self._of(selection.otherwise, shard)
            groups |= {key: group for key, group in others.items() if key // 2 not in here}
        return groups

    def _sorted(self, selection: Selection, shard: Shard) -> dict[int, _Group]:
        known = self._groups.get((selection, shard))
        if known is None:
            known = self._groups[selection, shard] = {}
            self._spans = [np.concatenate([np.zeros(0, SPAN), *self._spans])]
            _sort(self._spans[0], selection, shard, known)
        return known


class _Group:
    """Rows numbered through, though they lie in spans: the k-th is k + shift of the span that it falls into."""

    def __init__(self) -> None:
        self.count = 0
        self._spans = 0
        self._ends = np.zeros(16, np.int64)  # rows up to the end of each span; longer than is used
        self._shifts = np.zeros(16, np.int64)

    def extend(self, first_rows: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Add spans."""
        spans = self._spans + len(rows)
        if spans > len(self._ends):  # doubled, so that an append does not copy all that came before
            room = np.zeros(max(spans, 2 * len(self._ends)) - self._spans, np.int64)
            self._ends = np.concatenate([self._ends[: self._spans], room])
            self._shifts = np.concatenate([self._shifts[: self._spans], room])
        ends = self.count + np.cumsum(rows)
        self._ends[self._spans : spans] = ends
        self._shifts[self._spans : spans] = first_rows - (ends - rows)
        self._spans, self.count = spans, int(ends[-1])

    def pick(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B] places in [0, count) -> [B] rows."""
        span = np.searchsorted(self._ends[: self._spans], places, side="right")
        return places + self._shifts[span]

    def rows(self) -> NDArray[np.int64]:
        """All, [count]."""
        return self.pick(np.arange(self.count, dtype=np.int64))


def _sort(spans: NDArray[Any], selection: Selection, shard: Shard, groups: dict[int, _Group]) -> None:
    """Add to the groups what the selection takes of these spans."""
    fits = _fits(spans, selection) & (spans["ordinal"] % shard.count == shard.index)
    taken = np.flatnonzero(fits)
    key = 2 * spans["task"][taken] + spans["online"][taken]
    order = np.argsort(key, kind="stable")
    key, taken = key[order], taken[order]
    first_rows, rows = spans["first_row"][taken], spans["rows"][taken].astype(np.int64)
    begins = np.flatnonzero(np.diff(key, prepend=-1)).tolist()
    for begin, end in pairwise([*begins, len(key)]):
        groups.setdefault(int(key[begin]), _Group()).extend(first_rows[begin:end], rows[begin:end])


def _fits(spans: NDArray[Any], selection: Selection) -> NDArray[np.bool_]:
    """[N] which spans the selection takes; spans of one episode are never parted."""
    fits = np.ones(len(spans), np.bool_)
    if selection.authors is not None:
        fits &= np.isin(spans["author"], list(selection.authors))
    if selection.outcomes is not None:
        fits &= np.isin(spans["outcome"], list(selection.outcomes))
    if selection.source is not None:
        fits &= spans["online"] == (selection.source == "online")
    if selection.beside is not None:
        fits &= np.isin(spans["episode"], spans["episode"][spans["author"] == selection.beside])
    if selection.also is not None:
        fits |= _fits(spans, selection.also)
    return fits


def _floor(fraction: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Uniform integers below `count` from uniform numbers in [0, 1)."""
    return np.minimum((fraction * count).astype(np.int64), count - 1)
