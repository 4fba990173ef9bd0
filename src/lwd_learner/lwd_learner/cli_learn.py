# SPDX-License-Identifier: Apache-2.0
"""`lwd train` and `lwd eval`: one phase of training on a run's episodes, and a success rate to be believed."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sqlalchemy.exc import SQLAlchemyError

from lwd_fleet.data.catalog import Catalog, PolicyStateError
from lwd_fleet.data.store import LocalStore
from lwd_fleet.sim import robot
from lwd_fleet.sim.rollout_worker import RolloutRequest
from lwd_fleet.sim.rollouts import RolloutFailed, Rollouts, split
from lwd_fleet.sim.shift import Shift
from lwd_fleet.sim.tasks import SUITES, TASKS
from lwd_fleet.supervisor import stop_requested
from lwd_learner.cli_terminal import console, fail, progress_bar
from lwd_learner.column import ColumnTooShort
from lwd_learner.descent import NonFiniteLoss
from lwd_learner.distributed import LaunchRefused, joined, local_device
from lwd_learner.evaluate import success_rate
from lwd_learner.learner import Learner, LearnerConfig, load_policy
from lwd_learner.methods import DEFAULT, METHODS, named
from lwd_learner.ranks import RanksDiverged
from lwd_learner.replay import ReplayEmpty, ReplayLocked, ReplayMismatch, ReplayMissing
from lwd_learner.shared_policy import share_policy
from lwd_learner.sim_policy import NothingToFit, sim_policy
from lwd_learner.trainer import TrainerConfig
from lwd_learner.training_run import TrainingRun, starting_policy
from lwd_learner.training_state import ResumeRefused
from lwd_policy import checkpoint
from lwd_policy.checkpoint import CheckpointRefused
from lwd_policy.trunk_file import TrunkRefused

_SLICE = 10  # steps; Ctrl-C waits for so many
_SAVE_EVERY = 200  # steps
_LOSSES = ("clone_loss", "critic_loss", "policy_loss")
_METHODS_HELP = "; ".join(f"{name}: {method.about}" for name, method in METHODS.items())
_REFUSALS = (
    CheckpointRefused,
    TrunkRefused,
    NothingToFit,
    ReplayEmpty,
    ReplayLocked,
    ReplayMismatch,
    ReplayMissing,
    ColumnTooShort,
    ResumeRefused,
    NonFiniteLoss,
    LaunchRefused,
    RanksDiverged,
    ValueError,
)


class Strategy(str, Enum):
    """What each of several processes holds."""

    ddp = "ddp"
    fsdp = "fsdp"


class Phase(str, Enum):
    """What `lwd train` can do; online training is the learner node's."""

    bc = "bc"
    offline = "offline"


def train(
    phase: Annotated[
        Phase, typer.Argument(help="bc: clone the demonstrations; offline: learn from all episodes")
    ],
    run: Annotated[
        Path,  # torchrun takes --run for an abbreviation of one of its own options
        typer.Option("--run", "--run-dir", help="Run directory with catalog.db and store"),
    ],
    steps: Annotated[int, typer.Option(help="Steps of this phase, those of earlier calls included", min=1)],
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint to start from; default: what the run began with, or a fresh policy of the simulated robot"
        ),
    ] = None,
    observation: Annotated[str, typer.Option(help="Of a fresh policy: images or keypoints")] = "images",
    suite: Annotated[
        str, typer.Option(help=f"Of a fresh policy: the tasks that it is for, {' or '.join(SUITES)}")
    ] = "demo",
    expert_size: Annotated[
        str, typer.Option(help="Of a fresh policy: tiny (learns on two cores) or base (wants a GPU)")
    ] = "tiny",
    method: Annotated[
        str,
        typer.Option(help=f"How the offline phase learns: {_METHODS_HELP}. Each has a directory of its own"),
    ] = DEFAULT,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    batch: Annotated[
        int, typer.Option(help="Rows of a step, over all processes", min=1)
    ] = TrainerConfig().batch,
    strategy: Annotated[
        Strategy,
        typer.Option(help="Under torchrun. ddp: a process holds all parameters; fsdp: a piece of each"),
    ] = Strategy.ddp,
) -> None:
    """Train on a run's episodes and publish a policy version. Ctrl-C saves; the same command goes on.

    Several processes train together: torchrun --nproc-per-node 2 -m lwd_learner.cli train ...
    """
    torch.set_num_threads(1)
    try:
        named(method)
        with joined(strategy.value, device, (run / "catalog.db").is_file()) as ranks:
            console.quiet = not ranks.first
            if ranks.first and not (run / "catalog.db").is_file():
                fail(f"{run} has no catalog.db; `lwd ingest` makes one")
            # Only the first process takes episodes in; the others have nothing to look up.
            with Catalog(run / "catalog.db" if ranks.first else "sqlite://") as catalog:
                config = LearnerConfig(TrainerConfig(batch=batch), method=method)
                store = LocalStore(run / "store")
                start = None
                name = "learner" if method == DEFAULT else f"learner_{method}"
                known = policy or starting_policy(run / name)
                if ranks.first and known is None:
                    start = sim_policy(observation, catalog, store, config.stride, suite, expert_size)
                elif ranks.first and known is not None:
                    start = load_policy(known, device)
                start = share_policy(ranks, start)
                place = str(local_device(device))
                with closing(
                    Learner(run / name, catalog, store, start, config, place, name=name, ranks=ranks)
                ) as learner:
                    _train(learner, phase, steps)
    except (*_REFUSALS, OSError, SQLAlchemyError, sqlite3.Error) as error:
        fail(error)


