# SPDX-License-Identifier: Apache-2.0
"""Adjoint matching on a Gaussian base, solved without sampling; several tests use it.

With an affine policy per step and a quadratic Q everything on a path is affine, so the noiseless path from x_i gives
E[. | x_i] exactly. A row of every tensor is one case: all cases are solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from lwd_learner.qam import (
    Adjoint,
    Pairing,
    Rollout,
    denoiser_adjoint,
    gaussian_adjoint,
    integrate,
    lean_adjoint,
    pairing_weight,
    scalar_adjoint,
    sde_step,
    terminal_adjoint,
)

INFINITE_BOX = 1e9


@dataclass(frozen=True)
class Case:
    """Base N(m, s^2) and Q/lambda = -(a - mu)^2 curvature / 2 + slope a; all [R] float64."""

    m: Tensor
    s: Tensor
    mu: Tensor
    curvature: Tensor
    slope: Tensor

    @staticmethod
    def of(*rows: tuple[float, float, float, float, float]) -> Case:
        """Rows of (m, s, mu, c, slope); c = inf for a linear Q."""
        m, s, mu, c, slope = torch.tensor(rows, dtype=torch.float64).T
        return Case(m, s, mu, c**-2, slope)

    def repeat(self, n: int) -> Case:
        return Case(*(x.repeat(n) for x in (self.m, self.s, self.mu, self.curvature, self.slope)))

    def k(self, t: Tensor | float) -> Tensor:
        """Slope in x of the base velocity."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return (t * self.s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * self.s**2)

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of the base at x [R, 1], t [R]."""
        return (self.m + self.k(t) * (x[:, 0] - t * self.m)).unsqueeze(-1)

    def value(self, a: Tensor) -> Tensor:
        """Q/lambda [R] at a [R, 1]."""
        return -self.curvature * (a[:, 0] - self.mu) ** 2 / 2 + self.slope * a[:, 0]

    def tilt(self) -> tuple[Tensor, Tensor]:
        """Mean and sd of the exact tilted distribution."""
        precision = self.s**-2 + self.curvature
        return (self.m / self.s**2 + self.mu * self.curvature + self.slope) / precision, precision**-0.5


@dataclass
class AffineFlow:
    """v(x, t_i) = slope_i x + offset_i on a grid of K steps; slope, offset: [K, R]."""

    slope: Tensor
    offset: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        i = round(float(t[0]) * len(self.slope))
        return self.slope[i].unsqueeze(-1) * x + self.offset[i].unsqueeze(-1)

    def repeat(self, n: int) -> AffineFlow:
        return AffineFlow(self.slope.repeat(1, n), self.offset.repeat(1, n))

    def endpoint(self) -> tuple[Tensor, Tensor]:
        """Mean and sd of what the Euler ODE over the same grid makes of N(0, 1)."""
        mean, sd = torch.zeros_like(self.slope[0]), torch.ones_like(self.slope[0])
        for a, c in zip(self.slope, self.offset, strict=True):
            mean, sd = mean + (a * mean + c) / len(self.slope), sd * (1 + a / len(self.slope))
        return mean, sd.abs()


def base_flow(case: Case, steps: int) -> AffineFlow:
    times = [i / steps for i in range(steps)]
    slope = torch.stack([case.k(t) for t in times])
    return AffineFlow(slope, torch.stack([case.m * (1 - t * case.k(t)) for t in times]))


def pulls(case: Case, steps: int, adjoint: Adjoint, pairing: Pairing) -> Tensor:
    """[K, R] adjoint that each step is paired with, per unit of terminal adjoint; the same at every x."""
    states = torch.zeros(steps + 1, len(case.m), 1).double()
    one = torch.ones(len(case.m), 1).double()
    if adjoint == "vjp":
        return lean_adjoint(case.base, states, one, pairing)[:, :, 0]
    if adjoint == "denoiser":
        return denoiser_adjoint(case.base, states, one, pairing)[:, :, 0]
    if adjoint == "scalar":
        return scalar_adjoint(one, steps, pairing)[:, :, 0]
    return gaussian_adjoint(one, steps, case.s.square().unsqueeze(-1), pairing)[:, :, 0]


def fixed_point(
    case: Case,
    steps: int,
    driver: Rollout = "on_policy",
    adjoint: Adjoint = "vjp",
    pairing: Pairing = "official",
) -> AffineFlow:
    """Where the adjoint-matching loss is stationary: v = v_b - c_i E[g | x_i], g the adjoint paired with step i.

    Solved backwards over the steps. Each step's target is affine in (x, v(x)), so it is read off the production
    functions at three points and solved for v.
    """
    h = 1.0 / steps
    rows = len(case.m)
    flow = base_flow(case, steps)
    terminal_slope, terminal_offset = terminal_line(case)
    pull = pulls(case, steps, adjoint, pairing)
    ahead_slope, ahead_offset = torch.ones(rows).double(), torch.zeros(rows).double()  # E[x_K | x_(i+1)]
    for i in reversed(range(steps)):
        time = i * h
        weight = pairing_weight(time, h, pairing) * pull[i] * terminal_slope
        shift = pairing_weight(time, h, pairing) * pull[i] * terminal_offset
        base_slope, base_offset = flow.slope[i].clone(), flow.offset[i].clone()
        if i == steps - 1:  # noiseless, reference velocity
            step_slope, step_offset = 1 + h * base_slope, h * base_offset
            step_velocity = torch.zeros(rows).double()
        else:
            zero, one = torch.zeros(rows, 1).double(), torch.ones(rows, 1).double()
            step_slope = sde_step(one, zero, time, h, zero)[:, 0]
            step_velocity = sde_step(zero, one, time, h, zero)[:, 0]
            step_offset = torch.zeros(rows).double()
            if driver == "reference":
                step_slope = step_slope + step_velocity * base_slope
                step_offset = step_velocity * base_offset
                step_velocity = torch.zeros(rows).double()
        # v = base - weight (ahead (step_slope x + step_velocity v + step_offset) + ahead_offset) - shift
        own = 1 + weight * ahead_slope * step_velocity
        flow.slope[i] = (base_slope - weight * ahead_slope * step_slope) / own
        flow.offset[i] = (base_offset - weight * (ahead_slope * step_offset + ahead_offset) - shift) / own
        step_slope = step_slope + step_velocity * flow.slope[i]
        step_offset = step_offset + step_velocity * flow.offset[i]
        ahead_offset = ahead_offset + ahead_slope * step_offset
        ahead_slope = ahead_slope * step_slope
    return flow


def terminal_line(case: Case) -> tuple[Tensor, Tensor]:
    """Slope and offset [R] of x_K -> g_K at temperature 1."""

    def adjoint(x: Tensor) -> Tensor:
        return terminal_adjoint(case.value, x.unsqueeze(-1), 1.0, clip=INFINITE_BOX)[:, 0]

    zero = adjoint(torch.zeros(len(case.m)).double())
    return adjoint(torch.ones(len(case.m)).double()) - zero, zero


def moments(flow: AffineFlow) -> Tensor:
    """[R, 2] mean and sd of the production ODE sampler, which is affine in its noise."""
    rows = flow.slope.shape[1]
    steps = len(flow.slope)
    zero = integrate(flow, torch.zeros(rows, 1).double(), steps)
    one = integrate(flow, torch.ones(rows, 1).double(), steps)
    return torch.cat([zero, (one - zero).abs()], dim=1)


ROWS = Case.of(
    (0, 1, 1, 1, 0),
    (0.3, 0.5, 0.8, 0.5, 0),
    (0.3, 0.5, 0.8, 0.25, 0),
    (0, 0.3, 0, inf, 1),
    (0.5, 0.2, 1, 1, 0),
)
