# SPDX-License-Identifier: Apache-2.0
"""Training as curves and histograms for TensorBoard, which is installed beside this project by whoever looks at them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import histogram, histogram_raw, scalar

from lwd_learner import divl
from lwd_learner.batch import Batch
from lwd_learner.divl import Support
from lwd_learner.trainer import Trainer

EVERY = 10  # steps that a point of a curve is the mean of
LOOK_EVERY = 200  # steps between two looks at distributions; each costs about one step without a policy
_BINS = 10  # of predicted values, to be compared with outcomes


class TrainingLog:
    """Event files in one directory. Before `begin`, nothing is asked for and nothing is written.

    Events are written by the caller's thread: the library's `SummaryWriter` hands them to one of its own, for which its
    `flush` does not wait, and the last point before a saved state was lost to a kill.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._begun = False
        self._writer: EventsWriter | None = None
        self._sums: dict[str, list[float]] = {}  # of each metric since the last point: sum, steps

    def begin(self, step: int, writes: bool = True) -> None:
        """Write from now on, after so many steps of the trainer. What a process before wrote of later steps, and lost
        with its state, is taken back: TensorBoard leaves it out. writes: False on all ranks but the first; they take part
        in looking."""
        self.close()
        self._begun = True
        if writes:
            self._directory.mkdir(parents=True, exist_ok=True)
            suffix = f".{time.time_ns()}"  # the rest of the name has seconds, and would be taken twice
            self._writer = EventsWriter(str(self._directory / "events"), suffix)
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the step that was the trainer's `step`-th. Their means become points of curves."""
        if not self._begun:
            return
        for name, value in metrics.items():
            if isfinite(value):
                sums = self._sums.setdefault(name, [0.0, 0.0])
                sums[0] += value
                sums[1] += 1.0
        if step % EVERY == 0:
            means = {name: total / count for name, (total, count) in self._sums.items()}
            self._sums.clear()
            self.scalars(step, means)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves, as they are."""
        if self._writer is not None:
            for name, value in values.items():
                if isfinite(value):
                    self._write(Event(step=step, summary=scalar(name, value)))

    def histogram(self, step: int, name: str, values: NDArray[Any]) -> None:
        """Of any numbers; those that are not finite are left out."""
        finite = values[np.isfinite(values)]
        if self._writer is not None and len(finite):
            self._write(Event(step=step, summary=histogram(name, finite, bins="auto")))

    def law(self, step: int, name: str, masses: NDArray[Any], support: Support) -> None:
        """A distribution over atoms, [C] masses, as the histogram it is."""
        if self._writer is None or not np.isfinite(masses).all():
            return
        atoms = support.atoms().double().numpy()
        edges = atoms + 0.5 * support.spacing
        masses_of = histogram_raw(
            name,
            min=float(edges[0] - support.spacing),
            max=float(edges[-1]),
            num=float(masses.sum()),
            sum=float(masses @ atoms),
            sum_squares=float(masses @ atoms**2),
            bucket_limits=edges.tolist(),
            bucket_counts=masses.tolist(),
        )
        self._write(Event(step=step, summary=masses_of))

    def look(self, trainer: Trainer, batch: Batch) -> None:
        """The distributions of V, tau and entropy at a batch's next states, of Q at its actions, and what Q expects of
        the policy and of the reference in its states. Disturbs nothing."""
        if not self._begun:
            return
        step, values, config = trainer.steps, trainer.values, trainer.config.divl
        batch = batch.to(trainer.device)
        with torch.no_grad():
            output = values.value(values.next_state(batch))
            read = divl.bootstrap(output, config.tau_base(trainer.online_steps), config)
        if config.value == "categorical":
            law = torch.softmax(output, dim=-1).double().mean(dim=0)
            self.law(step, "value/law", law.cpu().numpy(), config.support)
            self.histogram(step, "value/tau", read.tau.cpu().numpy())
            self.histogram(step, "value/entropy", read.entropy.cpu().numpy())
        self.histogram(step, "value/next", read.value.cpu().numpy())
        self.histogram(step, "critic/q", trainer.judge(batch).numpy())
        if trainer.actor.reference is not None:
            self.scalars(step, {f"policy/{name}": value for name, value in trainer.diagnose(batch).items()})

    def judge(self, step: int, q: NDArray[Any], outcome: NDArray[Any]) -> None:
        """What the critic says of held-out transitions, [N], against what became of them."""
        self.histogram(step, "held_out/q_minus_outcome", q - outcome)
        self.scalars(step, {f"held_out/{name}": value for name, value in calibration(q, outcome).items()})

    def flush(self) -> None:
        """Put all on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Put all on the disk, and write no more."""
        self._begun = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, event: Event) -> None:
        if self._writer is not None:
            event.wall_time = time.time()
            self._writer.write_event(event)

    @property
    def state(self) -> dict[str, list[float]]:
        """What must be saved so that a resumed run has the same curves."""
        return {name: list(sums) for name, sums in self._sums.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from a saved `state`."""
        self._sums = {name: list(sums) for name, sums in state.items()}


def calibration(q: NDArray[Any], outcome: NDArray[Any]) -> dict[str, float]:
    """How predicted values [N] agree with discounted outcomes [N]: mean error, mean absolute error, and the expected
    calibration error, which is the mean over all of |mean q - mean outcome| in their bin of q, bins equally full."""
    order = np.argsort(q, kind="stable")
    bins = [part for part in np.array_split(order, _BINS) if len(part)]
    gap = sum(len(part) * abs(q[part].mean() - outcome[part].mean()) for part in bins) / max(len(q), 1)
    error = q - outcome
    return {
        "bias": float(error.mean()),
        "absolute_error": float(np.abs(error).mean()),
        "calibration_error": float(gap),
    }
