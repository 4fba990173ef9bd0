# SPDX-License-Identifier: Apache-2.0
"""One bout: methods that share a seed, a cloned policy and critics in training, each judged as it goes.

The value and the critics never ask the policy anything, so all methods of a bout learn from the very same ones, on the
same batches; a bout with other methods and the same seed sees them too. Each method's processor time is counted on its
own; what is shared counts for every method that uses it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.ogbench_play.batches import ChunkSampler
from experiments.ogbench_play.snapshot import Parts, restore, snapshot
from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.divl import DivlConfig
from lwd_learner.extraction import Extraction, ExtractionConfig, make_extraction
from lwd_learner.extraction.cloning import Cloning
from lwd_learner.extraction.head import Head
from lwd_learner.extraction.headed import HeadConfig, acting_noise_steps, make_head
from lwd_learner.flow_actor import FlowActor, fast_products
from lwd_learner.state_networks import StateFlow
from lwd_learner.training_state import load_state, save_state, saved_states
from lwd_learner.value_learner import Metrics, ValueLearner

GAMMA = 0.99  # of one control step, as published for these tasks
STEP_S = 0.05  # one control step
CPU = torch.device("cpu")

Context = Callable[[NDArray[np.float32]], Tensor]  # observations [..., O] -> as networks see them
FlowKey = tuple[ExtractionConfig, int | None]  # how a flow is trained, on how many rows of a batch
Act = Callable[[Tensor, Tensor], Tensor]  # context [1, C], noise [1, N, A] -> chunk [1, H, A] in [-1, 1]


class Task(Protocol):
    """What a bout is about, `tasks.SingleTask` but for tests."""

    environment: str
    index: int
    name: str

    def succeeds(self, act: Act, context: Context, noise_steps: int, seed: int) -> bool:
        """One episode; noise_steps: N of the noise that `act` wants."""


@dataclass(frozen=True)
class Harness:
    """What all methods have in common."""

    width: int = 256  # units of every hidden layer
    layers: int = 3  # hidden layers of the flow, the value and the critics
    horizon: int = 5  # control steps of a chunk, executed without looking, as published for manipulation
    batch: int = 256  # chunks
    policy_rate: float = 3e-4  # Adam, as published
    critic_rate: float = 3e-4  # Adam, as published
    grad_norm_max: float = 1.0  # of each network, as published
    critics: int = 2  # heads; the published code has 10
    tau_base: float = 0.9  # quantile of V: play rarely does what a task asks for
    clone_updates: int = 20_000  # of the policy that every method starts from; the critics learn along
    updates: int = 30_000  # of every method after that
    evaluate_every: int = 5_000  # updates
    episodes: int = 50  # of one evaluation

    @property
    def divl(self) -> DivlConfig:
        return DivlConfig(gamma_per_second=GAMMA ** (1 / STEP_S), tau_base_offline=self.tau_base)

    @property
    def critic(self) -> CriticConfig:
        return CriticConfig(heads=self.critics, width=self.width, layers=self.layers, chunk_encoder="flat")


@dataclass(frozen=True)
class Entry:
    """A method with its tuned setting."""

    method: str
    setting: str
    extraction: ExtractionConfig  # how its flow is trained
    head: HeadConfig | None = None  # what acts in the flow's place, and learns on top of it
    rows: int | None = None  # of the batch that the flow's step uses; None: all
    head_rows: int | None = None  # ... and the head's step

    @property
    def name(self) -> str:
        return f"{self.method}-{self.setting}" if self.setting else self.method

    @property
    def flow(self) -> FlowKey:
        """Entries with equal ones share it."""
        return self.extraction, self.rows


@dataclass
class Clock:
    """Processor and wall seconds spent inside `running`."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu_s += time.process_time() - cpu
        self.wall_s += time.perf_counter() - wall


@dataclass
class Flow:
    """One flow policy in training."""

    actor: FlowActor
    extraction: Extraction
    rows: int | None
    clock: Clock = field(default_factory=Clock)

    def update(self, batch: Batch) -> Metrics:
        with self.clock.running(), fast_products():
            return self.extraction.update(batch.first(self.rows))


@dataclass
class Competitor:
    """One method: a flow that may be shared, as heads do not touch it, and its own head. curve: a point per evaluation."""

    entry: Entry
    flow: Flow
    head: Head | None
    noise: torch.Generator | None  # of the head
    clock: Clock = field(default_factory=Clock)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def update(self, batch: Batch) -> Metrics:
        if self.head is None:
            return {}
        with self.clock.running(), fast_products():
            return self.head.update(batch.first(self.entry.head_rows))

    @property
    def act(self) -> Act:
        return self.flow.extraction.act if self.head is None else self.head.act

    @property
    def noise_steps(self) -> int:
        """N of the noise [B, N, A] that `act` wants."""
        return acting_noise_steps(self.entry.head, self.flow.actor.chunk[0])


