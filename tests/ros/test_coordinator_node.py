# SPDX-License-Identifier: Apache-2.0
"""The coordinator as a process, with robots played by the test: assignments, roll-out, and robots that vanish."""

from __future__ import annotations

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lwd_msgs.action import RunEpisode
from lwd_msgs.msg import EpisodeState, FleetStatus, PolicyStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.action import ActionServer, GoalResponse

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.deployment import NodeSpec
from lwd_fleet.rollout.coordinator import FIRST_SEED
from lwd_policy.qos import LATCHED


class FakeRobot:
    """The policy's parameters and status and the episode action of one robot, without the rest."""

    def __init__(self, stage, name: str, accepts: bool = True) -> None:
        self.goals: list[RunEpisode.Goal] = []
        self.told: list[tuple[int, str, str]] = []
        self.silent = False  # takes an episode and never ends it
        self.accepts = accepts
        self.node = stage.add_node("policy", f"/{name}")
        for key, value in (("policy.version", -1), ("policy.uri", ""), ("policy.digest", "")):
            self.node.declare_parameter(key, value)
        self.node.add_on_set_parameters_callback(self._set)
        self._status = self.node.create_publisher(PolicyStatus, f"/{name}/policy/status", LATCHED)
        self._alive = self.node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.node.create_timer(0.5, self._tell_that_it_lives)
        self._server = ActionServer(
            self.node,
            RunEpisode,
            f"/{name}/run_episode",
            execute_callback=self._execute,
            goal_callback=lambda goal: GoalResponse.ACCEPT if self.accepts else GoalResponse.REJECT,
            handle_accepted_callback=self._accepted,
        )

    def show(self, version: int, digest: str) -> None:
        self._status.publish(
            PolicyStatus(
                desired_version=version, desired_digest=digest, active_version=version, active_digest=digest
            )
        )

    def _tell_that_it_lives(self) -> None:
        name = f"{self.node.get_fully_qualified_name()}: lifecycle"
        self._alive.publish(DiagnosticArray(status=[DiagnosticStatus(name=name, message="active")]))

    def _set(self, parameters) -> SetParametersResult:
        values = {one.name: one.value for one in parameters}
        self.told.append((values["policy.version"], values["policy.uri"], values["policy.digest"]))
        self.show(values["policy.version"], values["policy.digest"])
        return SetParametersResult(successful=True)

    def _accepted(self, handle) -> None:
        self.goals.append(handle.request)
        if not self.silent:
            handle.execute()

    def _execute(self, handle) -> RunEpisode.Result:
        handle.succeed()
        return RunEpisode.Result(success=True, outcome=EpisodeState.OUTCOME_SUCCESS)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(str(tmp_path / "catalog.db"))
    version = catalog.register_policy("d1", "file:///store/d1", (0, 0))
    catalog.set_policy_state(version, "active")
    yield catalog
    catalog.close()


def coordinator(tmp_path, **parameters) -> NodeSpec:
    return NodeSpec(
        "lwd_fleet",
        "coordinator_node",
        "coordinator",
        "/fleet",
        {
            "robots": ["sim_r1", "sim_r2"],
            "tasks.sim_r1": ["place", "stow"],
            "default_tasks": ["place"],
            "catalog": str(tmp_path / "catalog.db"),
            **parameters,
        },
    )


def test_robots_are_told_their_version_run_their_tasks_and_stop_after_their_number(stage, tmp_path, catalog):
    r1, r2 = FakeRobot(stage, "sim_r1"), FakeRobot(stage, "sim_r2")
    states = stage.collect(FleetStatus, "/fleet/status", LATCHED)
    stage.bring_up([coordinator(tmp_path, episodes_per_robot=3)])
    stage.until(lambda: states and list(states[-1].episodes) == [3, 3], "three episodes each")
    assert r1.told == r2.told == [(1, "file:///store/d1", "d1")]
    assert [goal.task for goal in r1.goals] == ["place", "stow", "place"]
    assert [goal.task for goal in r2.goals] == ["place"] * 3
    seeds = [goal.seed for goal in (*r1.goals, *r2.goals)]
    assert sorted(seeds) == list(range(FIRST_SEED, FIRST_SEED + 6))
    last = states[-1]
    assert list(last.robots) == ["sim_r1", "sim_r2"] and list(last.successes) == [3, 3]
    assert list(last.policy_version) == [1, 1] and last.desired_version == 1


def test_a_new_version_reaches_all_and_a_robot_that_was_off_line_catches_up(stage, tmp_path, catalog):
    r1 = FakeRobot(stage, "sim_r1")
    stage.bring_up([coordinator(tmp_path)])
    stage.until(lambda: r1.told, "the first version")
    version = catalog.register_policy("d2", "file:///store/d2", (0, 0))
    catalog.set_policy_state(version, "active")
    stage.until(lambda: r1.told[-1] == (2, "file:///store/d2", "d2"), "the second version")
    late = FakeRobot(stage, "sim_r2")
    stage.until(lambda: late.told, "the version for the robot that came late")
    assert late.told == [(2, "file:///store/d2", "d2")]
    stage.until(lambda: len(late.goals) >= 2, "episodes of the robot that came late")


def test_a_robot_that_never_ends_its_episode_or_refuses_all_keeps_no_other_from_working(
    stage, tmp_path, catalog
):
    r1, r2 = FakeRobot(stage, "sim_r1"), FakeRobot(stage, "sim_r2")
    r1.silent = True
    stage.bring_up([coordinator(tmp_path, silence_s=1.0)])
    stage.until(lambda: r1.goals and len(r2.goals) >= 3, "episodes of the healthy robot")
    r1.silent = False
    stage.until(lambda: len(r1.goals) >= 3, "the silent robot to work again")
    r2.accepts = False
    count = len(r1.goals)
    stage.until(lambda: len(r1.goals) >= count + 3, "episodes of robot 1")
