# SPDX-License-Identifier: Apache-2.0
"""The parts of adjoint matching against closed forms (algorithm.md 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, log

import pytest
import torch
from gaussian_flow import INFINITE_BOX, ROWS, Case, base_flow, fixed_point
from torch import Tensor

from lwd_learner.qam import (
    Adjoint,
    Pairing,
    QamConfig,
    QamStep,
    Rollout,
    box_adjoint,
    denoiser_adjoint,
    effective_lambda,
    flow_matching_loss,
    gaussian_adjoint,
    initial_dual,
    lean_adjoint,
    noise_scale,
    policy_loss,
    qam_loss,
    reference_variance,
    rollout,
    saturated_share,
    scalar_adjoint,
    terminal_adjoint,
    update_dual,
)

# --- the lean adjoint (13) ----------------------------------------------------------------------------------


def test_the_adjoint_of_a_gaussian_base_is_the_product_of_its_step_jacobians() -> None:
    steps, h = 10, 0.1
    states = torch.randn(steps + 1, 5, 1, dtype=torch.float64)
    adjoints = lean_adjoint(ROWS.base, states, torch.ones(5, 1).double(), "official")[:, :, 0]
    expected = torch.ones(5).double()
    for i in reversed(range(steps)):
        t = i * h + h
        expected = expected * (1 + h * (2 * ROWS.k(t) - 1 / t))
        assert torch.allclose(adjoints[i], expected, atol=1e-12)


def test_the_adjoint_tends_to_its_closed_form_with_the_number_of_steps() -> None:
    errors = []
    for steps in (50, 500):
        states = torch.zeros(steps + 1, 5, 1, dtype=torch.float64)
        adjoints = lean_adjoint(ROWS.base, states, torch.ones(5, 1).double(), "official")[:, :, 0]
        t = torch.arange(steps).double()[:, None] / steps
        closed = t * ROWS.s**2 / ((1 - t) ** 2 + t**2 * ROWS.s**2)
        errors.append((adjoints - closed)[steps // 5 :].abs().max().item())
    assert errors[1] < 0.02 and errors[1] < errors[0] / 5


@pytest.mark.parametrize("s", [1.0, 0.3, 0.1, 0.03, 0.01])
def test_the_denoiser_adjoint_of_a_gaussian_base_is_exact_at_every_width(s: float) -> None:
    case, steps = Case.of((0.3, s, 0.0, inf, 1.0)), 10
    adjoints = denoiser_adjoint(
        case.base, torch.zeros(steps + 1, 1, 1).double(), torch.ones(1, 1).double(), "official"
    )
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

    adjoints = denoiser_adjoint(velocity, torch.ones(steps + 1, 1, 2).double(), terminal, "official")
    for i in range(steps):
        t = i / steps
        marginal = (1 - t) ** 2 * torch.eye(2).double() + t**2 * covariance
        assert torch.allclose(
            adjoints[i, 0], t * covariance @ torch.linalg.solve(marginal, terminal[0]), atol=1e-12
        )


def test_a_narrow_base_turns_the_stepwise_adjoint_around_but_not_the_denoisers() -> None:
    """A policy cloned until it is good has an sd of 0.03 per joint and step: Q fell when it followed the former."""
    case, states = Case.of((0.0, 0.03, 0.0, inf, 1.0)), torch.zeros(11, 1, 1).double()
    stepwise = lean_adjoint(case.base, states, torch.ones(1, 1).double(), "official")[:, 0, 0]
    closed = denoiser_adjoint(case.base, states, torch.ones(1, 1).double(), "official")[:, 0, 0]
    assert stepwise.min() < -1
    assert closed.min() >= 0 and closed.max() < 0.1


@pytest.mark.parametrize(("pairing", "calls"), [("official", 10), ("right", 9), ("left", 9)])
def test_the_denoiser_adjoint_asks_the_reference_only_about_times_it_was_trained_on(
    pairing: Pairing, calls: int
) -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return -x

    denoiser_adjoint(velocity, torch.zeros(11, 3, 2), torch.ones(3, 2), pairing)
    assert max(times) < 1 and len(times) == calls


@pytest.mark.parametrize("driver", ["on_policy", "reference"])
@pytest.mark.parametrize("pairing", ["left", "official", "right"])
def test_the_policy_step_asks_the_reference_once_per_state(pairing: Pairing, driver: Rollout) -> None:
    """The roll-out's own evaluations are differentiated; the result is that of asking anew, to the last digit."""
    torch.manual_seed(0)
    reference = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3))
    policy = torch.nn.Linear(3, 3)
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return reference(x) * (1 - t[:, None])

    def value(action: Tensor) -> Tensor:
        return action.square().sum(dim=-1)

    config = QamConfig(steps=6, rollout=driver, pairing=pairing)
    step = policy_loss(lambda x, t: policy(x), velocity, value, torch.randn(6, 5, 3), 0.7, config)
    assert asked == pytest.approx([i / 6 for i in range(6)])
    assert torch.equal(step.adjoints, denoiser_adjoint(velocity, step.path.states, step.terminal, pairing))
    step.loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert policy.weight.grad is not None


