# SPDX-License-Identifier: Apache-2.0
"""When episodes came in, in steps of the trainer: a run that resumes must draw from what it could draw from then.

A learner that dies loses the steps after its last saved state, but not the episodes that came in meanwhile. If the
resumed run drew from them at once, its steps would not be those that were lost. So every time episodes come in, a line is
written first: from these places of the ledgers on, episodes count from this step of the trainer on.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from lwd_fleet.data.files import sync_directory


class Arrival(NamedTuple):
    """Episodes from these places of the ledgers on count from this step on."""

    step: int  # of the trainer
    replay: int  # `Replay.stored` before
    held_out: int  # the same of the held-out episodes


class IngestJournal:
    """A file of one JSON array per arrival, in the order of steps and places. Its lines are synced before the episodes
    they speak of are stored; a last line that a crash tore speaks of none and is cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._arrivals: list[Arrival] = []
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self._arrivals = [Arrival(*json.loads(line)) for line in whole.splitlines()]

    def note(self, arrival: Arrival) -> None:
        """Write down durably that episodes are about to come in. While a resumed run repeats steps that were lost, new
        episodes count from where the newest old ones do, so that they change none of these steps."""
        if self._arrivals and arrival.step <= self._arrivals[-1].step:
            return
        with self._path.open("ab") as file:
            file.write(json.dumps(arrival).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not self._arrivals:
            sync_directory(self._path.parent)  # the file may be new
        self._arrivals.append(arrival)

    def after(self, step: int) -> Arrival | None:
        """The first arrival after this step: at this step, only what lies before its places counts. None: all does."""
        place = bisect_right(self._arrivals, step, key=lambda arrival: arrival.step)
        return self._arrivals[place] if place < len(self._arrivals) else None

    def clear(self) -> None:
        """For a run that begins: it begins with all that is there."""
        if self._path.exists():
            self._path.unlink()
            sync_directory(self._path.parent)
        self._arrivals.clear()

    def forget_unless_stored(self, replay: int, held_out: int) -> None:
        """Forget all if it speaks of more episodes than these, or if there are none: those were moved away."""
        newest = self._arrivals[-1] if self._arrivals else Arrival(0, 0, 0)
        if newest.replay > replay or newest.held_out > held_out or replay + held_out == 0:
            self.clear()
