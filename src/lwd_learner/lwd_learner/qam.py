# SPDX-License-Identifier: Apache-2.0
"""Q-learning with adjoint matching: tilt a flow policy towards the critic without back-propagating through it.

Pure functions of tensors, official discretisation of algorithm.md 2.7. B rows, D flat action size, K flow steps,
h = 1/K, flow time 0 = noise, 1 = action. A velocity is a callable (x [B, D], flow_time [B]) -> [B, D]: a network
with its context bound, or a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
ActionValue = Callable[[Tensor], Tensor]
Total = Callable[[Tensor], Tensor]  # a sum over these rows -> the same sum over all rows of the step
Rollout = Literal["on_policy", "reference"]
Adjoint = Literal["denoiser", "vjp", "scalar", "gaussian"]
Pairing = Literal["left", "official", "right"]


@dataclass(frozen=True)
class QamConfig:
    """Policy extraction. Defaults are the `lwd` preset; see `paper()`."""

    steps: int = 10  # K; fewer than 10 lost most of the gain in the authors' data
    rollout: Rollout = "on_policy"  # whose paths; only the policy's own have the tilt as fixed point, 4.3
    adjoint: Adjoint = "denoiser"  # vjp: as published, wrong for a narrow reference, 6.5; others: no VJP
    pairing: Pairing = "official"  # left: the exact shift, but more of a network's noise; see docs/method.md
    spread_rows: int = 16  # contexts per update that "gaussian" samples the reference in, twice each
    spread_ema: float = 0.01  # weight of the newest of these; with 16 rows s^2 is known to 3 %
    temperature: Literal["path_kl", "fixed"] = "path_kl"  # Q's scale is unknown: fix the distance, 4.4
    fixed_lambda: float = 2.0  # value units; used by "fixed" only, as published
    kl_budget: float = 0.05  # nat per executed step; a start that a critic full of noise cannot abuse, 4.4b
    lambda_scale: float = 3.0  # lambda_eff = lambda_scale * lambda, 2.9
    dual_rate: float = 0.01  # change of lambda per step and nat, 2.9
    dual_ema: float = 0.1  # weight of the newest path KL, 2.9
    initial_lambda: float = 1 / 3  # value units / lambda_scale: lambda_eff starts at 1, the span of Q
    lambda_range: tuple[float, float] = (0.01, 100.0)  # of lambda, 2.9
    lambda_eff_min: float = 0.05  # value units; the dual must not spend its budget on noise, 4.4b
    clip: float = 1.0  # normalised action; no gradient outside the box, 4.11
    box_penalty: float = 1.0  # value per squared excess over the box, only while too many leave it, 4.11
    saturated_share_max: float = 0.05  # of executed coordinates; the penalty acts above it, 4.11
    adjoint_norm_max: float | None = None  # per row, of the terminal adjoint; None: no limit

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"adjoint matching needs two flow steps or more, not {self.steps}")

    def paper(self) -> QamConfig:
        """The `lwd_paper` preset: lambda = 2, paths of the frozen reference, published adjoint and pairing. 4.20."""
        return replace(
            self,
            rollout="reference",
            adjoint="vjp",
            pairing="official",
            temperature="fixed",
            fixed_lambda=2.0,
            box_penalty=0.0,
        )


# --- one flow step ----------------------------------------------------------------------------------------


def noise_scale(time: float, h: float) -> float:
    """sigma of the memoryless SDE at flow time `time`, shifted by one step h: finite at 0. algorithm.md 2.7."""
    return sqrt(2 * (1 - time + h) / (time + h))


def sde_step(x: Tensor, velocity: Tensor, time: float, h: float, noise: Tensor) -> Tensor:
    """One memoryless Euler-Maruyama step; x, velocity (at x, time) and standard normal noise: [B, D]. 2.7."""
    drift = 2 * velocity - x / (time + h)
    return x + h * drift + sqrt(h) * noise_scale(time, h) * noise


def adjoint_step(reference: Velocity, x: Tensor, time: float, h: float, adjoint: Tensor) -> Tensor:
    """One backward step of the lean adjoint: g_i = g_(i+1) + h J_i^T g_(i+1). algorithm.md 2.7.

    J_i is the Jacobian of the reference's drift 2 v_b(x, t_i + h) - x / (t_i + h) at x = x_i: one VJP for the
    whole batch. x, adjoint g_(i+1): [B, D]. Returns [B, D].
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        velocity = reference(leaf, _time(x, time + h))
        (pulled,) = torch.autograd.grad(velocity, leaf, adjoint.detach())
    return adjoint + h * (2 * pulled - adjoint / (time + h))


