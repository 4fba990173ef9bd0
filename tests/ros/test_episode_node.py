# SPDX-License-Identifier: Apache-2.0
"""Episodes run by real episode, recorder and uploader processes; the test plays the simulated robot."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from action_msgs.msg import GoalStatus
from lwd_msgs.action import RunEpisode
from lwd_msgs.msg import ControlMode, EpisodeState, ExecutedAction
from lwd_msgs.srv import CheckSuccess, LabelEpisode, ResetScene
from rclpy.action import ActionClient
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import String

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.deployment import NodeSpec
from lwd_fleet.supervisor import Supervisor
from lwd_policy.qos import EVENTS, LATCHED

NAMESPACE = "/sim_r1"
SUCCESS, FAILURE, UNLABELLED = (
    EpisodeState.OUTCOME_SUCCESS,
    EpisodeState.OUTCOME_FAILURE,
    EpisodeState.OUTCOME_UNLABELLED,
)
TOPICS = [
    "episode lwd_msgs/msg/EpisodeState latched",
    "task std_msgs/msg/String latched",
    "executed_action lwd_msgs/msg/ExecutedAction",
]
EVERY_STATE = QoSProfile(
    depth=50, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)


class Robot:
    """The simulated robot's services, its executed actions, and an operator's client."""

    def __init__(self, stage, directory: Path, **episode_parameters) -> None:
        self.stage = stage
        self.spool = directory / "spool"
        self.catalog = str(directory / "catalog.db")
        store = str(directory / "store")
        parameters = {"tasks": ["place"], "catalog": self.catalog, **episode_parameters}
        uploads = {"spool": str(self.spool), "store": store, "catalog": self.catalog}
        recording = {
            "spool": str(self.spool),
            "topics": TOPICS,
            "match_timeout_s": 20.0,
            "outcome_timeout_s": 20.0,
        }
        self.specs = [
            NodeSpec("lwd_fleet", "recorder_node", "recorder", NAMESPACE, recording),
            NodeSpec("lwd_fleet", "uploader_node", "uploader", NAMESPACE, uploads),
            NodeSpec("lwd_fleet", "episode_node", "episode", NAMESPACE, parameters),
        ]
        node = stage.node
        self.scene_works, self.done_after, self.checks = True, 3, 0
        node.create_service(ResetScene, f"{NAMESPACE}/reset_scene", self._reset)
        node.create_service(CheckSuccess, f"{NAMESPACE}/check_success", self._check)
        self._actions = node.create_publisher(ExecutedAction, f"{NAMESPACE}/executed_action", EVENTS)
        self.mode = node.create_publisher(ControlMode, f"{NAMESPACE}/control_mode", LATCHED)
        self.states = stage.collect(EpisodeState, f"{NAMESPACE}/episode", EVERY_STATE)
        self.tasks = stage.collect(String, f"{NAMESPACE}/task", LATCHED)
        self.client = ActionClient(node, RunEpisode, f"{NAMESPACE}/run_episode")
        self.feedback: list[RunEpisode.Feedback] = []
        self.step = 0
        self.supervisor: Supervisor | None = None

    def _reset(self, request, response):
        response.success, response.seed = self.scene_works, 42 if request.seed < 0 else request.seed
        response.message = "" if self.scene_works else "the bowl is missing"
        response.instruction = "put the cube into the bowl"
        self.checks = self.step = 0
        return response

    def _check(self, request, response):
        self.checks += 1
        done = self.done_after is not None and self.checks >= self.done_after
        response.success, response.done, response.sub_step_scores = True, done, [1.0 if done else 0.5]
        return response

    def live(self) -> None:
        if self.states and self.states[-1].state == EpisodeState.STATE_RUNNING:
            episode_id = self.states[-1].episode_id
            self._actions.publish(
                ExecutedAction(episode_id=episode_id, step=self.step, arms=["left"], author=bytes([3]))
            )
            self.step += 1

    def send(self, **goal):
        self.stage.until(self.client.server_is_ready, "run_episode")
        request = RunEpisode.Goal(**({"task": "place", "seed": -1} | goal))
        futures: list[Any] = []
        ask_at = 0.0

        def ask() -> None:
            """Again, where nothing began: a goal may be lost while processes are still finding each other."""
            nonlocal ask_at
            idle = not self.states or self.states[-1].state == EpisodeState.STATE_IDLE
            if not futures or (idle and time.monotonic() > ask_at):
                ask_at = time.monotonic() + 10.0
                futures.append(self.client.send_goal_async(request, self._hear))

        def answered() -> list[Any]:
            return [future for future in futures if future.done()]

        self.stage.until(answered, "the goal's acceptance", ask)
        return answered()[0].result()

    def _hear(self, message: Any) -> None:
        self.feedback.append(message.feedback)

    def running(self) -> str:
        state = EpisodeState.STATE_RUNNING
        self.stage.until(lambda: self.states and self.states[-1].state == state, "a running episode")
        return self.states[-1].episode_id

    def result(self, handle):
        future = handle.get_result_async()
        self.stage.until(future.done, "the episode's result", self.live)
        return future.result()

    def label(self, **request):
        return self.stage.call(LabelEpisode, f"{NAMESPACE}/label_episode", LabelEpisode.Request(**request))


@pytest.fixture
def robot(stage, tmp_path):
    robot = Robot(stage, tmp_path)
    robot.supervisor = stage.bring_up(robot.specs)
    yield robot
    robot.client.destroy()


def test_an_episode_from_reset_to_the_catalog(robot, stage):
    answer = robot.result(robot.send())
    result = answer.result
    assert answer.status == GoalStatus.STATUS_SUCCEEDED, result.message
    assert (result.success, result.outcome, list(result.sub_step_scores)) == (True, SUCCESS, [1.0])
    own = [state for state in robot.states if state.episode_id == result.episode_id]
    assert sorted({state.state for state in own}) == [1, 2, 3]
    assert (own[-1].state, own[-1].outcome, own[-1].outcome_source) == (3, SUCCESS, "detector")
    stage.until(lambda: robot.states[-1].state == EpisodeState.STATE_IDLE, "the episode to close")
    assert robot.tasks[-1].data == "put the cube into the bowl"

    reader = EpisodeReader(Path(result.path))
    summary = reader.summary
    assert (summary.outcome, summary.task, summary.seed) == ("success", "place", 42)
    assert summary.instruction == "put the cube into the bowl" and summary.truncated == ""
    assert [entry.message.step for entry in reader.messages("executed_action")] == list(range(summary.steps))
    assert [entry.message.data for entry in reader.messages("task")][-1] == summary.instruction

    catalog = Catalog(robot.catalog)
    stage.until(lambda: catalog.episode(result.episode_id), "the commit")
    assert catalog.episode(result.episode_id).summary == summary
    later = robot.label(episode_id=result.episode_id, outcome=FAILURE, source="operator:anna")
    assert later.success
    assert catalog.outcomes(catalog.snapshot()) == {result.episode_id: "failure"}
    catalog.close()


def test_a_time_limit_is_a_failure_with_its_scores(robot):
    robot.done_after = None
    answer = robot.result(robot.send(time_limit_s=1.5, instruction="do it", seed=5))
    assert (answer.result.success, answer.result.outcome) == (True, FAILURE)
    summary = EpisodeReader(Path(answer.result.path)).summary
    assert (summary.outcome, summary.sub_step_scores, summary.seed) == ("failure", (0.5,), 5)
    assert summary.instruction == "do it" and summary.end_reason == "time limit of 1.5 s"
    assert robot.feedback[0].episode_id == answer.result.episode_id
    assert any(message.state == EpisodeState.STATE_RUNNING for message in robot.feedback)


def test_a_cancelled_episode_is_sealed_without_a_label(robot, stage):
    robot.done_after = None
    handle = robot.send(time_limit_s=600.0)
    robot.running()
    cancel = handle.cancel_goal_async()
    stage.until(cancel.done, "the cancellation")
    answer = robot.result(handle)
    assert answer.status == GoalStatus.STATUS_CANCELED
    summary = EpisodeReader(Path(answer.result.path)).summary
    assert (summary.outcome, summary.end_reason) == ("unlabelled", "aborted: cancelled")
    assert robot.result(robot.send(time_limit_s=0.5)).result.success  # the next one runs


def test_an_operators_verdict_ends_the_running_episode(robot):
    robot.done_after = None
    handle = robot.send(time_limit_s=600.0)
    robot.running()
    assert robot.label(outcome=SUCCESS, source="operator:anna", sub_step_scores=[1.0, 1.0]).success
    answer = robot.result(handle)
    assert answer.result.outcome == SUCCESS
    summary = EpisodeReader(Path(answer.result.path)).summary
    assert (summary.outcome, summary.outcome_source) == ("success", "operator:anna")
    refused = robot.label(outcome=SUCCESS)
    assert not refused.success and "no episode is running" in refused.message


def test_an_emergency_stop_ends_the_episode(robot):
    robot.done_after = None
    handle = robot.send(time_limit_s=600.0)
    robot.running()
    robot.mode.publish(ControlMode(arms=["left"], mode=bytes([ControlMode.MODE_ESTOP]), reason=["button"]))
    answer = robot.result(handle)
    assert (answer.result.success, answer.result.outcome) == (True, UNLABELLED)
    assert EpisodeReader(Path(answer.result.path)).summary.end_reason == "aborted: emergency stop"


def test_a_goal_is_refused_while_an_episode_runs_or_for_a_foreign_task(robot):
    robot.done_after = None
    handle = robot.send(time_limit_s=600.0)
    assert handle.accepted
    assert not robot.send().accepted
    handle.cancel_goal_async()
    robot.result(handle)
    assert not robot.send(task="juggle").accepted


def test_an_episode_whose_scene_fails_leaves_nothing_behind(robot, stage):
    robot.scene_works = False
    answer = robot.result(robot.send())
    assert answer.status == GoalStatus.STATUS_ABORTED
    assert not answer.result.success and "the bowl is missing" in answer.result.message
    stage.until(lambda: robot.states[-1].state == EpisodeState.STATE_IDLE, "the episode node to be idle")
    assert {path.name for path in robot.spool.iterdir()} <= {"receipts"}
    robot.scene_works = True
    assert robot.result(robot.send()).result.success


def test_an_episode_node_told_to_stop_ends_the_episode_in_the_bag(robot, stage):
    robot.done_after = None
    robot.send(time_limit_s=600.0)
    episode_id = robot.running()
    pids = {entry.name.rpartition("/")[2]: entry.pid for entry in robot.supervisor.status()}
    os.kill(pids["recorder"], signal.SIGSTOP)  # as on a busy machine: it hears of all this later
    os.kill(pids["episode"], signal.SIGTERM)
    stage.spin(1.0)
    os.kill(pids["recorder"], signal.SIGCONT)
    stage.until((robot.spool / episode_id).exists, "the seal")
    summary = EpisodeReader(robot.spool / episode_id).summary
    assert summary.end_reason == "aborted: the episode node was stopped" and summary.truncated == ""


def test_a_killed_episode_node_leaves_an_unlabelled_episode_and_the_next_one_runs(robot, stage):
    robot.done_after = None
    robot.send(time_limit_s=600.0)
    episode_id = robot.running()
    process = next(entry for entry in robot.supervisor.status() if entry.name.endswith("/episode"))
    os.kill(process.pid, signal.SIGKILL)
    stage.until(lambda: robot.states[-1].state == EpisodeState.STATE_IDLE, "the node to be back")
    robot.done_after = 2

    def ask() -> None:  # requests go to the dead process until its lease is over, or the new one is inactive
        if not accepted:
            robot.client.send_goal_async(RunEpisode.Goal(task="place", seed=-1)).add_done_callback(
                lambda future: accepted.append(future.result()) if future.result().accepted else None
            )
            stage.spin(1.0)

    accepted: list = []
    stage.until(lambda: accepted, "the node to be active", ask)
    assert robot.result(accepted[0]).result.success
    summary = EpisodeReader(robot.spool / episode_id).summary
    assert summary.outcome == "unlabelled" and "next episode began" in summary.truncated