class Bout:
    """Trains `entries` on one task with one seed."""

    def __init__(
        self, harness: Harness, task: Task, sampler: ChunkSampler, seed: int, entries: tuple[Entry, ...]
    ) -> None:
        self.harness, self.task, self.sampler, self.seed = harness, task, sampler, seed
        self.chunk = (harness.horizon, sampler.action_dim)
        of_values = partial(torch.optim.Adam, lr=harness.critic_rate, fused=True)
        self.values = ValueLearner(
            sampler.context_dim,
            *self.chunk,
            harness.divl,
            harness.critic,
            of_values,
            harness.grad_norm_max,
            CPU,
            seed,
        )
        self.batches = torch.Generator().manual_seed(seed + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = StateFlow(sampler.context_dim, *self.chunk, harness.width, harness.layers)
        self.cloned = self._actor(flow)
        self.clocks = {"clone": Clock(), "values": Clock()}
        self.updates = 0  # of the competitors
        self.start: dict[str, Any] = {}  # the cloned policy's evaluation
        self.flows: dict[FlowKey, Flow] = {}
        self.competitors = [self._competitor(entry) for entry in entries]

    def run(self, folder: Path, start: Path, evaluated: Callable[[Competitor], None]) -> None:
        """Train to the end. A state is kept below `folder` at each evaluation, and continued from; `start` is where
        all bouts of this task and seed keep the end of cloning. evaluated: called when a method's curve has grown."""
        if saved := saved_states(folder):
            self._load(saved[-1])
        else:
            self._clone(start)
        for competitor in self.competitors:
            evaluated(competitor)
        while self.updates < self.harness.updates:
            batch = self.sampler.sample(self.harness.batch, self.batches)
            judged = self._judge(batch)
            of_flows = {key: flow.update(batch) for key, flow in self.flows.items()}
            of_heads = [competitor.update(batch) for competitor in self.competitors]
            self.updates += 1
            if self.updates % self.harness.evaluate_every == 0:
                for competitor, own in zip(self.competitors, of_heads, strict=True):
                    self._evaluate(competitor, judged, of_flows[competitor.entry.flow] | own)
                    evaluated(competitor)
                self._save(folder)

    def result(self, competitor: Competitor) -> dict[str, Any]:
        """What is kept of a method, for JSON."""
        return {
            "environment": self.task.environment,
            "task": self.task.index,
            "seed": self.seed,
            "method": competitor.entry.method,
            "setting": competitor.entry.setting,
            "extraction": asdict(competitor.entry.extraction),
            "head": None if competitor.entry.head is None else asdict(competitor.entry.head),
            "rows": {"flow": competitor.entry.rows, "head": competitor.entry.head_rows},
            "harness": asdict(self.harness),
            "curve": [self.start, *competitor.curve],
        }

    # --- parts ---------------------------------------------------------------------------------------------

    def _actor(self, flow: torch.nn.Module) -> FlowActor:
        make = partial(torch.optim.Adam, lr=self.harness.policy_rate, fused=True)
        return FlowActor(flow, *self.chunk, make, self.harness.grad_norm_max, CPU, self.seed)

    def _competitor(self, entry: Entry) -> Competitor:
        if entry.flow not in self.flows:
            actor = self._actor(copy.deepcopy(self.cloned.expert))
            extraction = make_extraction(entry.extraction, actor, self.values)
            self.flows[entry.flow] = Flow(actor, extraction, entry.rows)
        flow = self.flows[entry.flow]
        if entry.head is None:
            return Competitor(entry, flow, None, None)
        # The flow must not see from its noise whether there are heads on it.
        beside = flow.actor.beside(self.seed + 2)
        return Competitor(
            entry, flow, make_head(entry.head, flow.extraction, beside, self.values), beside.noise
        )

    def _judge(self, batch: Batch) -> Metrics:
        with self.clocks["values"].running(), fast_products():
            return self.values.update(batch, self.harness.tau_base)

    def _clone(self, folder: Path) -> None:
        """The policy that all start from, critics beside it; read from `folder` if it is there, else kept there."""
        if saved := saved_states(folder):
            tensors, record = load_state(saved[-1])
            self._check(record, saved[-1])
            restore(self._shared_parts(), tensors)
            self._restore_shared(record)
        else:
            cloning = Cloning(self.cloned, self.values)
            for _ in range(self.harness.clone_updates):
                batch = self.sampler.sample(self.harness.batch, self.batches)
                self._judge(batch)
                with self.clocks["clone"].running():
                    cloning.update(batch)
            act = partial(self.cloned.sample, self.cloned.expert)
            self.start = self._point(act, self.harness.horizon, [self.clocks["clone"]])
            save_state(folder, 0, snapshot(self._shared_parts()), self._shared_record(), keep=1)
        for flow in self.flows.values():
            flow.actor.expert.load_state_dict(self.cloned.expert.state_dict())
            flow.actor.freeze_reference()
            flow.extraction.restart()
        for competitor in self.competitors:
            if competitor.head is not None:
                competitor.head.restart()

    def _evaluate(self, competitor: Competitor, judged: Metrics, own: Metrics) -> None:
        clocks = [self.clocks["clone"], competitor.flow.clock, competitor.clock]
        if competitor.entry.method != "bc":
            clocks.append(self.clocks["values"])
        point = self._point(competitor.act, competitor.noise_steps, clocks)
        for name, metrics in (("values", judged), ("policy", own)):
            point[name] = {key: _number(value) for key, value in metrics.items()}
        competitor.curve.append(point)
        print(self.task.name, self.seed, competitor.entry.name, self.updates, point["successes"], flush=True)

    def _point(self, act: Act, noise_steps: int, clocks: list[Clock]) -> dict[str, Any]:
        seeds = range(1000 * self.seed, 1000 * self.seed + self.harness.episodes)
        context = self.sampler.context
        return {
            "updates": self.updates,
            "cpu_s": sum(clock.cpu_s for clock in clocks),
            "wall_s": sum(clock.wall_s for clock in clocks),
            "successes": sum(self.task.succeeds(act, context, noise_steps, seed) for seed in seeds),
            "episodes": self.harness.episodes,
        }

    # --- saving --------------------------------------------------------------------------------------------

    def _shared_parts(self) -> Parts:
        values, cloned = self.values, self.cloned
        return Parts(
            {
                "value": values.value,
                "critic": values.critic,
                "target_critic": values.target_critic,
                "cloned": cloned.expert,
            },
            {"value": values.value_descent, "critic": values.critic_descent, "cloned": cloned.descent},
            {"batches": self.batches, "cloned": cloned.noise},
        )

    def _parts(self) -> Parts:
        parts = self._shared_parts()
        for number, flow in enumerate(self.flows.values()):
            name, extraction = f"flow{number}", flow.extraction
            parts.modules |= {name: flow.actor.expert, f"{name}/reference": flow.actor.frozen}
            parts.modules |= {f"{name}/{own}": module for own, module in extraction.modules.items()}
            parts.descents[name] = flow.actor.descent
            parts.descents |= {f"{name}/{descent.name}": descent for descent in extraction.descents}
            parts.generators[name] = flow.actor.noise
        for competitor in self.competitors:
            if competitor.head is not None and competitor.noise is not None:
                name, head = competitor.entry.name, competitor.head
                parts.modules |= {f"{name}/{own}": module for own, module in head.modules.items()}
                parts.descents |= {f"{name}/{descent.name}": descent for descent in head.descents}
                parts.generators[name] = competitor.noise
        return parts

    def _shared_record(self) -> dict[str, Any]:
        return {
            "harness": self._matters(),
            "clocks": {name: asdict(clock) for name, clock in self.clocks.items()},
            "start": self.start,
        }

    def _restore_shared(self, record: dict[str, Any]) -> None:
        self.clocks = {name: Clock(**clock) for name, clock in record["clocks"].items()}
        self.start = record["start"]

    def _matters(self) -> dict[str, Any]:
        """The harness but for how long and how often: those may change between the parts of a bout."""
        return {
            name: value
            for name, value in asdict(self.harness).items()
            if name not in ("updates", "evaluate_every")
        }

    def _check(self, record: dict[str, Any], saved: Path) -> None:
        if record["harness"] != self._matters():
            raise ValueError(f"{saved} was made with {record['harness']}; remove it to start again")

    def _save(self, folder: Path) -> None:
        record = self._shared_record() | {
            "updates": self.updates,
            "flows": [
                {"clock": asdict(flow.clock), "numbers": flow.extraction.numbers}
                for flow in self.flows.values()
            ],
            "competitors": {
                competitor.entry.name: {"clock": asdict(competitor.clock), "curve": competitor.curve}
                for competitor in self.competitors
            },
        }
        save_state(folder, self.updates, snapshot(self._parts()), record, keep=1)

    def _load(self, saved: Path) -> None:
        tensors, record = load_state(saved)
        self._check(record, saved)
        for flow in self.flows.values():
            flow.actor.freeze_reference()
        restore(self._parts(), tensors)
        self._restore_shared(record)
        self.updates = record["updates"]
        for flow, kept in zip(self.flows.values(), record["flows"], strict=True):
            flow.clock = Clock(**kept["clock"])
            flow.extraction.restore(kept["numbers"])
        for competitor in self.competitors:
            kept = record["competitors"][competitor.entry.name]
            competitor.clock, competitor.curve = Clock(**kept["clock"]), kept["curve"]


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
