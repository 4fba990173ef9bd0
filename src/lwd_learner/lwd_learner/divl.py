# SPDX-License-Identifier: Apache-2.0
"""Distributional implicit value learning: the law of Q over replayed actions, and the TD target read off it.

Pure functions of tensors (algorithm.md 2.1-2.4). B rows, C atoms, N chunks of an n-step window, E critic heads. The
scalar expectile of IQL stands behind the same functions (`fit_loss`, `bootstrap`, `mean_value`), with one output in
the place of C logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import log
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

_CDF_TOLERANCE = 1e-6  # a tau printed with few digits must meet a CDF summed in another precision


@dataclass(frozen=True)
class Support:
    """The atoms z_i = low + i * spacing of the categorical value (algorithm.md 2.3)."""

    low: float = -0.1  # value; a margin below a failure's 0
    high: float = 1.1  # value; a margin above a success's 1
    size: int = 201  # atoms; spacing 0.006 as published

    def __post_init__(self) -> None:
        if not (self.high > self.low and self.size >= 2):
            raise ValueError(f"a support needs high > low and two atoms, not {self}")

    @property
    def spacing(self) -> float:
        return (self.high - self.low) / (self.size - 1)

    def atoms(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """[C] in the given precision."""
        return torch.linspace(self.low, self.high, self.size, device=device, dtype=dtype)


@dataclass(frozen=True)
class DivlConfig:
    """Everything that decides a TD target. Defaults are the `lwd` preset; see `paper()`."""

    support: Support = field(default_factory=Support)  # value; as published
    gamma_per_second: float = 0.97  # 1/s; .997 (published) is too weak against the smear of a neural V, 4.1b
    alpha: float = 0.3  # quantile per unit of entropy; as published
    tau_base_offline: float = 0.6  # quantile; as published
    tau_base_online: float = 0.9  # quantile; as published, reached by a ramp
    tau_ramp_steps: int = 1000  # learner steps from the offline to the online tau_base, 4.5
    tau_min: float = 0.4  # quantile; silent in the paper, never reached in its published range, 4.6
    tau_max: float = 0.95  # quantile; as above
    quantile: Literal["local_mean", "hard"] = "local_mean"  # hard rounds up and erases the discount, 4.1
    ema_rate: float = 0.005  # weight of the new critic per step; as published
    value: Literal["categorical", "expectile"] = "categorical"  # expectile: one number, as in IQL
    expectile: float = 0.7  # weight of errors upwards; as in IQL, which takes .9 where much must be stitched

    def __post_init__(self) -> None:
        if not 0.0 < self.expectile < 1.0:
            raise ValueError(f"an expectile lies between 0 and 1, not at {self.expectile}")

    @property
    def outputs(self) -> int:
        """Numbers that V says of a state."""
        return self.support.size if self.value == "categorical" else 1

    def gamma_per_step(self, step_s: float) -> float:
        """Discount of one executed step that lasts `step_s` seconds."""
        return float(self.gamma_per_second**step_s)

    def tau_base(self, online_steps: int) -> float:
        """tau_base after `online_steps` learner steps with online data (0: still offline). algorithm.md 4.5."""
        ramp = min(online_steps / max(self.tau_ramp_steps, 1), 1.0)
        return self.tau_base_offline + ramp * (self.tau_base_online - self.tau_base_offline)

    def paper(self) -> DivlConfig:
        """The `lwd_paper` preset: hard quantile, gamma .9999 at 30 Hz, no ramp. algorithm.md 4.20."""
        return replace(self, quantile="hard", gamma_per_second=0.9999**30, tau_ramp_steps=1)


# --- chunks and windows -----------------------------------------------------------------------------------


def chunk_reward(last_reward: Tensor, executed: Tensor, gamma: float) -> Tensor:
    """Reward of a chunk whose only reward sits on its last executed step: gamma^(L-1) r. algorithm.md 2.1.

    last_reward: any shape; executed: same shape, steps (>= 1). Returns the same shape.
    """
    return last_reward * gamma ** (executed - 1).to(last_reward.dtype)


class Window(NamedTuple):
    """The n-step view of B rows. All [B]."""

    reward: Tensor  # discounted to the first step of the window
    discount: Tensor  # gamma^steps, 0 where the episode ended in the window: nothing to bootstrap from
    last: Tensor  # int64, index in 0..N-1 of the chunk whose next state is bootstrapped from


def n_step_window(reward: Tensor, executed: Tensor, done: Tensor, cut: Tensor, gamma: float) -> Window:
    """Sum chunk rewards over a window. algorithm.md 2.2.

    reward: [B, N] chunk rewards; executed: [B, N] steps; done: [B, N] the episode's labelled end: the window
    stops there without bootstrap; cut: [B, N] the window stops after this chunk with bootstrap (author changed,
    frames lost, data end). What lies beyond the first stop is ignored, whatever it holds.
    """
    stop = (done | cut).to(torch.int64)
    before = torch.cumsum(stop, dim=1) - stop  # number of stops in earlier chunks
    alive = before == 0
    steps = torch.where(alive, executed, torch.zeros_like(executed)).to(torch.int64)
    offset = torch.cumsum(steps, dim=1) - steps
    power = torch.pow(torch.full_like(reward, gamma), offset.to(reward.dtype))
    # `where`, not a product: memory behind a stop may hold anything, NaN included.
    total = torch.where(alive, power * reward, torch.zeros_like(reward)).sum(dim=1)
    last = alive.sum(dim=1) - 1
    ended = (done & alive).any(dim=1)
    discount = torch.pow(torch.full_like(total, gamma), steps.sum(dim=1).to(reward.dtype))
    return Window(total, torch.where(ended, torch.zeros_like(discount), discount), last)


# --- the value --------------------------------------------------------------------------------------------


def fit_loss(output: Tensor, label: Tensor, config: DivlConfig) -> Tensor:
    """What V learns by, at either choice of `config.value`. output: [B, outputs]; label: [B]. Returns a scalar."""
    if config.value == "categorical":
        return value_loss(output, label, config.support)
    return expectile_loss(output.squeeze(-1), label, config.expectile)


def expectile_loss(value: Tensor, label: Tensor, expectile: float) -> Tensor:
    """mean |expectile - 1(u < 0)| u^2, u = label - value: least where value is that expectile. algorithm.md 2.4.

    value, label: [B], no gradient flows into the label. Returns a scalar.
    """
    error = label.detach() - value
    return (torch.where(error < 0, 1 - expectile, expectile) * error.square()).mean()


# --- the categorical value --------------------------------------------------------------------------------


def project(q: Tensor, support: Support) -> Tensor:
    """Two-hot (C51) projection of scalar values onto the support. algorithm.md 2.3.

    q: [B] values, any range (clipped to the support). Returns [B, C], rows sum to 1 and have mean clip(q).
    """
    position = (q.clamp(support.low, support.high) - support.low) / support.spacing
    nearest = position.round()
    tolerance = 4 * torch.finfo(q.dtype).eps * support.size
    on_atom = (position - nearest).abs() < tolerance  # to rounding: all its mass goes to that atom
    position = torch.where(on_atom, nearest, position)
    lower = position.floor().long().clamp(0, support.size - 2)  # a nan stays one, in the mass
    fraction = (position - lower).unsqueeze(-1)
    mass = torch.zeros(*q.shape, support.size, dtype=q.dtype, device=q.device)
    mass.scatter_(-1, lower.unsqueeze(-1), 1 - fraction)
    return mass.scatter_(-1, lower.unsqueeze(-1) + 1, fraction)


def value_loss(logits: Tensor, label: Tensor, support: Support) -> Tensor:
    """Cross-entropy of V to the projection of `label` = min over heads of the target critic. algorithm.md 2.3.

    logits: [B, C]; label: [B], no gradient flows into it. Returns a scalar, mean over B.
    """
    mass = project(label.detach(), support)
    return -(mass * torch.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def value_label(target_q: Tensor) -> Tensor:
    """[E, B] values of the target critic at the replayed action -> [B], the pessimistic head. algorithm.md 2.3."""
    return target_q.min(dim=0).values


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """[B, C] -> [B] in [0, 1]: entropy over log C. algorithm.md 2.4."""
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropy / log(probabilities.shape[-1])


def adaptive_tau(entropy: Tensor, tau_base: float, config: DivlConfig) -> Tensor:
    """[B] normalised entropy -> [B] quantile, lower where V is spread; no gradient. algorithm.md 2.4."""
    return (tau_base - config.alpha * entropy.detach()).clamp(config.tau_min, config.tau_max)


def quantile_index(probabilities: Tensor, tau: Tensor) -> Tensor:
    """First atom at which the CDF reaches tau. algorithm.md 2.4.

    probabilities: [B, C]; tau: [B] in (0, 1]. Returns [B] int64. A tau that rounding puts beyond the whole mass
    gives the last atom with mass.
    """
    cdf = probabilities.double().cumsum(dim=-1)
    threshold = torch.minimum(tau.double().unsqueeze(-1) - _CDF_TOLERANCE, cdf[..., -1:])
    return (cdf < threshold).sum(dim=-1).clamp(max=probabilities.shape[-1] - 1)


def quantile_value(probabilities: Tensor, tau: Tensor, config: DivlConfig) -> Tensor:
    """[B, C], [B] -> [B] value at the quantile; no gradient. algorithm.md 2.4.

    hard: the atom itself. local_mean: the mean over the atom and its neighbours, which returns the value of a
    two-hot distribution exactly instead of rounding it up by as much as one spacing.
    """
    probabilities = probabilities.detach()
    atoms = config.support.atoms(probabilities.device, probabilities.dtype)
    index = quantile_index(probabilities, tau)
    if config.quantile == "hard":
        return atoms[index]
    window = index.unsqueeze(-1) + torch.arange(-1, 2, device=index.device)
    inside = (window >= 0) & (window < config.support.size)
    window = window.clamp(0, config.support.size - 1)
    mass = probabilities.gather(-1, window) * inside
    total = mass.sum(dim=-1)
    mean = (mass * atoms[window]).sum(dim=-1) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, mean, atoms[index])


def mean_value(output: Tensor, config: DivlConfig) -> Tensor:
    """[B, outputs] -> [B] mean of V; no gradient. What is expected of the actions that the replay holds at a state; an
    expectile is a mean already, of errors weighted by their sign."""
    if config.value == "expectile":
        return output.detach().squeeze(-1)
    probabilities = torch.softmax(output.detach(), dim=-1)
    return probabilities @ config.support.atoms(probabilities.device, probabilities.dtype)


class Bootstrap(NamedTuple):
    """What V says about a state, and why. All [B], without gradient."""

    value: Tensor
    tau: Tensor
    entropy: Tensor  # 0 of a scalar, which knows no spread


def bootstrap(output: Tensor, tau_base: float, config: DivlConfig) -> Bootstrap:
    """What targets read off V at the next states. output: [B, outputs]. algorithm.md 2.4.

    categorical: the adaptive quantile. expectile: V itself, whatever tau_base is; `tau` is then the expectile.
    """
    if config.value == "expectile":
        value = output.detach().squeeze(-1)
        return Bootstrap(value, torch.full_like(value, config.expectile), torch.zeros_like(value))
    probabilities = torch.softmax(output.detach(), dim=-1)
    entropy = normalised_entropy(probabilities)
    tau = adaptive_tau(entropy, tau_base, config)
    return Bootstrap(quantile_value(probabilities, tau, config), tau, entropy)


# --- the critic -------------------------------------------------------------------------------------------


def critic_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """y = n-step reward + discount * Qt(next state); all [B], no gradient. algorithm.md 2.4.

    `where`, so that a value that is not finite at a state nobody bootstraps from cannot leak in.
    """
    bootstrapped = torch.where(discount > 0, discount * next_value, torch.zeros_like(next_value))
    return (reward + bootstrapped).detach()


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """[E, B] heads, [B] target -> scalar: squared error summed over heads, mean over B. algorithm.md 2.4."""
    return (q - target.detach()).square().sum(dim=0).mean()


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """target <- (1 - rate) target + rate online, parameter by parameter; buffers are copied. algorithm.md 2.4."""
    _lerp(target.parameters(), online.parameters(), rate)
    for kept, new in zip(target.buffers(), online.buffers(), strict=True):
        kept.copy_(new)


def _lerp(target: Iterable[Tensor], online: Iterable[Tensor], rate: float) -> None:
    for kept, new in zip(target, online, strict=True):
        kept.lerp_(new, rate)
