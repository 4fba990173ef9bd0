# SPDX-License-Identifier: Apache-2.0
"""A policy of the simulated robot that has learned nothing yet but to see: the shipped trunk, a fresh flow expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lwd_fleet.data.catalog import Catalog, EpisodeRow
from lwd_fleet.data.store import BlobStore
from lwd_fleet.sim import robot
from lwd_fleet.sim.presets import observation_spec, trunk_config, trunk_directory
from lwd_fleet.sim.tasks import SUITES
from lwd_learner.learner import fetch_trace, fit_actions
from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.trunk import build_trunk
from lwd_policy.trunk_file import load_trunk

HORIZON, STEP_S, EXECUTE_STEPS = 10, 0.1, 5  # the `sim` preset of rates
_EPISODES = 40  # of each task that the normalisation of actions is taken from, spread over all


class NothingToFit(Exception):
    """There is no episode to take the normalisation of actions from."""


def sim_policy(
    observation: Literal["images", "keypoints"] | str,
    catalog: Catalog,
    store: BlobStore,
    stride: int,
    suite: str = "demo",
    expert_size: str = "tiny",
    acting_noise: float = 1.0,
) -> FlowPolicy:
    """Its actions are normalised by the episodes committed so far: those should be demonstrations. expert_size: one of
    `flow_expert.PRESETS`; "tiny" learns on two cores, "base" wants a GPU. acting_noise: see `FlowPolicy`.

    Raises NothingToFit, TrunkRefused, FileNotFoundError, ValueError for an unknown kind of observation, suite or size.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r}; one of {', '.join(SUITES)}")
    body = robot.embodiment()
    trunk = build_trunk(trunk_config(observation, suite), body)
    load_trunk(trunk_directory(suite), trunk)
    action = ActionSpec.unnormalised(body, "ee_relative", HORIZON, STEP_S, EXECUTE_STEPS)
    spec = observation_spec(observation, suite=suite)
    policy = FlowPolicy(trunk, spec, action, expert_size, acting_noise=acting_noise)
    rows = catalog.episodes_since(0)
    if not rows:
        raise NothingToFit("no episode is committed; record or ingest demonstrations first")
    chosen = [row for task in SUITES[suite].tasks for row in _spread(rows, task.name)]
    if not chosen:
        raise NothingToFit(f"no committed episode is of a task of the suite {suite!r}")
    policy.action_spec = fit_actions((fetch_trace(store, row, policy, stride) for row in chosen), action)
    return policy


def _spread(rows: Sequence[EpisodeRow], task: str) -> Sequence[EpisodeRow]:
    of_task = [row for row in rows if row.summary.task == task]
    return of_task[:: max(1, len(of_task) // _EPISODES)]
