# SPDX-License-Identifier: Apache-2.0
"""Adjoint matching on a base with two modes, where nothing is affine (algorithm.md 5.3, items 16 and 21).

E[g_i | x_i] depends on the policy from step i on only, so one sweep backwards over the steps gives it on a grid, with
Gauss-Hermite quadrature for the noise. Sampling instead would drown it: between two modes the adjoint is a product of
large factors, and 20 000 paths leave an error of .2 in a step. Item 16 asks for stationarity at the closed-form
velocity of the tilt; item 21 solves for the fixed point itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwd_learner.qam import (
    ActionValue,
    Adjoint,
    Pairing,
    Velocity,
    adjoint_step,
    denoiser_adjoint,
    integrate,
    noise_scale,
    pairing_weight,
    rollout,
    scalar_adjoint,
    sde_step,
    terminal_adjoint,
)

Array = NDArray[np.float64]

NO_BOX = 1e9
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(13)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
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


@dataclass(frozen=True)
class Step:
    """Step i of the sweep: what is known of everything behind it, on the grid x [N, 1]."""

    i: int
    h: float
    x: Tensor
    expand: Array  # [N] 1 + h J_i
    denoise: Array  # [N] dD_i / dx
    terminal_ahead: (
        Array  # [N] E[g_K | x_(i+1)]; at the last step E[g_K | x_i], for it is noiseless and the base's
    )
    adjoint_ahead: Array  # [N] E[g_(i+1) | x_(i+1)], at the last step likewise
    last: bool

    def expect(self, velocity: Tensor, ahead: Array) -> Array:
        """E[ahead(x_(i+1)) | x_i] under a velocity [N, 1] of the policy."""
        if self.last:
            return ahead
        zero = torch.zeros_like(self.x)
        following = [
            sde_step(self.x, velocity, self.i * self.h, self.h, zero + float(n))[:, 0] for n in NODES
        ]
        grid = self.x[:, 0].numpy()
        return np.asarray(
            sum(w * np.interp(at.numpy(), grid, ahead) for w, at in zip(WEIGHTS, following, strict=True))
        )

    def own(self, velocity: Tensor, adjoint: Adjoint) -> Array:
        """E[g_i | x_i]."""
        if adjoint == "vjp":
            return self.expand * self.expect(velocity, self.adjoint_ahead)
        return self.denoise * self.expect(velocity, self.terminal_ahead)

    def paired(self, velocity: Tensor, adjoint: Adjoint, pairing: Pairing) -> Tensor:
        """[N, 1] expectation of the adjoint that the loss pairs this step with."""
        if adjoint == "scalar":
            factor = scalar_adjoint(torch.ones(1, 1).double(), round(1 / self.h), pairing)[self.i].item()
            found = factor * self.expect(velocity, self.terminal_ahead)
        elif pairing == "right" or (pairing == "left" and self.i == 0):
            found = self.expect(velocity, self.adjoint_ahead)
        else:
            found = self.own(velocity, adjoint)
        return torch.from_numpy(found).unsqueeze(-1)


def solve(
    base: Velocity,
    action_value: ActionValue,
    steps: int,
    policy: Velocity | None = None,
    adjoint: Adjoint = "vjp",
    pairing: Pairing = "official",
) -> GridFlow:
    """Expected paired adjoints under `policy`, or without one under the fixed point v = v_b - c_i E[g | x_i]."""
    h = 1.0 / steps
    grid = np.linspace(-6, 6, 601)
    x = torch.from_numpy(grid).unsqueeze(-1)
    one = torch.ones_like(x)
    times = [torch.full((len(grid),), i * h, dtype=torch.float64) for i in range(steps)]
    denoise = denoiser_adjoint(base, x.expand(steps + 1, -1, -1), one, "official")[:, :, 0].numpy()
    end = x + h * base(x, times[-1])
    terminal_ahead = adjoint_ahead = terminal_adjoint(action_value, end, 1.0, clip=NO_BOX)[:, 0].numpy()
    velocities, adjoints = np.zeros((steps, len(grid))), np.zeros((steps, len(grid)))
    for i in reversed(range(steps)):
        expand = adjoint_step(base, x, i * h, h, one)[:, 0].numpy()
        step = Step(i, h, x, expand, denoise[i], terminal_ahead, adjoint_ahead, last=i == steps - 1)
        if policy is not None:
            velocity = policy(x, times[i])
        else:
            velocity = _equilibrium(base(x, times[i]), step, adjoint, pairing)
        velocities[i] = velocity[:, 0].numpy()
        adjoints[i] = step.paired(velocity, adjoint, pairing)[:, 0].numpy()
        terminal_ahead, adjoint_ahead = step.expect(velocity, terminal_ahead), step.own(velocity, adjoint)
    return GridFlow(grid, velocities, adjoints)


def _equilibrium(reference: Tensor, sweep: Step, adjoint: Adjoint, pairing: Pairing) -> Tensor:
    """The velocity that equals its own target: the velocity moves the next state, and with it the adjoint."""
    weight = pairing_weight(sweep.i * sweep.h, sweep.h, pairing)
    velocity, rate, before = reference.clone(), 0.6, float("inf")
    for _ in range(2000):
        step = reference - weight * sweep.paired(velocity, adjoint, pairing) - velocity
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
    assert 0.3 < size[10:].max() < 0.72
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


# --- which adjoint and which pairing ---------------------------------------------------------------------------

# Share of the right mode (.858 in the tilt) and Wasserstein-1 distance to the tilt at K = 10, Q/lambda = 1.5 a. Ten Euler
# steps with the closed-form velocity of the tilt itself are .046 away from it.
ABLATION: dict[tuple[Adjoint, Pairing], tuple[float, float]] = {
    ("vjp", "official"): (0.772, 0.109),
    ("vjp", "right"): (0.768, 0.110),
    ("vjp", "left"): (0.788, 0.102),
    ("denoiser", "official"): (0.838, 0.051),
    ("denoiser", "right"): (0.870, 0.062),
    ("denoiser", "left"): (0.864, 0.046),
    ("scalar", "official"): (0.907, 0.197),
    ("scalar", "right"): (0.872, 0.106),
    ("scalar", "left"): (0.865, 0.095),
}


def distance(flow: Velocity, steps: int, tilt: Mixture) -> float:
    """Wasserstein-1 between what the flow makes and the tilt: the area between their distribution functions."""
    end, weight = endpoints(flow, steps)
    order = end[:, 0].argsort()
    at = torch.linspace(-3, 3, 3001, dtype=torch.float64)
    made = np.interp(at, end[order, 0], weight[order].cumsum(0), left=0.0, right=1.0)
    exact = torch.special.ndtr((at[:, None] - tilt.mean) / tilt.sd) @ tilt.weight
    return float((torch.from_numpy(made) - exact).abs().sum() * (at[1] - at[0]))


@pytest.mark.parametrize(("adjoint", "pairing"), ABLATION)
def test_where_each_adjoint_and_pairing_ends_between_two_modes(adjoint: Adjoint, pairing: Pairing) -> None:
    flow = solve(BASE, lambda a: 1.5 * a[:, 0], 10, adjoint=adjoint, pairing=pairing)
    end, weight = endpoints(flow, 10)
    share, away = ABLATION[adjoint, pairing]
    assert float(weight[end[:, 0] > 0].sum()) == pytest.approx(share, abs=0.01)
    assert distance(flow, 10, BASE.tilt(1.5)) == pytest.approx(away, abs=0.005)


def test_ten_steps_along_the_tilts_own_velocity_are_no_nearer_to_it_than_denoiser_and_left() -> None:
    tilt = BASE.tilt(1.5)
    assert distance(tilt, 10, tilt) == pytest.approx(ABLATION["denoiser", "left"][1], abs=0.005)


def test_a_critic_that_is_flat_on_both_modes_hardly_moves_anything() -> None:
    """Sigmoid of slope 10 between the modes, lambda .5: odds .878. A known limit of extraction by gradients, and the one
    place where the published recursion does better than the denoiser's form."""

    def value(a: Tensor) -> Tensor:
        return torch.sigmoid(10 * a[:, 0]) / 0.5

    share = {}
    choices: list[tuple[Adjoint, Pairing]] = [("vjp", "official"), ("denoiser", "left")]
    for adjoint, pairing in choices:
        end, weight = endpoints(solve(BASE, value, 10, adjoint=adjoint, pairing=pairing), 10)
        share[adjoint] = float(weight[end[:, 0] > 0].sum())
    assert share == pytest.approx({"vjp": 0.654, "denoiser": 0.613}, abs=0.02)
