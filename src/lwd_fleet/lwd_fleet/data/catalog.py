# SPDX-License-Identifier: Apache-2.0
"""The catalog: the only place where an episode becomes part of the fleet's experience.

One transaction per call, safe from many processes. Rows of episodes and labels are never changed or
removed: a snapshot (n, m) means the same for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from lwd_fleet.data.store import Manifest
from lwd_fleet.data.summary import OUTCOMES, EpisodeSummary
from lwd_fleet.data.tables import (
    COUNTERS,
    CURSORS,
    EPISODES,
    LABELS,
    POLICIES,
    QUARANTINE,
    open_engine,
    writing,
)

POLICY_TRANSITIONS: dict[str, frozenset[str]] = {
    "candidate": frozenset({"canary", "active", "retired"}),
    "canary": frozenset({"active", "rolled_back"}),
    "active": frozenset({"retired", "rolled_back"}),
    "retired": frozenset({"active"}),  # what a rollback returns to
    "rolled_back": frozenset(),
}


class EpisodeConflict(Exception):
    """Another content is committed under the same episode id; the new one is in quarantine."""


class PolicyStateError(Exception):
    """A policy version is unknown or cannot go to the wanted state."""


@dataclass(frozen=True)
class EpisodeRow:
    """A committed episode. `outcome` as recorded; see `Catalog.outcomes` for later verdicts. Times in s."""

    seq: int
    episode_id: str
    manifest_digest: str
    robot: str
    task: str
    instruction: str
    outcome: str
    policy_version: int
    steps: int
    source: str
    created_s: float
    committed_s: float
    manifest: dict[str, Any]

    @property
    def summary(self) -> EpisodeSummary:
        """The manifest, typed."""
        return EpisodeSummary.from_json(self.manifest)


@dataclass(frozen=True)
class LabelRow:
    """A verdict on an episode; the one with the highest `seq` counts."""

    seq: int
    episode_id: str
    outcome: str
    sub_step_scores: list[float]
    source: str
    created_s: float


@dataclass(frozen=True)
class PolicyRow:
    """A policy version and where it came from: parent version and snapshot (n, m)."""

    version: int
    digest: str
    uri: str
    parent: int | None
    snapshot_n: int
    label_m: int
    state: str
    metrics: dict[str, Any]
    created_s: float


@dataclass(frozen=True)
class QuarantineRow:
    """Something that was refused, and why."""

    id: int
    episode_id: str
    reason: str
    path: str
    created_s: float


class Catalog:
    """`url`: path of an SQLite file (made if absent) or an SQLAlchemy URL. `clock` gives Unix time in s."""

    def __init__(self, url: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._engine = open_engine(str(url))
        self._clock = clock

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the connections. Also done at the end of a `with`."""
        self._engine.dispose()

    # Episodes ----------------------------------------------------------------------------------------

    def commit_episode(self, manifest: Manifest, path: str = "") -> int:
        """Make an episode part of the experience; returns its sequence number, the same one however often
        and in whatever order it is committed. `path` says where it lies, for the quarantine.

        Raises `EpisodeConflict` (after noting it in the quarantine) if the id is taken by another content.
        """
        summary, digest = manifest.summary, manifest.digest
        with writing(self._engine) as connection:
            _lock(connection, "episodes")
            known = connection.execute(
                sql.select(EPISODES.c.seq, EPISODES.c.manifest_digest).where(
                    EPISODES.c.episode_id == summary.episode_id
                )
            ).one_or_none()
            if known is None:
                seq = _next(connection, "episodes")
                connection.execute(
                    EPISODES.insert().values(
                        seq=seq,
                        episode_id=summary.episode_id,
                        manifest_digest=digest,
                        robot=summary.robot,
                        task=summary.task,
                        instruction=summary.instruction,
                        outcome=summary.outcome,
                        policy_version=summary.policy_version,
                        steps=summary.steps,
                        source=summary.source,
                        created_s=summary.start_ns / 1e9,
                        committed_s=self._clock(),
                        manifest=summary.to_json(),
                    )
                )
                return seq
        if known.manifest_digest == digest:
            return int(known.seq)
        reason = f"committed with manifest {known.manifest_digest[:12]} as {known.seq}, offered {digest[:12]}"
        self.quarantine(summary.episode_id, reason, path)
        raise EpisodeConflict(f"{summary.episode_id} ({summary.robot}): {reason}; kept in quarantine")

    def episodes_since(self, seq: int, limit: int | None = None) -> list[EpisodeRow]:
        """Episodes with a greater sequence number, in order, at most `limit`."""
        query = sql.select(EPISODES).where(EPISODES.c.seq > seq).order_by(EPISODES.c.seq).limit(limit)
        return self._read(query, EpisodeRow)

    def episode(self, episode_id: str) -> EpisodeRow | None:
        """One episode, or None if it is not committed."""
        rows: list[EpisodeRow] = self._read(
            sql.select(EPISODES).where(EPISODES.c.episode_id == episode_id), EpisodeRow
        )
        return rows[0] if rows else None

    def episodes_named(self, prefix: str) -> list[EpisodeRow]:
        """Episodes whose id begins so, in order of the id."""
        matches = EPISODES.c.episode_id.startswith(prefix, autoescape=True)
        return self._read(sql.select(EPISODES).where(matches).order_by(EPISODES.c.episode_id), EpisodeRow)

    def snapshot(self) -> tuple[int, int]:
        """(n, m): all episodes up to n and all labels up to m, as of one moment."""
        with self._engine.begin() as connection:
            numbers = {row.name: row.value for row in connection.execute(sql.select(COUNTERS))}
        return int(numbers["episodes"]), int(numbers["labels"])

    # Labels ------------------------------------------------------------------------------------------

    def label(self, episode_id: str, outcome: str, source: str, sub_step_scores: Sequence[float] = ()) -> int:
        """Append a verdict; returns its number. The episode may be committed later than its label.
        Raises `ValueError` for an unknown outcome."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome {outcome!r}; one of {', '.join(OUTCOMES)}")
        with writing(self._engine) as connection:
            seq = _next(connection, "labels")
            connection.execute(
                LABELS.insert().values(
                    seq=seq,
                    episode_id=episode_id,
                    outcome=outcome,
                    sub_step_scores=[float(score) for score in sub_step_scores],
                    source=source,
                    created_s=self._clock(),
                )
            )
        return seq

    def labels(self, episode_id: str | None = None, as_of: int | None = None) -> list[LabelRow]:
        """Verdicts in order: of one episode or all, up to number `as_of`."""
        query = sql.select(LABELS).order_by(LABELS.c.seq)
        if episode_id is not None:
            query = query.where(LABELS.c.episode_id == episode_id)
        if as_of is not None:
            query = query.where(LABELS.c.seq <= as_of)
        return self._read(query, LabelRow)

    def outcomes(self, snapshot: tuple[int, int]) -> dict[str, str]:
        """Outcome of every episode of a snapshot, by id: the last verdict up to m, else as recorded."""
        n, m = snapshot
        query = sql.select(EPISODES.c.episode_id, EPISODES.c.outcome).where(EPISODES.c.seq <= n)
        with self._engine.begin() as connection:
            result = {row.episode_id: row.outcome for row in connection.execute(query)}
        for label in self.labels(as_of=m):
            if label.episode_id in result:
                result[label.episode_id] = label.outcome
        return result

    # Policies ----------------------------------------------------------------------------------------

    def register_policy(
        self,
        digest: str,
        uri: str,
        snapshot: tuple[int, int],
        parent: int | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> int:
        """Add a candidate; returns its version, numbered from 1. The same digest again gives the same
        version: a learner that died after registering does not make a second one."""
        with writing(self._engine) as connection:
            _lock(connection, "policies")
            known = connection.scalar(sql.select(POLICIES.c.version).where(POLICIES.c.digest == digest))
            if known is not None:
                return int(known)
            version = _next(connection, "policies")
            connection.execute(
                POLICIES.insert().values(
                    version=version,
                    digest=digest,
                    uri=uri,
                    parent=parent,
                    snapshot_n=snapshot[0],
                    label_m=snapshot[1],
                    state="candidate",
                    metrics=metrics or {},
                    created_s=self._clock(),
                )
            )
        return version

    def policies(self) -> list[PolicyRow]:
        """All versions, in order."""
        return self._read(sql.select(POLICIES).order_by(POLICIES.c.version), PolicyRow)

    def policy(self, version: int) -> PolicyRow:
        """One version. Raises `PolicyStateError` if there is none."""
        rows: list[PolicyRow] = self._read(
            sql.select(POLICIES).where(POLICIES.c.version == version), PolicyRow
        )
        if not rows:
            raise PolicyStateError(f"no policy version {version}")
        return rows[0]

    def set_policy_state(self, version: int, state: str) -> None:
        """Move a version along `POLICY_TRANSITIONS`; one that becomes active retires the one before in the
        same transaction. Setting the state it has does nothing. Raises `PolicyStateError`."""
        with writing(self._engine) as connection:
            _move_policy(connection, version, state)

    def roll_back(self, version: int) -> PolicyRow | None:
        """Mark a canary or active version as rolled back. If it was active, the newest retired version
        before it becomes active in the same transaction. Returns the desired policy afterwards."""
        with writing(self._engine) as connection:
            was_active = _policy_state(connection, version) == "active"
            _move_policy(connection, version, "rolled_back")
            if was_active:
                before = connection.scalar(
                    sql.select(sql.func.max(POLICIES.c.version)).where(
                        POLICIES.c.state == "retired", POLICIES.c.version < version
                    )
                )
                if before is not None:
                    _move_policy(connection, int(before), "active")
        return self.desired_policy()

    def desired_policy(self) -> PolicyRow | None:
        """The active version, or None before the first. (A canary is desired only where it is sent.)"""
        rows: list[PolicyRow] = self._read(
            sql.select(POLICIES).where(POLICIES.c.state == "active"), PolicyRow
        )
        return rows[0] if rows else None

    # Cursors and quarantine --------------------------------------------------------------------------

    def cursor(self, learner: str) -> int:
        """Last episode a learner has ingested; 0 if none."""
        with self._engine.begin() as connection:
            value = connection.scalar(sql.select(CURSORS.c.episode_seq).where(CURSORS.c.learner == learner))
        return int(value or 0)

    def set_cursor(self, learner: str, episode_seq: int) -> None:
        """Note that a learner has ingested everything up to `episode_seq`."""
        with writing(self._engine) as connection:
            changed = connection.execute(
                CURSORS.update().where(CURSORS.c.learner == learner).values(episode_seq=episode_seq)
            )
            if changed.rowcount == 0:
                connection.execute(CURSORS.insert().values(learner=learner, episode_seq=episode_seq))

    def quarantine(self, episode_id: str, reason: str, path: str) -> None:
        """Note something refused. The same note twice is one row."""
        columns = QUARANTINE.c
        with writing(self._engine) as connection:
            known = connection.scalar(
                sql.select(columns.id).where(columns.episode_id == episode_id, columns.reason == reason)
            )
            if known is None:
                connection.execute(
                    QUARANTINE.insert().values(
                        episode_id=episode_id, reason=reason, path=path, created_s=self._clock()
                    )
                )

    def quarantined(self) -> list[QuarantineRow]:
        """Everything refused, in order."""
        return self._read(sql.select(QUARANTINE).order_by(QUARANTINE.c.id), QuarantineRow)

    def _read(self, query: Any, row_type: Callable[..., Any]) -> list[Any]:
        with self._engine.begin() as connection:
            return [row_type(**row) for row in connection.execute(query).mappings()]


def _lock(connection: sql.Connection, name: str) -> int:
    """Last number of a sequence; its row stays locked until the transaction ends, so that what is read
    afterwards cannot change (SQLite holds its one write lock anyway)."""
    row = sql.select(COUNTERS.c.value).where(COUNTERS.c.name == name).with_for_update()
    return int(connection.execute(row).scalar_one())


def _next(connection: sql.Connection, name: str) -> int:
    """Take the next number of a sequence."""
    number = _lock(connection, name) + 1
    connection.execute(COUNTERS.update().where(COUNTERS.c.name == name).values(value=number))
    return number


def _policy_state(connection: sql.Connection, version: int) -> str:
    state = connection.scalar(sql.select(POLICIES.c.state).where(POLICIES.c.version == version))
    if state is None:
        raise PolicyStateError(f"no policy version {version}")
    return str(state)


def _move_policy(connection: sql.Connection, version: int, state: str) -> None:
    current = _policy_state(connection, version)
    if current == state:
        return
    if state not in POLICY_TRANSITIONS[current]:
        allowed = ", ".join(sorted(POLICY_TRANSITIONS[current])) or "nothing"
        raise PolicyStateError(f"policy {version} is {current}; it can become {allowed}, not {state}")
    if state == "active":
        connection.execute(POLICIES.update().where(POLICIES.c.state == "active").values(state="retired"))
    connection.execute(POLICIES.update().where(POLICIES.c.version == version).values(state=state))
