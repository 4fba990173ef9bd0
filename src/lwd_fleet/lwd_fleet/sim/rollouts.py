# SPDX-License-Identifier: Apache-2.0
"""Headless robots in processes of their own, as seen by whoever wants their episodes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lwd_fleet.sim.rollout_worker import RolloutRequest

_NICENESS = 10  # headless robots are in no hurry; those on the wire are
_STOP_TIMEOUT_S = 30.0


class RolloutFailed(Exception):
    """A worker ended with an error; the text is the end of what it wrote."""


class Rollouts:
    """Runs one worker process per request; iterate for the results, as dicts, while they come in.

    A context manager: leaving it ends workers that are still at work, after the episodes they are in.
    """

    def __init__(self, requests: Sequence[RolloutRequest], directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._logs: list[Path] = []
        for number, request in enumerate(requests):
            file, log = (
                directory / f"{request.robot}_{number}.json",
                directory / f"{request.robot}_{number}.log",
            )
            file.write_text(json.dumps(asdict(request)), encoding="utf-8")
            with log.open("w", encoding="utf-8") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lwd_fleet.sim.rollout_worker", str(file)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,  # Ctrl-C reaches the parent, which ends them in order
                    preexec_fn=lambda: os.nice(_NICENESS),
                )
            threading.Thread(target=self._read, args=(process,), daemon=True).start()
            self._processes.append(process)
            self._logs.append(log)

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Results until every worker has ended. Raises RolloutFailed."""
        running = len(self._processes)
        while running:
            line = self._lines.get()
            if line is None:
                running -= 1
                self._check()
            else:
                yield json.loads(line)

    def finished(self) -> list[dict[str, Any]]:
        """Results that have come in since the last call, without waiting. Raises RolloutFailed."""
        self._check()
        results = []
        while not self._lines.empty():
            line = self._lines.get()
            if line is not None:
                results.append(json.loads(line))
        return results

    def stop(self) -> None:
        """Ask the workers to end after their episodes, and wait."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put(line)
        process.wait()
        self._lines.put(None)

    def _check(self) -> None:
        for process, log in zip(self._processes, self._logs, strict=True):
            if process.poll() not in (None, 0, -signal.SIGTERM):
                tail = log.read_text(encoding="utf-8")[-2000:]
                raise RolloutFailed(f"a headless robot ended with status {process.returncode}: {tail}")


def split(request: RolloutRequest, workers: int) -> list[RolloutRequest]:
    """The same request for several workers, each with its share of the episodes and a name of its own."""
    return [
        replace(request, episodes=request.episodes[number::workers], robot=f"{request.robot}_{number}")
        for number in range(workers)
    ]