def test_a_path_keeps_the_digits_of_its_noise_when_networks_answer_in_fewer() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (-x).bfloat16()

    step = policy_loss(
        velocity, velocity, lambda a: a.sum(dim=-1), torch.randn(4, 5, 3), 1.0, QamConfig(steps=4)
    )
    assert {step.loss.dtype, step.adjoints.dtype, step.path.velocities.dtype} == {torch.float32}


@pytest.mark.parametrize("adjoint", [lean_adjoint, denoiser_adjoint])
def test_pairings_take_their_adjoints_from_one_sequence(adjoint: Callable[..., Tensor]) -> None:
    states, terminal = torch.randn(6, 3, 2).double(), torch.randn(3, 2).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) * t[:, None]

    official = adjoint(velocity, states, terminal, "official")
    right = adjoint(velocity, states, terminal, "right")
    left = adjoint(velocity, states, terminal, "left")
    assert torch.equal(right, torch.cat([official[1:], terminal[None]]))
    assert torch.equal(left, torch.cat([official[1:2], official[1:]]))


@pytest.mark.parametrize("s", [1.0, 0.3, 0.1, 0.03, 0.01])
def test_a_linear_critic_moves_the_mean_by_the_exact_tilt_at_every_width_when_paired_left(s: float) -> None:
    """b s^2 to 2 %. Official: up to 1.8 of it. Right: .01 b from its last step alone, 100 of it at s = 0.01."""
    moved = {pairing: linear_shift(s, pairing) / s**2 for pairing in ("left", "official", "right")}
    assert moved["left"] == pytest.approx(1.0, abs=0.02)
    assert 0.8 < moved["official"] < 1.85
    assert moved["right"] * s**2 > 0.01


def linear_shift(s: float, pairing: Pairing) -> float:
    """What Q = a moves the mean of the base N(0, s^2) by at K = 10, with the denoiser's adjoint."""
    flow = fixed_point(Case.of((0.0, s, 0.0, inf, 1.0)), 10, "on_policy", "denoiser", pairing)
    return flow.endpoint()[0].item()


def test_the_scalar_adjoint_is_the_flow_time_of_the_right_end() -> None:
    terminal = torch.tensor([[2.0, -1.0]])
    times = torch.tensor([0.25, 0.5, 0.75, 1.0])
    for pairing in ("official", "right"):
        assert torch.allclose(scalar_adjoint(terminal, 4, pairing), times[:, None, None] * terminal)
    left = torch.tensor([0.25, 0.25, 0.5, 0.75])
    assert torch.allclose(scalar_adjoint(terminal, 4, "left"), left[:, None, None] * terminal)


def test_the_scalar_adjoint_is_exact_where_the_references_velocity_is_the_same_everywhere() -> None:
    """2 v - x/t with v constant: g = t g_K, which `lean_adjoint` reaches as its product of 1 - h/t."""
    states, terminal = torch.randn(101, 2, 3).double(), torch.randn(2, 3).double()
    stepwise = lean_adjoint(lambda x, t: 0 * x + 1, states, terminal, "right")
    assert torch.allclose(
        scalar_adjoint(terminal, 100, "right"), stepwise, atol=0.011 * terminal.abs().max().item()
    )


@pytest.mark.parametrize("pairing", ["left", "right"])
def test_the_gaussian_adjoint_is_the_denoisers_for_independent_gaussian_dimensions(pairing: Pairing) -> None:
    sd = torch.tensor([1.0, 0.3, 0.03]).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        time = t[:, None]
        return x * (time * sd**2 - (1 - time)) / ((1 - time) ** 2 + time**2 * sd**2)

    terminal = torch.randn(4, 3).double()
    exact = denoiser_adjoint(velocity, torch.randn(11, 4, 3).double(), terminal, pairing)
    assert torch.allclose(gaussian_adjoint(terminal, 10, sd**2, pairing), exact, atol=1e-12)