# --- paths ------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """The reference at one state, with the graph that leads from the one to the other where a VJP will be asked for."""

    state: Tensor  # [B, D], x_i, a leaf
    velocity: Tensor  # [B, D], v_b(x_i, t_i)


class Path(NamedTuple):
    """A rolled-out batch of paths. `velocities` carry the policy's gradient; states and reference velocities carry none,
    and the graphs in `evaluations` reach nothing outside them.
    """

    states: Tensor  # [K+1, B, D], x_0 .. x_K
    velocities: Tensor  # [K, B, D], v_theta(x_i, t_i)
    reference_velocities: Tensor  # [K, B, D], v_b(x_i, t_i)
    evaluations: Sequence[Evaluation]  # K


def rollout(
    policy: Velocity,
    reference: Velocity,
    noise: Tensor,
    driver: Rollout = "on_policy",
    differentiable_from: int | None = None,
) -> Path:
    """Roll the memoryless SDE from noise to action. algorithm.md 2.7.

    noise: [K, B, D] standard normal; noise[0] is x_0 and noise[i] drives the step from i-1 to i, so that the
    deterministic skeleton of the path is obtained with zeros from 1 on. driver: whose velocity moves it. The
    last step is noiseless and uses the reference. Each state is detached before the policy sees it: the policy's
    velocities can be put into the loss as they are, without a second evaluation. differentiable_from: the first step
    whose evaluation of the reference keeps its graph, so that `denoiser_adjoint` needs no second one either. Networks
    under autocast may answer in fewer digits: the path is computed in those of the noise.
    """
    k = noise.shape[0]
    h = 1.0 / k
    x = noise[0]
    states, velocities, evaluations = [x], [], []
    for i in range(k):
        velocity = policy(x, _time(x, i * h)).to(x.dtype)
        differentiable = differentiable_from is not None and i >= differentiable_from
        evaluation = _evaluate(reference, x, i * h, differentiable)
        reference_velocity = evaluation.velocity.detach()
        if i < k - 1:
            driving = velocity.detach() if driver == "on_policy" else reference_velocity
            x = sde_step(x, driving, i * h, h, noise[i + 1])
        else:
            x = x + h * reference_velocity
        states.append(x)
        velocities.append(velocity)
        evaluations.append(evaluation)
    reference_velocities = torch.stack([evaluation.velocity.detach() for evaluation in evaluations])
    return Path(torch.stack(states), torch.stack(velocities), reference_velocities, evaluations)


