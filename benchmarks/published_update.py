# SPDX-License-Identifier: Apache-2.0
"""One update of the published QAM agent, made of this project's functions, and the time it takes.

Used by learner.py (CPU, beside the published code) and learner_gpu.py. What one update computes, as the published code does
(algorithm.md 1.8): chunks of the acting policy at the next states by K Euler steps; the TD target, mean minus half a standard
deviation of the slow critics; all critics' regression to it; flow matching of the cloned policy; adjoint matching of the
acting policy against the slow copy of the cloned one, with the gradient of the slow critics; one Adam step down the sum, its
gradient clipped to norm 1; the slow copies. Left out is what changes no result: Adam's moments of the slow copies, whose
gradients are zero, and the choice of the best of one sampled chunk.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lwd_learner import divl, qam
from lwd_learner.critic import CriticConfig, CriticEnsemble
from lwd_learner.descent import Descent
from lwd_learner.state_networks import StateFlow

STATE, HORIZON, ACTION = 28, 5, 5  # of the published code's cube tasks
DISCOUNT = 0.99**HORIZON
PESSIMISM = 0.5  # standard deviations of the heads
FLOW_STEPS = 10
INVERSE_TEMPERATURE = 1.0

Arithmetic = Literal["float32", "medium", "bfloat16"]
Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """Networks of one measurement."""

    name: str
    width: int
    layers: int
    critics: int


SIZES = (Size("512x4_q10", 512, 4, 10), Size("256x3_q2", 256, 3, 2))


@dataclass(frozen=True)
class Variant:
    """One way to compute the update."""

    name: str
    arithmetic: Arithmetic = "medium"  # of matrix products; float32: as torch has it; bfloat16: autocast
    adjoint: qam.Adjoint = "vjp"  # as published; "denoiser" is this project's default
    compiled: bool = False


EAGER = (
    Variant("default_products", "float32"),
    Variant("eager"),
    Variant("bf16", "bfloat16"),
    Variant("bf16_denoiser", "bfloat16", "denoiser"),
)
COMPILED = (
    Variant("compiled", compiled=True),
    Variant("bf16_compiled", "bfloat16", compiled=True),
    Variant("bf16_denoiser_compiled", "bfloat16", "denoiser", compiled=True),
)


@contextmanager
def products(kind: Arithmetic) -> Iterator[None]:
    """How float32 matrices are multiplied, forwards and backwards; weights, sums and optimisers stay in float32.

    "medium" lets torch take oneDNN, which uses all of a CPU's vector instructions where the default library uses half of
    them on some. It may then round factors to bfloat16; whether it did shows in the gradient's error (`gradient_errors`).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if kind == "float32" else "medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class StateBatch:
    """Random transitions with chunks that were executed to their end; speed does not depend on their values."""

    state: Tensor  # [B, STATE]
    action: Tensor  # [B, HORIZON, ACTION]
    mask: Tensor  # [B, HORIZON] bool
    reward: Tensor  # [B]
    next_state: Tensor  # [B, STATE]

    @staticmethod
    def random(rows: int, device: torch.device) -> StateBatch:
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        return StateBatch(
            normal(rows, STATE).to(device),
            normal(rows, HORIZON, ACTION).clamp(-1, 1).to(device),
            torch.ones(rows, HORIZON, dtype=torch.bool, device=device),
            -torch.ones(rows, device=device),
            normal(rows, STATE).to(device),
        )

    def double(self) -> StateBatch:
        """The same in float64."""
        return StateBatch(
            self.state.double(),
            self.action.double(),
            self.mask,
            self.reward.double(),
            self.next_state.double(),
        )


