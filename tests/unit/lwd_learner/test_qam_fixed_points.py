# SPDX-License-Identifier: Apache-2.0
"""Where adjoint matching ends on Gaussian bases, against the tables of algorithm.md 5.3 (items 14, 15 and 20)."""

from __future__ import annotations

import pytest
import torch
from gaussian_flow import (
    INFINITE_BOX,
    ROWS,
    AffineFlow,
    Case,
    base_flow,
    fixed_point,
    moments,
    terminal_line,
)
from torch import Tensor

from lwd_learner.qam import (
    Adjoint,
    Pairing,
    QamConfig,
    Rollout,
    noise_scale,
    path_kl,
    policy_loss,
    rollout,
    sde_step,
)

# (mean, sd) per row of ROWS
TILT = [(0.5, 0.7071), (0.55, 0.3536), (0.7, 0.2236), (0.09, 0.3), (0.5192, 0.1961)]
FIXED_POINTS: dict[tuple[Rollout, Adjoint, Pairing, int], list[tuple[float, float]]] = {
    ("on_policy", "vjp", "official", 10): [
        (0.4344, 0.6280),
        (0.5450, 0.2903),
        (0.7005, 0.1510),
        (0.1063, 0.2469),
        (0.5253, 0.1491),
    ],
    ("on_policy", "vjp", "official", 50): [
        (0.4749, 0.6915),
        (0.5431, 0.3416),
        (0.6878, 0.2171),
        (0.0926, 0.2887),
        (0.5202, 0.1860),
    ],
    ("reference", "vjp", "official", 10): [
        (0.6629, 0.5221),
        (0.6708, 0.2343),
        (0.8849, 0.0195),
        (0.1063, 0.2469),
        (0.5259, 0.1490),
    ],
    ("reference", "vjp", "official", 2000): [
        (0.7229, 0.6061),
        (0.6620, 0.3029),
        (0.9393, 0.0674),
        (0.0900, 0.2997),
        (0.5198, 0.1958),
    ],
    ("on_policy", "vjp", "right", 10): [
        (0.5329, 0.6441),
        (0.5702, 0.3078),
        (0.7156, 0.1953),
        (0.1170, 0.2469),
        (0.5270, 0.1504),
    ],
    ("on_policy", "scalar", "official", 10): [
        (0.4314, 0.6910),
        (0.6625, 0.2899),
        (0.7936, 0.1546),
        (0.3110, 0.2469),
        (0.5955, 0.1474),
    ],
}
PRINTED_AT_2000 = [(0.2482, 0.7513), (0.5080, 0.2918), (0.7419, 0.0581), (0.0718, 0.2997), (0.5205, 0.1916)]
BC_AT_10 = [(0.0, 0.8790), (0.3, 0.4308), (0.3, 0.4308), (0.0, 0.2469), (0.5, 0.1542)]


def skeleton(steps: int, rows: int, *starts: float) -> Tensor:
    """[K, B, 1] noise of the noiseless paths from each start, for every row."""
    noise = torch.zeros(steps, rows * len(starts), 1, dtype=torch.float64)
    noise[0] = torch.tensor(starts, dtype=torch.float64).repeat_interleave(rows).unsqueeze(-1)
    return noise


