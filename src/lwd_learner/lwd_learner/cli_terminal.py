# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the terminal, progress bars, and how a command says that it cannot go on."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


def fail(text: object) -> NoReturn:
    """One sentence on stderr, no traceback, exit status 2."""
    print(" ".join(str(text).split()), file=sys.stderr)
    raise typer.Exit(2)


def progress_bar() -> Progress:
    """A bar with numbers and the time left; `note` is free text at its end. Gone when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )
