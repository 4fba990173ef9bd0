# SPDX-License-Identifier: Apache-2.0
"""The thread that owns the learner of a deployment, as seen by the node: it is looked at, and it is ended. ROS-free."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from sqlalchemy.exc import SQLAlchemyError

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.data.store import open_store
from lwd_learner.column import ColumnTooShort
from lwd_learner.descent import NonFiniteLoss
from lwd_learner.learner import Learner, LearnerConfig, load_policy
from lwd_learner.online import OnlineConfig, OnlineLearner
from lwd_learner.replay import ReplayLocked, ReplayMismatch, ReplayMissing
from lwd_learner.training_run import starting_policy
from lwd_learner.training_state import ResumeRefused
from lwd_policy.checkpoint import CheckpointRefused
from lwd_policy.flow_policy import FlowPolicy

_PAUSE_S = 1.0  # while there is nothing to do, or the store or the catalog is away
_FATAL = (
    NonFiniteLoss,
    ResumeRefused,
    ReplayLocked,
    ReplayMismatch,
    ReplayMissing,
    ColumnTooShort,
    CheckpointRefused,
)


@dataclass(frozen=True)
class LearnerJob:
    """Where the data are and what is trained. `policy`: checkpoint to start from; empty: what the run in `run_dir` began
    with, or the active version if it begins now."""

    run_dir: Path
    store: str
    catalog: str
    policy: str = ""
    device: str = "cpu"
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)


@dataclass(frozen=True)
class LearnerView:
    """The learner as it was after its last step. `failure` is final, `problem` may pass."""

    phase: str = "idle"
    step: int = 0
    snapshot: int = 0
    transitions: int = 0
    policy_version: int = -1
    refused: int = 0  # episodes that could not be used
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    failure: str = ""


class LearnerWorker:
    """`view` is replaced as a whole, so that no reader sees half of it. `say` is called from the thread."""

    def __init__(self, job: LearnerJob, say: Callable[[str], None] = lambda text: None) -> None:
        self.view = LearnerView()
        self._job, self._say = job, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="learner")
        self._thread.start()

    def close(self) -> None:
        """Stop after the step in progress, save the state, and wait for that."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)  # the rest of the machine belongs to robots and headless workers
        try:
            while not self._stop.is_set():
                try:
                    with Catalog(self._job.catalog) as catalog:
                        self._work(catalog)
                except (OSError, SQLAlchemyError) as error:
                    self._pause(f"{type(error).__name__}: {error}")
        except _FATAL as error:
            self._fail(f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - a thread that ends without a word looks like one that waits
            self._say(traceback.format_exc())
            self._fail(f"{type(error).__name__}: {error}")

    def _work(self, catalog: Catalog) -> None:
        policy = self._policy(catalog)
        if policy is None:
            return
        job = self._job
        store = open_store(job.store)
        learner = Learner(job.run_dir, catalog, store, policy, job.learner, job.device)
        try:
            online = OnlineLearner(learner, job.online)
            self._say(f"{'continues' if online.run.resumed else 'begins'} at step {online.run.steps}")
            while not self._stop.is_set():
                self._round(online)
            online.save()
        finally:
            learner.close()

    def _round(self, online: OnlineLearner) -> None:
        try:
            busy = online.run_once(self._look)
        except (OSError, SQLAlchemyError) as error:
            self._pause(f"{type(error).__name__}: {error}")
            return
        refused = online.ingested.refused
        for text in refused:
            self._say(f"not used: {text}")
        self.view = replace(self.view, problem="", refused=self.view.refused + len(refused))
        self._look(online)
        if online.news:
            self._say(f"{online.news} at step {online.run.steps}")
        if not busy:
            self._stop.wait(_PAUSE_S)

    def _policy(self, catalog: Catalog) -> FlowPolicy | None:
        """What to start from, as soon as there is one; None if the end comes first."""
        if self._job.policy:
            return load_policy(Path(self._job.policy), self._job.device)
        begun = starting_policy(self._job.run_dir)
        if begun is not None:
            return load_policy(begun, self._job.device)
        while not self._stop.is_set():
            row = catalog.desired_policy()
            if row is not None:
                return load_policy(Path(row.uri.removeprefix("file://")), self._job.device)
            self._pause("waits for a first policy: none is active in the catalog, and `policy` names none")
        return None

    def _look(self, online: OnlineLearner) -> None:
        learner = online.learner
        self.view = replace(
            self.view,
            phase=online.phase,
            step=online.run.steps,
            snapshot=learner.snapshot,
            transitions=len(learner.replay),
            policy_version=learner.version,
            metrics=online.metrics,
        )

    def _pause(self, problem: str) -> None:
        if problem != self.view.problem:
            self._say(problem)
        self.view = replace(self.view, problem=problem)
        self._stop.wait(_PAUSE_S)

    def _fail(self, failure: str) -> None:
        self._say(f"training has ended: {failure}; the last published version stays")
        self.view = replace(self.view, phase="idle", failure=failure)
