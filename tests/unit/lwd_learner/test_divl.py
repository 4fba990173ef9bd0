# SPDX-License-Identifier: Apache-2.0
"""Closed forms of the categorical value and of the TD targets (algorithm.md 5.1, 5.2)."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lwd_learner.divl import (
    DivlConfig,
    Support,
    Window,
    adaptive_tau,
    bootstrap,
    chunk_reward,
    critic_loss,
    critic_target,
    ema_update,
    expectile_loss,
    fit_loss,
    mean_value,
    n_step_window,
    normalised_entropy,
    project,
    quantile_index,
    quantile_value,
    value_label,
    value_loss,
)

SUPPORT = Support()
CONFIG = DivlConfig()
HARD = replace(CONFIG, quantile="hard")
EXPECTILE = replace(CONFIG, value="expectile")
ATOMS = SUPPORT.atoms(dtype=torch.float64)


def mixture(weights: dict[float, float]) -> Tensor:
    """[1, C] probabilities: a weighted sum of projected values."""
    return sum(w * project(torch.tensor([q], dtype=torch.float64), SUPPORT) for q, w in weights.items())


# --- 5.1 categorical machinery ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_keeps_mass_and_mean_on_two_adjacent_atoms(dtype: torch.dtype) -> None:
    q = torch.empty(5000, dtype=dtype).uniform_(-0.1, 1.1, generator=torch.Generator().manual_seed(0))
    mass = project(q, SUPPORT)
    assert torch.allclose(mass.sum(-1), torch.ones_like(q), atol=1e-6)
    assert torch.allclose(mass @ SUPPORT.atoms(dtype=dtype), q, atol=1e-6)
    index = torch.arange(SUPPORT.size)
    for row in mass:
        used = index[row > 0]
        assert 1 <= len(used) <= 2 and used[-1] - used[0] <= 1


def test_a_value_on_an_atom_has_one_non_zero_and_one_outside_goes_to_the_edge() -> None:
    assert torch.equal((project(SUPPORT.atoms(), SUPPORT) > 0).sum(-1), torch.ones(201, dtype=torch.int64))
    mass = project(torch.tensor([-3.0, 7.0]), SUPPORT)
    assert mass[0, 0] == 1 and mass[1, -1] == 1
    assert torch.allclose(mass @ SUPPORT.atoms(), torch.tensor([-0.1, 1.1]))


def test_zero_and_one_are_between_atoms() -> None:
    mass = project(torch.tensor([0.0, 1.0], dtype=torch.float64), SUPPORT)
    assert torch.allclose(mass[0, 16:18], torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert torch.allclose(mass[1, 183:185], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    assert torch.allclose(
        ATOMS[[16, 17, 183, 184]], torch.tensor([-0.004, 0.002, 0.998, 1.004], dtype=torch.float64)
    )


def test_quantile_is_the_first_atom_whose_cdf_reaches_tau() -> None:
    support = Support(0.0, 1.0, 11)
    config = replace(HARD, support=support)
    p = torch.zeros(4, 11)
    p[:, 0], p[:, 5], p[:, 10] = 0.3, 0.4, 0.3
    value = quantile_value(p, torch.tensor([0.3, 0.31, 0.7, 0.71]), config)
    assert torch.allclose(value, torch.tensor([0.0, 0.5, 0.5, 1.0]))
    taus = torch.linspace(0.001, 1.0, 1000)
    assert (quantile_index(p[:1].expand(1000, 11), taus).diff() >= 0).all()


def test_tau_one_with_rounding_error_gives_the_last_atom_with_mass_never_the_first() -> None:
    p = torch.zeros(1, 201)
    p[0, 40:140] = 0.01 - 1e-6  # sums to 0.9999: no atom reaches 1
    assert quantile_index(p, torch.ones(1)).item() == 139
    assert quantile_value(p, torch.ones(1), CONFIG).item() == pytest.approx(
        ATOMS[138:140].mean().item(), abs=1e-6
    )


def test_entropy_of_uniform_one_hot_and_two_atoms() -> None:
    p = torch.zeros(3, 201, dtype=torch.float64)
    p[0], p[1, 7], p[2, [3, 190]] = 1 / 201, 1.0, 0.5
    expected = torch.tensor([1.0, 0.0, log(2) / log(201)], dtype=torch.float64)
    assert torch.allclose(normalised_entropy(p), expected, atol=1e-12)
    assert expected[2].item() == pytest.approx(0.1307, abs=5e-5)


def test_adaptive_tau_at_the_published_points_and_its_limits() -> None:
    entropy = torch.tensor([0.2, 0.48, 1.0])
    assert adaptive_tau(entropy, 0.6, CONFIG)[0].item() == pytest.approx(0.54)
    assert adaptive_tau(entropy, 0.9, CONFIG)[1].item() == pytest.approx(0.756)
    assert adaptive_tau(entropy, 0.6, CONFIG)[2].item() == pytest.approx(CONFIG.tau_min)
    assert (
        CONFIG.tau_base(0) == 0.6
        and CONFIG.tau_base(500) == pytest.approx(0.75)
        and CONFIG.tau_base(9999) == 0.9
    )


@pytest.mark.parametrize("config", [CONFIG, HARD])
def test_no_gradient_leaves_the_bootstrap(config: DivlConfig) -> None:
    logits = torch.randn(5, 201, requires_grad=True)
    read = bootstrap(logits, 0.6, config)
    target = critic_target(torch.zeros(5), torch.full((5,), 0.97), read.value)
    assert not (read.tau.requires_grad or read.value.requires_grad or target.requires_grad)


def test_cross_entropy_converges_to_the_mixture_and_both_phases_read_it_differently() -> None:
    labels = torch.tensor([0.0] * 7 + [1.0] * 3, dtype=torch.float64)
    logits = torch.zeros(1, 201, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.3)
    for _ in range(600):
        optimiser.zero_grad()
        value_loss(logits.expand(10, 201), labels, SUPPORT).backward()
        optimiser.step()
    p = torch.softmax(logits.detach(), -1)
    assert torch.allclose(p, mixture({0.0: 0.7, 1.0: 0.3}), atol=1e-3)
    exact = mixture({0.0: 0.7, 1.0: 0.3})
    assert normalised_entropy(exact).item() == pytest.approx(0.2352, abs=5e-5)
    assert (exact @ ATOMS).item() == pytest.approx(0.3, abs=1e-9)
    offline = bootstrap(exact.log(), 0.6, HARD)
    online = bootstrap(exact.log(), 0.9, HARD)
    assert offline.tau.item() == pytest.approx(0.5294, abs=5e-5)
    assert online.tau.item() == pytest.approx(0.8294, abs=5e-5)
    assert offline.value.item() == pytest.approx(0.002, abs=1e-6)
    assert online.value.item() == pytest.approx(0.998, abs=1e-6)
    assert bootstrap(exact.log(), 0.6, CONFIG).value.item() == pytest.approx(0.0, abs=1e-6)
    assert bootstrap(exact.log(), 0.9, CONFIG).value.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_quantile_of_the_fit_is_the_minimiser_of_the_asymmetric_loss(seed: int) -> None:
    random = np.random.default_rng(seed)
    q = random.uniform(0.0, 1.0, size=random.integers(3, 30))
    weight = random.dirichlet(np.ones(len(q)))
    tau = random.uniform(0.05, 0.95)
    grid = np.linspace(-0.1, 1.1, 120_001)
    below = q[None, :] < grid[:, None]
    loss = (weight * np.where(below, 1 - tau, tau) * np.abs(q[None, :] - grid[:, None])).sum(-1)
    p = mixture(dict(zip(q.tolist(), weight.tolist(), strict=True)))
    read = quantile_value(p, torch.tensor([tau]), HARD).item()
    assert abs(read - grid[loss.argmin()]) <= SUPPORT.spacing


# --- the expectile, in the place of the categorical value -----------------------------------------------------


def output_of(labels: dict[float, float], config: DivlConfig) -> Tensor:
    """[1, outputs] what V says when it has fitted labels of these weights exactly."""
    if config.value == "categorical":
        return mixture(labels).log()
    q, weight = (torch.tensor(list(side), dtype=torch.float64) for side in (labels.keys(), labels.values()))
    value = (q * weight).sum() / weight.sum()
    for _ in range(200):  # the expectile is the mean of labels weighted by the sign of their error
        asymmetric = weight * torch.where(q < value, 1 - config.expectile, config.expectile)
        value = (asymmetric * q).sum() / asymmetric.sum()
    return value.reshape(1, 1)


@pytest.mark.parametrize(("expectile", "expected"), [(0.6, 0.3913), (0.7, 0.5), (0.9, 0.7941)])
def test_the_expectile_loss_is_least_at_the_tabled_expectiles(expectile: float, expected: float) -> None:
    config = replace(EXPECTILE, expectile=expectile)
    labels = torch.tensor([0.0] * 7 + [1.0] * 3, dtype=torch.float64)
    value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([value], lr=0.5)
    for _ in range(300):
        optimiser.zero_grad()
        fit_loss(value.expand(10).unsqueeze(-1), labels, config).backward()
        optimiser.step()
    assert value.item() == pytest.approx(expected, abs=5e-5)
    assert bootstrap(value.reshape(1, 1), 0.6, config).value.item() == value.item()
    assert output_of({0.0: 0.7, 1.0: 0.3}, config).item() == pytest.approx(value.item(), abs=1e-9)


def test_the_expectile_loss_weighs_errors_by_their_sign() -> None:
    value, label = torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.1], requires_grad=True)
    loss = expectile_loss(value.requires_grad_(), label, 0.9)
    assert loss.item() == pytest.approx((0.9 * 0.2**2 + 0.1 * 0.4**2) / 2)
    loss.backward()
    assert label.grad is None
    assert value.grad is not None
    assert torch.allclose(value.grad, -torch.tensor([0.9 * 0.2, 0.1 * -0.4]))
    half = expectile_loss(value, label, 0.5)
    assert half.item() == pytest.approx(0.5 * (value - label).square().mean().item())


@pytest.mark.parametrize("seed", range(4))
def test_the_expectile_is_the_minimiser_of_the_asymmetric_square(seed: int) -> None:
    random = np.random.default_rng(seed)
    q, tau = random.uniform(0.0, 1.0, size=20), random.uniform(0.05, 0.95)
    weight = random.dirichlet(np.ones(len(q)))
    grid = np.linspace(0.0, 1.0, 100_001)
    error = q[None, :] - grid[:, None]
    loss = (weight * np.where(error < 0, 1 - tau, tau) * error**2).sum(-1)
    fitted = output_of(dict(zip(q.tolist(), weight.tolist(), strict=True)), replace(EXPECTILE, expectile=tau))
    assert fitted.item() == pytest.approx(grid[loss.argmin()], abs=2e-5)


def test_an_expectile_is_read_as_it_is_and_knows_no_spread() -> None:
    output = torch.randn(5, 1, requires_grad=True)
    read = bootstrap(output, 0.9, EXPECTILE)
    assert torch.equal(read.value, output.detach().squeeze(-1)) and not read.value.requires_grad
    assert torch.equal(read.tau, torch.full((5,), EXPECTILE.expectile)) and read.entropy.eq(0).all()
    assert torch.equal(mean_value(output, EXPECTILE), read.value)
    assert (CONFIG.outputs, EXPECTILE.outputs) == (201, 1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        replace(EXPECTILE, expectile=1.0)


def test_the_mean_of_the_categorical_value_is_that_of_its_labels() -> None:
    assert mean_value(mixture({0.0: 0.7, 1.0: 0.3}).log(), CONFIG).item() == pytest.approx(0.3, abs=1e-9)


# --- 5.2 TD -------------------------------------------------------------------------------------------------


def window(
    reward: list[float],
    done: list[int],
    cut: list[int] | None = None,
    executed: int = 30,
    gamma: float = 0.99,
) -> Window:
    n = len(reward)
    return n_step_window(
        torch.tensor([reward], dtype=torch.float64),
        torch.full((1, n), executed),
        torch.tensor([done], dtype=torch.bool),
        torch.tensor([cut or [0] * n], dtype=torch.bool),
        gamma,
    )


def test_a_window_that_meets_the_end_is_truncated_and_not_bootstrapped() -> None:
    view = window([0, 0, 1, 0], [0, 0, 1, 0])
    assert (
        view.reward.item() == pytest.approx(0.99**60) and view.discount.item() == 0 and view.last.item() == 2
    )
    assert critic_target(view.reward, view.discount, torch.tensor([torch.nan])).isfinite().all()


def test_a_cut_stops_the_window_and_bootstraps() -> None:
    view = window([0, 0, 1, 0], [0, 0, 1, 0], cut=[0, 1, 0, 0])
    assert (
        view.reward.item() == 0 and view.discount.item() == pytest.approx(0.99**60) and view.last.item() == 1
    )


@pytest.mark.parametrize("garbage", [5.0, float("nan"), float("inf")])
def test_nothing_stored_behind_the_end_matters(garbage: float) -> None:
    assert window([0, 0, 1, garbage], [0, 0, 1, 0]) == window([0, 0, 1, 0], [0, 0, 1, 1])


def test_one_step_windows_equal_the_one_step_target_bit_for_bit() -> None:
    reward, executed = torch.rand(64), torch.randint(1, 11, (64,))
    done, value = torch.rand(64) < 0.3, torch.rand(64)
    view = n_step_window(
        reward[:, None], executed[:, None], done[:, None], torch.zeros(64, 1, dtype=torch.bool), 0.997
    )
    discount = torch.where(done, torch.zeros(64), torch.pow(torch.full((64,), 0.997), executed.float()))
    assert torch.equal(critic_target(view.reward, view.discount, value), reward + discount * value)


def test_a_success_is_discounted_by_the_steps_inside_its_chunk() -> None:
    assert torch.allclose(
        chunk_reward(torch.ones(3), torch.tensor([1, 2, 30]), 0.9), torch.tensor([1, 0.9, 0.9**29])
    )
    view = n_step_window(
        torch.ones(1, 2), torch.tensor([[3, 5]]), torch.zeros(1, 2).bool(), torch.zeros(1, 2).bool(), 0.9
    )
    assert view.reward.item() == pytest.approx(1 + 0.9**3) and view.discount.item() == pytest.approx(0.9**8)


def fitted(q: Tensor, config: DivlConfig) -> Tensor:
    """[B, outputs] of a V that has seen one label per state, [B]."""
    return q.unsqueeze(-1) if config.value == "expectile" else project(q, config.support).log()


def chain_value(config: DivlConfig, tau_base: float, n: int) -> float:
    """Converged target of state 0 of a chain of 200 chunks of 30 steps, reward at its end."""
    states, gamma = 200, 0.9999
    chunk = torch.arange(states)[:, None] + torch.arange(n)[None, :]
    last = states - 1
    executed = torch.where(chunk >= last, 1, 30)
    reward = (chunk == last).double()
    view = n_step_window(reward, executed, chunk >= last, torch.zeros_like(chunk, dtype=torch.bool), gamma)
    following = (torch.arange(states) + view.last + 1).clamp(max=last)
    q = torch.zeros(states, dtype=torch.float64)
    for _ in range(states // n + 1):
        value = bootstrap(fitted(q, config), tau_base, config).value
        q = critic_target(view.reward, view.discount, value[following])
    return q[0].item()


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("tau_base", [0.6, 0.9])
@pytest.mark.parametrize("config", [CONFIG, EXPECTILE], ids=["local_mean", "expectile"])
def test_the_discount_of_a_long_chain_is_kept(config: DivlConfig, n: int, tau_base: float) -> None:
    assert chain_value(config, tau_base, n) == pytest.approx(0.5504, abs=0.002)


@pytest.mark.parametrize(
    ("tau_base", "n", "expected"), [(0.6, 1, 0.995), (0.9, 1, 1.001), (0.6, 10, 0.561), (0.9, 10, 0.584)]
)
def test_the_hard_quantile_erases_the_discount_as_recorded(tau_base: float, n: int, expected: float) -> None:
    assert chain_value(HARD, tau_base, n) == pytest.approx(expected, abs=0.001)


def self_loop(config: DivlConfig, backups: int) -> float:
    q = torch.tensor([0.5], dtype=torch.float64)
    for _ in range(backups):
        read = bootstrap(fitted(q, config), 0.6, config)
        q = critic_target(torch.zeros(1), torch.full((1,), 0.9999**30, dtype=torch.float64), read.value)
    return q.item()


def test_a_reward_free_loop_decays_unless_the_quantile_is_hard() -> None:
    assert self_loop(CONFIG, 2000) < 0.01
    assert self_loop(EXPECTILE, 2000) == pytest.approx(0.5 * 0.9999**60_000, rel=1e-6)
    assert self_loop(HARD, 2000) == pytest.approx(0.4985, abs=1e-4)


# Rows of a tabular replay: state, action, reward, next state (-1: the end).
# Route 1 starts well at A, passes S and fails late by x; route 2 starts badly at B, passes S and succeeds by y.
ROUTES = [("A", "good", 0.0, "S"), ("S", "x", 0.0, ""), ("B", "bad", 0.0, "S"), ("S", "y", 1.0, "")]


def q_of_routes(config: DivlConfig, tau_base: float, gamma: float) -> dict[tuple[str, str], float]:
    """The fixed point of fitting V to Q at the replayed actions and Q to its target, on `ROUTES`."""
    q = {(state, action): 0.0 for state, action, _, _ in ROUTES}
    for _ in range(4):  # longer than the longest route
        for state, action, reward, following in ROUTES:
            value = torch.zeros(1, dtype=torch.float64)
            if following:
                seen = [q[s, a] for s, a, _, _ in ROUTES if s == following]
                labels: dict[float, float] = {}
                for label in seen:
                    labels[label] = labels.get(label, 0.0) + 1 / len(seen)
                value = bootstrap(output_of(labels, config), tau_base, config).value
            discount = torch.full((1,), gamma if following else 0.0, dtype=torch.float64)
            q[state, action] = critic_target(torch.full_like(discount, reward), discount, value).item()
    return q


@pytest.mark.parametrize(
    ("config", "tau_base", "expected"),
    [
        (CONFIG, 0.6, 1.0),  # tau .6 - .3 Hn is above the half that fails
        (CONFIG, 0.9, 1.0),
        (replace(CONFIG, tau_min=0.1), 0.3, 0.0),  # below the half
        (EXPECTILE, 0.6, 0.7),
        (replace(EXPECTILE, expectile=0.9), 0.6, 0.9),
        (replace(EXPECTILE, expectile=0.5), 0.6, 0.5),  # the mean
    ],
)
def test_the_better_route_is_stitched_from_two_bad_episodes(
    config: DivlConfig, tau_base: float, expected: float
) -> None:
    """Monte Carlo gives the good start 0, as its episode failed; above the median, implicit values give it 1."""
    gamma = 0.99
    q = q_of_routes(config, tau_base, gamma)
    assert q["S", "x"] == 0.0 and q["S", "y"] == 1.0
    assert q["A", "good"] == pytest.approx(gamma * expected, abs=1e-6)
    assert q["B", "bad"] == q["A", "good"]


@pytest.mark.parametrize("config", [CONFIG, EXPECTILE], ids=["categorical", "expectile"])
def test_an_action_that_the_data_lack_changes_no_target(config: DivlConfig) -> None:
    class Critic(nn.Module):
        def __init__(self, absent: float) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.tensor([[0.2, absent], [0.3, absent]]))

        def forward(self, action: Tensor) -> Tensor:
            return self.table[:, action]

    targets = []
    replayed = torch.zeros(8, dtype=torch.int64)
    for absent in (0.0, 1e6):
        output = torch.zeros(1, config.outputs, requires_grad=True)
        optimiser = torch.optim.Adam([output], lr=0.1)
        for _ in range(50):
            optimiser.zero_grad()
            fit_loss(output.expand(8, -1), value_label(Critic(absent)(replayed)), config).backward()
            optimiser.step()
        targets.append(critic_target(torch.zeros(1), torch.ones(1), bootstrap(output, 0.9, config).value))
    assert torch.equal(*targets)
    assert targets[0].item() == pytest.approx(0.2, abs=0.02)  # the lower head


def test_the_critic_loss_sums_the_heads_and_its_target_is_constant() -> None:
    q = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
    target = torch.tensor([1.0, 1.0], requires_grad=True)
    loss = critic_loss(q, target)
    assert loss.item() == pytest.approx((0 + 4 + 1 + 16) / 2)
    loss.backward()
    assert target.grad is None


def test_the_target_critic_moves_by_exactly_the_ema_rate() -> None:
    online, target = nn.Linear(3, 2), nn.Linear(3, 2)
    before = target.weight.detach().clone()
    ema_update(target, online, 0.005)
    assert torch.allclose(target.weight - before, 0.005 * (online.weight - before), atol=1e-7)


@pytest.mark.parametrize(("config", "tau_base"), [(CONFIG, 0.6), (CONFIG, 0.9), (EXPECTILE, 0.6)])
def test_a_neural_value_lets_a_reward_free_loop_decay_at_the_default_discount(
    config: DivlConfig, tau_base: float
) -> None:
    """algorithm.md 4.1b: a network over noisy features of one state smears its target; Q must still fall from .5.

    The critic is a number that follows the target slowly, as the EMA critic does; chunks last one second.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = 16
    network = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, config.outputs))
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    state = torch.randn(8)
    reward, discount = torch.zeros(rows), torch.full((rows,), config.gamma_per_step(1.0))

    def fit(q: Tensor) -> None:
        optimiser.zero_grad()
        fit_loss(network(state + 0.1 * torch.randn(rows, 8)), q.expand(rows), config).backward()
        optimiser.step()

    q = torch.tensor(0.5)
    for _ in range(300):
        fit(q)
    with torch.no_grad():
        assert bootstrap(network(state[None]), tau_base, config).value.item() == pytest.approx(0.5, abs=0.05)
    for _ in range(5000):
        fit(q)
        with torch.no_grad():
            value = bootstrap(network(state + 0.1 * torch.randn(rows, 8)), tau_base, config).value
        q = torch.lerp(q, critic_target(reward, discount, value).mean(), 0.02)
    assert q.item() < 0.1
