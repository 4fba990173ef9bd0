# SPDX-License-Identifier: Apache-2.0
"""Adjoint matching on a base with two modes, where nothing is affine (algorithm.md 5.3, items 16 and 21).

E[g_i | x_i] depends on the policy from step i on only, so one sweep backwards over the steps gives it on a grid, with
Gauss-Hermite quadrature for the noise. Sampling instead would drown it: between two modes the adjoint is a product of
large factors, and 20 000 paths leave an error of .2 in a step. Item 16 asks for stationarity at the closed-form
velocity of the tilt; item 21 solves for the fixed point itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwd_learner.qam import (
    ActionValue,
    Velocity,
    adjoint_step,
    integrate,
    noise_scale,
    rollout,
    sde_step,
    terminal_adjoint,
)

Array = NDArray[np.float64]

NO_BOX = 1e9
SEPARATION, SD = 0.6, 0.15


@dataclass(frozen=True)
class Mixture:
    """Components N(mean_j, sd^2) with their weights; the velocity of its flow in closed form."""

    mean: Tensor  # [J]
    sd: float
    weight: Tensor  # [J]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, 1], t: [B] -> [B, 1]."""
        time = t[:, None]
        variance = (1 - time) ** 2 + time**2 * self.sd**2
        offset = x - time * self.mean
        share = torch.softmax(self.weight.log() - offset.square() / (2 * variance), dim=1)
        slope = (time * self.sd**2 - (1 - time)) / variance
        return (share * (self.mean + slope * offset)).sum(dim=1, keepdim=True)

    def tilt(self, b: float) -> Mixture:
        """The mixture times exp(b a), normalised: every mean moves by b sd^2, weights by exp(b mean)."""
        weight = self.weight * torch.exp(b * self.mean)
        return Mixture(self.mean + b * self.sd**2, self.sd, weight / weight.sum())


BASE = Mixture(
    torch.tensor([-SEPARATION, SEPARATION], dtype=torch.float64),
    SD,
    torch.tensor([0.5, 0.5], dtype=torch.float64),
)


# --- the expected adjoint, without sampling -------------------------------------------------------------------


@dataclass(frozen=True)
class GridFlow:
    """v(x, t_i) and E[g_i | x_i = x] by linear interpolation on a grid, one row per step."""

    grid: Array  # [N]
    velocity: Array  # [K, N]
    adjoint: Array  # [K, N]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        row = self.velocity[round(float(t[0]) * len(self.velocity))]
        return torch.from_numpy(np.interp(x[:, 0].numpy(), self.grid, row)).unsqueeze(-1)


def solve(base: Velocity, action_value: ActionValue, steps: int, policy: Velocity | None = None) -> GridFlow:
    """Expected adjoints under `policy`, or without one under the fixed point v = v_b - (sigma_i^2 / 2) E[g_i | x_i]."""
    h = 1.0 / steps
    grid = np.linspace(-6, 6, 601)
    x = torch.from_numpy(grid).unsqueeze(-1)
    zero = torch.zeros_like(x)
    node, weight = np.polynomial.hermite_e.hermegauss(13)
    weight = weight / weight.sum()
    times = [torch.full((len(grid),), i * h, dtype=torch.float64) for i in range(steps)]
    # The last step is noiseless and the base's: E[g_K | x_(K-1)] is known.
    last = x + h * base(x, times[-1])
    expected = terminal_adjoint(action_value, last, 1.0, clip=NO_BOX)
    velocities, adjoints = np.zeros((steps, len(grid))), np.zeros((steps, len(grid)))
    ahead = expected[:, 0].numpy()  # E[g_(i+1) | x_(i+1)] on the grid
    for i in reversed(range(steps)):
        factor = adjoint_step(base, x, i * h, h, torch.ones_like(x))  # 1 + h J_i, one number per grid point

        def adjoint_given(
            velocity: Tensor, i: int = i, ahead: Array = ahead, factor: Tensor = factor
        ) -> Tensor:
            if i == steps - 1:
                return factor * expected
            following = [sde_step(x, velocity, i * h, h, zero + float(n))[:, 0].numpy() for n in node]
            mean = sum(w * np.interp(at, grid, ahead) for w, at in zip(weight, following, strict=True))
            return factor * torch.from_numpy(np.asarray(mean)).unsqueeze(-1)

        if policy is not None:
            velocity = policy(x, times[i])
        else:
            velocity = _equilibrium(base(x, times[i]), noise_scale(i * h, h) ** 2 / 2, adjoint_given)
        adjoint = adjoint_given(velocity)
        velocities[i], adjoints[i] = velocity[:, 0].numpy(), adjoint[:, 0].numpy()
        ahead = adjoints[i]
    return GridFlow(grid, velocities, adjoints)


