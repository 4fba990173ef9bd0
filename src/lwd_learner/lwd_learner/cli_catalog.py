# SPDX-License-Identifier: Apache-2.0
"""`lwd episodes` and `lwd policies`: what a catalog knows. Nothing here changes it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from lwd_fleet.data.catalog import Catalog, EpisodeRow, LabelRow, QuarantineRow
from lwd_learner.cli_terminal import console, fail

app = typer.Typer(help="List committed episodes, or show one.")

CatalogOption = Annotated[str, typer.Option(help="Catalog: an SQLite file or an SQLAlchemy URL")]

_MAX_NAMED = 5  # ids listed where a prefix means several


@app.callback(invoke_without_command=True)
def episodes(
    context: typer.Context,
    catalog: CatalogOption = "",
    last: Annotated[int, typer.Option(help="How many of the newest")] = 20,
) -> None:
    """List committed episodes, with the outcome that counts now; `show` tells all about one."""
    if context.invoked_subcommand is not None:
        return
    with _existing(catalog) as store:
        snapshot = store.snapshot()
        outcomes = store.outcomes(snapshot)
        rows = store.episodes_since(max(0, snapshot[0] - last))
        refused = store.quarantined()
    table = Table("seq", Column("episode", no_wrap=True), "robot", "task", "instruction", "policy", "steps", "outcome",
                  "recorded")  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.seq), row.episode_id[:13], row.robot, row.task, row.instruction, str(row.policy_version),
            str(row.steps), outcomes[row.episode_id], _moment(row.created_s),
        )  # fmt: skip
    console.print(table)
    for entry in refused:
        console.print(f"[yellow]in quarantine[/] {entry.episode_id}: {entry.reason} ({entry.path})")


@app.command()
def show(
    episode: Annotated[str, typer.Argument(help="Id of the episode, or a beginning that no other has")],
    catalog: CatalogOption,
) -> None:
    """Everything that the catalog knows of one episode."""
    with _existing(catalog) as store:
        rows = store.episodes_named(episode)
        notes = [entry for entry in store.quarantined() if entry.episode_id.startswith(episode)]
        names = sorted({row.episode_id for row in rows} | {note.episode_id for note in notes})
        if episode in names:  # the whole id of one may be the beginning of another
            names = [episode]
        if not names:
            fail(f"no episode begins with {episode!r}; `lwd episodes --catalog {catalog}` lists them")
        if len(names) > 1:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            fail(f"{episode!r} is the beginning of {', '.join(names[:_MAX_NAMED])}{more}; give more of it")
        (name,) = names
        labels = store.labels(name)
    table = Table.grid(padding=(0, 2))
    table.add_row("episode", name)
    notes = [entry for entry in notes if entry.episode_id == name]
    committed = next((row for row in rows if row.episode_id == name), None)
    for what, text in _facts(committed, labels, notes):
        table.add_row(what, escape(text))
    console.print(table)


def policies(catalog: CatalogOption) -> None:
    """List policy versions, their state and what they were trained from."""
    table = Table("version", "state", "digest", "parent", "episodes up to", "labels up to", "metrics")
    with _existing(catalog) as store:
        for row in store.policies():
            metrics = ", ".join(
                f"{key} {value:.3g}" for key, value in row.metrics.items() if isinstance(value, float)
            )
            table.add_row(
                str(row.version), row.state, row.digest[:12], str(row.parent or ""), str(row.snapshot_n),
                str(row.label_m), metrics,
            )  # fmt: skip
    console.print(table)


def _existing(catalog: str) -> Catalog:
    """The catalog; a mistyped path must not make an empty one."""
    if not catalog:
        fail("say which catalog: --catalog FILE")
    if "://" not in catalog and not Path(catalog).is_file():
        fail(f"there is no catalog {catalog}")
    return Catalog(catalog)


def _facts(
    row: EpisodeRow | None, labels: Sequence[LabelRow], notes: Sequence[QuarantineRow]
) -> Iterator[tuple[str, str]]:
    """What is known of one episode, as (what, text) lines."""
    if row is None:
        yield "committed", "no"
    else:
        yield from _committed(row, labels)
    for label in labels:
        scores = f", scores {_scores(label.sub_step_scores)}" if label.sub_step_scores else ""
        yield f"label {label.seq}", f"{label.outcome} by {label.source} at {_moment(label.created_s)}{scores}"
    for note in notes:
        where = f" ({note.path})" if note.path else ""
        yield "quarantine", f"{note.reason}, since {_moment(note.created_s)}{where}"


def _committed(row: EpisodeRow, labels: Sequence[LabelRow]) -> Iterator[tuple[str, str]]:
    summary = row.summary
    yield "committed", f"number {row.seq} at {_moment(row.committed_s)}"
    yield "robot", f"{row.robot} ({row.source})"
    yield "task", row.task + (f", seed {summary.seed}" if summary.seed >= 0 else "")
    yield "instruction", row.instruction
    by = f" by {summary.outcome_source}" if summary.outcome_source else ""
    scores = f", scores {_scores(summary.sub_step_scores)}" if summary.sub_step_scores else ""
    recorded = f"{row.outcome}{by}{scores}"
    counts = f"{labels[-1].outcome} (label {labels[-1].seq}); as recorded: " if labels else ""
    yield "outcome", counts + recorded
    if summary.end_reason:
        yield "ended", summary.end_reason
    for interval in summary.policy_intervals:
        steps = f"steps {interval.first_step} to {interval.last_step}"
        yield "policy", f"version {interval.version} ({interval.digest[:12]}), {steps}"
    yield "steps", str(row.steps)
    # Both arms can have authors of their own in one step: the shares need not add up to one.
    share = (f"{name} {count / max(1, row.steps):.0%}" for name, count in summary.authors.items())
    yield "acted by", ", ".join(share) or "nobody"
    duration_s = (summary.end_ns - summary.start_ns) / 1e9
    yield "recorded", f"{_moment(row.created_s)}, {duration_s:.1f} s, {summary.message_count} messages"
    if summary.truncated:
        yield "incomplete", summary.truncated
    for file in summary.files:
        yield "file", f"{file.name}, {file.size / 1e6:.2f} MB, SHA-256 {file.sha256}"


def _moment(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _scores(scores: Sequence[float]) -> str:
    return " ".join(f"{score:g}" for score in scores)
