# SPDX-License-Identifier: Apache-2.0
"""The fleet study: one generalist on eight dual-arm tasks, 16 simulated robots, and the ways to go on learning.

    scripts/run python -m experiments.fleet gather                  # demonstrations and play, once
    scripts/run python -m experiments.fleet run --seed 0            # all cells of a training seed, and their evaluation
    scripts/run python -m experiments.fleet summarise               # the tables

`clone`, `cell` and `evaluate` are the parts of `run`; `run --cells` takes ablations, too.

Stages leave their results below `--work`; an interrupted one goes on where it was. Nothing is evaluated with help.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.fleet_study.ablations import ABLATIONS, FLEETS
from experiments.fleet_study.ablations import TASKS as ABLATION_TASKS
from experiments.fleet_study.analysis import LADDER, Outcomes, read_work, summarise, table
from experiments.fleet_study.plan import CELLS, LONG, FleetPlan
from experiments.fleet_study.study import Study
from lwd_fleet.sim.shift import Shift

RESULTS = Path(__file__).parent / "results" / "fleet"
ABLATION_RESULTS = RESULTS.parent / "fleet_ablations"
WORK = Path("runs/fleet")

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()

Seed = Annotated[int, typer.Option(help="Of training", min=0)]
Work = Annotated[Path, typer.Option(help="Where runs are kept")]
Quick = Annotated[bool, typer.Option(help="A little of everything: does it run?")]
Tasks = Annotated[str, typer.Option(help="Only these, separated by commas")]
Workers = Annotated[int, typer.Option(help="Processes that simulate", min=1)]
Size = Annotated[str, typer.Option(help="Of the flow expert: tiny, or base on a GPU")]
Device = Annotated[str, typer.Option(help="Of the learner: cpu or cuda")]


@contextmanager
def _study(
    work: Path, quick: bool, tasks: str, workers: int, size: str = "tiny", device: str = "cpu"
) -> Iterator[Study]:
    torch.set_num_threads(1)
    plan = replace(FleetPlan(), expert_size=size, device=device)
    if tasks:
        plan = replace(plan, tasks=tuple(tasks.split(",")))
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        rows: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, note: str) -> None:
            if stage not in rows or bar.tasks[rows[stage]].completed > done:
                rows[stage] = bar.add_task(stage, total=total, note=note)
            bar.update(rows[stage], completed=done, total=total, note=note)

        yield Study(work, plan.quick() if quick else plan, workers, show)


@app.command()
def gather(work: Work = WORK, quick: Quick = False, tasks: Tasks = "", workers: Workers = 2) -> None:
    """Record and ingest demonstrations and play."""
    with _study(work, quick, tasks, workers) as study:
        study.gather()


@app.command()
def clone(
    seed: Seed,
    work: Work = WORK,
    quick: Quick = False,
    tasks: Tasks = "",
    workers: Workers = 2,
    size: Size = "tiny",
    device: Device = "cpu",
) -> None:
    """Clone the demonstrations; record what the result does in the deployment."""
    with _study(work, quick, tasks, workers, size, device) as study:
        study.clone(seed)
    if not (quick or tasks):
        _keep_course(study, "sft", seed)


@app.command()
def cell(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(CELLS | ABLATIONS | FLEETS)}")],
    seed: Seed,
    work: Work = WORK,
    quick: Quick = False,
    tasks: Tasks = "",
    workers: Workers = 2,
    device: Device = "cpu",
) -> None:
    """Train one method from the cloned policy of a seed."""
    cells = CELLS | ABLATIONS | FLEETS
    if name not in cells:
        raise typer.BadParameter(f"no cell {name!r}; there are {', '.join(cells)}")
    with _study(work, quick, tasks, workers, device=device) as study:
        study.learn(seed, name, cells[name])
    if not (quick or tasks):
        _keep_course(study, name, seed)


def _keep_course(study: Study, name: str, seed: int) -> None:
    file = _results(name) / f"seed_{seed}" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(study.course(seed, name), indent=1) + "\n", encoding="utf-8")


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(help="A cell, or sft, or expert")],
    seed: Seed = 0,
    work: Work = WORK,
    quick: Quick = False,
    tasks: Tasks = "",
    workers: Workers = 2,
    development: Annotated[
        bool, typer.Option(help="On development scenes, to choose by; nothing is kept")
    ] = False,
    wave: Annotated[
        int | None,
        typer.Option(help="What the fleet worked with in this wave, from 0; default: the end", min=0),
    ] = None,
    shift: Annotated[
        str | None, typer.Option(help="Another than the deployment's: a name or JSON; empty for none")
    ] = None,
) -> None:
    """Run every scene once; keep the outcomes of the test scenes as CSV."""
    of_ablation = ",".join(ABLATION_TASKS) if name in ABLATIONS | FLEETS else ""
    with _study(work, quick, tasks or of_ablation, workers) as study:
        chosen = None if shift is None else Shift.parse(shift)
        if name == "expert":
            results = study.expert(chosen or Shift())
        else:
            results = study.evaluate(seed, name, development, chosen, wave)
    for task, (success, score, count) in _by_task(results).items():
        console.print(f"{task:<14} success {success:.2f}  score {score:.2f}  ({count} scenes)")
    if not (development or quick or tasks or name == "expert" or chosen):
        at = "" if wave is None else f"_wave_{wave}"
        _keep(_results(name) / f"seed_{seed}" / f"{name}{at}.csv", results)


@app.command()
def run(
    seed: Seed,
    cells: Annotated[str, typer.Option(help="Separated by commas")] = ",".join(CELLS),
    work: Work = WORK,
    workers: Workers = 1,
) -> None:
    """All that a training seed lacks: its cloned policy, its cells, their evaluation. Interrupted, it goes on where it was.

    Says first how long it will take, by what the same cells took of other seeds.
    """
    lacking = [name for name in ("sft", *cells.split(",")) if not (work / f"seed_{seed}" / name).exists()]
    known = {name: worked["minutes"] for name, worked in (_work(RESULTS) | _work(ABLATION_RESULTS)).items()}
    unknown = [name for name in lacking if name not in known]
    minutes = sum(known.get(name, 0.0) for name in lacking)
    console.print(
        f"seed {seed}: {minutes:.0f} minutes of one process, and {', '.join(unknown) or 'nothing'} untimed"
    )
    for name in ("sft", *cells.split(",")):
        if name in lacking and name == "sft":
            clone(seed, work, workers=workers)
        elif name in lacking:
            cell(name, seed, work, workers=workers)
        if not (_results(name) / f"seed_{seed}" / f"{name}.csv").exists():
            evaluate(name, seed, work, workers=workers)


def _work(folder: Path) -> dict[str, dict[str, float]]:
    return read_work(folder) if folder.exists() else {}


@app.command("summarise")
def write_summary() -> None:
    """Write summary.json from all outcomes that are there, of the table and of the ablations, and print both."""
    _summarise(RESULTS, Outcomes.read(RESULTS), LADDER, ["sft", *CELLS])
    if ABLATION_RESULTS.exists():
        outcomes = Outcomes.read(ABLATION_RESULTS, RESULTS, only=ABLATION_TASKS)
        comparisons = [("lwd_offline", name) for name in ABLATIONS]
        methods = [name for name in outcomes.score if name.startswith("fleet_")]
        _summarise(ABLATION_RESULTS, outcomes, comparisons, ["sft", "lwd_offline", *ABLATIONS, *methods])


def _summarise(
    folder: Path, outcomes: Outcomes, comparisons: Sequence[tuple[str, str]], methods: Sequence[str]
) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    summary = summarise(outcomes, comparisons) | {
        "work": read_work(folder),
        "observation": FleetPlan().observation,
        "command": "scripts/run python -m experiments.fleet evaluate, summarise",
        "commit": head.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread per process, no GPU",
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(table(summary, methods), markup=False)


def _results(name: str) -> Path:
    return ABLATION_RESULTS if name in ABLATIONS | FLEETS else RESULTS


def _by_task(results: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, int]]:
    """Success, score and number of episodes; the score of a long task is the mean of its sub-steps."""
    groups = defaultdict(list)
    for one in results:
        groups[one["request"]["task"]].append(one)
    return {
        task: (
            sum(one["success"] for one in group) / len(group),
            sum(_score(task, one) for one in group) / len(group),
            len(group),
        )
        for task, group in sorted(groups.items())
    }


def _score(task: str, result: dict[str, Any]) -> float:
    scores = result["sub_step_scores"]
    return sum(scores) / len(scores) if task in LONG else float(result["success"])


def _keep(path: Path, results: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "scene", "success", "score", "steps", "sub_steps"])
        for one in sorted(results, key=lambda one: (one["request"]["task"], one["request"]["seed"])):
            task = one["request"]["task"]
            row = [
                task,
                one["request"]["seed"],
                int(one["success"]),
                round(_score(task, one), 4),
                one["steps"],
            ]
            writer.writerow([*row, json.dumps(one["sub_step_scores"])])


if __name__ == "__main__":
    app()