def _equilibrium(reference: Tensor, spread: float, adjoint_given: Callable[[Tensor], Tensor]) -> Tensor:
    """The velocity that equals its own target: the velocity moves the next state, and with it the adjoint."""
    velocity, rate, before = reference.clone(), 0.6, float("inf")
    for _ in range(2000):
        step = reference - spread * adjoint_given(velocity) - velocity
        size = step.abs().max().item()
        if size < 1e-5:
            return velocity
        rate = max(rate / 2, 0.05) if size > before else rate  # a large one oscillates between the modes
        velocity, before = velocity + rate * step, size
    raise AssertionError(f"no equilibrium, residual {size}")


def test_the_solver_finds_the_tabled_fixed_point_of_a_gaussian() -> None:
    base = Mixture(torch.zeros(1, dtype=torch.float64), 1.0, torch.ones(1, dtype=torch.float64))
    end, weight = endpoints(solve(base, lambda a: -((a[:, 0] - 1) ** 2) / 2, 10), 10)
    mean = weight @ end[:, 0]
    assert mean.item() == pytest.approx(0.4344, abs=2e-4)
    assert (weight @ (end[:, 0] - mean) ** 2).sqrt().item() == pytest.approx(0.6280, abs=2e-4)


# --- stationarity at the tilt (16) ---------------------------------------------------------------------------


def test_the_tilt_of_the_mixture() -> None:
    tilt = BASE.tilt(1.5)
    assert tilt.weight[1].item() == pytest.approx(0.8581, abs=5e-5)
    assert (tilt.weight @ tilt.mean).item() == pytest.approx(0.4635, abs=5e-5)


def stationarity(steps: int) -> tuple[float, Array, Array]:
    """Share of the right mode on the production paths of the tilt; per step the rms of the residual's projection on
    (1, x, x^2), and of v* - v_b."""
    tilt = BASE.tilt(1.5)
    noise = torch.randn(steps, 20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = rollout(tilt, BASE, noise)
    solved = solve(BASE, lambda a: 1.5 * a[:, 0], steps, policy=tilt)
    moved = (path.velocities - path.reference_velocities)[:, :, 0].numpy()
    projection = np.zeros(steps)
    for i, x in enumerate(path.states[:-1, :, 0].numpy()):
        spread = noise_scale(i / steps, 1 / steps) ** 2 / 2
        residual = moved[i] + spread * np.interp(x, solved.grid, solved.adjoint[i])
        basis, _ = np.linalg.qr(np.stack([x**power for power in range(3)], axis=1))
        projection[i] = np.sqrt(np.square(basis.T @ residual).sum() / len(x))
    return float((path.states[-1] > 0).double().mean()), projection, np.sqrt(np.square(moved).mean(axis=1))


def test_the_tilt_keeps_its_modes_and_its_residual_vanishes_with_the_step() -> None:
    share, _, _ = stationarity(10)
    share_coarse, coarse, size = stationarity(50)
    share_fine, fine, _ = stationarity(200)
    assert [share, share_coarse, share_fine] == pytest.approx([0.81, 0.851, 0.856], abs=0.01)
    assert coarse[10:].max() < 0.10 and fine[40:].max() < 0.045
    assert fine[40:].max() < coarse[10:].max() / 2
    assert 0.3 < size[10:].max() < 0.8
    assert fine[0] > 0.4  # the first step of the official discretisation stays wrong by O(1), 2.7


# --- the odds of two modes (21) ------------------------------------------------------------------------------


def endpoints(flow: Velocity, steps: int) -> tuple[Tensor, Tensor]:
    """Euler endpoints [N, 1] of noise on a fine grid, and the weight of each under N(0, 1)."""
    noise = torch.linspace(-5, 5, 4001, dtype=torch.float64).unsqueeze(-1)
    density = torch.exp(-noise[:, 0].square() / 2)
    return integrate(flow, noise, steps), density / density.sum()


def odds(temperature: float, steps: int) -> float:
    """Share of the better of two equal modes at the fixed point, for a Q that goes from 0 at one to 1 at the other."""
    flow = solve(BASE, lambda a: (a[:, 0] + SEPARATION) / (2 * SEPARATION) / temperature, steps)
    end, weight = endpoints(flow, steps)
    return float(weight[end[:, 0] > 0].sum())


@pytest.mark.parametrize("temperature", [2.0, 1.0, 0.5])
def test_two_modes_share_by_the_odds_of_their_values(temperature: float) -> None:
    assert odds(temperature, 50) == pytest.approx(1 / (1 + exp(-1 / temperature)), abs=0.03)


def test_ten_steps_keep_the_order_of_temperatures_and_give_a_strong_tilt_too_little() -> None:
    """The odds ask for .622, .731 and .881.

    Steps this coarse have several fixed points near the ridge between the modes: which one is met depends on how it
    is approached (.75 to .79 for the last one, on any grid), so only what all of them share is asserted.
    """
    share = [odds(temperature, 10) for temperature in (2.0, 1.0, 0.5)]
    assert 0.5 < share[0] < share[1] < share[2] < 0.84
