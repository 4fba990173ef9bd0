# SPDX-License-Identifier: Apache-2.0
"""Adjoint matching against exact fixed points and closed forms (algorithm.md 5.3).

On a one-dimensional Gaussian base with an affine policy per step and a quadratic Q everything on a path is affine,
so the noiseless path from x_i gives E[. | x_i] exactly and fixed points need no sampling. A row of every tensor is
one case: all cases are solved at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, log

import pytest
import torch
from torch import Tensor

from lwd_learner.qam import (
    QamConfig,
    adjoint_step,
    denoiser_adjoint,
    effective_lambda,
    flow_matching_loss,
    initial_dual,
    integrate,
    lean_adjoint,
    noise_scale,
    path_kl,
    qam_loss,
    rollout,
    sde_step,
    terminal_adjoint,
    update_dual,
)

# --- Gaussian flows -----------------------------------------------------------------------------------------

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


def fixed_point(case: Case, steps: int, paths: str = "policy") -> AffineFlow:
    """Where the adjoint-matching loss is stationary: v = v_b - (sigma^2 / 2) E[g_i | x_i].

    Solved backwards over the steps. Each step's target is affine in (x, v(x)), so it is read off the production
    functions at three points and solved for v.
    """
    h = 1.0 / steps
    rows = len(case.m)
    flow = base_flow(case, steps)
    # E[g_i | x_i] = pull_i (x_i -> g_K -> g_i); both maps are kept as (slope, offset) per row.
    terminal_slope, terminal_offset = _affine(lambda x: _terminal(case, x), rows)
    ahead_slope, ahead_offset = torch.ones(rows).double(), torch.zeros(rows).double()  # E[x_K | x_(i+1)]
    pull = torch.ones(rows).double()  # g_(i+1) per g_K
    for i in reversed(range(steps)):
        time = i * h
        x = torch.zeros(rows, 1).double()
        pull = adjoint_step(case.base, x, time, h, pull.unsqueeze(-1))[:, 0]
        weight = noise_scale(time, h) ** 2 / 2 * pull * terminal_slope
        shift = noise_scale(time, h) ** 2 / 2 * pull * terminal_offset
        base_slope, base_offset = flow.slope[i].clone(), flow.offset[i].clone()
        if i == steps - 1:  # noiseless, reference velocity
            step_slope, step_offset = 1 + h * base_slope, h * base_offset
            step_velocity = torch.zeros(rows).double()
        else:
            zero, one = torch.zeros(rows, 1).double(), torch.ones(rows, 1).double()
            step_slope = sde_step(one, zero, time, h, zero)[:, 0]
            step_velocity = sde_step(zero, one, time, h, zero)[:, 0]
            step_offset = torch.zeros(rows).double()
            if paths == "reference":
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


def _terminal(case: Case, x: Tensor) -> Tensor:
    return terminal_adjoint(case.value, x.unsqueeze(-1), 1.0, clip=INFINITE_BOX)[:, 0]


def _affine(function: Callable[[Tensor], Tensor], rows: int) -> tuple[Tensor, Tensor]:
    zero = function(torch.zeros(rows).double())
    return function(torch.ones(rows).double()) - zero, zero


ROWS = Case.of(
    (0, 1, 1, 1, 0),
    (0.3, 0.5, 0.8, 0.5, 0),
    (0.3, 0.5, 0.8, 0.25, 0),
    (0, 0.3, 0, inf, 1),
    (0.5, 0.2, 1, 1, 0),
)
TILT = [(0.5, 0.7071), (0.55, 0.3536), (0.7, 0.2236), (0.09, 0.3), (0.5192, 0.1961)]
FIXED_POINTS = {  # algorithm.md 5.3 item 14: (mean, sd) per row
    ("policy", 10): [
        (0.4344, 0.6280),
        (0.5450, 0.2903),
        (0.7005, 0.1510),
        (0.1063, 0.2469),
        (0.5253, 0.1491),
    ],
    ("policy", 50): [
        (0.4749, 0.6915),
        (0.5431, 0.3416),
        (0.6878, 0.2171),
        (0.0926, 0.2887),
        (0.5202, 0.1860),
    ],
    ("reference", 10): [
        (0.6629, 0.5221),
        (0.6708, 0.2343),
        (0.8849, 0.0195),
        (0.1063, 0.2469),
        (0.5259, 0.1490),
    ],
    ("reference", 2000): [
        (0.7229, 0.6061),
        (0.6620, 0.3029),
        (0.9393, 0.0674),
        (0.0900, 0.2997),
        (0.5198, 0.1958),
    ],
}
BC_AT_10 = [(0.0, 0.8790), (0.3, 0.4308), (0.3, 0.4308), (0.0, 0.2469), (0.5, 0.1542)]


def skeleton(steps: int, rows: int, *starts: float) -> Tensor:
    """[K, B, 1] noise of the noiseless paths from each start, for every row."""
    noise = torch.zeros(steps, rows * len(starts), 1, dtype=torch.float64)
    noise[0] = torch.tensor(starts, dtype=torch.float64).repeat_interleave(rows).unsqueeze(-1)
    return noise


def moments(flow: AffineFlow) -> Tensor:
    """[R, 2] mean and sd of the production ODE sampler, which is affine in its noise."""
    rows = flow.slope.shape[1]
    steps = len(flow.slope)
    zero = integrate(flow, torch.zeros(rows, 1).double(), steps)
    one = integrate(flow, torch.ones(rows, 1).double(), steps)
    return torch.cat([zero, (one - zero).abs()], dim=1)


def table(values: list[tuple[float, float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- the lean adjoint (13) ----------------------------------------------------------------------------------


def test_the_adjoint_of_a_gaussian_base_is_the_product_of_its_step_jacobians() -> None:
    steps, h = 10, 0.1
    states = torch.randn(steps + 1, 5, 1, dtype=torch.float64)
    adjoints = lean_adjoint(ROWS.base, states, torch.ones(5, 1).double())[:, :, 0]
    expected = torch.ones(5).double()
    for i in reversed(range(steps)):
        t = i * h + h
        expected = expected * (1 + h * (2 * ROWS.k(t) - 1 / t))
        assert torch.allclose(adjoints[i], expected, atol=1e-12)


def test_the_adjoint_tends_to_its_closed_form_with_the_number_of_steps() -> None:
    errors = []
    for steps in (50, 500):
        states = torch.zeros(steps + 1, 5, 1, dtype=torch.float64)
        adjoints = lean_adjoint(ROWS.base, states, torch.ones(5, 1).double())[:, :, 0]
        t = torch.arange(steps).double()[:, None] / steps
        closed = t * ROWS.s**2 / ((1 - t) ** 2 + t**2 * ROWS.s**2)
        errors.append((adjoints - closed)[steps // 5 :].abs().max().item())
    assert errors[1] < 0.02 and errors[1] < errors[0] / 5


@pytest.mark.parametrize("s", [1.0, 0.3, 0.1, 0.03, 0.01])
def test_the_denoiser_adjoint_of_a_gaussian_base_is_exact_at_every_width(s: float) -> None:
    case, steps = Case.of((0.3, s, 0.0, inf, 1.0)), 10
    adjoints = denoiser_adjoint(case.base, torch.zeros(steps + 1, 1, 1).double(), torch.ones(1, 1).double())
    t = torch.arange(steps).double() / steps
    exact = t * s**2 / ((1 - t) ** 2 + t**2 * s**2)
    assert torch.allclose(adjoints[:, 0, 0], exact, atol=1e-12)


def test_the_denoiser_adjoint_of_a_correlated_gaussian_base_is_exact() -> None:
    root = torch.tensor([[0.5, 0.0], [0.4, 0.05]]).double()
    covariance, steps = root @ root.T, 10
    terminal = torch.tensor([[1.0, -2.0]]).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        time = float(t[0])
        marginal = (1 - time) ** 2 * torch.eye(2).double() + time**2 * covariance
        return x @ torch.linalg.solve(marginal, time * covariance - (1 - time) * torch.eye(2).double())

    adjoints = denoiser_adjoint(velocity, torch.ones(steps + 1, 1, 2).double(), terminal)
    for i in range(steps):
        t = i / steps
        marginal = (1 - t) ** 2 * torch.eye(2).double() + t**2 * covariance
        assert torch.allclose(adjoints[i, 0], t * covariance @ torch.linalg.solve(marginal, terminal[0]), atol=1e-12)


def test_a_narrow_base_turns_the_stepwise_adjoint_around_but_not_the_denoisers() -> None:
    """A policy cloned until it is good has an sd of 0.03 per joint and step: Q fell when it followed the former."""
    case, states = Case.of((0.0, 0.03, 0.0, inf, 1.0)), torch.zeros(11, 1, 1).double()
    stepwise = lean_adjoint(case.base, states, torch.ones(1, 1).double())[:, 0, 0]
    closed = denoiser_adjoint(case.base, states, torch.ones(1, 1).double())[:, 0, 0]
    assert stepwise.min() < -1
    assert closed.min() >= 0 and closed.max() < 0.1


def test_the_denoiser_adjoint_asks_the_reference_only_about_times_it_was_trained_on() -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return -x

    denoiser_adjoint(velocity, torch.zeros(11, 3, 2), torch.ones(3, 2))
    assert max(times) < 1 and len(times) == 10


@pytest.mark.parametrize("s", [1.0, 0.3, 0.1, 0.03, 0.01])
def test_a_linear_critic_moves_the_mean_by_about_the_exact_tilt_at_every_width(s: float) -> None:
    """b s^2 within a factor of 2; the stepwise adjoint gives 20 b s^2 at s = 0.03 and 200 b s^2 at 0.01."""
    case, steps = Case.of((0.0, s, 0.0, inf, 1.0)), 10
    flow = base_flow(case, steps)
    states = torch.zeros(steps + 1, 1, 1).double()
    adjoints = denoiser_adjoint(case.base, states, -torch.ones(1, 1).double())[:, :, 0]
    weight = torch.tensor([[noise_scale(i / steps, 1 / steps) ** 2 / 2] for i in range(steps)]).double()
    mean, _ = AffineFlow(flow.slope, flow.offset - weight * adjoints).endpoint()
    assert 0.5 < float(mean / s**2) < 2.0


def test_the_adjoint_of_a_general_linear_field_is_the_transposed_jacobian_of_its_steps() -> None:
    steps, d, h = 8, 6, 1 / 8
    torch.manual_seed(0)
    matrix, offset = torch.randn(d, d).double(), torch.randn(d).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x @ matrix.T + offset

    states, terminal = torch.randn(steps + 1, 3, d).double(), torch.randn(3, d).double()
    product = eye = torch.eye(d, dtype=torch.float64)
    for i in range(steps):
        product = (eye + h * (2 * matrix - eye / (i * h + h))) @ product
    adjoints = lean_adjoint(velocity, states, terminal)
    assert torch.allclose(adjoints[0], terminal @ product, atol=1e-9, rtol=1e-9)

    def steps_of(x: Tensor) -> Tensor:
        for i in range(steps):
            x = x + h * (2 * velocity(x, torch.zeros(1)) - x / (i * h + h))
        return x

    _, pulled = torch.autograd.functional.vjp(steps_of, states[0, 0], terminal[0])
    assert torch.allclose(adjoints[0, 0], pulled, atol=1e-9, rtol=1e-9)


# --- fixed points (14, 15) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("paths", "steps"), FIXED_POINTS)
def test_fixed_points_on_gaussians_match_the_table(paths: str, steps: int) -> None:
    flow = fixed_point(ROWS, steps, paths)
    assert torch.allclose(
        torch.stack(flow.endpoint(), dim=1), table(FIXED_POINTS[paths, steps]), atol=5.1e-5, rtol=0
    )


def test_the_table_of_behaviour_cloning_and_the_exact_tilt() -> None:
    assert torch.allclose(moments(base_flow(ROWS, 10)), table(BC_AT_10), atol=5.1e-5, rtol=0)
    assert torch.allclose(torch.stack(ROWS.tilt(), dim=1), table(TILT), atol=5.1e-5, rtol=0)


@pytest.mark.parametrize(("paths", "steps"), [("policy", 10), ("policy", 50), ("reference", 10)])
def test_the_production_loss_vanishes_at_the_fixed_point_and_its_sampler_gives_the_table(
    paths: str, steps: int
) -> None:
    case, flow = ROWS.repeat(3), fixed_point(ROWS, steps, paths).repeat(3)
    path = rollout(flow, case.base, skeleton(steps, 5, -1.0, 0.2, 2.0), paths)
    terminal = terminal_adjoint(case.value, path.states[-1], 1.0, clip=INFINITE_BOX)
    adjoints = lean_adjoint(case.base, path.states, terminal)
    assert qam_loss(path, adjoints).item() < 1e-16
    base = base_flow(ROWS, steps).repeat(3)
    assert qam_loss(rollout(base, case.base, skeleton(steps, 5, -1.0, 0.2, 2.0)), adjoints).item() > 0.1
    assert torch.allclose(moments(flow)[:5], table(FIXED_POINTS[paths, steps]), atol=5.1e-5, rtol=0)


def test_the_error_of_the_mean_is_first_order_in_the_step() -> None:
    case = Case.of((0, 1, 1, 1, 0))
    error = [abs(fixed_point(case, k).endpoint()[0].item() - 0.5) for k in (10, 50, 200, 2000)]
    assert error == pytest.approx([0.066, 0.025, 0.009, 0.001], abs=6e-4)


# --- null, sign and scale (17) ------------------------------------------------------------------------------


def gradient_at_base(
    action_value: Callable[[Tensor], Tensor], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    case = Case.of((0.2, 0.4, 0, inf, 0)).repeat(512)
    flow = base_flow(case, 10)
    flow.slope.requires_grad_(True)
    flow.offset.requires_grad_(True)
    noise = torch.randn(10, 512, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = rollout(flow, case.base, noise)
    terminal = terminal_adjoint(action_value, path.states[-1], temperature, clip=INFINITE_BOX)
    qam_loss(path, lean_adjoint(case.base, path.states, terminal)).backward()
    return flow.slope.grad.sum(-1), flow.offset.grad.sum(-1)  # type: ignore[union-attr]


def test_a_constant_critic_leaves_the_policy_at_the_reference() -> None:
    slope, offset = gradient_at_base(lambda a: 3.0 + 0.0 * a[:, 0])
    assert slope.abs().max() < 1e-12 and offset.abs().max() < 1e-12


def test_a_critic_that_rises_with_the_action_raises_every_velocity_and_the_temperature_scales_it() -> None:
    _, one = gradient_at_base(lambda a: a[:, 0])
    _, two = gradient_at_base(lambda a: a[:, 0], temperature=0.5)
    assert (
        one[1:] < 0
    ).all()  # descent raises the offset; at the first step the discretisation is off by O(1), 2.7
    assert torch.allclose(two, 2 * one)


def test_the_shift_of_a_linear_critic_is_proportional_to_the_inverse_temperature() -> None:
    mean = [fixed_point(Case.of((0, 0.3, 0, inf, b)), 10).endpoint()[0].item() for b in (1.0, 2.0)]
    assert mean[0] > 0 and mean[1] == pytest.approx(2 * mean[0])


# --- clip and masks (18, 19) --------------------------------------------------------------------------------


def test_a_coordinate_outside_the_box_has_no_terminal_adjoint() -> None:
    endpoint = torch.tensor([[0.5, 1.2, -1.0001, -0.9]])
    adjoint = terminal_adjoint(lambda a: a.sum(-1), endpoint, 0.5)
    assert torch.equal(adjoint, torch.tensor([[-2.0, 0.0, 0.0, -2.0]]))


def test_the_critic_sees_the_clipped_endpoint_and_its_heads_are_averaged() -> None:
    seen = []

    def heads(action: Tensor) -> Tensor:
        seen.append(action.detach().clone())
        return torch.stack([action.sum(-1), 3 * action.sum(-1)])

    adjoint = terminal_adjoint(heads, torch.tensor([[2.0, 0.1]]), 1.0)
    assert torch.allclose(seen[0], torch.tensor([[1.0, 0.1]])) and torch.allclose(
        adjoint, torch.tensor([[0.0, -2.0]])
    )


def test_masked_steps_get_no_adjoint_anywhere_when_the_reference_treats_steps_apart() -> None:
    horizon, dim = 4, 3
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    flat = mask.unsqueeze(-1).expand(2, horizon, dim).reshape(2, -1)
    states = torch.randn(11, 2, horizon * dim).clamp(-0.9, 0.9)
    terminal = terminal_adjoint(lambda a: a.sin().sum(-1), states[-1], 1.0, mask=flat)
    adjoints = lean_adjoint(lambda x, t: torch.sin(3 * x), states, terminal)
    assert (adjoints[:, ~flat] == 0).all() and (adjoints[1:, flat] != 0).all()
    chunk = torch.randn(2, horizon, dim)
    assert torch.equal(chunk.reshape(2, -1).reshape(2, horizon, dim), chunk)


def test_the_norm_of_the_terminal_adjoint_can_be_limited_without_turning_it() -> None:
    endpoint = torch.tensor([[0.1, 0.2], [0.001, 0.0]])
    free = terminal_adjoint(lambda a: 50 * a.square().sum(-1), endpoint, 1.0)
    limited = terminal_adjoint(lambda a: 50 * a.square().sum(-1), endpoint, 1.0, norm_max=1.0)
    assert torch.allclose(limited[0], free[0] / free[0].norm()) and torch.equal(limited[1], free[1])


# --- paths --------------------------------------------------------------------------------------------------


def test_only_the_policys_velocities_carry_a_gradient_and_the_last_step_is_the_references() -> None:
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    case = ROWS.repeat(1)
    path = rollout(lambda x, t: weight * x, case.base, torch.randn(10, 5, 1).double())
    assert path.velocities.requires_grad and not path.states.requires_grad
    assert not path.reference_velocities.requires_grad
    assert torch.allclose(path.states[-1], path.states[-2] + 0.1 * path.reference_velocities[-1])


def test_the_memoryless_noise_at_both_ends() -> None:
    assert noise_scale(0.0, 0.1) ** 2 / 2 == pytest.approx(11) and noise_scale(
        0.5, 0.1
    ) ** 2 / 2 == pytest.approx(1)
    assert noise_scale(0.9, 0.1) ** 2 / 2 == pytest.approx(0.2)


def test_cloning_a_constant_velocity_field_has_zero_loss_and_ignores_invalid_steps() -> None:
    action, noise = torch.randn(6, 4, 2), torch.randn(6, 4, 2)
    valid = torch.arange(4)[None, :, None] < torch.tensor([1, 2, 3, 4, 1, 2])[:, None, None]
    spoiled = torch.where(valid, action, torch.full_like(action, 1e3))
    loss = flow_matching_loss(lambda x, t: action - noise, spoiled, noise, torch.rand(6), valid)
    assert loss.item() == pytest.approx(0.0, abs=1e-10)
    assert (
        flow_matching_loss(
            lambda x, t: 0 * x, torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.rand(1)
        ).item()
        == 1.0
    )


# --- path KL and temperature (20) ---------------------------------------------------------------------------


def exact_path_kl(case: Case, steps: int) -> float:
    """E of `path_kl` at the fixed point, by the moments of x_i under the policy's own affine steps."""
    flow, base, h = fixed_point(case, steps), base_flow(case, steps), 1 / steps
    mean, variance, kl = torch.zeros(1).double(), torch.ones(1).double(), 0.0
    for i in range(steps):
        slope, offset = flow.slope[i] - base.slope[i], flow.offset[i] - base.offset[i]
        square = (slope * mean + offset) ** 2 + slope**2 * variance
        kl += (2 * h / noise_scale(i * h, h) ** 2 * square).item()
        zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
        at_zero = sde_step(zero, flow.offset[i : i + 1], i * h, h, zero)[0]
        at_one = sde_step(one, (flow.slope + flow.offset)[i : i + 1], i * h, h, zero)[0]
        noise = sde_step(zero, zero, i * h, h, one)[0]
        mean, variance = at_zero + (at_one - at_zero) * mean, (at_one - at_zero) ** 2 * variance + noise**2
    return kl


