# SPDX-License-Identifier: Apache-2.0
"""The `lwd` command: one entry for everything that a person does with the fleet from a terminal."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from lwd_fleet.deployment import DeploymentError, load_deployment, node_specs
from lwd_fleet.domain import PrivateDomain
from lwd_fleet.supervisor import Supervisor, stop_requested
from lwd_learner import cli_catalog, cli_data, cli_learn
from lwd_learner.cli_terminal import console, fail
from lwd_learner.demo import Demo, print_summary
from lwd_learner.demo_plan import DemoPlan
from lwd_learner.doctor import examine

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="A robot fleet that learns while it is deployed."
)


@app.command()
def up(
    deployment: Annotated[
        Path, typer.Argument(help="Deployment file, e.g. config/deployments/sim_two_robots.yaml")
    ],
    run_dir: Annotated[
        Path | None, typer.Option(help="Where to write; default: as the deployment says")
    ] = None,
    hardware: Annotated[bool, typer.Option(help="Allow real robots to move")] = False,
    dry_run: Annotated[bool, typer.Option(help="Decide and record, but send nothing to the drivers")] = False,
) -> None:
    """Start a deployment and keep it running until Ctrl-C."""
    try:
        plan = load_deployment(deployment, run_dir)
        specs = node_specs(plan, hardware=hardware, dry_run=dry_run)
    except DeploymentError as error:
        raise typer.BadParameter(str(error)) from error
    with PrivateDomain() as domain:
        environment = domain.environment if plan.simulated else {}
        where = f"ROS_DOMAIN_ID={domain.number}" if plan.simulated else "the ROS domain of this shell"
        console.print(f"{len(specs)} nodes in {where}; logs in {plan.run_dir / 'log'}; Ctrl-C ends them")
        until = stop_requested()
        with Supervisor(specs, plan.run_dir, environment, report=console.print) as supervisor:
            supervisor.run(until)


@app.command()
def demo(
    run_dir: Annotated[Path | None, typer.Option(help="Where to write; default: runs/<date>")] = None,
    full: Annotated[bool, typer.Option(help="Evaluate the multi-stage task as well")] = False,
    quick: Annotated[
        bool, typer.Option(help="Every step once, in a minute or two; the numbers mean nothing")
    ] = False,
    observation: Annotated[str, typer.Option(help="images or keypoints; default: as the plan says")] = "",
) -> None:
    """Run the whole loop on simulated robots and write a report."""
    torch.set_num_threads(1)  # the robots' processes need the other core
    plan = DemoPlan().quick() if quick else DemoPlan().full() if full else DemoPlan()
    if observation:
        plan = replace(plan, observation=observation)
    directory = run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if directory.exists():
        raise typer.BadParameter(f"{directory} exists; name a new directory")
    summary = Demo(directory, plan, console).run()
    print_summary(summary, console, directory / "report.html")


@app.command()
def doctor(
    directory: Annotated[Path, typer.Argument(help="Where runs are going to be written")] = Path("runs"),
) -> None:
    """Check the installation and say what to fix."""
    healthy = True
    for finding in examine(directory):
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        console.print(f"{mark}  {finding.name}: {finding.message}")
        if finding.remedy:
            console.print(f"    -> {finding.remedy}")
        healthy &= finding.ok
    raise typer.Exit(0 if healthy else 1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory, e.g. runs/<date>")]) -> None:
    """Print the numbers that a run ended with, and where its page is."""
    file, page = run / "summary.json", run / "report.html"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        metrics: dict[str, float] = summary["metrics"]
        table = Table(
            "metric", "value", "95 % interval", title=f"{summary['command']} at {summary['commit']}"
        )
        for name, value in metrics.items():
            interval = summary["intervals"].get(name)
            table.add_row(name, f"{value:.4g}", "{:.3f} to {:.3f}".format(*interval) if interval else "")
    except FileNotFoundError:
        fail(f"{run} has no summary.json; a demonstration writes it at its end")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        fail(f"{file} cannot be used: {error!r}")
    console.print(table)
    if page.is_file():
        console.print(f"page: {page}", soft_wrap=True)


app.add_typer(cli_data.app, name="import")
app.command()(cli_data.ingest)
app.command()(cli_learn.train)
app.command()(cli_learn.publish)
app.command(name="eval")(cli_learn.evaluate)
app.add_typer(cli_catalog.app, name="episodes")
app.command()(cli_catalog.policies)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
