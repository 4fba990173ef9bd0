# SPDX-License-Identifier: Apache-2.0
"""Starts the nodes of a deployment as supervised processes, where ROS `launch` is not installed.

It only spawns: which nodes there are is decided in `deployment.py`, their bring-up by the lifecycle manager.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from lwd_fleet.deployment import NodeSpec
from lwd_fleet.domain import transport

_BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_HEALTHY_AFTER_S = 60.0  # a process that lived this long starts the back-off anew
_TERM_TIMEOUT_S = 5.0
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


class SupervisorError(Exception):
    """A node cannot be started; the text says which and why."""


@dataclass
class _Child:
    """One supervised process and what becomes of it."""

    spec: NodeSpec
    command: list[str]
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    starts: int = 0
    failures: int = 0  # ends in a row, each before it was healthy
    restart_at: float | None = None
    exit_status: int | None = None  # of the last process that ended


@dataclass(frozen=True)
class ProcessStatus:
    """What a person wants to know of one node's process."""

    name: str
    pid: int | None  # None: not running
    starts: int
    exit_status: int | None  # of the last process that ended; negative: the signal
    log_file: Path


class Supervisor:
    """Runs `specs` until `stop`. Use it as a context manager, from the main thread: on Linux the children are
    killed when the thread that started them ends, however it ends, so none is ever orphaned.

    `directory` receives `log/` and `parameters/`; `environment` is added to this process's.
    """

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        directory: str | Path,
        environment: Mapping[str, str] | None = None,
        report: Callable[[str], None] = print,
        back_off_s: Sequence[float] = _BACK_OFF_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._back_off_s, self._clock = report, tuple(back_off_s), clock
        self._environment = {
            **os.environ,
            "RCUTILS_LOGGING_BUFFERED_STREAM": "1",
            **transport(),
            **(environment or {}),
        }
        directory = Path(directory).absolute()
        for name in ("log", "parameters"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._children = [self._prepare(spec, directory) for spec in specs]

    def __enter__(self) -> Supervisor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start every process once. Raises SupervisorError, with everything stopped again."""
        try:
            for child in self._children:
                self._spawn(child)
        except OSError as error:
            self.stop()
            raise SupervisorError(
                f"{child.spec.full_name}: {child.command[0]} did not start: {error}"
            ) from error

    def poll(self) -> None:
        """Notice ends and start again what is due. Call it a few times per second."""
        now = self._clock()
        for child in self._children:
            status = None if child.process is None else child.process.poll()
            if status is not None:
                self._ended(child, status, now)
            if child.restart_at is not None and now >= child.restart_at:
                self._spawn(child)

    def run(self, until: Callable[[], bool]) -> None:
        """`poll` until the condition holds."""
        while not until():
            self.poll()
            time.sleep(_POLL_S)

    def status(self) -> list[ProcessStatus]:
        """One entry per node, in the order given."""
        return [
            ProcessStatus(
                name=child.spec.full_name,
                pid=None if child.process is None else child.process.pid,
                starts=child.starts,
                exit_status=child.exit_status,
                log_file=child.log_file,
            )
            for child in self._children
        ]

    def stop(self) -> None:
        """End all: SIGINT, after each one's own time SIGTERM, 5 s later SIGKILL. Returns once all ended."""
        for child in self._children:
            child.restart_at = None
        begin = self._clock()
        steps: dict[int, int] = {}  # pid -> signals sent
        while running := [child for child in self._children if child.process is not None]:
            waited = self._clock() - begin
            for child in running:
                assert child.process is not None
                status = child.process.poll()
                if status is not None:
                    child.process, child.exit_status = None, status
                    continue
                patience = child.spec.stop_timeout_s
                schedule = (
                    (0.0, signal.SIGINT),
                    (patience, signal.SIGTERM),
                    (patience + _TERM_TIMEOUT_S, signal.SIGKILL),
                )
                sent = steps.get(child.process.pid, 0)
                if sent < len(schedule) and waited >= schedule[sent][0]:
                    if sent > 0:
                        self._report(f"{child.spec.full_name} did not end; sending {schedule[sent][1].name}")
                    child.process.send_signal(schedule[sent][1])
                    steps[child.process.pid] = sent + 1
            time.sleep(_POLL_S)

    # Helpers -----------------------------------------------------------------------------------------

    def _prepare(self, spec: NodeSpec, directory: Path) -> _Child:
        file_name = spec.full_name.strip("/").replace("/", ".")
        parameters = directory / "parameters" / f"{file_name}.yaml"
        parameters.write_text(parameter_file(spec), encoding="utf-8")
        command = [
            *executable(spec),
            "--ros-args",
            "-r",
            f"__node:={spec.name}",
            "-r",
            f"__ns:={spec.namespace}",
        ]
        for source, target in spec.remappings:
            command += ["-r", f"{source}:={target}"]
        command += ["--params-file", str(parameters)]
        return _Child(spec, command, directory / "log" / f"{file_name}.log")

    def _spawn(self, child: _Child) -> None:
        child.restart_at = None
        child.started = self._clock()
        child.starts += 1
        parent = os.getpid()
        with child.log_file.open("ab") as log:
            child.process = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which then ends all in order
                preexec_fn=lambda: _die_with_parent(parent),
            )

    def _ended(self, child: _Child, status: int, now: float) -> None:
        child.process, child.exit_status = None, status
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if not child.spec.respawn:
            self._report(f"{child.spec.full_name} {how}; it stays down (log: {child.log_file})")
            return
        child.failures = 1 if now - child.started >= _HEALTHY_AFTER_S else child.failures + 1
        delay = self._back_off_s[min(child.failures, len(self._back_off_s)) - 1]
        child.restart_at = now + delay
        self._report(
            f"{child.spec.full_name} {how}; starting it again in {delay:g} s (log: {child.log_file})"
        )


def executable(spec: NodeSpec) -> list[str]:
    """The command of a node: `<prefix>/lib/<package>/<executable>` of the first prefix in the ament index
    that has the package, else the same module run by this Python. Raises SupervisorError."""
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        if prefix and (Path(prefix) / "share/ament_index/resource_index/packages" / spec.package).exists():
            program = Path(prefix) / "lib" / spec.package / spec.executable
            if os.access(program, os.X_OK):
                return [str(program)]
            raise SupervisorError(
                f"{spec.full_name}: package {spec.package} in {prefix} has no executable {spec.executable}; "
                "build the workspace again"
            )
    return [sys.executable, "-m", spec.module]


def parameter_file(spec: NodeSpec) -> str:
    """The node's parameters as a ROS parameter file. Empty lists are left out: they have no type."""
    values = {key: value for key, value in spec.parameters.items() if value != [] and value != ()}
    content: dict[str, Any] = {spec.full_name: {"ros__parameters": values}}
    return yaml.safe_dump(content, sort_keys=False)


def stop_requested() -> Callable[[], bool]:
    """From now on SIGINT and SIGTERM only make the returned function true: for `Supervisor.run`."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda which, frame: received.append(which))
    return lambda: bool(received)


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


def _die_with_parent(parent: int) -> None:
    """In the child, before exec: the kernel kills it when the supervisor ends, even by kill -9. With SIGKILL,
    for a hung node ignores all else; what a recorder leaves behind then is salvaged as after any crash."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