def test_the_references_variance_is_the_one_within_a_context() -> None:
    """Contexts ask for actions that lie .5 apart; the same context for some that lie .2 or .05 apart."""
    rows = 4000
    mean, sd = torch.randn(rows, 1).double() * 0.5, torch.tensor([0.2, 0.05]).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        time = t[:, None]
        slope = (time * sd**2 - (1 - time)) / ((1 - time) ** 2 + time**2 * sd**2)
        return mean + slope * (x - time * mean)

    noise = torch.randn(2, rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(reference_variance(velocity, noise, 40), sd**2, rtol=0.08)
    assert torch.allclose(reference_variance(velocity, noise, 10)[0], sd[0] ** 2, rtol=0.08)


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
    adjoints = lean_adjoint(velocity, states, terminal, "official")
    assert torch.allclose(adjoints[0], terminal @ product, atol=1e-9, rtol=1e-9)

    def steps_of(x: Tensor) -> Tensor:
        for i in range(steps):
            x = x + h * (2 * velocity(x, torch.zeros(1)) - x / (i * h + h))
        return x

    _, pulled = torch.autograd.functional.vjp(steps_of, states[0, 0], terminal[0])
    assert torch.allclose(adjoints[0, 0], pulled, atol=1e-9, rtol=1e-9)


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
    qam_loss(path, lean_adjoint(case.base, path.states, terminal, "official"), "official").backward()
    return flow.slope.grad.sum(-1), flow.offset.grad.sum(-1)  # type: ignore[union-attr]


def test_a_constant_critic_leaves_the_policy_at_the_reference() -> None:
    slope, offset = gradient_at_base(lambda a: 3.0 + 0.0 * a[:, 0])
    assert slope.abs().max() < 1e-12 and offset.abs().max() < 1e-12


@pytest.mark.parametrize("adjoint", ["denoiser", "vjp", "scalar", "gaussian"])
@pytest.mark.parametrize("pairing", ["left", "official", "right"])
def test_no_way_to_pair_moves_the_policy_for_a_constant_critic(adjoint: Adjoint, pairing: Pairing) -> None:
    indifferent = Case(ROWS.m, ROWS.s, ROWS.mu, 0 * ROWS.curvature, 0 * ROWS.slope)
    flow, base = fixed_point(indifferent, 10, adjoint=adjoint, pairing=pairing), base_flow(ROWS, 10)
    assert torch.equal(flow.slope, base.slope) and torch.equal(flow.offset, base.offset)


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
    adjoints = lean_adjoint(lambda x, t: torch.sin(3 * x), states, terminal, "official")
    assert (adjoints[:, ~flat] == 0).all() and (adjoints[1:, flat] != 0).all()
    chunk = torch.randn(2, horizon, dim)
    assert torch.equal(chunk.reshape(2, -1).reshape(2, horizon, dim), chunk)


def test_the_norm_of_the_terminal_adjoint_can_be_limited_without_turning_it() -> None:
    endpoint = torch.tensor([[0.1, 0.2], [0.001, 0.0]])
    free = terminal_adjoint(lambda a: 50 * a.square().sum(-1), endpoint, 1.0)
    limited = terminal_adjoint(lambda a: 50 * a.square().sum(-1), endpoint, 1.0, norm_max=1.0)
    assert torch.allclose(limited[0], free[0] / free[0].norm()) and torch.equal(limited[1], free[1])


# --- staying inside the box (4.11) --------------------------------------------------------------------------


def test_too_many_coordinates_outside_the_box_are_pulled_back_by_the_gradient_of_their_penalty() -> None:
    config = QamConfig(box_penalty=3.0, saturated_share_max=0.2)
    crowded = torch.tensor([[0.5, 1.2, -1.5, -0.9]], dtype=torch.float64, requires_grad=True)
    penalty = 3.0 / 2 * (crowded.abs() - 1).relu().square().sum()
    (gradient,) = torch.autograd.grad(penalty / 0.5, crowded)
    assert torch.allclose(box_adjoint(crowded, 0.5, config), gradient)
    assert (box_adjoint(crowded, 0.5, replace(config, saturated_share_max=0.5)) == 0).all()


def test_what_is_not_executed_is_neither_counted_nor_pulled_back() -> None:
    endpoint = torch.tensor([[0.0, 2.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, False, False]])
    assert saturated_share(endpoint, 1.0, mask) == 0.5 and saturated_share(endpoint, 1.0) == 0.75
    pull = box_adjoint(endpoint, 1.0, QamConfig(box_penalty=1.0), mask)
    assert torch.equal(pull, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_the_policy_step_adds_the_pull_to_the_terminal_adjoint() -> None:
    noise = torch.randn(10, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    case = Case.of((1.5, 0.2, 0, inf, 1)).repeat(64)

    def step(config: QamConfig) -> QamStep:
        return policy_loss(case.base, case.base, case.value, noise, 1.0, config)

    free, pulled = step(QamConfig(box_penalty=0.0)), step(QamConfig(box_penalty=2.0))
    assert pulled.saturated > 0.9 and torch.equal(free.endpoint, pulled.endpoint)
    excess = pulled.endpoint - pulled.endpoint.clamp(-1, 1)
    assert torch.allclose(pulled.terminal, free.terminal + 2 * excess)


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


# --- temperature (20) ---------------------------------------------------------------------------------------


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
    assert (paper.rollout, effective_lambda(initial_dual(paper), paper)) == ("reference", 2.0)
    assert (paper.adjoint, paper.pairing, paper.box_penalty) == ("vjp", "official", 0.0)
    back = replace(paper, rollout="on_policy", temperature="path_kl", adjoint="denoiser", box_penalty=1.0)
    assert back == QamConfig()
