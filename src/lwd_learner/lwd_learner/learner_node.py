# SPDX-License-Identifier: Apache-2.0
"""Runs the learner of a deployment in a thread and speaks ROS for it: `learner/status` and diagnostics."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lwd_msgs.msg import LearnerStatus
from rclpy.clock import Clock, ClockType

from lwd_fleet.data.store import open_store
from lwd_learner.learner import LearnerConfig
from lwd_learner.learner_worker import LearnerJob, LearnerView, LearnerWorker
from lwd_learner.online import OnlineConfig
from lwd_learner.qam import QamConfig
from lwd_learner.trainer import TrainerConfig
from lwd_policy.managed_node import (
    ERROR,
    OK,
    WARN,
    Check,
    ConfigurationError,
    ManagedNode,
    parameter,
    run_node,
)
from lwd_policy.qos import LATCHED

_PHASES = ("offline", "online")
_NICENESS = 10  # training can wait; the control loops of robots on the same machine cannot
_DEFAULT = TrainerConfig()
_HELD_OUT = LearnerConfig().held_out


@dataclass(frozen=True)
class LearnerParameters:
    """Parameters of the learner node; those of the trainer cannot be changed once there is a saved state."""

    store: str = parameter("", "directory or file:// URI of the store")
    catalog: str = parameter("", "path of an SQLite file or SQLAlchemy URL of the catalog")
    run_dir: str = parameter("", "directory of replay and training state; versions go to ../policies")
    policy: str = parameter("", "checkpoint directory to start from; empty: the catalog's active version")
    phase: str = parameter("online", "offline or online: how episodes that come in are treated")
    steps: int = parameter(0, "end training after so many; 0: never", low=0)
    publish_every: int = parameter(50, "steps between two policy versions", low=1)
    refit_every: int = parameter(0, "steps from one refit of the reference to the next; 0: none", low=0)
    refit_steps: int = parameter(1000, "cloning steps of a refit", low=1)
    min_transitions: int = parameter(200, "transitions in the replay before training begins", low=1)
    device: str = parameter("cpu", "cpu or cuda")
    batch: int = parameter(_DEFAULT.batch, "rows of a step", low=1, high=65536)
    policy_rows: int = parameter(0, "rows of the batch that the policy step uses; 0: all", low=0)
    policy_rate: float = parameter(_DEFAULT.policy_rate, "learning rate of the policy", low=0.0, high=1.0)
    critic_rate: float = parameter(
        _DEFAULT.critic_rate, "learning rate of critic and value", low=0.0, high=1.0
    )
    kl_budget: float = parameter(
        QamConfig().kl_budget, "distance from the reference policy", unit="nat per step", low=0.0, high=100.0
    )
    tau_ramp_steps: int = parameter(
        _DEFAULT.divl.tau_ramp_steps, "steps from the offline to the online quantile", low=1
    )
    held_out: float = parameter(_HELD_OUT, "share of episodes that only judge the critic", low=0.0, high=0.9)


class LearnerNode(ManagedNode):
    """A thin shell: `LearnerWorker` has the thread, `OnlineLearner` the work."""

    parameters_type = LearnerParameters

    def __init__(self) -> None:
        super().__init__("learner")
        self._worker: LearnerWorker | None = None
        self._job: LearnerJob | None = None
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)

    def configure(self) -> None:
        options: LearnerParameters = self.parameters
        if not (options.store and options.catalog and options.run_dir):
            raise ConfigurationError("parameters store, catalog and run_dir have to be given")
        if options.phase not in _PHASES:
            raise ConfigurationError(f"phase is {options.phase!r}; write {' or '.join(_PHASES)}")
        if options.policy and not Path(options.policy).is_dir():
            raise ConfigurationError(f"policy: {options.policy} is no checkpoint directory")
        try:
            open_store(options.store)
            Path(options.run_dir).mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as error:
            raise ConfigurationError(f"store or run_dir: {error}") from error
        self._job = learner_job(options)
        self._status = self.create_publisher(LearnerStatus, "learner/status", LATCHED)

    def activate(self) -> None:
        assert self._job is not None
        self._worker = LearnerWorker(self._job, self.get_logger().info)
        self._timer = self.create_timer(1.0, self._publish_status, clock=self._steady)

    def deactivate(self) -> None:
        if self._worker is not None:
            self.destroy_timer(self._timer)
            self._worker.close()
            self._publish_status()
            self._worker = None

    def cleanup(self) -> None:
        if self._job is not None:
            self._job = None
            self.destroy_publisher(self._status)

    def diagnose(self) -> list[Check]:
        if self._worker is None:
            return []
        view = self._worker.view
        level = ERROR if view.failure else WARN if view.problem else OK
        values = {
            "refused_episodes": view.refused,
            "transitions": view.transitions,
            "version": view.policy_version,
        }
        return [
            Check(
                "training", level, view.failure or view.problem or f"{view.phase}, step {view.step}", values
            )
        ]

    def _publish_status(self) -> None:
        assert self._worker is not None
        view: LearnerView = self._worker.view
        message = LearnerStatus(
            phase=view.phase,
            step=view.step,
            steps_planned=self.parameters.steps,
            snapshot=view.snapshot,
            transitions=view.transitions,
            policy_version=view.policy_version,
            metric_names=list(view.metrics),
            metric_values=list(view.metrics.values()),
        )
        message.header.stamp = self.get_clock().now().to_msg()
        self._status.publish(message)


def learner_job(options: LearnerParameters) -> LearnerJob:
    """The parameters as what the core understands."""
    trainer = replace(
        _DEFAULT,
        divl=replace(_DEFAULT.divl, tau_ramp_steps=options.tau_ramp_steps),
        extraction=replace(QamConfig(), kl_budget=options.kl_budget),
        batch=options.batch,
        policy_rows=options.policy_rows or None,
        policy_rate=options.policy_rate,
        critic_rate=options.critic_rate,
    )
    phase: Literal["offline", "online"] = "online" if options.phase == "online" else "offline"
    return LearnerJob(
        run_dir=Path(options.run_dir),
        store=options.store,
        catalog=options.catalog,
        policy=options.policy,
        device=options.device,
        learner=LearnerConfig(trainer, held_out=options.held_out),
        online=OnlineConfig(
            phase,
            options.steps,
            options.publish_every,
            options.min_transitions,
            refit_every=options.refit_every,
            refit_steps=options.refit_steps,
        ),
    )


def main(args: list[str] | None = None) -> int:
    os.nice(_NICENESS)
    return run_node(LearnerNode, args)


if __name__ == "__main__":
    sys.exit(main())