class PublishedUpdate:
    """Networks, their slow copies and the optimiser. Calling it makes one update."""

    def __init__(self, size: Size, variant: Variant, device: torch.device, mode: str | None = None) -> None:
        """mode: of torch.compile; None: its default."""
        self.variant, self.device = variant, device
        self.config = qam.QamConfig(
            steps=FLOW_STEPS,
            adjoint=variant.adjoint,
            pairing="official",
            box_penalty=0.0,
        )
        heads = CriticConfig(
            heads=size.critics, width=size.width, layers=size.layers, chunk_encoder="flat", hidden="gelu_norm"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.critic = CriticEnsemble(STATE, HORIZON, ACTION, heads).to(device)
            self.cloned = StateFlow(STATE, HORIZON, ACTION, size.width, size.layers).to(device)
            self.acting = StateFlow(STATE, HORIZON, ACTION, size.width, size.layers).to(device)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.slow_cloned = copy.deepcopy(self.cloned).requires_grad_(False)
        learned = nn.ModuleDict({"critic": self.critic, "cloned": self.cloned, "acting": self.acting})
        self.descent = Descent("published", learned, partial(torch.optim.Adam, lr=3e-4, fused=True), 1.0)
        generator = torch.Generator(device).manual_seed(0)
        self.normal: Callable[..., Tensor] = partial(torch.randn, generator=generator, device=device)
        self.uniform: Callable[..., Tensor] = partial(torch.rand, generator=generator, device=device)
        if variant.compiled:
            for network in (*learned.values(), self.slow_critic, self.slow_cloned):
                network.compile(dynamic=False, mode=mode)

    def __call__(self, batch: StateBatch) -> float:
        with products(self.variant.arithmetic):
            norm = self.descent.step(self.loss(batch))
        divl.ema_update(self.slow_critic, self.critic, 0.005)
        divl.ema_update(self.slow_cloned, self.cloned, 0.005)
        return norm

    def loss(self, batch: StateBatch) -> Tensor:
        """The sum of the three losses."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.arithmetic == "bfloat16"):
            return self.critic_loss(batch) + self.cloning_loss(batch) + self.policy_loss(batch)

    def critic_loss(self, batch: StateBatch) -> Tensor:
        """Mean over heads and rows of the squared TD error."""
        with torch.no_grad():
            noise = self.normal(len(batch.reward), HORIZON * ACTION)
            action = qam.integrate(_bind(self.acting, batch.next_state), noise, FLOW_STEPS).clamp(-1, 1)
            heads = self.slow_critic(batch.next_state, _chunks(action), batch.mask)
            target = batch.reward + DISCOUNT * (
                heads.mean(dim=0) - PESSIMISM * heads.std(dim=0, correction=0)
            )
        heads = self.critic(batch.state, batch.action, batch.mask)
        return divl.critic_loss(heads, target) / len(heads)

    def cloning_loss(self, batch: StateBatch) -> Tensor:
        """Flow matching to the batch's actions."""
        noise = self.normal(*batch.action.shape)
        return qam.flow_matching_loss(
            partial(self.cloned, batch.state), batch.action, noise, self.uniform(len(noise))
        )

    def policy_loss(self, batch: StateBatch) -> Tensor:
        """Adjoint matching."""
        noise = self.normal(FLOW_STEPS, len(batch.reward), HORIZON * ACTION)
        return qam.policy_loss(
            _bind(self.acting, batch.state),
            _bind(self.slow_cloned, batch.state),
            lambda action: self.slow_critic(batch.state, _chunks(action), batch.mask),
            noise,
            1 / INVERSE_TEMPERATURE,
            self.config,
        ).loss

    def gradient(self, batch: StateBatch) -> Tensor:
        """Of the loss at the present weights, all parameters in one vector, in float64."""
        parameters = list(self.descent.module.parameters())
        with products(self.variant.arithmetic):
            gradients = torch.autograd.grad(self.loss(batch), parameters)
        return torch.cat([gradient.flatten().double() for gradient in gradients])


def seconds_per_update(step: Step, updates: int, device: torch.device) -> tuple[float, float]:
    """Mean wall time and processor time of `updates` steps in a row; waits for the device before and after."""
    _wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(updates):
        step()
    _wait(device)
    return (time.perf_counter() - wall) / updates, (time.process_time() - processor) / updates


def gradient_errors(size: Size, rows: int, device: torch.device) -> dict[Arithmetic, float]:
    """Length of the error of one update's gradient over the gradient's, against the same update in float64."""
    exact = PublishedUpdate(size, Variant("exact", "float32"), device)
    # The random numbers of float32: drawn in float64 they would be others.
    noise = torch.Generator(device).manual_seed(0)
    exact.normal = lambda *shape: torch.randn(*shape, generator=noise, device=device).double()
    exact.uniform = lambda rows: torch.rand(rows, generator=noise, device=device).double()
    for network in (exact.descent.module, exact.slow_critic, exact.slow_cloned):
        network.double()
    expected = exact.gradient(StateBatch.random(rows, device).double())
    kinds: tuple[Arithmetic, ...] = ("float32", "medium", "bfloat16")
    errors: dict[Arithmetic, float] = {}
    for kind in kinds:
        error = (
            PublishedUpdate(size, Variant(kind, kind), device).gradient(StateBatch.random(rows, device))
            - expected
        )
        errors[kind] = float(error.norm() / expected.norm())
    return errors


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bind(network: nn.Module, state: Tensor) -> qam.Velocity:
    return lambda x, t: network(state, _chunks(x), t).flatten(1)


def _chunks(action: Tensor) -> Tensor:
    return action.view(-1, HORIZON, ACTION)
