# SPDX-License-Identifier: Apache-2.0
"""A private ROS domain for a run, so that two runs on one machine never see, let alone move, each other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

# 102 and above collide with the ephemeral ports of Linux; 0 is everybody's default.
_FIRST, _LAST = 1, 101


def transport() -> dict[str, str]:
    """Environment of every node we start, on hardware too; what the user has set wins.

    Over Fast DDS shared memory the kill of one node stopped the arbiter and the driver beside it for 2.8 s; other
    middlewares ignore the variable.
    """
    return {"FASTDDS_BUILTIN_TRANSPORTS": os.environ.get("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")}


class NoFreeDomainError(Exception):
    """Every private domain is taken by a run on this machine."""


class PrivateDomain:
    """A domain no other run of this machine has, until `release` or the end of this process.

    `environment` is what nodes need to live in it: nobody beyond this machine can hear them.
    """

    def __init__(self) -> None:
        directory = Path(tempfile.gettempdir()) / f"lwd-domains-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        count = _LAST - _FIRST + 1
        for offset in range(count):  # start anywhere: runs of other users are not seen in our lock files
            number = _FIRST + (os.getpid() + offset) % count
            lock = (directory / str(number)).open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            self.number = number
            self._lock: IO[str] = lock
            return
        raise NoFreeDomainError(
            f"all {count} private ROS domains are in use; end another run (locks: {directory})"
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "ROS_DOMAIN_ID": str(self.number),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            **transport(),
        }

    def release(self) -> None:
        self._lock.close()

    def __enter__(self) -> PrivateDomain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
