# SPDX-License-Identifier: Apache-2.0
"""Who may move the robot now, and what exactly is sent to it: the one place where commands are made.

The arbiter runs at `output_hz`. Once per policy step it takes the next action of the running chunk, then moves
there in a straight line (joint space) over the output ticks of the step, inside the robot's limits. Whenever
something it needs is missing it holds, and says why. It knows no ROS and no clock: times come in with each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

import numpy as np
from numpy.typing import NDArray

from lwd_policy.chunk_player import ChunkPlayer
from lwd_policy.embodiment import Embodiment

Array = NDArray[np.float64]


_PUT_ELSEWHERE = 0.02  # rad or m: further from the command than any tracking error at rest


class State(Enum):
    """What the robot does."""

    HOLD = "hold"
    POLICY = "policy"
    ESTOP = "estop"


class Event(Enum):
    """What an output tick finds (one per tick, in order of precedence), or what an operator pressed."""

    ESTOP_PRESSED = "e-stop pressed"
    ESTOP_RESET = "e-stop reset"
    JOINTS_STALE = "joint states stale"
    NO_EPISODE = "no episode running"
    DISARMED = "disarmed"
    NO_ACTION = "no action due"
    ACTION_DUE = "action due"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.HOLD, Event.ESTOP_PRESSED): State.ESTOP,
    (State.HOLD, Event.ESTOP_RESET): State.HOLD,
    (State.HOLD, Event.JOINTS_STALE): State.HOLD,
    (State.HOLD, Event.NO_EPISODE): State.HOLD,
    (State.HOLD, Event.DISARMED): State.HOLD,
    (State.HOLD, Event.NO_ACTION): State.HOLD,
    (State.HOLD, Event.ACTION_DUE): State.POLICY,
    (State.POLICY, Event.ESTOP_PRESSED): State.ESTOP,
    (State.POLICY, Event.ESTOP_RESET): State.POLICY,
    (State.POLICY, Event.JOINTS_STALE): State.HOLD,
    (State.POLICY, Event.NO_EPISODE): State.HOLD,
    (State.POLICY, Event.DISARMED): State.HOLD,
    (State.POLICY, Event.NO_ACTION): State.HOLD,
    (State.POLICY, Event.ACTION_DUE): State.POLICY,
    (State.ESTOP, Event.ESTOP_PRESSED): State.ESTOP,
    (State.ESTOP, Event.ESTOP_RESET): State.HOLD,
    (State.ESTOP, Event.JOINTS_STALE): State.ESTOP,
    (State.ESTOP, Event.NO_EPISODE): State.ESTOP,
    (State.ESTOP, Event.DISARMED): State.ESTOP,
    (State.ESTOP, Event.NO_ACTION): State.ESTOP,
    (State.ESTOP, Event.ACTION_DUE): State.ESTOP,
}


class Author(IntEnum):
    """Who decided a policy step; the values of `lwd_msgs/ExecutedAction`."""

    HOLD = 0
    POLICY = 1
    HUMAN = 2
    EXPERT = 3
    RAMP = 4


@dataclass(frozen=True)
class ArbiterTiming:
    """Rates and time-outs. `output_hz` must be an integer multiple of `policy_step_hz`."""

    policy_step_hz: float = 10.0
    output_hz: float = 50.0
    joint_timeout_s: float = 0.2  # older joint states mean a dead driver or bus
    max_jump: float = 0.5  # rad or m: a command never leads the measured joint by more than this

    def __post_init__(self) -> None:
        for name in ("policy_step_hz", "output_hz", "joint_timeout_s", "max_jump"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, is {value}")
        if self.ticks_per_step < 1 or abs(self.output_hz / self.policy_step_hz - self.ticks_per_step) > 1e-9:
            raise ValueError(
                f"output_hz ({self.output_hz:g}) must be an integer multiple of "
                f"policy_step_hz ({self.policy_step_hz:g})"
            )

    @property
    def ticks_per_step(self) -> int:
        return round(self.output_hz / self.policy_step_hz)

    @property
    def tick_s(self) -> float:
        return 1.0 / self.output_hz


@dataclass(frozen=True)
class Chunk:
    """A chunk as it is offered. `positions` [H, n] absolute joint targets, rad or m, columns in `joint_names`."""

    episode_id: str
    chunk_id: int
    policy_version: int
    policy_digest: str
    observation_step: int  # last policy step executed when the observation was assembled; -1: none
    step_s: float
    joint_names: tuple[str, ...]
    positions: Array
    author: Author = Author.POLICY  # EXPERT: a scripted demonstrator drives through the same path


@dataclass(frozen=True)
class ExecutedStep:
    """What happened over one policy step. `positions` [n]: the last command sent within it."""

    episode_id: str
    step: int
    positions: Array
    author: Author
    policy_version: int  # -1 unless the policy is the author, likewise the next three fields
    policy_digest: str
    chunk_id: int
    chunk_index: int
    clipped: bool
    proposed: Array | None  # [n] what the policy proposed, even where the step ended as a hold


@dataclass(frozen=True)
class Output:
    """Result of one tick. `positions` [n] is None only before the first joint state."""

    positions: Array | None
    state: State
    reason: str
    clipped: bool
    executed: ExecutedStep | None


@dataclass(frozen=True)
class _Action:
    """The action of the running policy step."""

    target: Array
    index: int
    chunk: Chunk


class Arbiter:
    """See the module's text. Times are integer ns of any one steady clock; joints are in the embodiment's order."""

    def __init__(self, embodiment: Embodiment, timing: ArbiterTiming, auto_arm: bool = False) -> None:
        self._joint_names = tuple(embodiment.joint_names)
        self._lower = np.asarray(embodiment.lower, dtype=np.float64)
        self._upper = np.asarray(embodiment.upper, dtype=np.float64)
        self._max_step = np.asarray(embodiment.max_velocity, dtype=np.float64) * timing.tick_s
        self._timing = timing
        self._joint_timeout_ns = round(timing.joint_timeout_s * 1e9)

        self.state = State.HOLD
        self.reason = "no joint state received yet"
        self._event = Event.JOINTS_STALE
        self.armed = auto_arm
        self._estop_pressed = False

        self._measured: Array | None = None
        self._measured_ns = 0
        self._output: Array | None = None  # last command
        self._start = self._lower  # command at the start of the policy step

        self.episode_id = ""
        self.step = 0  # the policy step under way
        self._tick = 0  # output tick within it
        self._action: _Action | None = None
        self._chunk: Chunk | None = None  # the one followed
        self._policy: tuple[int, str] | None = None
        self._begin_episode("")

    # Inputs ------------------------------------------------------------------------------------------

    def joints(self, positions: Array, now_ns: int) -> str | None:
        """Take measured joints [n]. Returns why they were refused; refused joints age like missing ones."""
        positions = np.asarray(positions, dtype=np.float64)
        if positions.shape != self._lower.shape:
            return f"joint state has {positions.size} positions, the robot has {self._lower.size} joints"
        if not np.isfinite(positions).all():
            return "joint state is not finite"
        self._measured = positions
        self._measured_ns = now_ns
        return None

    def episode_started(self, episode_id: str, first_step: int = 0) -> None:
        """An episode runs from now on; its first step begins with the next tick. A known id changes nothing.

        `first_step` > 0: the episode was running before this arbiter was; step numbers must not come twice.
        """
        if episode_id != self.episode_id:
            self._begin_episode(episode_id, first_step)

    def episode_ended(self) -> None:
        """No episode runs: hold. The step under way is not recorded."""
        self._begin_episode("")

    def scene_prepared(self) -> None:
        """The scene is being prepared: somebody else may move the arms now, and they are held where they are put.

        Without this the arms would be driven back, at the highest speed, to where the episode before had ended.
        """
        self._begin_episode("")
        self._preparing = True

    def restart(self) -> None:
        """Commands had ceased: begin again from the measured joints, disarmed. An e-stop stays latched."""
        self.armed = False
        self._transition(Event.DISARMED, "disarmed; waiting to be armed")
        self._measured = self._output = None

    def arm(self) -> str | None:
        """Allow motion. Returns why it was refused."""
        if self.state == State.ESTOP:
            return "the e-stop is latched; reset it first"
        self.armed = True
        return None

    def disarm(self) -> None:
        """Hold until `arm`."""
        self.armed = False

    def press_estop(self) -> None:
        """Stop now, latch, and disarm."""
        self._estop_pressed = True
        self.armed = False
        self._transition(Event.ESTOP_PRESSED, "e-stop pressed")

    def release_estop(self) -> None:
        """The button is out again; the stop stays latched until `reset_estop`."""
        self._estop_pressed = False

    def reset_estop(self) -> str | None:
        """Leave the latched stop, into a disarmed hold. Returns why it was refused."""
        if self._estop_pressed:
            return "the e-stop is still pressed"
        if self.state == State.ESTOP:
            self._transition(Event.ESTOP_RESET, "e-stop reset; waiting to be armed")
        return None

    def offer(self, chunk: Chunk) -> str | None:
        """Follow this chunk from the next policy step on. Returns why it was refused; the running one then goes on."""
        refusal = self._refusal(chunk)
        if refusal is None:
            if chunk.author == Author.POLICY:
                self._policy = (chunk.policy_version, chunk.policy_digest)
            self._chunk = chunk
            self._player.offer(chunk.positions, chunk.observation_step)
        return refusal

    # Output ------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> Output:
        """Advance by one output tick and return the command to send."""
        if self._measured is None:
            if self.state == State.HOLD:
                self.reason = "no joint state received yet"
            return Output(None, self.state, self.reason, False, None)
        if self._output is None:
            self._output = np.clip(self._measured, self._lower, self._upper)

        stale = now_ns - self._measured_ns > self._joint_timeout_ns
        moved = self._preparing and float(np.abs(self._measured - self._output).max()) > _PUT_ELSEWHERE
        if moved and not stale and self.state == State.HOLD:
            self._output = np.clip(self._measured, self._lower, self._upper)
        first_tick = self._tick == 0
        if first_tick:
            self._start = self._output
            self._step_clipped = False
            self._interrupted = False
            self._action = None
        event, reason = self._find(stale, first_tick)
        self._transition(event, reason)

        if self.state == State.POLICY and self._action is not None:
            fraction = (self._tick + 1) / self._timing.ticks_per_step
            wanted = self._start + fraction * (self._action.target - self._start)
        else:
            self._interrupted = True
            wanted = self._output
        self._output = self._limit(self._output, wanted, None if stale else self._measured)
        clipped = bool((np.abs(self._output - wanted) > 1e-9).any())
        self._step_clipped |= clipped

        executed = None
        self._tick += 1
        if self._tick == self._timing.ticks_per_step:
            self._tick = 0
            if self.episode_id:
                executed = self._executed()
                self.step += 1
        return Output(self._output, self.state, self.reason, clipped, executed)

    # Helpers -----------------------------------------------------------------------------------------

    def _begin_episode(self, episode_id: str, first_step: int = 0) -> None:
        self.episode_id = episode_id
        self._preparing = False
        self.step = first_step
        self._tick = 0
        self._action = None
        self._step_clipped = False
        self._interrupted = False
        self._policy = None  # version and digest: fixed by the first chunk accepted
        self._drop_chunks(observed_from=first_step - 1)

    def _drop_chunks(self, observed_from: int) -> None:
        """Forget the running chunk; accept only chunks observed when `observed_from` was executed or later."""
        self._player = ChunkPlayer()
        self._chunk = None
        self._observed_from = observed_from

    def _find(self, stale: bool, first_tick: bool) -> tuple[Event, str]:
        """The event of this tick and its reason; takes the next action at the first tick of a policy step."""
        if self.state == State.ESTOP:
            return Event.ESTOP_PRESSED, self.reason
        if stale:
            return Event.JOINTS_STALE, f"joint states are stale: none for {self._timing.joint_timeout_s:g} s"
        if not self.episode_id:
            return Event.NO_EPISODE, "no episode is running"
        if not self.armed:
            return Event.DISARMED, "disarmed; waiting to be armed"
        if first_tick:
            self._action = self._next_action()
        elif self._interrupted:
            waiting = self._event == Event.NO_ACTION
            return Event.NO_ACTION, self.reason if waiting else "waiting for the next policy step"
        if self._action is not None:
            return Event.ACTION_DUE, f"following {self._action.chunk.author.name.lower()}"
        if self._chunk is not None:
            return Event.NO_ACTION, "the last chunk is exhausted; waiting for the policy"
        if self._observed_from >= 0:
            return Event.NO_ACTION, "waiting for a chunk observed after the hold"
        return Event.NO_ACTION, "waiting for the first chunk of the episode"

    def _next_action(self) -> _Action | None:
        chunk = self._chunk
        if chunk is None or self.step - chunk.observation_step > len(chunk.positions):
            return None  # none, or one whose time has passed: a chunk expires with its own horizon
        following = self._player.next(self.step)
        if following is None:
            return None
        target, index = following
        return _Action(target, index, chunk)

    def _transition(self, event: Event, reason: str) -> None:
        """Apply the table. Leaving POLICY for anything but a lack of actions drops the chunk: its tail was
        planned for a robot that did not stop (the arm would snap to where it should have been by now)."""
        before, self.state = self.state, TRANSITIONS[self.state, event]
        self._event, self.reason = event, reason
        if before == State.POLICY and self.state != State.POLICY:
            self._interrupted = True
            if event != Event.NO_ACTION:
                self._drop_chunks(observed_from=self.step)

    def _limit(self, previous: Array, wanted: Array, measured: Array | None) -> Array:
        """Joint limits and distance from the measured joints bound the goal, the velocity bounds the way there:
        applied last, it also bounds the return to a robot that was pushed away from a held command."""
        goal = wanted
        if measured is not None:
            jump = self._timing.max_jump
            goal = np.minimum(np.maximum(goal, measured - jump), measured + jump)
        goal = np.minimum(np.maximum(goal, self._lower), self._upper)
        limited: Array = np.minimum(np.maximum(goal, previous - self._max_step), previous + self._max_step)
        return limited

    def _executed(self) -> ExecutedStep:
        assert self._output is not None
        action = self._action
        author = Author.HOLD if action is None or self._interrupted else action.chunk.author
        by_policy = author == Author.POLICY
        chunk = action.chunk if action is not None and by_policy else None
        return ExecutedStep(
            episode_id=self.episode_id,
            step=self.step,
            positions=self._output,
            author=author,
            policy_version=chunk.policy_version if chunk else -1,
            policy_digest=chunk.policy_digest if chunk else "",
            chunk_id=chunk.chunk_id if chunk else 0,
            chunk_index=action.index if action is not None and chunk else -1,
            clipped=self._step_clipped,
            proposed=action.target if action is not None and action.chunk.author == Author.POLICY else None,
        )

    def _refusal(self, chunk: Chunk) -> str | None:
        why = self._why_not(chunk)
        return None if why is None else f"chunk {chunk.chunk_id} refused: {why}"

    def _why_not(self, chunk: Chunk) -> str | None:
        n = len(self._joint_names)
        policy = (chunk.policy_version, chunk.policy_digest)
        if not self.episode_id:
            return "no episode is running"
        if chunk.episode_id != self.episode_id:
            return f"it belongs to episode {chunk.episode_id or '(none)'}, running is {self.episode_id}"
        if chunk.joint_names != self._joint_names:
            return f"its joints {list(chunk.joint_names)} are not the robot's {list(self._joint_names)}"
        if chunk.positions.ndim != 2 or chunk.positions.shape[1] != n or not len(chunk.positions):
            return f"its positions have shape {chunk.positions.shape}, not [H, {n}]"
        if not np.isfinite(chunk.positions).all():
            return "its positions are not finite"
        if not abs(chunk.step_s * self._timing.policy_step_hz - 1.0) < 1e-6:
            return f"its step is {chunk.step_s:g} s, the robot's {1 / self._timing.policy_step_hz:g} s"
        if chunk.author == Author.POLICY and self._policy not in (None, policy):
            return f"policy {policy[0]} ({policy[1][:8]}) is not the one this episode started with"
        if chunk.observation_step >= self.step:
            return f"it was observed after step {chunk.observation_step}, which is not executed yet"
        if chunk.observation_step < self._observed_from:
            return f"it was observed before the robot was held in step {self._observed_from}"
        if self._chunk is not None and chunk.observation_step < self._chunk.observation_step:
            return f"it is older than the running chunk {self._chunk.chunk_id}"
        return None
