# SPDX-License-Identifier: Apache-2.0
"""The trainer: composes the losses of `divl` and `qam` into steps and owns everything that changes between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lwd_learner import divl, qam
from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.descent import Descent, NonFiniteLoss
from lwd_learner.extraction import ExtractionConfig, make_extraction
from lwd_learner.extraction.headed import HeadConfig, acting_noise_steps, with_head
from lwd_learner.flow_actor import FlowActor, fast_products
from lwd_learner.image_encoder import Sight
from lwd_learner.ranks import ALONE, Ranks
from lwd_learner.schedule import CONSTANT, Schedule
from lwd_learner.training_state import ResumeRefused, load_state, save_state, saved_states
from lwd_learner.value_learner import Metrics, ValueLearner


@dataclass(frozen=True)
class TrainerConfig:
    """Everything that decides a training run, apart from its data. Defaults are the `lwd` preset."""

    divl: divl.DivlConfig = field(default_factory=divl.DivlConfig)
    extraction: ExtractionConfig = field(default_factory=qam.QamConfig)  # its type chooses the method
    head: HeadConfig | None = None  # what acts on top of the extraction's flow, by type; None: the flow alone
    critic: CriticConfig = field(default_factory=CriticConfig)
    step_s: float = 0.1  # s of one executed step: 1 / policy_step_hz; discounts count executed time
    batch: int = 256  # rows; for networks over cached features, 4.18
    policy_rows: int | None = (
        None  # rows of the batch that the policy step uses, its cost is linear; None: all
    )
    policy_rate: float = 3e-4  # AdamW; 2e-5 as published belongs to a billion parameters
    policy_decay: float = 0.0  # weight decay; would pull the policy away from its reference
    critic_rate: float = 5e-4  # Adam, value and critic; as published
    policy_schedule: Schedule = CONSTANT  # of `policy_rate` and the rates of heads: no last step to anneal to
    critic_schedule: Schedule = CONSTANT  # of `critic_rate`
    grad_norm_max: float = 1.0  # of each network's gradient, section 3
    precision: Literal["float32", "bf16"] = (
        "float32"  # of activations and products; bf16: autocast, weights and sums stay as they are
    )
    compile: bool = False  # networks by torch.compile; the first updates take minutes

    def paper(self) -> TrainerConfig:
        """The `lwd_paper` preset. algorithm.md 4.20. Its rates fall where the number of steps is known."""
        falling = Schedule("cosine")
        return replace(
            self,
            divl=self.divl.paper(),
            extraction=qam.QamConfig().paper(),
            policy_schedule=falling,
            critic_schedule=falling,
        )

    @property
    def gamma(self) -> float:
        """Discount of one executed step: what `Replay.sample` wants."""
        return self.divl.gamma_per_step(self.step_s)

    def to_record(self) -> dict[str, Any]:
        """For a saved state, as JSON gives it back; the types of `extraction` and `head` included."""
        record = asdict(self)
        record["extraction"]["method"] = type(self.extraction).__name__
        if self.head is not None:
            record["head"]["method"] = type(self.head).__name__
        return record


class Trainer:
    """Trains a flow expert `expert(context [B, C], noisy [B, H, A], flow_time [B]) -> velocity` in place.

    `clone` is behaviour cloning; `freeze_reference` ends it; `learn` is the LEARNER step of algorithm.md 3. The parts:
    `actor` holds the policy, `values` what judges it, `extraction` makes the one follow the other.
    """

    def __init__(
        self,
        expert: nn.Module,
        context_dim: int,
        horizon: int,
        action_dim: int,
        config: TrainerConfig | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        ranks: Ranks = ALONE,
        sight: Sight | None = None,
    ) -> None:
        """Networks and random numbers are of torch's default precision, and batches must be. ranks: see `Ranks`; each
        makes the same calls with its rows of a batch, `ranks.share(config.batch)` of them. sight: the images of those
        batches, for a critic with features of its own. Raises ValueError for what the ranks cannot train."""
        self.config = config = config or TrainerConfig()
        if config.head is not None and ranks.sharded:
            raise ValueError(
                "a head is published by the first rank, which needs it whole: train it with ddp, not fsdp"
            )
        self.ranks = ranks
        self.device = torch.device(device)
        of_policy = partial(
            torch.optim.AdamW, lr=config.policy_rate, weight_decay=config.policy_decay, fused=True
        )
        of_values = partial(torch.optim.Adam, lr=config.critic_rate, fused=True)
        size = (horizon, action_dim)
        self.actor = FlowActor(expert, *size, of_policy, config.grad_norm_max, self.device, seed, ranks)
        self.values = ValueLearner(
            context_dim,
            *size,
            config.divl,
            config.critic,
            of_values,
            config.grad_norm_max,
            self.device,
            seed,
            ranks,
            sight,
        )
        extraction = make_extraction(config.extraction, self.actor, self.values)
        self.extraction = with_head(config.head, extraction, self.actor, self.values)
        self.sampling = torch.Generator().manual_seed(seed + 1)  # to be passed to Replay.sample
        self._compiled: WeakSet[nn.Module] = WeakSet()
        self._compile()
        self.steps = 0  # clone and learn steps
        self.online_steps = 0  # learn steps that raised tau_base
        self.phase_steps = 0  # learn steps since `begin_phase`: where schedules are
        self.planned: int | None = None  # learn steps that the phase will have; None: it has no end
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    # --- behaviour cloning ---------------------------------------------------------------------------------

    def clone(self, batch: Batch, rate: float | None = None) -> dict[str, float]:
        """One flow-matching step towards the batch's actions, where valid. algorithm.md 2.5. rate: learning rate of
        this step; None: it is a learn step of a method that clones, at `policy_rate` by `policy_schedule`. Its sampling
        noise is far above what faster products lose."""
        if rate is None:
            rate = self.config.policy_rate * self.config.policy_schedule.share(self.phase_steps, self.planned)
            self.phase_steps += 1
        self.actor.descent.set_rate(rate)
        with self._watch(), self._autocast(), fast_products():
            loss = self.actor.cloning_loss(batch.to(self.device))
            norm = self.actor.descent.step(loss)
        self.steps += 1
        return self._record({"clone_loss": loss, "clone_gradient": norm})

    def freeze_reference(self) -> None:
        """Make the present policy the reference that tilts are measured from. The only place that changes it."""
        self.actor.freeze_reference()
        self._compile()
        self.extraction.restart()

    # --- reinforcement learning ----------------------------------------------------------------------------

    def begin_phase(self) -> None:
        """Learning rates start their schedules anew."""
        self.phase_steps = 0

    def learn(self, batch: Batch, update_policy: bool = True, raise_tau: bool = True) -> dict[str, float]:
        """The LEARNER step: value, then target with the updated value, critic, EMA, policy. algorithm.md 3.

        update_policy: False while the critic knows too little to be followed (`gate.CriticCheck`, 4.4b). raise_tau:
        False holds tau_base where it is while Q over-estimates (4.1b); otherwise each step with online rows
        raises it along its ramp. Raises NonFiniteLoss, ReferenceMissing.
        """
        batch = batch.to(self.device)
        self._set_rates()
        self.online_steps += int(raise_tau and self.ranks.any(bool(batch.online.any())))
        with self._watch(), self._autocast():
            metrics: Metrics = self.values.update(batch, self.config.divl.tau_base(self.online_steps))
            if update_policy:
                rows = self.config.policy_rows
                first = None if rows is None else self.ranks.share(rows)
                metrics |= self.extraction.update(batch.first(first))
        metrics["policy_updated"] = float(update_policy)
        self.steps += 1
        self.phase_steps += 1
        return self._record(metrics)

    def _set_rates(self) -> None:
        policy = (self.actor.descent, *self.extraction.descents)
        values = (self.values.value_descent, self.values.critic_descent)
        for schedule, descents in (
            (self.config.policy_schedule, policy),
            (self.config.critic_schedule, values),
        ):
            if schedule != CONSTANT:
                for descent in descents:
                    descent.set_rate(descent.peak_rate * schedule.share(self.phase_steps, self.planned))

    # --- acting --------------------------------------------------------------------------------------------

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(N, A) of the noise that `act` starts from."""
        horizon, action_dim = self.actor.chunk
        return acting_noise_steps(self.config.head, horizon), action_dim

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """How the whole acts, as robots will: context [B, C], noise [B, N, A] -> chunk [B, H, A] in [-1, 1]."""
        return self.extraction.act(context, noise)

    # --- looking at what was learned -----------------------------------------------------------------------

    @torch.no_grad()
    def judge(self, batch: Batch) -> Tensor:
        """[B] mean of the target heads for the replayed chunks, on the CPU: for `gate.outcome_auc` and reports."""
        batch = batch.to(self.device)
        state = self.values.slow_state(batch)
        return self.values.q(state, batch.action, batch.mask).mean(dim=0).cpu()

    @torch.no_grad()
    def advantage(self, batch: Batch, draws: int = 4) -> Tensor:
        """[B] Q of the replayed chunks minus the mean Q of `draws` chunks of the reference in the same states, on the CPU:
        what the critic makes of an action, apart from what it makes of its state. Does not disturb training, and is the
        same on all ranks that are given the same rows. Raises ReferenceMissing."""
        batch = batch.to(self.device)
        state = self.values.slow_state(batch)
        generator = torch.Generator(self.device).manual_seed(0)  # the same alternatives each time
        usual = torch.zeros(len(batch), device=self.device)
        for _ in range(draws):
            noise = torch.randn(batch.action.shape, generator=generator, device=self.device)
            chunk = self.actor.sample(self.actor.frozen, batch.context, noise)
            usual += self.values.q(state, chunk, batch.mask).mean(dim=0) / draws
        return (self.values.q(state, batch.action, batch.mask).mean(dim=0) - usual).cpu()

    @torch.no_grad()
    def critic_losses(self, batch: Batch) -> Tensor:
        """[B] what the critic's loss is the mean of, with the networks as they are now."""
        batch = batch.to(self.device)
        tau_base = self.config.divl.tau_base(self.online_steps)
        read = divl.bootstrap(self.values.value(self.values.next_state(batch)), tau_base, self.config.divl)
        target = divl.critic_target(batch.reward, batch.discount, read.value)
        q: Tensor = self.values.critic(self.values.state(batch), batch.action, batch.mask)
        return (q - target).square().sum(dim=0)

    @torch.no_grad()
    def diagnose(self, batch: Batch) -> dict[str, float]:
        """Q of what the policy and its reference would do from the same noise. Does not disturb training."""
        batch = batch.to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.steps)
        every = (len(batch) * self.ranks.size, *self.noise_shape)
        noise = self.ranks.mine(torch.randn(every, generator=generator, device=self.device))
        chunks = (
            self.act(batch.context, noise),
            self.actor.sample(self.actor.frozen, batch.context, noise[:, : self.actor.chunk[0]]),
        )
        state = self.values.slow_state(batch)
        policy, reference = (
            float(self.ranks.mean(self.values.q(state, chunk, batch.mask).mean())) for chunk in chunks
        )
        return {"q_policy": policy, "q_reference": reference, "q_gain": policy - reference}

    @property
    def means(self) -> dict[str, float]:
        """Of all metrics since the last report."""
        return {name: self._sums[name] / self._counts[name] for name in self._sums}

    def report(self) -> dict[str, float]:
        """Means of all metrics since the last report."""
        means = self.means
        self._sums.clear()
        self._counts.clear()
        return means

    # --- saving --------------------------------------------------------------------------------------------

    def save(self, folder: Path, beside: Mapping[str, Any] | None = None) -> Path:
        """Write a state from which `load` continues bit for bit, also on another number of ranks. Returns its directory
        below `folder`; only the first rank writes. beside: what else belongs to the run, as JSON. Raises RanksDiverged."""
        whole = self.ranks.whole
        tensors = {"rng.noise": self.actor.noise.get_state(), "rng.sampling": self.sampling.get_state()}
        for name, module in self._modules():
            tensors |= {f"{name}/{key}": whole(tensor) for key, tensor in module.state_dict().items()}
        self.ranks.require_equal(tensors)
        for descent in self._descents():
            for index, state in descent.optimiser.state_dict()["state"].items():
                tensors |= {
                    f"optimiser.{descent.name}/{index}/{key}": whole(tensor) for key, tensor in state.items()
                }
        record = {
            "config": self.config.to_record(),
            "steps": self.steps,
            "online_steps": self.online_steps,
            "phase_steps": self.phase_steps,
            "extraction": self.extraction.numbers,
            "has_reference": self.actor.reference is not None,
            "sums": self._sums,
            "counts": self._counts,
            "beside": dict(beside or {}),
        }
        written = save_state(folder, self.steps, tensors, record) if self.ranks.first else folder
        self.ranks.wait()
        return written

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from the newest state below `folder`, of which only the first rank needs to have a copy. Returns what
        was saved beside it. Raises ResumeRefused; then nothing was changed."""
        part = self.ranks.part
        where = folder
        saved: tuple[Mapping[str, Tensor], dict[str, Any]] = {}, {}
        if self.ranks.first:
            states = saved_states(folder)
            if not states:
                raise ResumeRefused(f"{folder}: no training state")
            where = states[-1]
            saved = load_state(where)
            _compare(self.config.to_record(), saved[1]["config"], where)
        tensors, record = self.ranks.given(*saved)
        before = self.actor.reference
        self.actor.reference = self.actor.copy_expert() if record["has_reference"] else None
        modules = dict(self._modules())
        groups: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
        for key, tensor in tensors.items():
            name, _, rest = key.partition("/")
            if name in groups:
                groups[name][rest] = tensor
        problems = [
            f"{name}: {text}" for name, module in modules.items() for text in _misfits(module, groups[name])
        ]
        if problems:
            self.actor.reference = before
            raise ResumeRefused(f"{where}: {'; '.join(problems[:3])}")
        for name, module in modules.items():
            parts = {key: part(groups[name][key], like) for key, like in module.state_dict().items()}
            module.load_state_dict(parts)
        if self.actor.reference is not None:
            self.actor.reference.requires_grad_(False).eval()
        for descent in self._descents():
            self._load_optimiser(descent, tensors)
        self._compile()
        self.actor.noise.set_state(tensors["rng.noise"])
        self.sampling.set_state(tensors["rng.sampling"])
        self.steps, self.online_steps = record["steps"], record["online_steps"]
        self.phase_steps = record["phase_steps"]
        self.extraction.restore(record["extraction"])
        self._sums = defaultdict(float, record["sums"])
        self._counts = defaultdict(int, record["counts"])
        beside: dict[str, Any] = record["beside"]
        return beside

    def _load_optimiser(self, descent: Descent, tensors: Mapping[str, Tensor]) -> None:
        descent.restart()
        parameters = list(descent.module.parameters())
        state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            group, *place = key.split("/")
            if group == f"optimiser.{descent.name}":
                like = parameters[int(place[0])]
                # A moment lies as its parameter does; a count of steps is everybody's.
                state[int(place[0])][place[1]] = self.ranks.part(tensor, like) if tensor.dim() else tensor
        descent.optimiser.load_state_dict({**descent.optimiser.state_dict(), "state": dict(state)})

    # --- parts ---------------------------------------------------------------------------------------------

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield "expert", self.actor.descent.module
        if self.actor.reference is not None:
            yield "reference", self.actor.reference
        yield "value", self.values.value_descent.module
        yield "critic", self.values.critic_descent.module
        yield "target_critic", self.values.target_critic
        yield from self.values.features.modules.items()
        for name, module in self.extraction.modules.items():
            yield name, self.ranks.bare(module)

    def _compile(self) -> None:
        """Have the networks compiled that are not yet, at their first call."""
        if self.config.compile:
            for _, module in self._modules():
                if module not in self._compiled:
                    module.compile()
                    self._compiled.add(module)

    def _autocast(self) -> torch.autocast:
        # Without its cache: within one step weights change, and the target is of the value network as just updated.
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled, cache_enabled=False)

    def _descents(self) -> Iterator[Descent]:
        yield self.actor.descent
        yield self.values.value_descent
        yield self.values.critic_descent
        yield from self.values.features.descents
        yield from self.extraction.descents

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Say when it happened that a loss was no number."""
        try:
            yield
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{error} at step {self.steps}") from error

    def _record(self, metrics: Metrics) -> dict[str, float]:
        numbers = {
            name: float(value.detach() if isinstance(value, Tensor) else value)
            for name, value in metrics.items()
        }
        numbers = self.ranks.means(numbers)
        for name, value in numbers.items():
            self._sums[name] += value
            self._counts[name] += 1
        return numbers


def _compare(ours: dict[str, Any], theirs: dict[str, Any], where: Path, prefix: str = "") -> None:
    """Raise ResumeRefused if a saved configuration is another one."""
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            _compare(mine, other, where, f"{prefix}{key}.")
        elif (list(mine) if isinstance(mine, tuple) else mine) != other:  # JSON knows no tuples
            raise ResumeRefused(f"{where} was trained with {prefix}{key} = {other}, not {mine}")


def _misfits(module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """What keeps `tensors` from being the state of `module`."""
    state = module.state_dict()
    wrong = [f"{key} is missing or unknown" for key in sorted(state.keys() ^ tensors.keys())]
    shared = state.keys() & tensors.keys()
    return wrong + [
        f"{key} has shape {tuple(tensors[key].shape)} instead of {tuple(state[key].shape)}"
        for key in sorted(shared)
        if tensors[key].shape != state[key].shape
    ]