def integrate(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Euler ODE from noise [B, D] to the endpoint [B, D], not clipped: how the policy acts. algorithm.md 1.8."""
    x = noise
    for i in range(steps):
        x = x + velocity(x, _time(x, i / steps)) / steps
    return x


# --- adjoint ----------------------------------------------------------------------------------------------


def terminal_adjoint(
    action_value: ActionValue,
    endpoint: Tensor,
    temperature: float | Tensor,
    clip: float = 1.0,
    mask: Tensor | None = None,
    norm_max: float | None = None,
) -> Tensor:
    """g_K = - grad_a Q(clip(x_K)) / lambda. algorithm.md 2.7.

    action_value: [B, D] -> [E, B] heads of the target critic, averaged here (4.10), or [B]. endpoint: [B, D].
    mask: [B, D] bool, the executed steps: the critic's opinion of anything else is no opinion. A coordinate
    outside the box gets exactly 0. Returns [B, D].
    """
    with torch.enable_grad():
        leaf = endpoint.detach().requires_grad_(True)
        q = action_value(leaf.clamp(-clip, clip))
        total = q.sum() / (q.shape[0] if q.dim() == 2 else 1)
        (gradient,) = torch.autograd.grad(total, leaf)
    outside = leaf.detach().abs() > clip
    gradient = gradient.masked_fill(outside, 0.0)
    if mask is not None:
        gradient = gradient.masked_fill(~mask, 0.0)
    adjoint = -gradient / temperature
    if norm_max is not None:
        norm = adjoint.norm(dim=-1, keepdim=True)
        adjoint = adjoint * (norm_max / norm.clamp_min(norm_max))
    return adjoint


def box_adjoint(
    endpoint: Tensor,
    temperature: float | Tensor,
    config: QamConfig,
    mask: Tensor | None = None,
    saturated: Tensor | None = None,
) -> Tensor:
    """What the terminal adjoint gains when more of the batch than `saturated_share_max` is outside the box. 4.11.

    The tilt becomes pi_b exp((Q - penalty) / lambda) with penalty = box_penalty / 2 * sum relu(|x_K| - clip)^2: outside,
    where the clipped critic has no gradient, it is the only pull back. endpoint, mask: [B, D]; saturated: share
    that decides, if not that of these rows. Returns [B, D], 0 inside the box and off the mask.
    """
    excess = endpoint.detach() - endpoint.detach().clamp(-config.clip, config.clip)
    if mask is not None:
        excess = excess * mask
    share = saturated_share(endpoint, config.clip, mask) if saturated is None else saturated
    return torch.where(
        share > config.saturated_share_max,
        config.box_penalty / temperature * excess,
        torch.zeros_like(excess),
    )


def saturated_share(
    endpoint: Tensor, clip: float, mask: Tensor | None = None, total: Total = torch.detach
) -> Tensor:
    """Share of the coordinates (of `mask`, if given) that the box will cut. endpoint, mask: [B, D]; a scalar.
    total: sums over other batches as well, where several are one."""
    outside = (endpoint.detach().abs() > clip).float()
    counted = torch.ones_like(outside) if mask is None else mask.float()
    cut, of = total(torch.stack([(outside * counted).sum(), counted.sum()]))
    return cut / of.clamp_min(1)


# Four ways to carry the terminal adjoint back. Each returns [K, B, D], what the steps of the loss are paired with:
#   official  g_0 .. g_(K-1)
#   right     g_1 .. g_K
#   left      g_1, g_1 .. g_(K-1): the first step has no adjoint of its own, see `pairing_weight`


def carry_adjoint(
    reference: Velocity, path: Path, terminal: Tensor, config: QamConfig, variance: Tensor | None = None
) -> Tensor:
    """[K, B, D] by the configured way. terminal: [B, D]; variance: [D], for "gaussian"."""
    if config.adjoint == "denoiser":
        return denoiser_adjoint(
            reference, path.states, terminal, config.pairing, path.evaluations[_first(config.pairing) :]
        )
    if config.adjoint == "vjp":
        return lean_adjoint(reference, path.states, terminal, config.pairing)
    if config.adjoint == "scalar":
        return scalar_adjoint(terminal, config.steps, config.pairing)
    if variance is None:
        raise ValueError("the gaussian adjoint needs the reference's variance, see reference_variance")
    return gaussian_adjoint(terminal, config.steps, variance, config.pairing)


def lean_adjoint(reference: Velocity, states: Tensor, terminal: Tensor, pairing: Pairing) -> Tensor:
    """The published recursion along a path with the reference's Jacobian only. algorithm.md 2.7.

    states: [K+1, B, D]; terminal: [B, D]. Returns [K, B, D]. The unexecuted tail of a chunk has a zero terminal
    adjoint but receives what the reference's Jacobian carries there: it moves along with the executed steps it is
    correlated with, as the tilted distribution does.
    """
    k = states.shape[0] - 1
    adjoints = [terminal]
    for i in reversed(range(_first(pairing), k)):
        adjoints.append(adjoint_step(reference, states[i], i / k, 1 / k, adjoints[-1]))
    return _paired(adjoints[:0:-1], terminal, pairing)


def denoiser_adjoint(
    reference: Velocity,
    states: Tensor,
    terminal: Tensor,
    pairing: Pairing,
    evaluations: Sequence[Evaluation] | None = None,
) -> Tensor:
    """The lean adjoint in closed form: g_i = (dD_i / dx)^T g_K with D_i(x) = x + (1 - t_i) v_b(x, t_i), the reference's
    estimate of the action. algorithm.md 2.6, 6.5.

    For a Gaussian base of any covariance dD/dx = t S (t^2 S + (1-t)^2 I)^-1, the exact solution of the adjoint
    equation (t s^2 / Den(t) per direction of sd s); for a linear Q it is the optimum of any base to first order. It
    stays between 0 and g_K however narrow the base is, and never asks the reference about flow time 1, where it was
    not trained. `lean_adjoint` multiplies factors 1 + h J of which the last ones are negative for sd < 0.1 at K = 10.
    states: [K+1, B, D]; terminal: [B, D]; evaluations: of this reference at the states that the pairing needs, where a
    roll-out has kept them; their graphs are used up. One VJP per step, for "official" also at t = 0. Returns [K, B, D].
    """
    k = states.shape[0] - 1
    first = _first(pairing)
    if evaluations is None:
        evaluations = [_evaluate(reference, states[i], i / k, True) for i in range(first, k)]
    # Unlike the recursion, no step waits for another: one call for all of them.
    pulled = torch.autograd.grad(
        [evaluation.velocity for evaluation in evaluations],
        [evaluation.state for evaluation in evaluations],
        [terminal.detach()] * (k - first),
    )
    adjoints = [terminal + (1 - i / k) * pulled[i - first] for i in range(first, k)]
    return _paired(adjoints, terminal, pairing)


def scalar_adjoint(terminal: Tensor, steps: int, pairing: Pairing) -> Tensor:
    """SQAM: g = t g_K, with t = t_i + h at step i of the official pairing. algorithm.md 2.10.

    Exact where the reference's velocity does not depend on x; over-moves a narrow base by about 1/s^2. Without a VJP.
    terminal: [B, D]. Returns [K, B, D].
    """
    return _closed_form_times(terminal, steps, pairing) * terminal


def gaussian_adjoint(terminal: Tensor, steps: int, variance: Tensor, pairing: Pairing) -> Tensor:
    """g = t s^2 / ((1-t)^2 + t^2 s^2) g_K per dimension, at the times of `scalar_adjoint`. algorithm.md 6.5.

    What the denoiser's Jacobian is for a base with independent Gaussian dimensions, without a VJP. terminal: [B, D];
    variance s^2: [D]. Returns [K, B, D].
    """
    time = _closed_form_times(terminal, steps, pairing)
    return time * variance / ((1 - time).square() + time.square() * variance) * terminal


def reference_variance(reference: Velocity, noise: Tensor, steps: int) -> Tensor:
    """[D] variance of the reference's actions given their context, averaged over contexts. algorithm.md 6.5.

    noise: [2, B, D], two draws for each of the contexts that `reference` is bound to. Half the squared difference of
    two samples of one context does not see how contexts differ: the spread over a batch would, and is far wider.
    Midpoint steps, because Euler's at K = 10 lose a quarter to a third of the variance.
    """
    samples = []
    with torch.no_grad():
        for x in noise:
            for i in range(steps):
                middle = x + reference(x, _time(x, i / steps)) / (2 * steps)
                x = x + reference(middle, _time(x, (i + 0.5) / steps)) / steps
            samples.append(x)
    return (samples[0] - samples[1]).square().mean(dim=0) / 2


# --- losses -----------------------------------------------------------------------------------------------


def qam_loss(path: Path, adjoints: Tensor, pairing: Pairing) -> Tensor:
    """mean_B sum_i (4 / sigma_i^2) || v_theta - v_b + c_i g ||^2, summed over D; c_i: `pairing_weight`. 2.7.

    For "official" that is || 2 (v_theta - v_b) / sigma_i + sigma_i g_i ||^2. adjoints: [K, B, D], carried for the same
    pairing. Returns a scalar whose gradient reaches the policy through `path.velocities` only.
    """
    k = path.velocities.shape[0]
    weight = _per_step(path.velocities, [pairing_weight(i / k, 1 / k, pairing) for i in range(k)])
    residual = path.velocities - path.reference_velocities + weight * adjoints
    return (2 * residual / _noise_scales(path.velocities)).square().sum(dim=(0, 2)).mean()


def pairing_weight(time: float, h: float, pairing: Pairing) -> float:
    """c of the target v_b - c g for the step from `time` to `time` + h. algorithm.md 2.6, 2.7.

    official: sigma^2 / 2 with the left adjoint; right: (1-t)/(t+h) with the right one. left: the continuous (1-t)/t with
    the left one, the velocity of the tilt itself where the adjoint is exact. At t = 0 that is Cov(x_1) times the
    gradient, a limit 0/0; g_h = h / (1-h)^2 Cov(x_1 | x_h) g_K and Cov(x_1 | x_h) is close to Cov(x_1).
    """
    if pairing == "official":
        return noise_scale(time, h) ** 2 / 2
    if pairing == "right":
        return (1 - time) / (time + h)
    return (1 - time) / time if time > 0 else (1 - h) ** 2 / h


def path_kl(path: Path) -> Tensor:
    """[B] nat: sum_i (2h / sigma_i^2) ||v_theta - v_b||^2, an estimate of KL(policy || reference). 2.9.

    Exact in expectation only on the policy's own paths.
    """
    sigma = _noise_scales(path.velocities)
    h = 1.0 / path.velocities.shape[0]
    delta = (path.velocities - path.reference_velocities).detach()
    return (2 * h * (delta / sigma).square()).sum(dim=(0, 2))


class QamStep(NamedTuple):
    """One evaluation of the policy's objective. Only `loss` and `path.velocities` carry a gradient."""

    loss: Tensor  # scalar
    path: Path
    adjoints: Tensor  # [K, B, D], as each step of the loss is paired with them
    terminal: Tensor  # [B, D], g_K
    endpoint: Tensor  # [B, D], x_K before the clip
    saturated: Tensor  # scalar, share of executed coordinates outside the box


def policy_loss(
    policy: Velocity,
    reference: Velocity,
    action_value: ActionValue,
    noise: Tensor,
    temperature: float | Tensor,
    config: QamConfig,
    mask: Tensor | None = None,
    variance: Tensor | None = None,
    total: Total = torch.detach,
) -> QamStep:
    """The whole objective of one policy step: paths, terminal adjoint, its way back, loss. algorithm.md 2.6, 2.7.

    policy, reference: velocities bound to the contexts of B rows; action_value: [B, D] -> [E, B] or [B] of the same
    rows; noise: [K, B, D] standard normal with K = config.steps; temperature: lambda in value units; mask: [B, D] bool,
    the executed coordinates; variance: [D] of the reference's actions, for the "gaussian" adjoint only;
    total: see `saturated_share`. Everything else of a row depends on that row alone.
    """
    differentiable_from = _first(config.pairing) if config.adjoint == "denoiser" else None
    path = rollout(policy, reference, noise, config.rollout, differentiable_from)
    endpoint = path.states[-1]
    terminal = terminal_adjoint(
        action_value, endpoint, temperature, config.clip, mask, config.adjoint_norm_max
    )
    saturated = saturated_share(endpoint, config.clip, mask, total)
    if config.box_penalty > 0:
        terminal = terminal + box_adjoint(endpoint, temperature, config, mask, saturated)
    adjoints = carry_adjoint(reference, path, terminal, config, variance)
    loss = qam_loss(path, adjoints, config.pairing)
    return QamStep(loss, path, adjoints, terminal, endpoint, saturated)


# --- temperature ------------------------------------------------------------------------------------------


class Dual(NamedTuple):
    """State of the temperature: plain numbers, saved with the trainer."""

    multiplier: float  # lambda
    kl_ema: float  # nat per executed step


def initial_dual(config: QamConfig) -> Dual:
    """At the beginning of a phase: nothing of the budget is known to be spent. algorithm.md 2.9."""
    return Dual(config.initial_lambda, 0.0)


def effective_lambda(dual: Dual, config: QamConfig) -> float:
    """The temperature that divides Q, in value units. algorithm.md 2.9, 4.4b."""
    if config.temperature == "fixed":
        return config.fixed_lambda
    return max(config.lambda_scale * dual.multiplier, config.lambda_eff_min)


def update_dual(dual: Dual, kl_per_step: float, config: QamConfig) -> Dual:
    """Projected dual ascent on the path KL per executed step. algorithm.md 2.9."""
    observed = min(kl_per_step, 2 * config.kl_budget)
    ema = (1 - config.dual_ema) * dual.kl_ema + config.dual_ema * observed
    low, high = config.lambda_range
    # Below the floor of lambda_eff a smaller multiplier changes nothing but the way back.
    low = max(low, config.lambda_eff_min / config.lambda_scale)
    return Dual(min(max(dual.multiplier + config.dual_rate * (ema - config.kl_budget), low), high), ema)


# --- flow matching ----------------------------------------------------------------------------------------


def flow_matching_loss(
    velocity: Velocity, action: Tensor, noise: Tensor, flow_time: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Behaviour cloning of the flow: mean ||v(x_t, t) - (x_1 - x_0)||^2. algorithm.md 2.5.

    action x_1, noise x_0: [B, ...]; flow_time: [B] in [0, 1]; valid: bool, broadcastable to action: the mean is
    over valid elements only. Returns a scalar.
    """
    t = flow_time.reshape(-1, *([1] * (action.dim() - 1)))
    noisy = torch.lerp(noise, action, t)
    error = (velocity(noisy, flow_time) - (action - noise)).square()
    if valid is None:
        return error.mean()
    weight = valid.expand_as(error).to(error.dtype)
    return (error * weight).sum() / weight.sum().clamp_min(1.0)


def _evaluate(reference: Velocity, x: Tensor, time: float, differentiable: bool) -> Evaluation:
    with torch.set_grad_enabled(differentiable):
        leaf = x.detach().requires_grad_(differentiable)
        return Evaluation(leaf, reference(leaf, _time(leaf, time)).to(x.dtype))


def _time(x: Tensor, value: float) -> Tensor:
    return torch.full((x.shape[0],), value, dtype=x.dtype, device=x.device)


def _noise_scales(velocities: Tensor) -> Tensor:
    """[K, 1, 1] sigma_i for velocities [K, B, D]."""
    k = velocities.shape[0]
    return _per_step(velocities, [noise_scale(i / k, 1 / k) for i in range(k)])


def _closed_form_times(like: Tensor, steps: int, pairing: Pairing) -> Tensor:
    """[K, 1, 1] flow times at which a closed form gives the adjoint of each step.

    "official" takes the grid shifted by h, as its sigma does: at t = 0 there would be no adjoint at all.
    """
    if pairing == "left":
        return _per_step(like, [max(i, 1) / steps for i in range(steps)])
    return _per_step(like, [(i + 1) / steps for i in range(steps)])


def _per_step(like: Tensor, values: list[float]) -> Tensor:
    """[K, 1, 1] in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


def _first(pairing: Pairing) -> int:
    """Index of the first adjoint that the loss needs."""
    return 0 if pairing == "official" else 1


def _paired(adjoints: list[Tensor], terminal: Tensor, pairing: Pairing) -> Tensor:
    """[K, B, D] for the steps of the loss, from the adjoints that `_first` asks for up to g_(K-1)."""
    if pairing == "right":
        adjoints = [*adjoints, terminal]
    elif pairing == "left":
        adjoints = [adjoints[0], *adjoints]
    return torch.stack(adjoints)
