# SPDX-License-Identifier: Apache-2.0
"""Speaks ROS for `Coordinator`: run_episode goals, policy parameters, `/fleet/status`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from lwd_msgs.action import RunEpisode
from lwd_msgs.msg import EpisodeState, FleetStatus, PolicyStatus
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.action import ActionClient
from rclpy.client import Client
from rclpy.clock import Clock, ClockType
from rclpy.parameter import Parameter
from rclpy.task import Future

from lwd_fleet.rollout.catalog_watch import CatalogWatch
from lwd_fleet.rollout.coordinator import FIRST_SEED, Coordinator, CoordinatorTiming, Desired, Goal
from lwd_policy.managed_node import OK, WARN, Check, ConfigurationError, ManagedNode, parameter, run_node
from lwd_policy.qos import EVENTS, LATCHED

_TICK_S = 0.1


@dataclass(frozen=True)
class CoordinatorParameters:
    """Parameters of the coordinator; besides these, `tasks.<robot>` may list the tasks of one robot."""

    robots: tuple[str, ...] = parameter((), "names of the robots, which are their namespaces")
    default_tasks: tuple[str, ...] = parameter(
        (), "tasks of robots without a list of their own, taken in turn"
    )
    catalog: str = parameter("", "URL of the catalog")
    episodes_per_robot: int = parameter(0, "stop assigning after so many; 0: never", low=0)
    first_seed: int = parameter(
        FIRST_SEED, "seed of the first scene; lower ones are for evaluations", low=FIRST_SEED
    )
    update_timeout_s: float = parameter(
        10.0,
        "a robot that takes longer to take a policy version is told again",
        unit="s",
        low=0.1,
        high=600.0,
    )
    silence_s: float = parameter(
        30.0, "an episode nothing is heard of for so long is given up", unit="s", low=1.0, high=3600.0
    )
    policy_silence_s: float = parameter(
        3.0,
        "no episode starts when the policy node was not heard for so long",
        unit="s",
        low=1.0,
        high=3600.0,
    )


@dataclass
class _Robot:
    """The connections to one robot and the goal that is out."""

    name: str
    run_episode: ActionClient
    parameters: Client  # of the policy node
    inputs: list[Any]
    episode_id: str = ""
    goal_number: int = 0  # answers to earlier goals are ignored
    goal_handle: Any = None


class CoordinatorNode(ManagedNode):
    """Serves every robot for itself; nothing here waits."""

    parameters_type = CoordinatorParameters

    def __init__(self) -> None:
        super().__init__("coordinator")
        self._coordinator: Coordinator | None = None
        self._watch: CatalogWatch | None = None
        self._robots: dict[str, _Robot] = {}
        self._work: list[Any] = []
        self._seen_looks = 0
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)

    # Lifecycle ---------------------------------------------------------------------------------------

    def configure(self) -> None:
        options: CoordinatorParameters = self.parameters
        if not options.robots or not options.catalog:
            raise ConfigurationError("set `robots` to the names of the robots and `catalog` to its URL")
        tasks = {}
        for name in options.robots:
            key = f"tasks.{name}"
            if not self.has_parameter(key):
                self.declare_parameter(key, Parameter.Type.STRING_ARRAY)
            own = self.get_parameter_or(key, Parameter(key, value=None)).value
            tasks[name] = tuple(own or options.default_tasks)
        try:
            self._coordinator = Coordinator(
                tasks,
                options.episodes_per_robot,
                options.first_seed,
                CoordinatorTiming(options.update_timeout_s, options.silence_s, options.policy_silence_s),
            )
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        self._status = self.create_publisher(FleetStatus, "status", LATCHED)
        self._robots = {name: self._connect(name) for name in options.robots}
        self._policies = {f"/{name}/policy: lifecycle": name for name in options.robots}
        self._diagnostics_heard = self.create_subscription(
            DiagnosticArray, "/diagnostics", self._on_diagnostics, EVENTS
        )

    def activate(self) -> None:
        self._watch = CatalogWatch(self.parameters.catalog)
        self._seen_looks = 0
        self._work = [
            self.create_timer(_TICK_S, self._on_tick, clock=self._steady),
            self.create_timer(1.0, self._publish_status, clock=self._steady),
        ]

    def deactivate(self) -> None:
        for timer in self._work:
            self.destroy_timer(timer)
        self._work = []
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def cleanup(self) -> None:
        for robot in self._robots.values():
            robot.run_episode.destroy()
            self.destroy_client(robot.parameters)
            for subscription in robot.inputs:
                self.destroy_subscription(subscription)
        if self._coordinator is not None:
            self.destroy_subscription(self._diagnostics_heard)
        self._robots = {}
        self._coordinator = None

    def diagnose(self) -> list[Check]:
        if self._coordinator is None or self._watch is None:
            return []
        view = self._watch.view
        desired = self._coordinator.desired
        wanted = "no policy version is active yet" if desired is None else f"version {desired.version}"
        checks = [
            Check("catalog", WARN if view.error else OK, view.error or wanted, {"committed": view.committed})
        ]
        for robot in self._coordinator.robots.values():
            refused = desired is not None and robot.refused[0] == desired.version
            note = f"refuses version {robot.refused[0]}: {robot.refused[1]}" if refused else robot.note
            values = {
                "episodes": robot.episodes,
                "successes": robot.successes,
                "policy": robot.active_version,
            }
            idle = "waits for its policy" if robot.active_version < 0 else "free"
            state = "runs an episode" if robot.running else idle
            checks.append(Check(robot.name, WARN if note else OK, note or state, values))
        return checks

    # One round ---------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        assert self._coordinator is not None and self._watch is not None
        now_s = self._now_s()
        view = self._watch.view
        if view.looks != self._seen_looks:
            self._seen_looks = view.looks
            if view.desired != self._coordinator.desired:
                self.get_logger().info(f"desired policy: {view.desired}")
            self._coordinator.catalog(view.desired, view.committed)
        for name, desired in self._coordinator.updates_due(now_s):
            if self._robots[name].parameters.service_is_ready():
                self._send_update(self._robots[name], desired, now_s)
        for name in self._coordinator.given_up(now_s):
            self._give_up(self._robots[name])
        for name, goal in self._coordinator.goals_due(now_s):
            if self._robots[name].run_episode.server_is_ready():
                self._send_goal(self._robots[name], goal, now_s)

    def _send_update(self, robot: _Robot, desired: Desired, now_s: float) -> None:
        assert self._coordinator is not None
        self._coordinator.update_sent(robot.name, now_s)
        values = {
            "policy.version": desired.version,
            "policy.uri": desired.uri,
            "policy.digest": desired.digest,
        }
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        answer = robot.parameters.call_async(SetParametersAtomically.Request(parameters=parameters))
        answer.add_done_callback(partial(self._on_update_answer, robot, desired))

    def _on_update_answer(self, robot: _Robot, desired: Desired, future: Future) -> None:
        if self._coordinator is None:
            return
        result = future.result().result
        error = "" if result.successful else result.reason or "refused without a reason"
        self._coordinator.update_ended(robot.name, error, self._now_s())
        if error:
            self.get_logger().warning(f"{robot.name}: version {desired.version} not taken: {error}")
        else:
            self.get_logger().info(f"{robot.name}: told to run version {desired.version}")

    def _send_goal(self, robot: _Robot, goal: Goal, now_s: float) -> None:
        assert self._coordinator is not None
        robot.goal_number += 1
        number = robot.goal_number
        self._coordinator.goal_sent(robot.name, now_s)
        sent = robot.run_episode.send_goal_async(
            RunEpisode.Goal(task=goal.task, seed=goal.seed),
            feedback_callback=lambda message: self._on_feedback(robot, number),
        )
        sent.add_done_callback(partial(self._on_goal_answer, robot, number))
        self.get_logger().info(f"{robot.name}: {goal.task}, seed {goal.seed}")

    def _on_feedback(self, robot: _Robot, number: int) -> None:
        if self._coordinator is not None and number == robot.goal_number:
            self._coordinator.heard(robot.name, self._now_s())

    def _on_goal_answer(self, robot: _Robot, number: int, future: Future) -> None:
        if self._coordinator is None or number != robot.goal_number:
            return
        handle = future.result()
        if not handle.accepted:
            robot.goal_number += 1
            self._coordinator.goal_refused(robot.name, "it is busy or not ready", self._now_s())
            return
        robot.goal_handle = handle
        self._coordinator.heard(robot.name, self._now_s())
        handle.get_result_async().add_done_callback(partial(self._on_result, robot, number))

    def _on_result(self, robot: _Robot, number: int, future: Future) -> None:
        if self._coordinator is None or number != robot.goal_number:
            return
        robot.goal_number += 1
        robot.goal_handle = None
        result = future.result().result
        success = result.outcome == EpisodeState.OUTCOME_SUCCESS
        message = result.message or "ended without a reason; see the log of the robot's episode node"
        self._coordinator.goal_ended(robot.name, result.success, success, message, self._now_s())
        if not result.success:
            self.get_logger().warning(f"{robot.name}: {message}")

    def _give_up(self, robot: _Robot) -> None:
        self.get_logger().warning(f"{robot.name}: {self._view(robot).note}")
        robot.goal_number += 1
        if robot.goal_handle is not None:
            robot.goal_handle.cancel_goal_async()
            robot.goal_handle = None

    # Inputs and status -------------------------------------------------------------------------------

    def _connect(self, name: str) -> _Robot:
        return _Robot(
            name,
            ActionClient(self, RunEpisode, f"/{name}/run_episode"),
            self.create_client(SetParametersAtomically, f"/{name}/policy/set_parameters_atomically"),
            [
                self.create_subscription(
                    PolicyStatus, f"/{name}/policy/status", partial(self._on_policy_status, name), LATCHED
                ),
                self.create_subscription(
                    EpisodeState, f"/{name}/episode", partial(self._on_episode, name), LATCHED
                ),
            ],
        )

    def _on_policy_status(self, name: str, message: PolicyStatus) -> None:
        assert self._coordinator is not None
        refused = (message.refused_version, message.refused_reason)
        self._coordinator.policy_status(name, message.desired_digest, message.active_version, refused)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        assert self._coordinator is not None
        for status in message.status:
            if status.name in self._policies and status.message == "active":
                self._coordinator.policy_heard(self._policies[status.name], self._now_s())

    def _on_episode(self, name: str, message: EpisodeState) -> None:
        assert self._coordinator is not None
        self._coordinator.heard(name, self._now_s())
        over = message.state in (EpisodeState.STATE_IDLE, EpisodeState.STATE_ENDED)
        self._robots[name].episode_id = "" if over else message.episode_id

    def _publish_status(self) -> None:
        assert self._coordinator is not None
        robots = list(self._coordinator.robots.values())
        desired = self._coordinator.desired
        message = FleetStatus(
            robots=[robot.name for robot in robots],
            episode_id=[self._robots[robot.name].episode_id for robot in robots],
            task=[robot.goal.task if robot.goal is not None and robot.running else "" for robot in robots],
            policy_version=[robot.active_version for robot in robots],
            episodes=[robot.episodes for robot in robots],
            successes=[robot.successes for robot in robots],
            desired_version=-1 if desired is None else desired.version,
            committed=self._coordinator.committed,
        )
        message.header.stamp = self.get_clock().now().to_msg()
        self._status.publish(message)

    def _view(self, robot: _Robot) -> Any:
        assert self._coordinator is not None
        return self._coordinator.robots[robot.name]

    def _now_s(self) -> float:
        return float(self._steady.now().nanoseconds * 1e-9)


def main(args: list[str] | None = None) -> int:
    return run_node(CoordinatorNode, args)


if __name__ == "__main__":
    sys.exit(main())
