# SPDX-License-Identifier: Apache-2.0
"""Simulated robots without ROS, faster than real time: the same world, observation, policy and arbiter code, and
the same episode format. The robots of one process advance in lockstep, so that one forward pass serves them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lwd_fleet.data.episode import EpisodeWriter, mint_episode_id
from lwd_fleet.data.messages import create, serialise, to_stamp
from lwd_fleet.robot.arbiter import Arbiter, ArbiterTiming, Author, Chunk, ExecutedStep
from lwd_fleet.sim import play
from lwd_fleet.sim.experts import Expert
from lwd_fleet.sim.operator import Operator, OperatorLimits
from lwd_fleet.sim.shift import Shift
from lwd_fleet.sim.world import World
from lwd_policy.chunk_policy import ChunkPolicy, PolicyChunk
from lwd_policy.embodiment import Embodiment
from lwd_policy.observation import Observation, ObservationBuffer, ObservationSpec, decode_message

_EPOCH_NS = 1_700_000_000 * 1_000_000_000  # where simulated time starts
_JPEG_QUALITY = 90
_RUNNING, _ENDED = 2, 3  # EpisodeState STATE_*
_SUCCESS, _FAILURE = 1, 2  # EpisodeState OUTCOME_*


@dataclass(frozen=True)
class EpisodeRequest:
    """One episode to run: its task and the seed of its scene (and of the policy's noise)."""

    task: str
    seed: int


@dataclass(frozen=True)
class EpisodeResult:
    """How it ended. `path` is the sealed episode, None where nothing was recorded."""

    request: EpisodeRequest
    episode_id: str
    instruction: str
    success: bool
    sub_step_scores: tuple[float, ...]
    steps: int
    human_steps: int  # of them, by a simulated operator
    duration_s: float  # simulated
    path: Path | None


class HeadlessRobot:
    """One simulated robot from reset to outcome; the part of `sim_robot`, `arbiter`, `episode` and `recorder`."""

    def __init__(
        self,
        name: str,
        world: World,
        embodiment: Embodiment,
        timing: ArbiterTiming,
        spec: ObservationSpec,
        request: EpisodeRequest,
        spool: Path | None,
    ) -> None:
        """Resets the world and records into `spool` (None: nothing is recorded)."""
        self.request = request
        self.world = world
        world.reset(request.seed)
        self.episode_id = mint_episode_id()
        self._name = name
        self._embodiment = embodiment
        self._timing = timing
        self._buffer = ObservationBuffer(spec)
        self._streams = {stream.topic: stream for stream in spec.streams}
        self._cameras = [s.name.removeprefix("camera_") for s in spec.streams if s.kind == "image"]
        self._writer = (
            None if spool is None else EpisodeWriter(spool, self.episode_id, name, source="headless")
        )
        self._now_ns = _EPOCH_NS
        self._chunks = 0
        self._human_steps = 0
        self._decided_at: int | None = None  # step of the policy's last decision; None: it has to decide
        self._first_observed_ns: int | None = None
        self._arbiter = Arbiter(embodiment, timing, auto_arm=True)
        self._emit("task", "std_msgs/msg/String", data=world.instruction)
        self._sense()
        self._emit_state(_RUNNING)
        self._arbiter.episode_started(self.episode_id)

    @property
    def step(self) -> int:
        """Policy steps executed."""
        return self._arbiter.step

    @property
    def finished(self) -> bool:
        """Whether the task is done or its time is over."""
        return self.world.done() or self.world.time_s >= self.world.time_limit_s - 1e-9

    def needs_decision(self, execute_steps: int) -> bool:
        """Whether the policy's chunk has been executed, or somebody else drove since."""
        return self._decided_at is None or self.step - self._decided_at >= execute_steps

    def sense(self) -> None:
        """Take and record what every sensor says now."""
        if self.step:
            self._sense()

    def observe(self) -> list[Observation]:
        """Sense, and return what a policy decides on: [history] observations, oldest first."""
        self.sense()
        if self._first_observed_ns is None:
            self._first_observed_ns = self._now_ns
        return self._buffer.context(self._now_ns, self._first_observed_ns)

    def follow(
        self, chunk: PolicyChunk, observations: Sequence[Observation], version: int, digest: str
    ) -> None:
        """Offer a chunk of the policy to the arbiter, and record it with what it was decided on."""
        self._decided_at = self.step
        self._chunks += 1
        names = self._embodiment.joint_names
        self._offer(chunk.positions, Author.POLICY, version, digest)
        self._emit(
            "policy/action_chunk",
            "lwd_msgs/msg/ActionChunk",
            header=self._header(),
            episode_id=self.episode_id,
            chunk_id=self._chunks,
            policy_version=version,
            policy_digest=digest,
            observations=[
                create(
                    "lwd_msgs/msg/ObservationStamps",
                    stamp=to_stamp(observation.time_ns),
                    stream_names=list(observation.stamps),
                    stream_stamps=[to_stamp(stamp) for stamp in observation.stamps.values()],
                )
                for observation in observations
            ],
            observation_step=self.step - 1,
            step_s=1.0 / self._timing.policy_step_hz,
            horizon=len(chunk.positions),
            joint_names=list(names),
            positions=np.ascontiguousarray(chunk.positions).reshape(-1),
            value=float(chunk.value),
        )

    def demonstrate(self, target: NDArray[np.float64]) -> None:
        """Let a scripted demonstrator command the next policy step. target: [n] rad or m."""
        self._chunks += 1
        self._offer(target[None], Author.EXPERT, -1, "")

    def correct(self, target: NDArray[np.float64]) -> None:
        """Let an operator command the next policy step; the policy decides anew after it. target: [n] rad or m."""
        self._decided_at = None
        self._human_steps += 1
        self._chunks += 1
        self._offer(target[None], Author.HUMAN, -1, "")

    def advance(self) -> None:
        """One policy step of the arbiter and the world."""
        executed = None
        for _ in range(self._timing.ticks_per_step):
            self._arbiter.joints(self.world.joint_positions, self._now_ns)
            output = self._arbiter.tick(self._now_ns)
            assert output.positions is not None
            self.world.step(output.positions)
            self._now_ns += round(1e9 / self._timing.output_hz)
            executed = output.executed or executed
        assert executed is not None
        self._emit_joints()
        self._emit_executed(executed)

    def finish(self) -> EpisodeResult:
        """Write the outcome and seal the episode."""
        success = self.world.done()
        self._emit_state(_ENDED, _SUCCESS if success else _FAILURE)
        path = None if self._writer is None else self._writer.seal().path
        return EpisodeResult(
            request=self.request,
            episode_id=self.episode_id,
            instruction=self.world.instruction,
            success=success,
            sub_step_scores=tuple(self.world.sub_step_scores()),
            steps=self.step,
            human_steps=self._human_steps,
            duration_s=self.world.time_s,
            path=path,
        )

    def _offer(self, positions: NDArray[np.float64], author: Author, version: int, digest: str) -> None:
        refusal = self._arbiter.offer(
            Chunk(
                episode_id=self.episode_id,
                chunk_id=self._chunks,
                policy_version=version,
                policy_digest=digest,
                observation_step=self.step - 1,
                step_s=1.0 / self._timing.policy_step_hz,
                joint_names=self._embodiment.joint_names,
                positions=positions,
                author=author,
            )
        )
        if refusal is not None:
            raise RuntimeError(f"{self._name}, episode {self.episode_id}: {refusal}")

    def _sense(self) -> None:
        for camera in self._cameras:
            image = cv2.cvtColor(self.world.render(camera), cv2.COLOR_RGB2BGR)
            _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            self._emit(
                f"camera_{camera}/image_raw/compressed",
                "sensor_msgs/msg/CompressedImage",
                header=self._header(f"camera_{camera}_optical_frame"),
                format="rgb8; jpeg compressed bgr8",
                data=jpeg.reshape(-1),
            )
        if "keypoints" in self._streams:
            self._emit(
                "keypoints",
                "geometry_msgs/msg/PoseArray",
                header=self._header("base_link"),
                poses=[_pose(point) for point in self.world.keypoints()],
            )
        self._emit_joints()

    def _emit_joints(self) -> None:
        self._emit(
            "joint_states",
            "sensor_msgs/msg/JointState",
            header=self._header(),
            name=list(self._embodiment.joint_names),
            position=self.world.joint_positions,
            velocity=self.world.joint_velocities,
        )

    def _emit_executed(self, step: ExecutedStep) -> None:
        arms = [arm.name for arm in self._embodiment.arms]
        self._emit(
            "executed_action",
            "lwd_msgs/msg/ExecutedAction",
            header=self._header(),
            episode_id=step.episode_id,
            step=step.step,
            joint_names=list(self._embodiment.joint_names),
            positions=step.positions,
            arms=arms,
            author=np.full(len(arms), int(step.author), np.uint8),
            policy_version=step.policy_version,
            policy_digest=step.policy_digest,
            chunk_id=step.chunk_id,
            chunk_index=step.chunk_index,
            clipped=step.clipped,
            proposed_policy=np.zeros(0) if step.proposed is None else step.proposed,
        )

    def _emit_state(self, state: int, outcome: int = 0) -> None:
        self._emit(
            "episode",
            "lwd_msgs/msg/EpisodeState",
            header=self._header(),
            state=state,
            episode_id=self.episode_id,
            robot=self._name,
            task=self.request.task,
            instruction=self.world.instruction,
            outcome=outcome,
            sub_step_scores=np.asarray(self.world.sub_step_scores(), np.float32),
            outcome_source="detector" if outcome else "",
            end_reason={0: "", _SUCCESS: "the task is done", _FAILURE: "time limit"}[outcome],
            seed=self.request.seed,
        )

    def _emit(self, topic: str, type_name: str, **fields: Any) -> None:
        """Make a message, give it to the policy's buffer and to the recording, whichever want it."""
        stream = self._streams.get(topic)
        if stream is None and self._writer is None:
            return
        message = create(type_name, **fields)
        if stream is not None:
            self._buffer.add(
                stream.name, self._now_ns, decode_message(stream, message, self._embodiment.joint_names)
            )
        if self._writer is not None:
            name = f"/{self._name}/{topic}"
            self._writer.write(name, type_name, serialise(message), self._now_ns, self._now_ns)

    def _header(self, frame: str = "") -> Any:
        return create("std_msgs/msg/Header", stamp=to_stamp(self._now_ns), frame_id=frame)


@dataclass(frozen=True)
class HeadlessSetup:
    """What all headless robots of a run share."""

    embodiment: Embodiment
    timing: ArbiterTiming
    spec: ObservationSpec
    shift: Shift = Shift()  # noqa: RUF009 - frozen
    image_size: int = 96  # px
    spool: Path | None = None  # None: episodes are run but not recorded
    robot: str = "sim_headless"


def run_policy(
    setup: HeadlessSetup,
    policy: ChunkPolicy,
    version: int,
    digest: str,
    requests: Iterable[EpisodeRequest],
    robots: int = 8,
    assistance: OperatorLimits | None = None,
) -> Iterator[EpisodeResult]:
    """Run the requests with the policy on `robots` robots in lockstep; results come as episodes end.

    Without assistance, an episode's outcome depends on its request only, not on its neighbours in the batch. With it,
    every `assistance.robots` robots have an operator who takes over from the policy where it does not get on.
    """
    execute = policy.action_spec.execute_steps
    pending = iter(requests)
    slots: list[HeadlessRobot | None] = [None] * robots
    worlds: list[dict[str, World]] = [{} for _ in range(robots)]
    operators = (
        []
        if assistance is None
        else [(first, Operator(assistance, first)) for first in range(0, robots, assistance.robots)]
    )
    while True:
        for slot, robot in enumerate(slots):
            if robot is None and (request := next(pending, None)) is not None:
                world = worlds[slot].setdefault(
                    request.task, World(request.task, setup.shift, setup.image_size)
                )
                slots[slot] = _robot(setup, world, request)
                policy.begin_episode(slot, request.seed)
        working = {slot: robot for slot, robot in enumerate(slots) if robot is not None}
        if not working:
            return
        helped = set()
        for first, operator in operators:
            index = operator.attend(slots[first : first + operator.limits.robots])
            if index is not None:
                helped.add(first + index)
                robot = working[first + index]
                robot.sense()
                robot.correct(operator.command(robot))
        due = [
            slot for slot, robot in working.items() if slot not in helped and robot.needs_decision(execute)
        ]
        if due:
            contexts = [working[slot].observe() for slot in due]
            for slot, chunk, context in zip(due, policy.chunk(contexts, due), contexts, strict=True):
                working[slot].follow(chunk, context, version, digest)
        for slot, robot in working.items():
            robot.advance()
            if robot.finished:
                slots[slot] = None
                yield robot.finish()


def run_expert(
    setup: HeadlessSetup,
    requests: Iterable[EpisodeRequest],
    noise: float = 1.0,
    observe_every: int = 5,
    plays: bool = False,
) -> Iterator[EpisodeResult]:
    """Run the requests with the scripted expert, observing every `observe_every` policy steps. plays: it does not do
    the task, but explores what goes wrong (`play.py`)."""
    worlds: dict[str, World] = {}
    for request in requests:
        world = worlds.setdefault(request.task, World(request.task, setup.shift, setup.image_size))
        robot = _robot(setup, world, request)
        expert = Expert(
            world, np.random.default_rng(request.seed), noise, scripts=play.scripts if plays else None
        )
        while not robot.finished:
            if robot.step % observe_every == 0:
                robot.sense()
            robot.demonstrate(expert.command())
            robot.advance()
        yield robot.finish()


def _robot(setup: HeadlessSetup, world: World, request: EpisodeRequest) -> HeadlessRobot:
    return HeadlessRobot(setup.robot, world, setup.embodiment, setup.timing, setup.spec, request, setup.spool)


def _pose(point: Sequence[float] | NDArray[np.float32]) -> Any:
    x, y, z = (float(value) for value in point)
    return create(
        "geometry_msgs/msg/Pose",
        position=create("geometry_msgs/msg/Point", x=x, y=y, z=z),
        orientation=create("geometry_msgs/msg/Quaternion", w=1.0),
    )
