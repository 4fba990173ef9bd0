# SPDX-License-Identifier: Apache-2.0
"""A thread beside the executor's: slow jobs are done there, their results are called back here."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

Job = tuple[Callable[[], Any], Callable[[Any], None], Callable[[Exception], None]]


class Worker:
    """One thread that does jobs in order.

    `wake` is called in that thread whenever there is something to `collect`; all other methods belong to the thread
    that made the worker, and so do the callbacks of the jobs.
    """

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._finished: deque[Callable[[], None]] = deque()
        self._pending = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a job waits, runs or has a result that was not collected."""
        return self._pending > 0

    def submit(
        self, job: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]
    ) -> None:
        """Do `job` in the worker; `done(result)` or `failed(error)` is called by `collect`."""
        self._pending += 1
        self._jobs.put((job, done, failed))

    def collect(self) -> None:
        """Call back for all jobs that have finished."""
        while self._finished:
            callback = self._finished.popleft()
            self._pending -= 1
            callback()

    def stop(self) -> None:
        """End after the job under way; what waits is not begun. A thread that still ran while the ROS context ends
        would abort the process."""
        self._stopping = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while (entry := self._jobs.get()) is not None and not self._stopping:
            job, done, failed = entry
            try:
                result = job()
            except Exception as error:  # noqa: BLE001 - whatever it was is handed to `failed`; the robot's node lives on
                self._finished.append(_bind(failed, error))
            else:
                self._finished.append(_bind(done, result))
            self._wake()


def _bind(callback: Callable[[Any], None], value: Any) -> Callable[[], None]:
    return lambda: callback(value)
