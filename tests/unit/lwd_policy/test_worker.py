# SPDX-License-Identifier: Apache-2.0
"""The thread that infers and loads: order, errors, and an end that does not wait for what was not begun."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lwd_policy.worker import Worker


class Waker:
    """Counts results that can be collected."""

    def __init__(self) -> None:
        self.ready = threading.Semaphore(0)

    def __call__(self) -> None:
        self.ready.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.ready.acquire(timeout=30)


def boom() -> Any:
    raise ValueError("no")


def test_results_and_errors_come_back_in_order_in_the_thread_that_collects() -> None:
    waker, heard = Waker(), []
    worker = Worker("test", waker)
    threads = set()

    def done(value: Any) -> None:
        heard.append(value)
        threads.add(threading.current_thread())

    worker.submit(lambda: threading.current_thread().name, done, done)
    worker.submit(boom, done, lambda error: done(str(error)))
    worker.submit(lambda: 3, done, done)
    waker.wait(3)
    assert worker.busy and heard == []
    worker.collect()
    assert heard == ["test", "no", 3] and not worker.busy
    assert threads == {threading.current_thread()}
    worker.stop()


def test_the_end_waits_for_the_job_under_way_and_begins_no_other() -> None:
    began, may_end, ran = threading.Event(), threading.Event(), []
    worker = Worker("test", lambda: None)

    def first() -> None:
        began.set()
        may_end.wait(30)
        ran.append(1)

    worker.submit(first, lambda _: None, lambda _: None)
    worker.submit(lambda: ran.append(2), lambda _: None, lambda _: None)
    assert began.wait(30)
    threading.Timer(0.05, may_end.set).start()
    worker.stop()
    assert ran == [1]


def test_a_callback_may_submit_the_next_job() -> None:
    waker, heard = Waker(), []
    worker = Worker("test", waker)
    worker.submit(lambda: 1, lambda _: worker.submit(lambda: 2, heard.append, pytest.fail), pytest.fail)
    waker.wait(1)
    worker.collect()
    assert worker.busy
    waker.wait(1)
    worker.collect()
    assert heard == [2]
    worker.stop()
