# SPDX-License-Identifier: Apache-2.0
"""The trainer: composes the losses of `divl` and `qam` into steps and owns everything that changes between them."""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwd_learner import divl, qam
from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig, CriticEnsemble, ValueNetwork
from lwd_learner.training_state import ResumeRefused, load_state, save_state, saved_states


class NonFiniteLoss(Exception):
    """A loss or gradient stopped being a number; nothing was updated by it."""


class ReferenceMissing(Exception):
    """Reinforcement learning was asked for before there was a frozen reference to stay near."""


@dataclass(frozen=True)
class TrainerConfig:
    """Everything that decides a training run, apart from its data. Defaults are the `lwd` preset."""

    divl: divl.DivlConfig = field(default_factory=divl.DivlConfig)
    qam: qam.QamConfig = field(default_factory=qam.QamConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    step_s: float = 0.1  # s of one executed step: 1 / policy_step_hz; discounts count executed time
    batch: int = 256  # rows; for networks over cached features, 4.18
    policy_rows: int | None = (
        None  # rows of the batch that the policy step uses, its cost is linear; None: all
    )
    policy_rate: float = 3e-4  # AdamW; 2e-5 as published belongs to a billion parameters
    policy_decay: float = 0.0  # weight decay; would pull the policy away from its reference
    critic_rate: float = (
        5e-4  # Adam, value and critic; as published, held constant: a deployment has no last step
    )
    grad_norm_max: float = 1.0  # of each network's gradient, section 3

    def paper(self) -> TrainerConfig:
        """The `lwd_paper` preset. algorithm.md 4.20."""
        return replace(self, divl=self.divl.paper(), qam=self.qam.paper())

    @property
    def gamma(self) -> float:
        """Discount of one executed step: what `Replay.sample` wants."""
        return self.divl.gamma_per_step(self.step_s)


class Trainer:
    """Trains a flow expert `expert(context [B, C], noisy [B, H, A], flow_time [B]) -> velocity` in place.

    `clone` is behaviour cloning; `freeze_reference` ends it; `learn` is the LEARNER step of algorithm.md 3.
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
    ) -> None:
        self.config = config = config or TrainerConfig()
        self.device = torch.device(device)
        self._chunk = (horizon, action_dim)
        self.expert = expert.to(self.device)
        self.reference: nn.Module | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.value = ValueNetwork(context_dim, config.divl.support.size, config.critic).to(self.device)
            self.critic = CriticEnsemble(context_dim, horizon, action_dim, config.critic).to(self.device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.noise = torch.Generator(self.device).manual_seed(seed)  # of paths and flow times
        self.sampling = torch.Generator().manual_seed(seed + 1)  # to be passed to Replay.sample
        self.steps = 0  # clone and learn steps
        self.online_steps = 0  # learn steps that raised tau_base
        self.dual = qam.initial_dual(config.qam)
        self._policy_optimiser = self._new_policy_optimiser()
        self._value_optimiser = torch.optim.Adam(self.value.parameters(), config.critic_rate, fused=True)
        self._critic_optimiser = torch.optim.Adam(self.critic.parameters(), config.critic_rate, fused=True)
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    # --- behaviour cloning ---------------------------------------------------------------------------------

    def clone(self, batch: Batch, rate: float | None = None) -> dict[str, float]:
        """One flow-matching step towards the batch's actions, where valid. algorithm.md 2.5. rate: learning rate of
        this step; None: `policy_rate`. Its sampling noise is far above what faster products lose."""
        batch = batch.to(self.device)
        for group in self._policy_optimiser.param_groups:
            group["lr"] = self.config.policy_rate if rate is None else rate
        with _fast_products():
            noise = self._normal(batch.action.shape)
            flow_time = torch.rand(len(batch), generator=self.noise, device=self.device)
            loss = qam.flow_matching_loss(
                lambda x, t: self.expert(batch.context, x, t),
                batch.action,
                noise,
                flow_time,
                batch.valid.unsqueeze(-1),
            )
            norm = self._descend("clone", loss, self.expert, self._policy_optimiser)
        self.steps += 1
        return self._record({"clone_loss": loss, "clone_gradient": norm})

    def freeze_reference(self) -> None:
        """Make the present policy the reference that tilts are measured from. The only place that changes it."""
        self.reference = copy.deepcopy(self.expert).requires_grad_(False).eval()
        self._policy_optimiser = self._new_policy_optimiser()
        self.dual = qam.initial_dual(self.config.qam)

    def reference_digest(self) -> str:
        """sha256 of the reference's weights. Raises ReferenceMissing."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self._frozen().state_dict().items()):
            hasher.update(name.encode())
            hasher.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()

    # --- reinforcement learning ----------------------------------------------------------------------------

    def learn(self, batch: Batch, update_policy: bool = True, raise_tau: bool = True) -> dict[str, float]:
        """The LEARNER step: value, then target with the updated value, critic, EMA, policy. algorithm.md 3.

        update_policy: False while the critic cannot tell successes apart (`gate.outcome_auc`, 4.4b). raise_tau:
        False holds tau_base where it is while Q over-estimates (4.1b); otherwise each step with online rows
        raises it along its ramp. Raises NonFiniteLoss, ReferenceMissing.
        """
        reference = self._frozen()
        batch = batch.to(self.device)
        self.online_steps += int(raise_tau and bool(batch.online.any()))
        metrics = self._learn_value(batch)
        metrics |= self._learn_critic(batch)
        divl.ema_update(self.target_critic, self.critic, self.config.divl.ema_rate)
        if update_policy:
            metrics |= self._learn_policy(batch, reference)
        metrics["policy_updated"] = float(update_policy)
        self.steps += 1
        return self._record(metrics)

    def _learn_value(self, batch: Batch) -> dict[str, float | Tensor]:
        support = self.config.divl.support
        with torch.no_grad():
            label = divl.value_label(self.target_critic(batch.context, batch.action, batch.mask))
        loss = divl.value_loss(self.value(batch.context), label, support)
        norm = self._descend("value", loss, self.value, self._value_optimiser)
        clipped = ((label < support.low) | (label > support.high)).float().mean()
        return {
            "value_loss": loss,
            "value_gradient": norm,
            "value_label": label.mean(),
            "label_clipped": clipped,
        }

    def _learn_critic(self, batch: Batch) -> dict[str, float | Tensor]:
        tau_base = self.config.divl.tau_base(self.online_steps)
        with torch.no_grad():
            read = divl.bootstrap(self.value(batch.next_context), tau_base, self.config.divl)
        target = divl.critic_target(batch.reward, batch.discount, read.value)
        q = self.critic(batch.context, batch.action, batch.mask)
        loss = divl.critic_loss(q, target)
        norm = self._descend("critic", loss, self.critic, self._critic_optimiser)
        return {
            "critic_loss": loss,
            "critic_gradient": norm,
            "q": q.detach().mean(),
            "target": target.mean(),
            "tau": read.tau.mean(),
            "entropy": read.entropy.mean(),
            "tau_base": tau_base,
        }

    def _learn_policy(self, batch: Batch, reference: nn.Module) -> dict[str, float | Tensor]:
        config = self.config.qam
        rows = slice(self.config.policy_rows)
        context, mask = batch.context[rows], batch.mask[rows]
        policy_velocity = self._velocity(self.expert, context)
        reference_velocity = self._velocity(reference, context)
        noise = self._normal((config.steps, len(context), self._chunk[0] * self._chunk[1]))
        path = qam.rollout(policy_velocity, reference_velocity, noise, config.paths)
        endpoint, temperature = path.states[-1], qam.effective_lambda(self.dual, config)
        carry = qam.denoiser_adjoint if config.adjoint == "denoiser" else qam.lean_adjoint
        adjoints = carry(
            reference_velocity,
            path.states,
            qam.terminal_adjoint(
                lambda a: self.target_critic(context, a.view(-1, *self._chunk), mask),
                endpoint,
                temperature,
                config.clip,
                mask.unsqueeze(-1).expand(-1, *self._chunk).flatten(1),
                config.adjoint_norm_max,
            ),
        )
        loss = qam.qam_loss(path, adjoints)
        norm = self._descend("policy", loss, self.expert, self._policy_optimiser)
        kl = (qam.path_kl(path) / mask.sum(dim=1)).mean()
        self.dual = qam.update_dual(self.dual, float(kl), config)
        return {
            "policy_loss": loss / path.velocities[:, 0].numel(),
            "policy_gradient": norm,
            "adjoint": adjoints.norm(dim=-1).mean(),
            "path_kl": kl,
            "lambda": temperature,
            "saturated": (endpoint.abs() > config.clip).float().mean(),
        }

    # --- looking at what was learned -----------------------------------------------------------------------

    @torch.no_grad()
    def judge(self, batch: Batch) -> Tensor:
        """[B] mean of the target heads for the replayed chunks, on the CPU: for `gate.outcome_auc` and reports."""
        batch = batch.to(self.device)
        q: Tensor = self.target_critic(batch.context, batch.action, batch.mask)
        return q.mean(dim=0).cpu()

    @torch.no_grad()
    def diagnose(self, batch: Batch) -> dict[str, float]:
        """Q of what the policy and its reference would do from the same noise. Does not disturb training."""
        batch = batch.to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.steps)
        noise = torch.randn(batch.action.flatten(1).shape, generator=generator, device=self.device)
        q = []
        for expert in (self.expert, self._frozen()):
            end = qam.integrate(self._velocity(expert, batch.context), noise, self.config.qam.steps)
            chunk = end.clamp(-self.config.qam.clip, self.config.qam.clip).view(-1, *self._chunk)
            q.append(float(self.target_critic(batch.context, chunk, batch.mask).mean()))
        return {"q_policy": q[0], "q_reference": q[1], "q_gain": q[0] - q[1]}

    def report(self) -> dict[str, float]:
        """Means of all metrics since the last report."""
        means = {name: self._sums[name] / self._counts[name] for name in self._sums}
        self._sums.clear()
        self._counts.clear()
        return means

    # --- saving --------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> Path:
        """Write a state from which `load` continues bit for bit. Returns its directory below `folder`."""
        tensors = {"rng.noise": self.noise.get_state(), "rng.sampling": self.sampling.get_state()}
        for name, module in self._modules():
            tensors |= {f"{name}/{key}": tensor for key, tensor in module.state_dict().items()}
        for name, optimiser in self._optimisers():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{name}/{index}/{key}": tensor for key, tensor in state.items()}
        record = {
            "config": asdict(self.config),
            "steps": self.steps,
            "online_steps": self.online_steps,
            "dual": list(self.dual),
            "has_reference": self.reference is not None,
            "sums": self._sums,
            "counts": self._counts,
        }
        return save_state(folder, self.steps, tensors, record)

    def load(self, folder: Path) -> None:
        """Continue from the newest state below `folder`. Raises ResumeRefused; then nothing was changed."""
        states = saved_states(folder)
        if not states:
            raise ResumeRefused(f"{folder}: no training state")
        tensors, record = load_state(states[-1])
        _compare(asdict(self.config), record["config"], states[-1])
        reference, self.reference = (
            self.reference,
            copy.deepcopy(self.expert) if record["has_reference"] else None,
        )
        groups = {name: {} for name, _ in self._modules()}  # type: dict[str, dict[str, Tensor]]
        for key, tensor in tensors.items():
            name, _, rest = key.partition("/")
            if name in groups:
                groups[name][rest] = tensor
        problems = [
            f"{name}: {text}" for name, module in self._modules() for text in _misfits(module, groups[name])
        ]
        if problems:
            self.reference = reference
            raise ResumeRefused(f"{states[-1]}: {'; '.join(problems[:3])}")
        for name, module in self._modules():
            module.load_state_dict(groups[name])
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        self._policy_optimiser = self._new_policy_optimiser()
        for name, optimiser in self._optimisers():
            state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
            for key, tensor in tensors.items():
                group, *place = key.split("/")
                if group == f"optimiser.{name}":
                    state[int(place[0])][place[1]] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": dict(state)})
        self.noise.set_state(tensors["rng.noise"])
        self.sampling.set_state(tensors["rng.sampling"])
        self.steps, self.online_steps = record["steps"], record["online_steps"]
        self.dual = qam.Dual(*record["dual"])
        self._sums = defaultdict(float, record["sums"])
        self._counts = defaultdict(int, record["counts"])

    # --- parts ---------------------------------------------------------------------------------------------

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield "expert", self.expert
        yield "value", self.value
        yield "critic", self.critic
        yield "target_critic", self.target_critic
        if self.reference is not None:
            yield "reference", self.reference

    def _optimisers(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        yield "policy", self._policy_optimiser
        yield "value", self._value_optimiser
        yield "critic", self._critic_optimiser

    def _new_policy_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.expert.parameters(),
            self.config.policy_rate,
            weight_decay=self.config.policy_decay,
            fused=True,
        )

    def _frozen(self) -> nn.Module:
        if self.reference is None:
            raise ReferenceMissing("freeze_reference() comes between cloning and learning")
        return self.reference

    def _velocity(self, expert: nn.Module, context: Tensor) -> qam.Velocity:
        """The expert with its context bound, over flat chunks [B, D]."""

        def velocity(x: Tensor, flow_time: Tensor) -> Tensor:
            chunk: Tensor = expert(context, x.view(-1, *self._chunk), flow_time)
            return chunk.flatten(1)

        return velocity

    def _normal(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.noise, device=self.device)

    def _descend(self, name: str, loss: Tensor, module: nn.Module, optimiser: torch.optim.Optimizer) -> float:
        """One optimiser step with a clipped gradient; returns its norm before the clip. Raises NonFiniteLoss."""
        if not isfinite(float(loss.detach())):
            raise NonFiniteLoss(f"the {name} loss is {float(loss.detach())} at step {self.steps}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), self.config.grad_norm_max))
        if not isfinite(norm):
            raise NonFiniteLoss(f"the {name} gradient has norm {norm} at step {self.steps}")
        optimiser.step()
        return norm

    def _record(self, metrics: dict[str, float | Tensor]) -> dict[str, float]:
        numbers = {
            name: float(value.detach() if isinstance(value, Tensor) else value)
            for name, value in metrics.items()
        }
        for name, value in numbers.items():
            self._sums[name] += value
            self._counts[name] += 1
        return numbers


@contextmanager
def _fast_products() -> Iterator[None]:
    """Factors of matrix products rounded to bfloat16 where the processor has instructions for it; weights and sums
    stay in float32. Without such instructions nothing changes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