def test_the_path_kl_tends_to_the_kl_of_the_tilt() -> None:
    case = Case.of((0, 1, 1, 1, 0))
    mean, sd = case.tilt()
    exact = (0.5 * (sd**2 + mean**2 - 1 - 2 * sd.log())).item()
    assert exact == pytest.approx(0.2216, abs=5e-5)
    errors = [abs(exact_path_kl(case, k) - exact) for k in (50, 500, 2000)]
    assert errors[2] < 0.002 and errors[2] < errors[1] < errors[0]


def test_the_sampled_path_kl_agrees_with_its_expectation() -> None:
    case = Case.of((0, 1, 1, 1, 0))
    flow = fixed_point(case, 20)
    noise = torch.randn(20, 20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wide = case.repeat(20_000)
    kl = path_kl(rollout(flow.repeat(20_000), wide.base, noise))
    assert kl.mean().item() == pytest.approx(exact_path_kl(case, 20), abs=4 * (kl.std() / 20_000**0.5).item())


def test_the_dual_settles_where_the_kl_meets_the_budget() -> None:
    config = QamConfig(kl_budget=0.5, lambda_eff_min=0.0)
    dual = initial_dual(config)

    def kl(temperature: float) -> float:  # row 1 with Q scaled: N(0,1) tilted by precision 1/temperature
        precision = 1 + 1 / temperature
        mean = (1 / temperature) / precision
        return 0.5 * (1 / precision + mean**2 - 1 + log(precision))

    for _ in range(20_000):
        dual = update_dual(dual, kl(effective_lambda(dual, config)), config)
    assert dual.kl_ema == pytest.approx(0.5, abs=1e-3)
    assert kl(effective_lambda(dual, config)) == pytest.approx(0.5, abs=1e-3)


def test_the_temperature_has_a_floor_and_one_burst_of_kl_is_clipped() -> None:
    config = QamConfig()
    dual = initial_dual(config)
    for _ in range(5000):
        dual = update_dual(dual, 0.0, config)
    assert effective_lambda(dual, config) == pytest.approx(0.05)
    burst = update_dual(dual, 1e9, config)
    assert burst.kl_ema == pytest.approx(config.dual_ema * 2 * config.kl_budget)


def test_the_paper_preset() -> None:
    paper = QamConfig().paper()
    assert (paper.paths, effective_lambda(initial_dual(paper), paper)) == ("reference", 2.0)
    assert replace(paper, paths="policy", temperature="path_kl", fixed_lambda=2.0, adjoint="denoiser") == QamConfig()
