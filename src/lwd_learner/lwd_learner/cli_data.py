# SPDX-License-Identifier: Apache-2.0
"""`lwd import` and `lwd ingest`: recordings from elsewhere become episodes, and episodes become experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lwd_fleet.data.catalog import Catalog, EpisodeConflict
from lwd_fleet.data.episode import EpisodeRejected
from lwd_fleet.data.store import BlobDamaged, LocalStore
from lwd_fleet.data.uploader import commit
from lwd_learner.cli_terminal import console, fail, progress_bar
from lwd_learner.importers.command import NOTHING_IMPORTED, from_bags, from_lerobot, quarantine_of
from lwd_learner.importers.write import ImportResult, Progress

app = typer.Typer(no_args_is_help=True, help="Turn recordings of other formats into episodes.")

Out = Annotated[Path, typer.Option(help="Directory of the episodes; refusals are noted in its `quarantine`")]
Mapping = Annotated[Path, typer.Option(help="What the topics mean: a YAML file as in config/mappings")]


@app.command()
def lerobot(
    source: Annotated[Path, typer.Argument(help="Directory of a LeRobot dataset, v2.0 to v3.0")],
    out: Out,
    robot: Annotated[
        str | None, typer.Option(help="Name of the robot; default: the dataset's robot type")
    ] = None,
) -> None:
    """Import a LeRobot dataset."""
    _finish(_import(lambda progress: from_lerobot(source, out, progress, robot)), out)


@app.command()
def bags(
    source: Annotated[list[Path], typer.Argument(help="Bags, or directories that contain them")],
    mapping: Mapping,
    out: Out,
) -> None:
    """Import rosbag2 recordings, MCAP or SQLite."""
    _finish(_import(lambda progress: from_bags(source, mapping, out, progress)), out)


def ingest(
    source: Annotated[
        list[Path], typer.Argument(help="Episodes, directories of episodes, or bags with --mapping")
    ],
    run: Annotated[Path, typer.Option(help="Run directory; its store and catalog are made if absent")],
    mapping: Annotated[
        Path | None, typer.Option(help="The sources are bags of others, which this maps")
    ] = None,
) -> None:
    """Commit episodes to the experience of a run. What is refused is listed and noted in the catalog."""
    refused = 0
    if mapping is not None:
        imported, file, given = run / "imported", mapping, source
        results = _import(lambda progress: from_bags(given, file, imported, progress))
        refused = sum(not result.imported for result in results)
        source = [result.path for result in results if result.path is not None]
    episodes = [episode for one in source for episode in _episodes(one)]
    with Catalog(run / "catalog.db") as catalog:
        before = catalog.snapshot()[0]
        refused += _commit(episodes, LocalStore(run / "store"), catalog)
        added = catalog.snapshot()[0] - before
    console.print(f"{added} added, {refused} refused; {before + added} episodes in {run / 'catalog.db'}")
    raise typer.Exit(1 if refused else 0)


def _import(work: Callable[[Progress], list[ImportResult]]) -> list[ImportResult]:
    """Run an import under a progress bar, and say what became of each source."""
    with progress_bar() as bar:
        task = bar.add_task("import", total=None, note="")

        def progress(result: ImportResult, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            console.print(str(result), markup=False, highlight=False)
            for note in result.notes:
                console.print(f"    note: {note}", markup=False, highlight=False)

        try:
            return work(progress)
        except NOTHING_IMPORTED as error:
            fail(f"nothing imported: {error}")


def _finish(results: Sequence[ImportResult], out: Path) -> None:
    refused = sum(not result.imported for result in results)
    console.print(f"{len(results) - refused} of {len(results)} imported into {out}")
    if refused:
        console.print(f"{refused} refused, see {quarantine_of(out)}")
        raise typer.Exit(1)


def _episodes(source: Path) -> list[Path]:
    """The episode itself, or the sealed episodes in a directory."""
    if not source.is_dir():
        fail(f"{source} is no directory; name an episode, a directory of episodes, or bags and --mapping")
    if any(source.glob("*.mcap")):
        return [source]
    found = sorted({file.parent for file in source.glob("*/*.mcap")})
    if not found:
        fail(f"{source} holds no episode, which is a directory with one .mcap file")
    return [path for path in found if not path.name.startswith(".")]


def _commit(episodes: Sequence[Path], store: LocalStore, catalog: Catalog) -> int:
    """Commit all that can be; returns how many were refused."""
    refused = 0
    with progress_bar() as bar:
        task = bar.add_task("ingest", total=len(episodes), note="")
        for path in episodes:
            try:
                commit(path, store, catalog)
            except (EpisodeRejected, EpisodeConflict, BlobDamaged) as error:
                refused += 1
                catalog.quarantine(path.name, str(error), str(path))
                console.print(f"refused: {error}", markup=False, highlight=False)
            except OSError as error:
                fail(f"{path}: {error}")
            bar.update(task, advance=1)
    return refused
