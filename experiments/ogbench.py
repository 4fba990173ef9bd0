# SPDX-License-Identifier: Apache-2.0
"""Quality on a public benchmark: ways to make a policy out of one critic, on OGBench's play data and single tasks.

    scripts/run pip install --target runs/ogbench/packages ogbench     # once; the project itself does not need it
    export PYTHONPATH=runs/ogbench/packages
    scripts/run python -m experiments.ogbench train development         # three trials per method, another task
    scripts/run python -m experiments.ogbench train report              # the chosen settings; hours
    scripts/run python -m experiments.ogbench summarise

`train` skips what is finished and continues what was interrupted; started twice, two processes share the work. As a
module (-m), not as a file: beside itself Python would find this file where it looks for the package `ogbench`.
Results: experiments/results/ogbench, with a README that says what they mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from experiments.ogbench_play.batches import ChunkSampler
from experiments.ogbench_play.bout import GAMMA, Bout, Competitor
from experiments.ogbench_play.collect import digest, load_or_collect
from experiments.ogbench_play.plan import DATA_SEED, EPISODES, Match, Stage, matches
from experiments.ogbench_play.summary import figure, finished, load_runs, summarise, trials
from experiments.ogbench_play.tasks import SingleTask

app = typer.Typer(add_completion=False, help=__doc__)
RESULTS = Path("experiments/results/ogbench")
WORK = Path("runs/ogbench")


@app.command()
def train(
    stage: Annotated[Stage, typer.Argument(help="Which part of the plan")],
    results: Annotated[Path, typer.Option(help="Where results are written")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Data and states of runs")] = WORK,
) -> None:
    """Run what is missing of a stage, in the plan's order."""
    torch.set_num_threads(1)
    for match in matches(stage):
        with _alone(work / "locks" / match.key) as free:
            if free:
                _run(match, results / "runs" / stage.value, work)


@app.command("summarise")
def write_summary(
    results: Annotated[Path, typer.Option(help="Where results are")] = RESULTS,
) -> None:
    """Write summary.json from the finished runs of the report and the trials, and the figure from all runs so far."""
    runs = load_runs(results / "runs" / Stage.REPORT.value)
    done = [run for run in runs if finished(run)]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    summary = summarise(done) | {
        "unfinished_runs": len(runs) - len(done),
        "trials": trials(load_runs(results / "runs" / Stage.DEVELOPMENT.value)),
        "command": "python -m experiments.ogbench train report",
        "commit": head.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread per process, no GPU",
    }
    (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if runs:
        figure(runs, results / "success.png")
    print(json.dumps(summary, indent=1))


def _run(match: Match, results: Path, work: Path) -> None:
    files = {entry: results / match.name / f"{entry.name}.json" for entry in match.entries}
    missing = tuple(
        entry
        for entry, file in files.items()
        if not (file.is_file() and finished(json.loads(file.read_text())))
    )
    if not missing:
        return
    states = work / "states"
    if not (states / match.key).is_dir():  # else all of them were on the way, and go on together
        match = replace(match, entries=missing)
    rows = load_or_collect(work / "data", match.environment, EPISODES, DATA_SEED)
    task = SingleTask(match.environment, match.task)
    sampler = ChunkSampler(task.label(rows), task.parts, match.harness.horizon, GAMMA)
    bout = Bout(match.harness, task, sampler, match.seed, match.entries)
    about = {
        "data": digest(rows),
        "packages": {name: version(name) for name in ("ogbench", "mujoco", "torch")},
    }

    def write(competitor: Competitor) -> None:
        file = files[competitor.entry]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(bout.result(competitor) | about, indent=1) + "\n")

    bout.run(states / match.key, states / match.name, write)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this process is the only one to hold `path`; freed at the end, also by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


if __name__ == "__main__":
    app()
