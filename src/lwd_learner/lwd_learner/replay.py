# SPDX-License-Identifier: Apache-2.0
"""The replay: chunk transitions of all episodes in memory-mapped columns, with a ledger that says what counts.

A directory holds `features.f32` (observation points), `previous.i64` (the observation before in its context),
`actions.f32` and `transitions.bin` (chunk starts), and `ledger.sqlite3`. An episode is appended as a whole:
columns first, synced, then one row of the ledger. What a crash leaves beyond the ledger is cut off at open.
One process writes (it holds a lock on the directory).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwd_learner.batch import Batch
from lwd_learner.column import Column
from lwd_learner.divl import chunk_reward, n_step_window
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout, Source

FORMAT = 1


class ReplayLocked(Exception):
    """Another process writes to this replay."""


class ReplayMismatch(Exception):
    """The directory was written for other features, actions or another format; its rows mean something else."""


class ReplayEmpty(Exception):
    """No transition fits what was asked for."""


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
class _Entry:
    """An episode of the ledger that counts."""

    number: int
    episode_id: str
    task: str
    source: Source
    outcome: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class _Index:
    """Rows of a selection, grouped by task; group 2t holds the offline and 2t+1 the online rows of task t."""

    rows: NDArray[np.int64]
    start: NDArray[np.int64]  # [2T]
    count: NDArray[np.int64]  # [2T]
    tasks: NDArray[np.int64]  # tasks that have any row


class Replay:
    """Append episodes, draw minibatches. Not thread-safe."""

    def __init__(self, directory: Path, layout: ReplayLayout) -> None:
        """Open or create. Raises ReplayLocked, ReplayMismatch, ColumnTooShort."""
        directory.mkdir(parents=True, exist_ok=True)
        self.layout = layout
        with ExitStack() as opening:  # whatever fails, nothing stays open or locked
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            opening.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ReplayLocked(f"{directory} is in use by another process") from None
            self._ledger = opening.enter_context(closing(sqlite3.connect(directory / "ledger.sqlite3")))
            points, rows = _prepare(self._ledger, layout, directory)
            chunk = (layout.horizon, layout.action_dim)

            def column(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], length: int) -> Column:
                return opening.enter_context(closing(Column(directory / name, dtype, shape, length)))

            self._features = column("features.f32", np.dtype("f4"), (layout.feature_dim,), points)
            self._previous = column("previous.i64", np.dtype("i8"), (), points)
            self._actions = column("actions.f32", np.dtype("f4"), chunk, rows)
            self._transitions = column("transitions.bin", TRANSITION, (), rows)
            self._resources = opening.pop_all()
        self._sync(directory)
        self.tasks: list[str] = []
        self._entries: list[_Entry] = []
        self._outcome_of: NDArray[np.int64] = np.zeros(0, np.int64)
        self._task_of: NDArray[np.int64] = np.zeros(0, np.int64)
        self._online_of: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._indices: dict[Selection, _Index] = {}
        self._seen: int | None = None
        self._reload()

    def close(self) -> None:
        """Release the files and the lock."""
        self._resources.close()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Transitions that count."""
        return sum(entry.rows for entry in self._entries)

    @property
    def episode_ids(self) -> frozenset[str]:
        """Episodes that count."""
        return frozenset(entry.episode_id for entry in self._entries)

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """(episode id, first row, rows) of the episodes that count, in the order of time inside each."""
        return [(entry.episode_id, entry.first_row, entry.rows) for entry in self._entries]

    @property
    def stored(self) -> int:
        """Episodes of the ledger, those that later ones replaced included: it only grows."""
        (total,) = self._ledger.execute("SELECT coalesce(max(number) + 1, 0) FROM episodes").fetchone()
        return int(total)

    def see(self, stored: int | None) -> None:
        """Count only the ledger's first `stored` episodes, as when there were no more; None: all."""
        if stored != self._seen:
            self._seen = stored
            self._reload()

    def count(self, selection: Selection = EVERYTHING) -> int:
        """Transitions in a selection."""
        return len(self._index(selection).rows)

    def append(self, episode: ReplayEpisode) -> bool:
        """Append one episode durably; False if exactly this one is there already.

        The same id with other content (a later label changes rewards and ends) takes the place of the old rows.
        Raises ValueError if the arrays do not fit together.
        """
        episode.check(self.layout)
        digest = episode.digest()
        known = self._ledger.execute(
            "SELECT digest FROM episodes WHERE episode_id = ? AND active", (episode.episode_id,)
        ).fetchone()
        if known is not None and known[0] == digest:
            return False
        (number,) = self._ledger.execute("SELECT coalesce(max(number), -1) + 1 FROM episodes").fetchone()
        first_point, first_row = self._features.rows, self._transitions.rows
        table = episode.transitions.copy()
        starts = np.full(len(episode.features) + 1, -1, np.int64)  # one more, so that next_point -1 finds -1
        starts[table["point"]] = first_row + np.arange(len(table))
        table["next_row"] = starts[table["next_point"]]
        table["point"] += first_point
        table["next_point"] = np.where(table["next_point"] < 0, -1, table["next_point"] + first_point)
        table["episode"] = number
        self._features.append(episode.features)
        self._previous.append(episode.previous + first_point)
        self._actions.append(episode.actions)
        self._transitions.append(table)
        with self._ledger:
            self._ledger.execute("UPDATE episodes SET active = 0 WHERE episode_id = ?", (episode.episode_id,))
            self._ledger.execute(
                "INSERT INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",
                (
                    number,
                    episode.episode_id,
                    digest,
                    episode.task,
                    episode.source,
                    episode.outcome,
                    first_point,
                    len(episode.features),
                    first_row,
                    len(table),
                ),
            )
        for column in (self._features, self._previous):
            column.advance(first_point + len(episode.features))
        for column in (self._actions, self._transitions):
            column.advance(first_row + len(table))
        self._reload()
        return True

    def sample(
        self,
        size: int,
        generator: torch.Generator,
        gamma: float,
        n_step: int | Mapping[str, int] = 1,
        selection: Selection = EVERYTHING,
        online_share: Mapping[str, float] | None = None,
    ) -> Batch:
        """Draw `size` transitions with replacement. algorithm.md 4.17.

        Uniform over tasks; inside a task, where both have rows, online with the chance `online_share` (by task name,
        else .5) and offline otherwise. gamma: per executed step. n_step: chunks of the window of offline rows (by
        task name if a mapping, else 1); online windows are one chunk. Raises ReplayEmpty.
        """
        index = self._index(selection)
        if len(index.rows) == 0:
            raise ReplayEmpty(
                f"no transition for {selection}; the replay holds {len(self)} in {len(self._entries)} episodes"
            )
        # Always three draws per row, so that the random stream does not depend on what the replay holds.
        draw = torch.rand(3, size, generator=generator, dtype=torch.float64).numpy()
        task = index.tasks[_floor(draw[0], np.full(size, len(index.tasks)))]
        online = draw[1] < np.array([(online_share or {}).get(name, 0.5) for name in self.tasks])[task]
        online = np.where(
            index.count[2 * task] == 0, True, np.where(index.count[2 * task + 1] == 0, False, online)
        )
        group = 2 * task + online
        rows = index.rows[index.start[group] + _floor(draw[2], index.count[group])]
        return self.batch(rows, gamma, n_step)

    def batch(self, rows: NDArray[np.int64], gamma: float, n_step: int | Mapping[str, int] = 1) -> Batch:
        """The given rows, [B] int64, in the n-step view."""
        first = self._transitions.view[rows]
        task, online = self._task_of[first["episode"]], self._online_of[first["episode"]]
        if isinstance(n_step, int):
            window = np.where(online, 1, n_step)
        else:
            by_task = np.array([n_step.get(name, 1) for name in self.tasks])
            window = np.where(online, 1, by_task[task])
        chain = self._chain(rows, int(window.max()))
        table = self._transitions.view[chain]
        executed = torch.from_numpy(table["executed"].astype(np.int64))
        # A window ends where another author acts (policy and human would be mixed) and where nothing follows.
        other = np.zeros_like(chain, dtype=np.bool_)
        other[:, :-1] = (table["author"][:, 1:] != table["author"][:, :-1]) | (chain[:, 1:] == chain[:, :-1])
        cut = table["cut"] | other | (np.arange(chain.shape[1]) >= window[:, None] - 1)
        view = n_step_window(
            chunk_reward(torch.from_numpy(table["reward"].copy()), executed, gamma),
            executed,
            torch.from_numpy(table["done"].copy()),
            torch.from_numpy(cut),
            gamma,
        )
        final = table[np.arange(len(rows)), view.last.numpy()]
        next_point = np.where(final["next_point"] < 0, first["point"], final["next_point"])
        steps = np.arange(self.layout.horizon)
        return Batch(
            context=self._context(first["point"]),
            action=torch.from_numpy(self._actions.view[rows]),
            mask=torch.from_numpy(steps < first["executed"][:, None]),
            valid=torch.from_numpy(steps < first["planned"][:, None]),
            reward=view.reward,
            discount=view.discount,
            next_context=self._context(next_point),
            online=torch.from_numpy(online),
            author=torch.from_numpy(first["author"].astype(np.int64)),
            outcome=torch.from_numpy(self._outcome_of[first["episode"]]),
            policy_version=torch.from_numpy(first["policy_version"].astype(np.int64)),
            task=torch.from_numpy(task),
            row=torch.from_numpy(rows.copy()),
        )

    def rows(self, selection: Selection = EVERYTHING) -> NDArray[np.int64]:
        """All rows of a selection, for evaluation. [N] int64."""
        return np.sort(self._index(selection).rows)

    @staticmethod
    def _sync(directory: Path) -> None:
        """The names of new files must be as durable as the ledger that counts their rows."""
        handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(handle)
        os.close(handle)

    def _chain(self, rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """[B, length] consecutive transitions; the last one repeats where the episode has no more."""
        chain = np.empty((len(rows), length), np.int64)
        chain[:, 0] = rows
        following = self._transitions.view["next_row"]
        for i in range(1, length):
            after = following[chain[:, i - 1]]
            chain[:, i] = np.where(after < 0, chain[:, i - 1], after)
        return chain

    def _context(self, points: NDArray[np.int64]) -> Tensor:
        """[B] feature rows -> [B, history * F], oldest first."""
        history = [points]
        for _ in range(self.layout.history - 1):
            history.append(self._previous.view[history[-1]])
        features = self._features.view[np.stack(history[::-1], axis=1)]
        return torch.from_numpy(features.reshape(len(points), -1))

    def _reload(self) -> None:
        """Read the ledger into the tables that sampling needs. Of an episode, the newest seen version counts."""
        total = self.stored
        self._entries = [
            _Entry(*row)
            for row in self._ledger.execute(
                "SELECT number, episode_id, task, source, outcome, first_row, rows FROM episodes WHERE number IN"
                " (SELECT max(number) FROM episodes WHERE number < ? GROUP BY episode_id) ORDER BY number",
                (total if self._seen is None else self._seen,),
            )
        ]
        self.tasks = sorted({entry.task for entry in self._entries})
        place = {name: i for i, name in enumerate(self.tasks)}
        self._outcome_of, self._task_of = np.zeros(total, np.int64), np.zeros(total, np.int64)
        self._online_of = np.zeros(total, np.bool_)
        for entry in self._entries:
            self._outcome_of[entry.number] = entry.outcome
            self._task_of[entry.number] = place[entry.task]
            self._online_of[entry.number] = entry.source == "online"
        self._indices.clear()

    def _index(self, selection: Selection) -> _Index:
        if selection not in self._indices:
            groups: list[list[NDArray[np.int64]]] = [[] for _ in range(2 * len(self.tasks))]
            for entry in self._entries:
                rows = np.arange(entry.first_row, entry.first_row + entry.rows, dtype=np.int64)
                rows = rows[_fits(entry, self._transitions.view["author"][rows], selection)]
                groups[2 * self._task_of[entry.number] + (entry.source == "online")].append(rows)
            parts = [np.concatenate([np.zeros(0, np.int64), *group]) for group in groups]
            if selection.otherwise is not None:
                other = self._index(selection.otherwise)
                for task in set(other.tasks.tolist()) - {k // 2 for k, part in enumerate(parts) if len(part)}:
                    for k in (2 * task, 2 * task + 1):
                        parts[k] = other.rows[other.start[k] : other.start[k] + other.count[k]]
            count = np.array([len(part) for part in parts], np.int64)
            start = np.cumsum(count) - count
            tasks = np.flatnonzero(count.reshape(-1, 2).sum(axis=1)).astype(np.int64)
            everything = np.concatenate([np.zeros(0, np.int64), *parts])
            self._indices[selection] = _Index(everything, start, count, tasks)
        return self._indices[selection]


def _fits(entry: _Entry, author: NDArray[np.uint8], selection: Selection) -> NDArray[np.bool_]:
    """[R] which of an episode's rows, by these authors, are in a selection, `otherwise` apart."""
    fits = np.ones(len(author), np.bool_)
    if selection.authors is not None:
        fits &= np.isin(author, list(selection.authors))
    if selection.outcomes is not None:
        fits &= entry.outcome in selection.outcomes
    if selection.source is not None:
        fits &= entry.source == selection.source
    if selection.beside is not None:
        fits &= selection.beside in author
    if selection.also is not None:
        fits |= _fits(entry, author, selection.also)
    return fits


def _prepare(ledger: sqlite3.Connection, layout: ReplayLayout, directory: Path) -> tuple[int, int]:
    """Create the tables or compare the layout; returns how many observation points and transitions count."""
    ledger.execute("PRAGMA synchronous = FULL")
    with ledger:
        ledger.execute("CREATE TABLE IF NOT EXISTS layout (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        ledger.execute(
            "CREATE TABLE IF NOT EXISTS episodes (number INTEGER PRIMARY KEY, episode_id TEXT NOT NULL,"
            " digest TEXT NOT NULL, task TEXT NOT NULL, source TEXT NOT NULL, outcome INTEGER NOT NULL,"
            " first_point INTEGER NOT NULL, points INTEGER NOT NULL, first_row INTEGER NOT NULL,"
            " rows INTEGER NOT NULL, active INTEGER NOT NULL)"
        )
        ledger.execute("CREATE UNIQUE INDEX IF NOT EXISTS active_id ON episodes (episode_id) WHERE active")
        found = dict(ledger.execute("SELECT key, value FROM layout"))
        expected = {key: str(value) for key, value in {**asdict(layout), "format": FORMAT}.items()}
        if not found:
            ledger.executemany("INSERT INTO layout VALUES (?, ?)", expected.items())
            found = expected
    wrong = [
        f"{key} {found.get(key)} not {value}" for key, value in expected.items() if found.get(key) != value
    ]
    if wrong:
        raise ReplayMismatch(f"{directory}: {', '.join(wrong)}; ingest the episodes into a new replay")
    points, rows = ledger.execute(
        "SELECT coalesce(max(first_point + points), 0), coalesce(max(first_row + rows), 0) FROM episodes"
    ).fetchone()
    return int(points), int(rows)


def _floor(fraction: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Uniform integers below `count` from uniform numbers in [0, 1)."""
    return np.minimum((fraction * count).astype(np.int64), count - 1)
