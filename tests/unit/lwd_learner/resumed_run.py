# SPDX-License-Identifier: Apache-2.0
"""The process that test_resume.py kills: an online learner to whom episodes come at certain steps. Goes on wherever the
one before was killed; writes what each step said, as it was said, to `steps.jsonl`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from small_run import SmallRun

from lwd_learner import learner as learner_module
from lwd_learner import training_state
from lwd_learner.gate import CriticCheck
from lwd_learner.learner import Ingested, Learner, LearnerConfig
from lwd_learner.loss_mix import LossMixConfig
from lwd_learner.online import OnlineConfig, OnlineLearner
from lwd_learner.selections import DEMONSTRATIONS
from lwd_learner.trainer import TrainerConfig

STEPS = 44
ARRIVALS = {
    0: 3,
    9: 4,
    24: 6,
}  # the trainer's step from which on so many episodes are committed; between two saves
ONLINE = OnlineConfig(
    steps=STEPS, publish_every=6, min_transitions=1, slice_steps=3, refit_every=16, refit_steps=4
)


def main(root: Path, slow_save_s: float) -> None:
    run = SmallRun(root)
    trainer = TrainerConfig(batch=16, policy_rows=4)
    config = LearnerConfig(trainer, held_out=0.3, check_every=7, loss_mix=LossMixConfig(window=8))
    learner = Learner(root / "learner", run.catalog, run.store, run.policy(), config)
    arrange(learner, slow_save_s)
    online = OnlineLearner(learner, ONLINE)
    with open(root / "steps.jsonl", "a", encoding="utf-8") as log:

        def look(one: OnlineLearner) -> None:
            if one.run.steps > before[0]:
                before[0] = one.run.steps
                said = {name: value.hex() for name, value in one._recent[-1].items()}
                log.write(json.dumps({"step": one.run.steps, "said": said}) + "\n")
                log.flush()

        before = [online.run.steps]
        while not online.finished:
            online.run_once(look)
    online.save()
    learner.close()


def arrange(learner: Learner, slow_save_s: float) -> None:
    """Episodes come in at their steps, the policy follows the critic whatever it knows, demonstrations count as what
    succeeded in deployment, and a save takes its time between two files."""
    ingest = learner.ingest

    def due(source, progress=None, limit=None):  # type: ignore[no-untyped-def]
        wanted = max(count for step, count in ARRIVALS.items() if step <= learner.trainer.steps)
        result = Ingested()
        while learner.snapshot < wanted:
            result = ingest("offline" if learner.snapshot < 2 else "online", limit=1)
        return result

    def sync(path: Path) -> None:
        plain(path)
        time.sleep(slow_save_s)

    plain = training_state._sync
    learner.ingest = due  # type: ignore[method-assign]
    training_state._sync = sync
    learner_module.DEPLOYED = DEMONSTRATIONS
    CriticCheck.knows_something = property(lambda check: True)  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