def _train(learner: Learner, phase: Phase, steps: int) -> None:
    work = TrainingRun(learner, phase.value, steps)  # before episodes come in, which count from its step on
    with progress_bar() as bar:
        reading = bar.add_task("ingest", total=None, note="")
        ingested = learner.ingest(
            "offline", lambda done, total: bar.update(reading, completed=done, total=total)
        )
        bar.remove_task(reading)
        for text in ingested.refused:
            console.print(f"not used: {text}", markup=False, highlight=False)
        if work.resumed:
            console.print(f"goes on from step {work.steps} of {phase.value}")
        task = bar.add_task(phase.value, total=steps, completed=work.steps, note="")

        def show(step: int, metrics: dict[str, float]) -> None:
            losses = ", ".join(f"{name} {metrics[name]:.3g}" for name in _LOSSES if name in metrics)
            bar.update(task, advance=1, note=losses)

        stopped = stop_requested()  # between two steps only: a state of half a step would be saved otherwise
        while work.steps < steps and not learner.ranks.any(stopped()):
            work.train(min(_SLICE, steps - work.steps), show)
            if work.steps % _SAVE_EVERY == 0:
                work.save()
    if work.steps < steps:
        work.save()
        console.print(f"stopped at step {work.steps}; the state is saved, the same command goes on")
        raise typer.Exit(130)
    work.save()
    metrics = learner.trainer.report()
    before = learner.version
    version = learner.publish(metrics)
    if version == before:
        console.print(
            f"policy unchanged, still version {version}, after {work.steps} steps on {len(learner.replay)} transitions"
        )
        return
    numbers = ", ".join(f"{name} {metrics[name]:.3g}" for name in _LOSSES if name in metrics)
    console.print(
        f"version {version} after {work.steps} steps on {len(learner.replay)} transitions: {numbers or 'as before'}"
    )


def evaluate(
    policy: Annotated[Path, typer.Option(help="Checkpoint directory")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}")] = "place",
    suite: Annotated[
        str, typer.Option(help=f"All tasks of a suite instead of one; one of {', '.join(SUITES)}")
    ] = "",
    episodes: Annotated[int, typer.Option(help="Number of scenes of each task", min=1)] = 100,
    first_seed: Annotated[int, typer.Option(help="Scenes have this seed and the following", min=0)] = 0,
    shift: Annotated[str, typer.Option(help="Name of a domain shift, or one as JSON")] = "",
    workers: Annotated[int, typer.Option(help="Processes", min=1)] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the outcome of every scene")
    ] = False,
) -> None:
    """Success rate of a policy on simulated robots, with its 95 % interval."""
    if suite not in ("", *SUITES):
        fail(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    if task not in TASKS:
        fail(f"no task {task!r}; there are {', '.join(TASKS)}")
    tasks = [member.name for member in SUITES[suite].tasks] if suite else [task]
    try:
        Shift.parse(shift)
        checkpoint.read_card(policy)
    except (ValueError, CheckpointRefused) as error:
        fail(error)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lwd-") as folder, progress_bar() as bar:
        scenes = [(name, seed) for seed in range(first_seed, first_seed + episodes) for name in tasks]
        request = RolloutRequest(
            robot_file=str(robot.write(Path(folder))), episodes=scenes, shift=shift, policy=str(policy)
        )
        row = bar.add_task("evaluate", total=len(scenes), note="")
        try:
            with Rollouts(split(request, min(workers, len(scenes))), Path(folder) / "workers") as rollouts:
                for result in rollouts:
                    results.append(result)
                    bar.update(row, advance=1, note=f"{sum(one['success'] for one in results)} succeeded")
        except RolloutFailed as error:
            fail(error)
    records = [_judged([one for one in results if one["request"]["task"] == name], name) for name in tasks]
    if as_json:
        print(json.dumps({"policy": policy.name, "shift": shift, "tasks": records}, indent=1))
        return
    for record in records:
        rate = record["success"]
        console.print(
            f"{record['task']}: {sum(record['outcomes'].values())} of {episodes} succeeded, "
            f"{rate['value']:.1%} (95 % interval {rate['low']:.1%} to {rate['high']:.1%}), "
            f"sub-steps {record['sub_steps']:.2f}"
        )


def _judged(results: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """What all scenes of one task came to. sub_steps: mean of their scores, 0 to 1."""
    outcomes = {one["request"]["seed"]: one["success"] for one in results}
    scores = [score for one in results for score in one["sub_step_scores"]]
    return {
        "task": task,
        "success": asdict(success_rate(list(outcomes.values()))),
        "sub_steps": sum(scores) / len(scores),
        "outcomes": {str(seed): outcomes[seed] for seed in sorted(outcomes)},
    }


def publish(
    policy: Annotated[Path, typer.Argument(help="Checkpoint directory")],
    run: Annotated[Path, typer.Option(help="Run directory of the deployment that shall run it")],
) -> None:
    """Give a policy to the robots of a deployment: copy it into the run and make it the active version."""
    try:
        card = checkpoint.read_card(policy)
        target = run / "policies" / card.digest
        if not target.exists():
            shutil.copytree(policy, target)
        with Catalog(run / "catalog.db") as catalog:
            version = catalog.register_policy(card.digest, target.absolute().as_uri(), catalog.snapshot())
            catalog.set_policy_state(version, "active")
    except (CheckpointRefused, PolicyStateError, OSError, SQLAlchemyError) as error:
        fail(error)
    console.print(f"version {version} ({card.digest[:12]}) is active in {run}")
