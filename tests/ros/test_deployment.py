# SPDX-License-Identifier: Apache-2.0
"""A whole deployment under the supervisor: a simulated robot runs episodes with the version it is told to run,
they reach the catalog, and all of it goes on after kill -9 of the policy."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from std_msgs.msg import Bool

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.deployment import Deployment, load_deployment, node_specs
from lwd_fleet.rollout.coordinator import EVALUATION_SEEDS
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_policy import checkpoint
from lwd_policy.action import ActionSpec
from lwd_policy.embodiment import Embodiment
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.qos import LATCHED
from lwd_policy.trunk import build_trunk

SIM_ONE = Path(__file__).parents[2] / "config" / "deployments" / "sim_one_robot.yaml"
EPISODE_S = 3.0


def roll_out(deployment: Deployment, catalog: Catalog, seed: int) -> int:
    """Make an untrained policy the desired one; returns its version."""
    torch.manual_seed(seed)
    embodiment = Embodiment.load(deployment.robots[0].robot_file)
    action = ActionSpec.unnormalised(embodiment, "joint_relative", 10, 1 / deployment.policy_step_hz, 5)
    policy = FlowPolicy(
        build_trunk(trunk_config("keypoints"), embodiment), observation_spec("keypoints"), action
    )
    folder = checkpoint.save(deployment.run_dir / "policies", policy)
    version = catalog.register_policy(folder.name, folder.as_uri(), (0, 0))
    catalog.set_policy_state(version, "active")
    return version


@pytest.mark.slow
def test_episodes_flow_into_the_catalog_and_a_new_version_takes_over(stage, tmp_path):
    deployment = load_deployment(SIM_ONE, run_dir=tmp_path / "run")
    specs = [
        dataclasses.replace(spec, parameters={**spec.parameters, "time_limit_s": EPISODE_S})
        if spec.name == "episode"
        else spec
        for spec in node_specs(deployment, parts=("robots", "fleet"))
    ]
    catalog = Catalog(deployment.catalog)
    first = roll_out(deployment, catalog, seed=1)
    ready = stage.collect(Bool, "/fleet/lifecycle_manager/ready", LATCHED)
    supervisor = stage.start(specs)
    stage.until(lambda: ready and ready[-1].data, "all nodes to become active")

    stage.until(lambda: len(catalog.episodes_since(0)) >= 1, "an episode in the catalog")
    second = roll_out(deployment, catalog, seed=2)

    def committed(version: int) -> int:
        return sum(row.policy_version == version for row in catalog.episodes_since(0))

    stage.until(lambda: committed(second) >= 1, "an episode of the second version")
    policy = next(one for one in supervisor.status() if one.name == "/sim_r1/policy")
    os.kill(policy.pid, signal.SIGKILL)
    count = committed(second)
    stage.until(lambda: committed(second) >= count + 2, "episodes after the death of the policy")

    rows = catalog.episodes_since(0)
    led = [row for row in rows if row.policy_version != -1]
    assert {row.policy_version for row in led} == {first, second}
    assert len(rows) - len(led) <= 2, "only what began before the death was noticed ran without a policy"
    assert committed(first) >= 1 and all(row.robot == "sim_r1" and row.task == "place" for row in rows)
    assert all(row.steps >= 1 for row in rows)
    seeds = {row.summary.seed for row in rows}
    assert not seeds & set(EVALUATION_SEEDS) and len(seeds) == len(rows)
    catalog.close()
