# SPDX-License-Identifier: Apache-2.0
"""Runs episodes on request: asks the scene, the recorder and the detector, and tells everyone the state.
All decisions are in `episode_machine.py`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from lwd_msgs.action import RunEpisode
from lwd_msgs.msg import ControlMode, EpisodeState, ExecutedAction
from lwd_msgs.srv import CheckSuccess, LabelEpisode, ResetScene, StartRecording, StopRecording
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.task import Future
from sqlalchemy.exc import SQLAlchemyError
from std_msgs.msg import String

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.data.episode import mint_episode_id
from lwd_fleet.data.summary import OUTCOMES
from lwd_fleet.robot.episode_machine import EpisodeMachine, Outcome, State
from lwd_policy.managed_node import (
    OK,
    WARN,
    Check,
    ConfigurationError,
    ManagedNode,
    parameter,
    run_node,
)
from lwd_policy.qos import EVENTS, LATCHED

_POLL_S = 0.05
_FEEDBACK_S = 0.5


class _Refused(Exception):
    """The episode cannot go on; the text says why, for a person."""


@dataclass(frozen=True)
class EpisodeParameters:
    """Parameters of the episode node."""

    tasks: tuple[str, ...] = parameter(("*",), "tasks this robot may be given; '*': any")
    time_limit_s: float = parameter(
        30.0,
        "time limit of an episode where neither the goal nor the scene states one",
        unit="s",
        low=0.1,
        high=86400.0,
    )
    settle_s: float = parameter(
        0.25, "time between the start of the recording and of the episode", unit="s", low=0.0, high=60.0
    )
    reset_scene: bool = parameter(True, "ask `reset_scene` before an episode")
    detector: bool = parameter(True, "ask `check_success` during an episode")
    check_hz: float = parameter(5.0, "rate of the questions to the detector", unit="Hz", low=0.1, high=100.0)
    service_timeout_s: float = parameter(
        10.0, "how long the scene and the detector may take to answer", unit="s", low=0.1, high=600.0
    )
    recorder_timeout_s: float = parameter(
        30.0, "how long the recorder may take to start or seal", unit="s", low=0.1, high=600.0
    )
    catalog: str = parameter("", "catalog for verdicts on episodes that are over; empty: none are taken")


class EpisodeNode(ManagedNode):
    """Serves the action `run_episode` and `label_episode`; publishes latched `episode` and `task`."""

    parameters_type = EpisodeParameters

    def __init__(self) -> None:
        super().__init__("episode")
        self._machine = EpisodeMachine(time.monotonic, self._publish_state)
        self._claimed = False  # a goal was accepted and is not over
        self._steps = 0
        self._estop = False
        self._server: ActionServer | None = None
        self._catalog: Catalog | None = None
        self._episode: Any = None
        self._last_problem = ""

    # Lifecycle ---------------------------------------------------------------------------------------

    def configure(self) -> None:
        self._robot = self.get_namespace().strip("/")
        if not self._robot:
            raise ConfigurationError("run in the robot's namespace")
        if self.parameters.catalog:
            try:
                self._catalog = Catalog(self.parameters.catalog)
            except (SQLAlchemyError, OSError) as error:
                raise ConfigurationError(f"parameter catalog: {error}") from error
        self._episode = self.create_publisher(EpisodeState, "episode", LATCHED)
        self._task = self.create_publisher(String, "task", LATCHED)
        self._inputs = [
            self.create_subscription(ControlMode, "control_mode", self._on_mode, LATCHED),
            self.create_subscription(ExecutedAction, "executed_action", self._on_action, EVENTS),
        ]
        self._reset = self.create_client(ResetScene, "reset_scene")
        self._check = self.create_client(CheckSuccess, "check_success")
        self._start = self.create_client(StartRecording, "recorder/start")
        self._stop = self.create_client(StopRecording, "recorder/stop")
        self._label = self.create_service(LabelEpisode, "label_episode", self._on_label)
        self._server = ActionServer(
            self,
            RunEpisode,
            "run_episode",
            execute_callback=self._execute,
            goal_callback=self._on_goal,
            cancel_callback=lambda handle: CancelResponse.ACCEPT,
            # In the default group, an episode in progress would block all else.
            callback_group=ReentrantCallbackGroup(),
        )
        self._publish_state()

    def deactivate(self) -> None:
        if self._machine.state in (State.PREPARING, State.RUNNING):
            # `_run` sees it, and has the recording sealed.
            self._machine.abort("the episode node was stopped")

    def unfinished(self) -> bool:
        return self._machine.state is State.ENDED and self._stop.service_is_ready()

    def cleanup(self) -> None:
        if self._server is not None:
            self._server.destroy()
            self._server = None
        for client in (self._reset, self._check, self._start, self._stop):
            self.destroy_client(client)
        self.destroy_service(self._label)
        for entity in self._inputs:
            self.destroy_subscription(entity)
        self.destroy_publisher(self._episode)
        self.destroy_publisher(self._task)
        self._episode = None
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def diagnose(self) -> list[Check]:
        episode = self._machine.episode
        text = f"{self._machine.state.name.lower()} {episode.episode_id}".strip()
        return [Check("episode", WARN if self._last_problem else OK, self._last_problem or text)]

    # One episode -------------------------------------------------------------------------------------

    def _on_goal(self, goal: RunEpisode.Goal) -> GoalResponse:
        tasks = self.parameters.tasks
        if not self.active:
            reason = "the episode node is not active"
        elif self._claimed or self._machine.state is not State.IDLE:
            reason = f"episode {self._machine.episode.episode_id} is not over"
        elif "*" not in tasks and goal.task not in tasks:
            reason = f"task {goal.task!r} is none of {', '.join(tasks)}"
        else:
            self._claimed = True
            return GoalResponse.ACCEPT
        self.get_logger().warning(f"goal rejected: {reason}")
        return GoalResponse.REJECT

    async def _execute(self, handle: Any) -> RunEpisode.Result:
        result = RunEpisode.Result(episode_id=mint_episode_id())
        try:
            await self._prepare(handle, result.episode_id)
            await self._run(handle)
            await self._finish(result)
        except _Refused as refused:
            result.message = self._last_problem = str(refused)
            self.get_logger().error(f"episode {result.episode_id}: {refused}")
            if self._machine.state is State.PREPARING:
                self._machine.refuse()
        finally:
            if self._machine.state is State.ENDED:
                self._machine.close()
            self._claimed = False
        if handle.is_cancel_requested:
            handle.canceled()
        elif result.success:
            handle.succeed()
        else:
            handle.abort()
        return result

    async def _prepare(self, handle: Any, episode_id: str) -> None:
        """Reset the scene, tell everyone, and return once everything is being recorded."""
        goal, options = handle.request, self.parameters
        limit_s = goal.time_limit_s
        self._steps = 0
        self._machine.begin(episode_id, goal.task, goal.instruction)
        instruction, seed = goal.instruction, -1
        if options.reset_scene:
            request = ResetScene.Request(task=goal.task, seed=goal.seed)
            scene = await self._call(self._reset, request, options.service_timeout_s)
            if not scene.success:
                raise _Refused(f"the scene cannot be reset: {scene.message}")
            instruction, seed = goal.instruction or scene.instruction, scene.seed
            limit_s = limit_s or scene.time_limit_s
        if not instruction:
            raise _Refused(f"no instruction for task {goal.task!r}: give one in the goal")
        self._require_preparing()
        if handle.is_cancel_requested:
            self._machine.abort("cancelled")
            raise _Refused("cancelled while preparing")
        self._machine.describe(instruction, seed, limit_s or options.time_limit_s)
        self._task.publish(String(data=instruction))
        request = StartRecording.Request(
            episode_id=episode_id, robot=self._robot, task=goal.task, instruction=instruction
        )
        recording = await self._call(self._start, request, options.recorder_timeout_s)
        if not recording.success:
            raise _Refused(f"the recorder did not start: {recording.message}")
        # What the first decision sees must be in the recording: let every stream bring a sample.
        settled_s = time.monotonic() + options.settle_s
        while time.monotonic() < settled_s:
            await self._pause()
        self._require_preparing()
        self._machine.run()

    async def _run(self, handle: Any) -> None:
        """Watch the running episode until it has ended, whoever ends it."""
        machine, check_s = self._machine, 1.0 / self.parameters.check_hz
        question: Future | None = None
        asked_s = next_check_s = next_feedback_s = time.monotonic()
        while machine.state is State.RUNNING:
            now_s = time.monotonic()
            if question is not None and question.done():
                self._judge(question)
                question = None
            elif question is not None and now_s - asked_s > self.parameters.service_timeout_s:
                self.get_logger().warning("check_success does not answer", throttle_duration_sec=5.0)
                self._check.remove_pending_request(question)
                question = None
            if machine.state is State.RUNNING:
                self._end_if_due(handle)
            if self.parameters.detector and question is None and now_s >= next_check_s:
                if self._check.service_is_ready():
                    question, asked_s = self._check.call_async(CheckSuccess.Request()), now_s
                next_check_s = now_s + check_s
            if now_s >= next_feedback_s:
                self._give_feedback(handle)
                next_feedback_s = now_s + _FEEDBACK_S
            await self._pause()

    def _judge(self, question: Future) -> None:
        judgement = question.result()
        if judgement is not None and judgement.success:
            self._machine.judge(judgement.done, judgement.sub_step_scores)
        elif judgement is not None:
            self.get_logger().warning(f"no judgement: {judgement.message}", throttle_duration_sec=5.0)

    def _end_if_due(self, handle: Any) -> None:
        if handle.is_cancel_requested:
            self._machine.abort("cancelled")
        elif self._estop:
            self._machine.abort("emergency stop")
        else:
            self._machine.check_time()

    async def _finish(self, result: RunEpisode.Result) -> None:
        """Seal the recording; the recorder holds the bag open until the outcome is in it."""
        episode = self._machine.episode
        result.outcome = int(episode.outcome)
        result.sub_step_scores = list(episode.sub_step_scores)
        sealed = await self._call(self._stop, StopRecording.Request(), self.parameters.recorder_timeout_s)
        if not sealed.success:
            raise _Refused(f"the recording is not sealed: {sealed.message}")
        result.success, result.path, result.message = True, sealed.path, episode.end_reason
        self._last_problem = ""

    def _require_preparing(self) -> None:
        if self._machine.state is not State.PREPARING:
            raise _Refused("the episode node was stopped")

    # Speaking and listening --------------------------------------------------------------------------

    def _publish_state(self) -> None:
        if self._episode is None:
            return
        episode = self._machine.episode
        message = EpisodeState(
            state=int(self._machine.state),
            episode_id=episode.episode_id,
            robot=self._robot,
            task=episode.task,
            instruction=episode.instruction,
            outcome=int(episode.outcome),
            sub_step_scores=list(episode.sub_step_scores),
            outcome_source=episode.outcome_source,
            end_reason=episode.end_reason,
            seed=episode.seed,
        )
        message.header.stamp = self.get_clock().now().to_msg()
        self._episode.publish(message)

    def _give_feedback(self, handle: Any) -> None:
        machine = self._machine
        handle.publish_feedback(
            RunEpisode.Feedback(
                state=int(machine.state),
                episode_id=machine.episode.episode_id,
                elapsed_s=machine.elapsed_s,
                steps=self._steps,
            )
        )

    def _on_mode(self, message: ControlMode) -> None:
        self._estop = ControlMode.MODE_ESTOP in list(message.mode)

    def _on_action(self, message: ExecutedAction) -> None:
        if message.episode_id == self._machine.episode.episode_id:
            self._steps = message.step + 1

    def _on_label(
        self, request: LabelEpisode.Request, response: LabelEpisode.Response
    ) -> LabelEpisode.Response:
        current = self._machine.episode.episode_id
        episode_id = request.episode_id or current
        if request.outcome >= len(OUTCOMES):
            response.message = f"outcome {request.outcome}: EpisodeState knows 0 to {len(OUTCOMES) - 1}"
        elif not episode_id:
            response.message = "no episode is running; name the episode"
        elif episode_id == current and self._machine.state is State.RUNNING:
            source = request.source or "operator"
            self._machine.decide(Outcome(request.outcome), request.sub_step_scores, source)
            response.success, response.message = True, "the episode ends with this verdict"
        elif self._catalog is None:
            response.message = (
                "this robot has no catalog (parameter catalog): label the episode where it is stored"
            )
        else:
            self._label_later(self._catalog, episode_id, request, response)
        return response

    def _label_later(
        self,
        catalog: Catalog,
        episode_id: str,
        request: LabelEpisode.Request,
        response: LabelEpisode.Response,
    ) -> None:
        source = request.source or "operator"
        try:
            number = catalog.label(episode_id, OUTCOMES[request.outcome], source, request.sub_step_scores)
        except SQLAlchemyError as error:
            response.message = f"the catalog refused: {error}"
            return
        response.success, response.message = True, f"label {number}"

    # Waiting -----------------------------------------------------------------------------------------

    async def _call(self, client: Any, request: Any, timeout_s: float) -> Any:
        """Call a service without holding the executor. Raises `_Refused` if no answer comes in time."""
        deadline = time.monotonic() + timeout_s
        while not client.service_is_ready():
            if time.monotonic() > deadline:
                raise _Refused(f"nobody serves {client.srv_name}")
            await self._pause()
        future = client.call_async(request)
        while not future.done():
            if time.monotonic() > deadline:
                client.remove_pending_request(future)
                raise _Refused(f"{client.srv_name} did not answer within {timeout_s:g} s")
            await self._pause()
        return future.result()

    async def _pause(self) -> None:
        future = Future()
        timer = self.create_timer(_POLL_S, lambda: future.done() or future.set_result(None))
        try:
            await future
        finally:
            self.destroy_timer(timer)


def main(args: list[str] | None = None) -> int:
    return run_node(EpisodeNode, args)


if __name__ == "__main__":
    sys.exit(main())
