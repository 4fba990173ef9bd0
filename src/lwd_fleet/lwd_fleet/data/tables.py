# SPDX-License-Identifier: Apache-2.0
"""Tables of the catalog, and how a database is opened for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import JSON, BigInteger, Column, Float, Integer, String, Table, Text

METADATA = sql.MetaData()
BUSY_TIMEOUT_S = 30

COUNTERS = Table(
    "counters", METADATA, Column("name", String(32), primary_key=True), Column("value", BigInteger)
)
"""One row per sequence. Incremented in the transaction that uses the number, so that numbers become visible
in order and without gaps, on any database: a reader that has seen n has seen everything up to n."""

EPISODES = Table(
    "episodes",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("episode_id", String(64), nullable=False, unique=True),
    Column("manifest_digest", String(64), nullable=False),
    Column("robot", String(128), nullable=False),
    Column("task", String(128), nullable=False),
    Column("instruction", Text, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("policy_version", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("source", String(128), nullable=False),
    Column("created_s", Float, nullable=False),
    Column("committed_s", Float, nullable=False),
    Column("manifest", JSON, nullable=False),
)
LABELS = Table(
    "labels",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("episode_id", String(64), nullable=False, index=True),
    Column("outcome", String(16), nullable=False),
    Column("sub_step_scores", JSON, nullable=False),
    Column("source", String(128), nullable=False),
    Column("created_s", Float, nullable=False),
)
POLICIES = Table(
    "policies",
    METADATA,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("uri", Text, nullable=False),
    Column("parent", BigInteger),
    Column("snapshot_n", BigInteger, nullable=False),
    Column("label_m", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("created_s", Float, nullable=False),
)
CURSORS = Table(
    "cursors",
    METADATA,
    Column("learner", String(128), primary_key=True),
    Column("episode_seq", BigInteger, nullable=False),
)
QUARANTINE = Table(
    "quarantine",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("episode_id", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("created_s", Float, nullable=False),
)


def open_engine(url: str) -> sql.Engine:
    """An engine whose tables exist. `url` is an SQLAlchemy URL or the path of an SQLite file."""
    if "://" not in url:
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{url}"
    engine = sql.create_engine(
        url, connect_args={"timeout": BUSY_TIMEOUT_S} if url.startswith("sqlite") else {}
    )
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine)
    with writing(engine) as connection:
        METADATA.create_all(connection)
        known = set(connection.scalars(sql.select(COUNTERS.c.name)))
        for name in sorted({"episodes", "labels", "policies"} - known):
            connection.execute(COUNTERS.insert().values(name=name, value=0))
    return engine


def writing(engine: sql.Engine) -> Any:
    """A transaction that writes. It takes SQLite's write lock at its start: a transaction that reads first
    and then wants to write could only fail when another process wrote in between."""
    return engine.execution_options(lwd_begin="BEGIN IMMEDIATE").begin()


def _prepare_sqlite(engine: sql.Engine) -> None:
    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver's own idea of when to begin would come in between
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # a committed episode survives a power cut

    def begun(connection: sql.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("lwd_begin", "BEGIN"))

    sql.event.listen(engine, "connect", connected)
    sql.event.listen(engine, "begin", begun)
