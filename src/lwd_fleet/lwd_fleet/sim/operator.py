# SPDX-License-Identifier: Apache-2.0
"""A simulated operator with a person's limits: watches a few robots, notices late, helps one at a time, not for long.

They look at the truth, as a person beside the robot does, and drive with the hands of the scripted expert. What they do is
recorded as a human's steps. Their decisions depend on all robots that they watch, so with an operator an episode is no
longer decided by its own seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lwd_fleet.sim.experts import STEP_S, Expert
from lwd_fleet.sim.world import World


@dataclass(frozen=True)
class OperatorLimits:
    """What one operator can do."""

    robots: int = 4  # that one operator watches
    reaction_s: tuple[float, float] = (0.5, 1.5)  # between seeing trouble and driving, uniform
    patience: float = 0.8  # of a sub-step's share of the time limit, without progress: then it is trouble
    longest_s: float = 6.0  # of one take-over
    share: float = 0.25  # of a robot's steps, since its first episode, that may be a person's
    noise: float = 1.0  # of the hands, as of an `Expert`


class Assisted(Protocol):
    """A robot that can be helped."""

    @property
    def world(self) -> World: ...
    @property
    def step(self) -> int: ...
    @property
    def episode_id(self) -> str: ...


@dataclass
class _Attention:
    """What the operator knows of one robot."""

    episode_id: str = ""
    best: float = 0.0  # sum of sub-step scores
    since: int = 0  # step at which it was reached, or at which help ended
    steps: int = 0  # over all episodes
    human_steps: int = 0


class Operator:
    """Ask `attend` once per policy step; it says which robot they drive in this step."""

    def __init__(self, limits: OperatorLimits, seed: int) -> None:
        self.limits = limits
        self._rng = np.random.default_rng([seed, 11])
        self._attention: list[_Attention] = [_Attention() for _ in range(limits.robots)]
        self._driven: int | None = None
        self._expert: Expert | None = None
        self._begins = 0.0  # steps until they have reacted
        self._ends = 0  # steps left of the take-over

    def attend(self, robots: Sequence[Assisted | None]) -> int | None:
        """Look at all robots (None: not working now). Returns the index of the one that they drive in this step."""
        for attention, robot in zip(self._attention, robots, strict=False):
            self._look(attention, robot)
        if self._driven is not None:
            robot = robots[self._driven]
            if self._over(robot):
                if robot is not None:
                    self._attention[
                        self._driven
                    ].since = robot.step  # it gets another chance before they are back
                self._driven = self._expert = None
        if self._driven is None:
            self._driven = self._choose(robots)
            if self._driven is None:
                return None
            self._begins = self._rng.uniform(*self.limits.reaction_s) / STEP_S
            self._ends = round(self.limits.longest_s / STEP_S)
        if self._begins > 0:
            self._begins -= 1
            return None
        self._ends -= 1
        self._attention[self._driven].human_steps += 1
        return self._driven

    def command(self, robot: Assisted) -> np.ndarray:
        """Joint targets [14] for the end of this policy step of the robot that they drive."""
        if self._expert is None:
            self._expert = Expert(
                robot.world, np.random.default_rng(self._rng.integers(2**32)), self.limits.noise
            )
        return self._expert.command()

    def _look(self, attention: _Attention, robot: Assisted | None) -> None:
        if robot is None:
            return
        score = sum(robot.world.sub_step_scores())
        if robot.episode_id != attention.episode_id:
            attention.episode_id, attention.best, attention.since = robot.episode_id, score, robot.step
        elif score > attention.best:
            attention.best, attention.since = score, robot.step
        attention.steps += 1

    def _over(self, robot: Assisted | None) -> bool:
        """Whether the robot that they drive (or are about to) needs them no more, or may have them no longer."""
        assert self._driven is not None
        if robot is None or robot.step == 0:
            return True  # its episode ended
        attention = self._attention[self._driven]
        helped = self._expert is not None and attention.since == robot.step
        return helped or self._ends <= 0 or not self._affordable(attention)

    def _choose(self, robots: Sequence[Assisted | None]) -> int | None:
        """The robot that has been in trouble for longest; of several, the one that was helped least."""
        troubled = [
            (attention.since - robot.step, attention.human_steps, index)
            for index, (attention, robot) in enumerate(zip(self._attention, robots, strict=False))
            if robot is not None and self._in_trouble(attention, robot) and self._affordable(attention)
        ]
        return min(troubled)[2] if troubled else None

    def _in_trouble(self, attention: _Attention, robot: Assisted) -> bool:
        task = robot.world.task
        patience = self.limits.patience * task.time_limit_s / len(task.sub_steps)
        return (robot.step - attention.since) * STEP_S > patience

    def _affordable(self, attention: _Attention) -> bool:
        return attention.human_steps + 1 <= self.limits.share * attention.steps
