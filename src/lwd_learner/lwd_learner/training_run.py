# SPDX-License-Identifier: Apache-2.0
"""One phase of training (cloning, offline or online learning) that survives its process: the steps it has done and
the trainer's state lie in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lwd_learner.learner import Learner
from lwd_learner.selections import DEMONSTRATIONS
from lwd_learner.training_state import saved_states

Phase = Literal["bc", "offline", "online"]
PHASES: tuple[Phase, ...] = ("bc", "offline", "online")

_STATES = "state"


class TrainingRun:
    """Goes on from the newest saved state of the learner's run directory, or begins.

    `steps` counts from where the phase began, also over restarts. Raises ResumeRefused.
    """

    def __init__(self, learner: Learner, phase: Phase) -> None:
        self.learner, self.phase = learner, phase
        self._states = learner.run_dir / _STATES
        ranks = learner.trainer.ranks  # only the first one's host needs to have what was saved
        self.resumed = bool(ranks.newest(len(saved_states(self._states))))
        if self.resumed:
            learner.trainer.load(self._states)
        if phase != "bc" and learner.trainer.actor.reference is None:
            learner.trainer.freeze_reference()  # what was cloned, or came as a checkpoint, is what policies stay near
        now = learner.trainer.steps
        self._first = ranks.newest(
            _first_step(learner.run_dir / f"{phase}.json", now) if ranks.first else now
        )

    @property
    def steps(self) -> int:
        """Updates in this phase."""
        return self.learner.trainer.steps - self._first

    def train(
        self, steps: int, progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    ) -> None:
        """Do so many updates. Raises NonFiniteLoss, ReplayEmpty."""
        if self.phase == "bc":
            self.learner.clone(steps, DEMONSTRATIONS, progress)
        else:
            self.learner.learn(steps, progress)

    def save(self) -> Path:
        """Write the trainer's state."""
        return self.learner.trainer.save(self._states)


def _first_step(file: Path, now: int) -> int:
    """The trainer's step at which the phase began; noted when it does. A phase that began in a future that was lost
    with its state begins now."""
    if file.exists():
        first = int(json.loads(file.read_text(encoding="utf-8"))["first_step"])
        if first <= now:
            return first
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"first_step": now}) + "\n", encoding="utf-8")
    partial.replace(file)
    return now
