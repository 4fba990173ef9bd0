# SPDX-License-Identifier: Apache-2.0
"""Who does what next, and which policy version each robot is to run: the decisions, without ROS.

Every robot is served for itself and every wait ends: whatever one robot does, or does not, the others go on.
Times are seconds of any one steady clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EVALUATION_SEEDS = range(1_000_000)
"""Scenes that evaluations may use; the fleet never collects experience in them."""

FIRST_SEED = EVALUATION_SEEDS.stop

_RETRY_S = (2.0, 4.0, 8.0, 16.0, 30.0)


@dataclass(frozen=True)
class Desired:
    """The policy version the robots are to run."""

    version: int
    uri: str
    digest: str


@dataclass(frozen=True)
class Goal:
    """One episode to run."""

    task: str
    seed: int


@dataclass(frozen=True)
class CoordinatorTiming:
    """Bounds of all waits."""

    update_timeout_s: float = 10.0  # a robot that takes longer to take the parameters is asked again
    silence_s: float = 30.0  # a robot that tells nothing of its episode for so long is given up
    policy_silence_s: float = 3.0  # a policy node that says so long not that it is active may be dead


@dataclass
class RobotView:
    """What is known of one robot. Read only outside this module."""

    name: str
    tasks: tuple[str, ...]
    desired_digest: str = ""  # as the robot says
    active_version: int = -1
    refused: tuple[int, str] = (-1, "")  # version and reason
    policy_heard_s: float = -math.inf  # when the policy node last said that it is active
    goal: Goal | None = None  # assigned, or to be assigned next
    goal_since_s: float | None = None  # when it was sent; None: not sent
    heard_s: float = 0.0  # last sign of life while a goal is out
    started: int = 0  # episodes begun, for the turn of the tasks
    episodes: int = 0  # finished since start
    successes: int = 0
    goal_failures: int = 0  # in a row
    goal_retry_s: float = 0.0
    update_since_s: float | None = None
    update_failures: int = 0
    update_retry_s: float = 0.0
    note: str = ""  # what a person should know; empty: nothing

    @property
    def running(self) -> bool:
        return self.goal_since_s is not None


class Coordinator:
    """Tell it what is seen; do what `updates_due`, `goals_due` and `given_up` return; report how that ended.

    `tasks`: robot -> its tasks, taken in turn. `episodes_per_robot`: 0 for no end.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[str]],
        episodes_per_robot: int = 0,
        first_seed: int = FIRST_SEED,
        timing: CoordinatorTiming | None = None,
    ) -> None:
        if first_seed in EVALUATION_SEEDS:
            raise ValueError(
                f"first_seed {first_seed} is kept for evaluations; use {EVALUATION_SEEDS.stop} or more"
            )
        idle = [name for name, own in tasks.items() if not own]
        if idle:
            raise ValueError(f"no task for {', '.join(idle)}")
        self.robots = {name: RobotView(name, tuple(own)) for name, own in tasks.items()}
        self.desired: Desired | None = None
        self.committed = 0
        self._episodes_per_robot = episodes_per_robot
        self._first_seed = first_seed
        self._next_seed: int | None = None  # known once the catalog has answered
        self._timing = timing or CoordinatorTiming()

    @property
    def finished(self) -> bool:
        """Whether every robot has run all its episodes."""
        return self._episodes_per_robot > 0 and all(
            robot.episodes >= self._episodes_per_robot for robot in self.robots.values()
        )

    # What is seen ------------------------------------------------------------------------------------

    def catalog(self, desired: Desired | None, committed: int) -> None:
        """The catalog's desired policy and newest sequence number. The first one also says where the seeds go
        on: a coordinator that was started again does not collect in the same scenes once more."""
        if self._next_seed is None:
            self._next_seed = self._first_seed + committed
        if desired != self.desired:
            for robot in self.robots.values():
                robot.update_failures, robot.update_retry_s = 0, 0.0
        self.desired, self.committed = desired, committed

    def policy_status(
        self, name: str, desired_digest: str, active_version: int, refused: tuple[int, str] = (-1, "")
    ) -> None:
        """What the robot's policy node says it was told and runs; `refused`: version and reason."""
        robot = self.robots[name]
        robot.desired_digest, robot.active_version, robot.refused = desired_digest, active_version, refused

    def policy_heard(self, name: str, now_s: float) -> None:
        """The robot's policy node lives and is active. (Its status is latched: it outlives the node.)"""
        self.robots[name].policy_heard_s = now_s

    def heard(self, name: str, now_s: float) -> None:
        """A sign of life of the robot's episode."""
        self.robots[name].heard_s = now_s

    # What to do --------------------------------------------------------------------------------------

    def updates_due(self, now_s: float) -> list[tuple[str, Desired]]:
        """Robots that have to be told the desired version now; report what was sent with `update_sent`."""
        if self.desired is None:
            return []
        due = []
        for robot in self.robots.values():
            if (
                robot.update_since_s is not None
                and now_s - robot.update_since_s > self._timing.update_timeout_s
            ):
                self.update_ended(robot.name, f"no answer in {self._timing.update_timeout_s:g} s", now_s)
            told = robot.desired_digest == self.desired.digest
            if not told and robot.update_since_s is None and now_s >= robot.update_retry_s:
                due.append((robot.name, self.desired))
        return due

    def update_sent(self, name: str, now_s: float) -> None:
        """The parameters are on their way."""
        self.robots[name].update_since_s = now_s

    def update_ended(self, name: str, error: str, now_s: float) -> None:
        """The robot took the parameters (`error` empty) or not. Its status has the last word: until that
        shows the version, it is told again."""
        robot = self.robots[name]
        robot.update_since_s = None
        robot.update_retry_s = now_s + _RETRY_S[min(robot.update_failures, len(_RETRY_S) - 1)]
        robot.update_failures = robot.update_failures + 1 if error else 0
        robot.note = f"policy update failed: {error}" if error else ""

    def goals_due(self, now_s: float) -> list[tuple[str, Goal]]:
        """Episodes to start now, on robots that run a policy and are free; report with `goal_sent`."""
        if self._next_seed is None:
            return []
        due = []
        for robot in self.robots.values():
            done = 0 < self._episodes_per_robot <= robot.episodes
            if robot.running or done or now_s < robot.goal_retry_s or not self._has_policy(robot, now_s):
                continue
            if robot.goal is None:
                robot.goal = Goal(robot.tasks[robot.started % len(robot.tasks)], self._next_seed)
                robot.started += 1
                self._next_seed += 1
            due.append((robot.name, robot.goal))
        return due

    def goal_sent(self, name: str, now_s: float) -> None:
        """The goal is on its way."""
        self.robots[name].goal_since_s = self.robots[name].heard_s = now_s

    def goal_refused(self, name: str, why: str, now_s: float) -> None:
        """The robot did not take the goal: it is busy or not ready. The same goal is offered again later."""
        self._goal_failed(self.robots[name], f"does not take an episode: {why}", now_s)

    def goal_ended(self, name: str, recorded: bool, success: bool, message: str, now_s: float) -> None:
        """The episode ended; `recorded`: sealed, whatever the outcome."""
        robot = self.robots[name]
        robot.goal = None
        if not recorded:
            self._goal_failed(robot, f"the episode failed: {message}", now_s)
            return
        robot.goal_since_s, robot.goal_failures, robot.note = None, 0, ""
        robot.episodes += 1
        robot.successes += success

    def given_up(self, now_s: float) -> list[str]:
        """Robots whose episode is given up now because nothing was heard of them."""
        silent = [
            robot
            for robot in self.robots.values()
            if robot.running and now_s - robot.heard_s > self._timing.silence_s
        ]
        for robot in silent:
            robot.goal = None
            self._goal_failed(
                robot, f"silent for {self._timing.silence_s:g} s; its episode is given up", now_s
            )
        return [robot.name for robot in silent]

    def _has_policy(self, robot: RobotView, now_s: float) -> bool:
        return robot.active_version >= 0 and now_s - robot.policy_heard_s <= self._timing.policy_silence_s

    def _goal_failed(self, robot: RobotView, note: str, now_s: float) -> None:
        robot.goal_since_s = None
        robot.goal_retry_s = now_s + _RETRY_S[min(robot.goal_failures, len(_RETRY_S) - 1)]
        robot.goal_failures += 1
        robot.note = note