def table(values: list[tuple[float, float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- the table (14, 15) -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("driver", "adjoint", "pairing", "steps"), FIXED_POINTS)
def test_fixed_points_on_gaussians_match_the_table(
    driver: Rollout, adjoint: Adjoint, pairing: Pairing, steps: int
) -> None:
    flow = fixed_point(ROWS, steps, driver, adjoint, pairing)
    tabled = table(FIXED_POINTS[driver, adjoint, pairing, steps])
    assert torch.allclose(torch.stack(flow.endpoint(), dim=1), tabled, atol=5.1e-5, rtol=0)


def printed_fixed_point(case: Case, steps: int) -> AffineFlow:
    """The optimum of the loss as printed: paths of the reference's ODE, its adjoint along them, f_b - t(1-t) g. 2.8."""
    flow, h = base_flow(case, steps), 1 / steps
    slope, offset = terminal_line(case)
    pull = ahead_slope = torch.ones(len(case.m)).double()
    ahead_offset = torch.zeros(len(case.m)).double()
    for i in reversed(range(steps)):
        t = i * h
        pull = pull * (1 + h * flow.slope[i])
        ahead_offset = ahead_offset + ahead_slope * h * flow.offset[i]
        ahead_slope = ahead_slope * (1 + h * flow.slope[i])  # x_i -> x_K
        flow.slope[i] = flow.slope[i] - t * (1 - t) * pull * slope * ahead_slope
        flow.offset[i] = flow.offset[i] - t * (1 - t) * pull * (slope * ahead_offset + offset)
    return flow


def test_the_variant_as_printed_ends_at_the_tabled_half_of_the_shift() -> None:
    end = torch.stack(printed_fixed_point(ROWS, 2000).endpoint(), dim=1)
    assert torch.allclose(end, table(PRINTED_AT_2000), atol=5.1e-5, rtol=0)


def test_the_adjoint_of_the_printed_ode_has_its_closed_form() -> None:
    """s / sqrt(Den(t)), 5.3 item 13."""
    steps, h = 4000, 1 / 4000
    flow, pull = base_flow(ROWS, steps), torch.ones(5).double()
    for i in reversed(range(steps)):
        pull = pull * (1 + h * flow.slope[i])
        t = i * h
        if i % 1000 == 0:
            assert torch.allclose(pull, ROWS.s / ((1 - t) ** 2 + t**2 * ROWS.s**2).sqrt(), rtol=5e-3)


def test_the_table_of_behaviour_cloning_and_the_exact_tilt() -> None:
    assert torch.allclose(moments(base_flow(ROWS, 10)), table(BC_AT_10), atol=5.1e-5, rtol=0)
    assert torch.allclose(torch.stack(ROWS.tilt(), dim=1), table(TILT), atol=5.1e-5, rtol=0)


@pytest.mark.parametrize(
    ("driver", "adjoint", "pairing", "steps"), [key for key in FIXED_POINTS if key[3] < 100]
)
def test_the_production_loss_vanishes_at_the_fixed_point_and_its_sampler_gives_the_table(
    driver: Rollout, adjoint: Adjoint, pairing: Pairing, steps: int
) -> None:
    """On noiseless paths, whose adjoint is its own expectation."""
    case, starts = ROWS.repeat(3), skeleton(steps, 5, -1.0, 0.2, 2.0)
    config = QamConfig(
        steps=steps, rollout=driver, adjoint=adjoint, pairing=pairing, clip=INFINITE_BOX, box_penalty=0.0
    )
    flow = fixed_point(ROWS, steps, driver, adjoint, pairing)
    at = policy_loss(flow.repeat(3), case.base, case.value, starts, 1.0, config)
    assert at.loss.item() < 1e-16
    away = policy_loss(base_flow(ROWS, steps).repeat(3), case.base, case.value, starts, 1.0, config)
    assert away.loss.item() > 0.1
    assert torch.allclose(
        moments(flow), table(FIXED_POINTS[driver, adjoint, pairing, steps]), atol=5.1e-5, rtol=0
    )


def test_the_error_of_the_mean_is_first_order_in_the_step() -> None:
    case = Case.of((0, 1, 1, 1, 0))
    error = [abs(fixed_point(case, k).endpoint()[0].item() - 0.5) for k in (10, 50, 200, 2000)]
    assert error == pytest.approx([0.066, 0.025, 0.009, 0.001], abs=6e-4)


# --- which adjoint and which pairing ------------------------------------------------------------------------

# Distance to the exact tilt at K = 10, own paths, averaged over ROWS: of the mean, of the sd. What behaviour cloning loses
# in spread at K = 10 is part of the latter.
ABLATION: dict[tuple[Adjoint, Pairing], tuple[float, float]] = {
    ("vjp", "official"): (0.0187, 0.0630),
    ("vjp", "right"): (0.0207, 0.0472),
    ("vjp", "left"): (0.0055, 0.0488),
    ("denoiser", "official"): (0.0210, 0.0571),
    ("denoiser", "right"): (0.0170, 0.0424),
    ("denoiser", "left"): (0.0040, 0.0430),
    ("scalar", "official"): (0.1144, 0.0501),
    ("scalar", "right"): (0.1042, 0.0342),
    ("scalar", "left"): (0.1023, 0.0341),
    ("gaussian", "official"): (0.0426, 0.0650),
    ("gaussian", "right"): (0.0170, 0.0424),
    ("gaussian", "left"): (0.0040, 0.0430),
}


@pytest.mark.parametrize(("adjoint", "pairing"), ABLATION)
def test_how_far_from_the_tilt_each_adjoint_and_pairing_ends(adjoint: Adjoint, pairing: Pairing) -> None:
    made = torch.stack(fixed_point(ROWS, 10, "on_policy", adjoint, pairing).endpoint(), dim=1)
    error = (made - torch.stack(ROWS.tilt(), dim=1)).abs().mean(dim=0)
    assert torch.allclose(error, torch.tensor(ABLATION[adjoint, pairing]).double(), atol=1e-4)


# --- by sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "row", "sampled"),
    [
        ("on_policy", 0, (0.4348, 0.6282)),
        ("on_policy", 1, (0.5451, 0.2902)),
        ("reference", 0, (0.6613, 0.5221)),
    ],
)
def test_training_on_sampled_paths_ends_where_the_solution_says(
    driver: Rollout, row: int, sampled: tuple[float, float]
) -> None:
    """An affine policy per step, fitted by gradient steps to the production loss on random paths."""
    torch.manual_seed(0)
    rows, steps = 4096, 10
    case = Case(
        *(x[row : row + 1].repeat(rows) for x in (ROWS.m, ROWS.s, ROWS.mu, ROWS.curvature, ROWS.slope))
    )
    config = QamConfig(rollout=driver, adjoint="vjp", pairing="official", clip=INFINITE_BOX)
    start = base_flow(case, steps)
    slope, offset = (x[:, :1].clone().requires_grad_(True) for x in (start.slope, start.offset))
    scale = torch.tensor([noise_scale(i / steps, 1 / steps) ** 2 / 8 for i in range(steps)]).double()[:, None]
    averages = []
    for update in range(400):
        half = torch.randn(steps, rows // 2, 1, dtype=torch.float64)
        policy = AffineFlow(slope.expand(-1, rows), offset.expand(-1, rows))
        loss = policy_loss(policy, case.base, case.value, torch.cat([half, -half], dim=1), 1.0, config).loss
        gradients = torch.autograd.grad(loss, (slope, offset))
        with torch.no_grad():
            for parameter, gradient in zip((slope, offset), gradients, strict=True):
                parameter -= 0.1 * scale * gradient
        if update >= 200:
            averages.append(torch.cat([slope.detach(), offset.detach()], dim=1))
    mean = torch.stack(averages).mean(dim=0)
    end = torch.stack(AffineFlow(mean[:, :1], mean[:, 1:]).endpoint(), dim=1)
    assert torch.allclose(end[0], torch.tensor(sampled).double(), atol=0.003)


# --- path KL (20) ---------------------------------------------------------------------------


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
