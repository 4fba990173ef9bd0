# SPDX-License-Identifier: Apache-2.0
"""One phase of training (cloning, offline or online learning) that survives its process: all that decides its next
update lies in the run directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lwd_learner.learner import Learner
from lwd_learner.selections import DEMONSTRATIONS
from lwd_learner.training_state import saved_states
from lwd_policy import checkpoint

Phase = Literal["bc", "offline", "online"]
PHASES: tuple[Phase, ...] = ("bc", "offline", "online")

_STATES, _START = "state", "start"


class TrainingRun:
    """Goes on from the newest saved state of the learner's run directory, or begins; a phase begins by saving one, so
    that every update has a state to be repeated from.

    `steps` counts from where the phase began, also over restarts. Raises ResumeRefused.
    """

    def __init__(self, learner: Learner, phase: Phase, planned: int | None = None) -> None:
        """planned: updates of the phase, if it has an end; learning rates may fall towards it."""
        self.learner, self.phase, self.planned = learner, phase, planned
        self._states = learner.run_dir / _STATES
        self.restored: Mapping[str, Any] = {}  # what was saved with the state in the same phase
        ranks = learner.ranks  # only the first one's host needs to have what was saved
        self.resumed = bool(ranks.newest(len(saved_states(self._states))))
        if self.resumed and learner.trainer.steps == 0:
            saved = learner.trainer.load(self._states)
            learner.resume(saved["learner"])
            self.restored = saved["run"] if phase in learner.phases else {}
        elif not self.resumed:
            if ranks.first:
                _keep_start(learner)
            learner.begin_run()
        if phase != "bc" and learner.trainer.actor.reference is None:
            learner.trainer.freeze_reference()  # what was cloned, or came as a checkpoint, is what policies stay near
        learner.trainer.planned = planned
        if phase not in learner.phases:
            learner.phases[phase] = learner.trainer.steps
            learner.trainer.begin_phase()
            self.save()

    @property
    def steps(self) -> int:
        """Updates in this phase."""
        return self.learner.trainer.steps - self.learner.phases[self.phase]

    def train(
        self, steps: int, progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    ) -> None:
        """Do so many updates. Raises NonFiniteLoss, ReplayEmpty."""
        if self.phase == "bc":
            planned = self.planned or self.steps + steps
            self.learner.clone(steps, DEMONSTRATIONS, progress, done=self.steps, planned=planned)
        else:
            self.learner.learn(steps, progress)

    def save(self, run: Mapping[str, Any] | None = None) -> Path:
        """Write a state from which the run goes on bit for bit. run: what is to be found in `restored`."""
        self.learner.log.flush()
        beside = {"learner": self.learner.state, "run": dict(run or {})}
        return self.learner.trainer.save(self._states, beside)


def starting_policy(run_dir: Path) -> Path | None:
    """The checkpoint that the run in this directory began with; None if there is none to be resumed. Its trunk and its
    normalisation of actions are those of the run, whatever was recorded and published since."""
    if not saved_states(run_dir / _STATES):
        return None
    return next((path for path in (run_dir / _START).glob("[!.]*")), None)


def _keep_start(learner: Learner) -> None:
    folder = learner.run_dir / _START
    shutil.rmtree(folder, ignore_errors=True)  # of a run whose states were removed
    checkpoint.save(folder, learner.policy)
