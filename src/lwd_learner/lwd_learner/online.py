# SPDX-License-Identifier: Apache-2.0
"""The learner of a running deployment: takes in what the fleet commits, trains, and publishes, for ever. ROS-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lwd_learner.learner import Ingested, Learner
from lwd_learner.training_run import TrainingRun

_INGEST_EPISODES = 8  # of one round, so that a long backlog does not hold up training or a stop
_METRIC_STEPS = 50  # the running means are over so many


@dataclass(frozen=True)
class OnlineConfig:
    """When to train and when to publish."""

    phase: Literal["offline", "online"] = "online"  # how the episodes that come in are treated
    steps: int = 0  # of the phase; 0: endless
    publish_every: int = 50  # steps between two policy versions
    min_transitions: int = 200  # in the replay before training begins
    slice_steps: int = 5  # steps of one round; a stop waits for at most one round
    refit_every: int = 0  # steps from one refit of the reference to the next (`Learner.refit`); 0: none
    refit_steps: int = 1000  # of one refit, all in one round


class OnlineLearner:
    """`run_once` is one round of ingest, train, publish; who calls it decides about pauses and the end."""

    def __init__(self, learner: Learner, config: OnlineConfig | None = None) -> None:
        """Continues from the saved state. Raises ResumeRefused."""
        self.config = config or OnlineConfig()
        self.learner = learner
        self.run = TrainingRun(learner, self.config.phase, self.config.steps or None)
        self.ingested = Ingested()  # of the last round
        self.news = ""  # of the last round: what became of the policy, for people; empty: it was not its time
        saved = self.run.restored
        self._recent: deque[dict[str, float]] = deque(saved.get("recent", ()), maxlen=_METRIC_STEPS)
        self._published: int = saved.get("published", self.run.steps)  # or found unchanged
        self._refitted: int = saved.get("refitted", self.run.steps)
        self._saved = self.run.steps

    @property
    def finished(self) -> bool:
        """Whether all steps are done; episodes are still taken in."""
        return 0 < self.config.steps <= self.run.steps

    @property
    def phase(self) -> str:
        """What it does, in the words of LearnerStatus."""
        if self.finished:
            return "idle"
        return self.config.phase if self._enough else "ingest"

    @property
    def metrics(self) -> dict[str, float]:
        """Running means of the training metrics."""
        names = dict.fromkeys(name for metrics in self._recent for name in metrics)
        columns = {name: [one[name] for one in self._recent if name in one] for name in names}
        return {name: sum(values) / len(values) for name, values in columns.items()}

    @property
    def _enough(self) -> bool:
        return len(self.learner.replay) >= max(1, self.config.min_transitions)

    @property
    def _due(self) -> bool:
        """Whether it is time to publish."""
        return self.run.steps - self._published >= self.config.publish_every

    def run_once(self, look: Callable[[OnlineLearner], None] = lambda learner: None) -> bool:
        """One round; False if there was nothing to do but wait. `look` is called after every step.

        Raises NonFiniteLoss (then nothing of that step is in the policy), OSError and SQLAlchemyError while the
        store or the catalog is away (the next round goes on where this one was).
        """
        self.news = ""
        self.ingested = self.learner.ingest(self.config.phase, limit=_INGEST_EPISODES)
        look(self)
        busy = bool(self.ingested.episodes or self.ingested.refused)
        if not self.finished and self._enough:
            self._train(look)
            busy = True
        if self._due or (self.finished and self.run.steps > self._published):
            self.publish()
        return busy

    def publish(self) -> int:
        """Save the state, and make the present policy the version that the fleet should run. A policy that did not
        change stays the version it is: a new number would make every robot load what it runs."""
        self.save()
        before = self.learner.version
        version = self.learner.publish(self.metrics)
        self.news = (
            f"published version {version}"
            if version != before
            else f"policy unchanged, still version {version}"
        )
        self._published = self.run.steps
        return version

    def save(self) -> None:
        """Save the state if there is anything new in it."""
        if self.run.steps != self._saved:
            self.run.save(
                {"recent": list(self._recent), "published": self._published, "refitted": self._refitted}
            )
            self._saved = self.run.steps

    def _train(self, look: Callable[[OnlineLearner], None]) -> None:
        left = [self.config.slice_steps, self._published + self.config.publish_every - self.run.steps]
        if self.config.steps:
            left.append(self.config.steps - self.run.steps)

        def progress(step: int, metrics: dict[str, float]) -> None:
            self._recent.append(metrics)
            look(self)

        # A run that was killed after it saved, and before it published, publishes before it goes on.
        if 0 < self.config.refit_every <= self.run.steps - self._refitted and not self._due:
            self.learner.refit(self.config.refit_steps, progress)
            self._refitted = self.run.steps
        else:
            self.run.train(max(0, min(left)), progress)
