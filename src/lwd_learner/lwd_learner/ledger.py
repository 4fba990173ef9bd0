# SPDX-License-Identifier: Apache-2.0
"""The ledger of a replay: which episodes it holds, and how far its columns count.

It only ever grows: episode k is the k-th append, a later one of the same id supersedes the earlier. So `stored`, the
number of appends, names the state of the whole replay, and processes that agree on it see the same rows whatever is
appended meanwhile. SQLite in WAL mode: a reader neither waits for the writer nor holds it up.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwd_learner.replay_episode import ReplayEpisode, ReplayLayout

FORMAT = 2
_FILE = "ledger.sqlite3"
_BUSY_S = 30.0  # the longest wait for another connection; only recovery after a crash takes any time at all


class ReplayMismatch(Exception):
    """The directory was written for other features, actions or another format; its rows mean something else."""


class ReplayMissing(Exception):
    """There is no replay to read, or it does not reach as far as was asked."""


@dataclass(frozen=True)
class Extent:
    """How many rows of each column count."""

    points: int = 0
    rows: int = 0
    spans: int = 0
    image_bytes: int = 0


@dataclass(frozen=True)
class Place:
    """What the ledger gives an episode that is appended."""

    number: int
    task: int
    ordinal: int  # how many of the same task and source came before, superseded ones included


class Ledger:
    """One connection; `Ledger.create` for the writer, `Ledger.read` for everybody else."""

    def __init__(self, connection: sqlite3.Connection, directory: Path, layout: ReplayLayout) -> None:
        self._connection = connection
        self._directory = directory
        self.layout = layout

    @classmethod
    def create(cls, directory: Path, layout: ReplayLayout) -> Ledger:
        """Open for writing, with empty tables where there are none. Raises ReplayMismatch."""
        connection = sqlite3.connect(directory / _FILE, timeout=_BUSY_S, isolation_level=None)
        with _closed_on_error(connection, directory):
            found = _stored_layout(connection)
            if found is None:
                connection.execute("PRAGMA journal_mode = WAL")
                with closing(connection.cursor()) as cursor:
                    cursor.execute("BEGIN IMMEDIATE")
                    for statement in _TABLES:
                        cursor.execute(statement)
                    cursor.executemany("INSERT INTO layout VALUES (?, ?)", _written(layout).items())
                    cursor.execute("COMMIT")
            else:
                _compare(found, _written(layout), directory)
            connection.execute("PRAGMA synchronous = FULL")  # a commit survives the loss of power
        return cls(connection, directory, layout)

    @classmethod
    def read(cls, directory: Path) -> Ledger:
        """Open for reading. Raises ReplayMissing, ReplayMismatch."""
        if not (directory / _FILE).exists():
            raise ReplayMissing(f"{directory}: no replay is there")
        connection = sqlite3.connect(
            f"{(directory / _FILE).absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
        )
        with _closed_on_error(connection, directory):
            found = _stored_layout(connection)
            if found is None:
                raise ReplayMissing(f"{directory}: a replay is being created there; nothing to read yet")
            _compare({"format": found.get("format", "")}, {"format": json.dumps(FORMAT)}, directory)
            names = [field.name for field in fields(ReplayLayout)]
            if lacking := [name for name in names if name not in found]:
                raise ReplayMismatch(f"{directory}: its layout does not say {', '.join(lacking)}; {REMEDY}")
            layout = ReplayLayout.from_values({name: json.loads(found[name]) for name in names})
        return cls(connection, directory, layout)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # Reading -----------------------------------------------------------------------------------------

    @property
    def stored(self) -> int:
        """Appends so far, of superseded episodes too."""
        (count,) = self._connection.execute("SELECT coalesce(max(number), -1) + 1 FROM episodes").fetchone()
        return int(count)

    def extent(self, stored: int) -> Extent:
        """How far the columns count after so many appends. Raises ReplayMissing if there were not so many."""
        if stored == 0:
            return Extent()
        row = self._connection.execute(
            "SELECT points_end, rows_end, spans_end, image_bytes_end FROM episodes WHERE number = ?",
            (stored - 1,),
        ).fetchone()
        if row is None:
            raise ReplayMissing(
                f"{self._directory}: {stored} episodes were asked for, {self.stored} are stored"
            )
        return Extent(*row)

    def tasks(self, stored: int) -> list[str]:
        """Names by task number, in the order in which they first came."""
        rows = self._connection.execute(
            "SELECT name FROM tasks WHERE since < ? ORDER BY number", (stored,)
        ).fetchall()
        return [name for (name,) in rows]

    def superseded(self, stored: int, since: int = 0) -> NDArray[np.int64]:
        """Numbers of the episodes that an append `since` <= k < `stored` took the place of, ascending."""
        rows = self._connection.execute(
            "SELECT number FROM superseded WHERE by >= ? AND by < ? ORDER BY number", (since, stored)
        )
        return np.array([number for (number,) in rows], np.int64)

    def superseded_rows(self, stored: int) -> int:
        """Transitions that no longer count."""
        (rows,) = self._connection.execute(
            "SELECT coalesce(sum(rows), 0) FROM superseded JOIN episodes USING (number) WHERE by < ?",
            (stored,),
        ).fetchone()
        return int(rows)

    def episodes(self, stored: int) -> list[tuple[str, int, int]]:
        """(episode id, first row, rows) of the episodes that count, in the order of their appends."""
        return self._connection.execute(
            "SELECT episode_id, rows_end - rows, rows FROM episodes WHERE number < ?"
            " AND number NOT IN (SELECT number FROM superseded WHERE by < ?) ORDER BY number",
            (stored, stored),
        ).fetchall()

    def fingerprint(self, stored: int) -> int:
        """Of the contents of the first `stored` appends and their order, 56 bits."""
        hasher = hashlib.sha256()
        for (digest,) in self._connection.execute(
            "SELECT digest FROM episodes WHERE number < ? ORDER BY number", (stored,)
        ):
            hasher.update(digest.encode())
        return int.from_bytes(hasher.digest()[:7], "big")

    def described(self, number: int) -> tuple[str, str, str]:
        """(episode id, task, source) of one append. Raises ReplayMissing."""
        row = self._connection.execute(
            "SELECT episode_id, name, source FROM episodes JOIN tasks ON tasks.number = task"
            " WHERE episodes.number = ?",
            (number,),
        ).fetchone()
        if row is None:
            raise ReplayMissing(f"{self._directory}: no episode has the number {number}")
        return row

    # Writing -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin what `commit` or `undo` ends."""
        self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """What was added counts, durably."""
        self._connection.execute("COMMIT")

    def undo(self) -> None:
        """Nothing was added."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def holds(self, episode_id: str, digest: str) -> bool:
        """Whether the newest append of that id has this content."""
        newest = self._connection.execute(
            "SELECT digest FROM episodes WHERE episode_id = ? ORDER BY number DESC LIMIT 1", (episode_id,)
        ).fetchone()
        return newest is not None and newest[0] == digest

    def place(self, episode: ReplayEpisode) -> Place:
        """Where the next append goes. A task that is new gets a number."""
        number = self.stored
        known = self._connection.execute(
            "SELECT number FROM tasks WHERE name = ?", (episode.task,)
        ).fetchone()
        if known is None:
            known = self._connection.execute(
                "INSERT INTO tasks (number, name, since) SELECT count(*), ?, ? FROM tasks RETURNING number",
                (episode.task, number),
            ).fetchone()
        last = self._connection.execute(
            "SELECT ordinal FROM episodes WHERE task = ? AND source = ? ORDER BY number DESC LIMIT 1",
            (known[0], episode.source),
        ).fetchone()
        return Place(number, int(known[0]), 0 if last is None else int(last[0]) + 1)

    def add(self, place: Place, episode: ReplayEpisode, digest: str, end: Extent) -> None:
        """Note an append that ends at `end`."""
        self._connection.execute(
            "INSERT INTO superseded SELECT max(number), ? FROM episodes WHERE episode_id = ? HAVING count(*)",
            (place.number, episode.episode_id),
        )
        self._connection.execute(
            "INSERT INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                place.number,
                episode.episode_id,
                digest,
                place.task,
                episode.source,
                place.ordinal,
                len(episode.transitions),
                *asdict(end).values(),
            ),
        )


# Both of a learner's: its place in the catalog is one for the two.
REMEDY = (
    "move it away (`replay` and `held_out` together), and the episodes are ingested anew into an empty one"
)

_TABLES = (
    "CREATE TABLE layout (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE tasks (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, since INTEGER NOT NULL)",
    "CREATE TABLE episodes (number INTEGER PRIMARY KEY, episode_id TEXT NOT NULL, digest TEXT NOT NULL,"
    " task INTEGER NOT NULL, source TEXT NOT NULL, ordinal INTEGER NOT NULL, rows INTEGER NOT NULL,"
    " points_end INTEGER NOT NULL, rows_end INTEGER NOT NULL, spans_end INTEGER NOT NULL,"
    " image_bytes_end INTEGER NOT NULL)",
    "CREATE INDEX by_id ON episodes (episode_id, number)",
    "CREATE INDEX by_group ON episodes (task, source, number)",
    "CREATE TABLE superseded (number INTEGER PRIMARY KEY, by INTEGER NOT NULL)",
    "CREATE INDEX by_successor ON superseded (by)",
)


@contextmanager
def _closed_on_error(connection: sqlite3.Connection, directory: Path) -> Iterator[None]:
    """While a ledger is opened. Raises ReplayMismatch for a file that is none."""
    try:
        yield
    except BaseException as error:
        connection.close()
        if type(error) is sqlite3.DatabaseError:  # its subclasses speak of locks, disks and statements
            raise ReplayMismatch(f"{directory}: its ledger cannot be read ({error}); {REMEDY}") from error
        raise


def _written(layout: ReplayLayout) -> dict[str, str]:
    """The layout as the ledger has it."""
    values: dict[str, Any] = {**asdict(layout), "format": FORMAT}
    return {key: json.dumps(value) for key, value in values.items()}


def _stored_layout(connection: sqlite3.Connection) -> dict[str, str] | None:
    """None: no replay was ever created here."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'layout'").fetchone():
        return None
    return dict(connection.execute("SELECT key, value FROM layout"))


def _compare(found: Mapping[str, str], expected: Mapping[str, str], directory: Path) -> None:
    wrong = [
        f"{key} {found.get(key)} not {value}" for key, value in expected.items() if found.get(key) != value
    ]
    if found.get("format") != expected["format"]:  # the rest may well be said otherwise in another format
        wrong = [f"format {found.get('format')} not {expected['format']}"]
    if wrong:
        raise ReplayMismatch(f"{directory}: {', '.join(wrong)}; {REMEDY}")
