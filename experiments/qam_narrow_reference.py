#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Ways to carry and pair the adjoint, behind a cloned network of a narrow Gaussian policy.

Closed-form references have exact Jacobians; a cloned network's are noisy, and the first flow steps multiply that noise
by ten. A network is cloned from actions N(mean(context), sd^2 I) in eight dimensions and tilted towards a linear Q, at
the temperature at which the exact tilt is .1 nat away. Printed per way: the gain in Q over the exact gain sd^2 / lambda,
the movement across the gradient over that along it (0 is exact), and the path KL (.1 is exact).

    scripts/run python experiments/qam_narrow_reference.py      (five minutes on one core)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from math import sqrt

import torch
from torch import Tensor, nn

from lwd_learner import qam
from lwd_learner.descent import Descent
from lwd_learner.schedule import CONSTANT, Schedule

CONTEXT, ACTION, ROWS = 3, 8, 256
BUDGET = 0.1  # nat between the exact tilt and the reference
WAYS: list[tuple[qam.Adjoint, qam.Pairing]] = [
    *product(("denoiser",), ("official", "left", "right")),
    *product(("gaussian",), ("official", "left", "right")),
    *product(("vjp",), ("official", "left")),
]


class Flow(nn.Module):
    """v(context, x, t)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [CONTEXT + ACTION + 3, width, width, width]
        layers: list[nn.Module] = []
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, ACTION))

    def forward(self, context: Tensor, x: Tensor, flow_time: Tensor) -> Tensor:
        t = flow_time[:, None]
        velocity: Tensor = self.net(torch.cat([context, x, t, torch.sin(3 * t), torch.cos(3 * t)], dim=1))
        return velocity

    def bound(self, context: Tensor) -> qam.Velocity:
        return lambda x, t: self(context, x, t)


def train(flow: Flow, loss: Callable[[], Tensor], updates: int, rate: float, schedule: Schedule) -> None:
    descent = Descent("flow", flow, partial(torch.optim.Adam, lr=rate), norm_max=1.0)
    for step in range(updates):
        descent.set_rate(rate * schedule.share(step, updates))
        descent.step(loss())
    flow.requires_grad_(False)


def clone(sd: float, updates: int) -> Flow:
    flow, mixing = Flow(), 0.3 * torch.randn(CONTEXT, ACTION)

    def loss() -> Tensor:
        context = torch.randn(512, CONTEXT)
        action = 0.7 * torch.tanh(context @ mixing) + sd * torch.randn(512, ACTION)
        noise, flow_time = torch.randn(512, ACTION), torch.rand(512)
        return qam.flow_matching_loss(flow.bound(context), action, noise, flow_time)

    train(flow, loss, updates, 2e-3, Schedule("cosine"))
    return flow


def tilt(
    reference: Flow, config: qam.QamConfig, gradient: Tensor, temperature: float, updates: int
) -> tuple[float, float, float]:
    """Gain in Q, movement across the gradient, path KL."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    contexts = torch.randn(1000, CONTEXT)
    variance = qam.reference_variance(reference.bound(contexts), torch.randn(2, 1000, ACTION), config.steps)
    kl: list[float] = []

    def loss() -> Tensor:
        context, noise = torch.randn(ROWS, CONTEXT), torch.randn(config.steps, ROWS, ACTION)
        step = qam.policy_loss(
            policy.bound(context),
            reference.bound(context),
            lambda a: a @ gradient,
            noise,
            temperature,
            config,
            variance=variance,
        )
        kl.append(qam.path_kl(step.path).mean().item())
        return step.loss

    train(policy, loss, updates, 3e-4, CONSTANT)
    context, noise = torch.randn(4000, CONTEXT), torch.randn(4000, ACTION)
    ends = [qam.integrate(flow.bound(context), noise, config.steps) for flow in (policy, reference)]
    moved = ends[0] - ends[1]
    along = moved @ gradient
    across = (moved - along[:, None] * gradient).norm(dim=1).mean()
    return float(along.mean()), float(across), sum(kl[-20:]) / 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300, help="of each tilt; of cloning ten times as many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| sd | adjoint | pairing | gain / exact | across / along | path KL |\n|---|---|---|---|---|---|")
    for sd in (0.05, 0.1):
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        temperature = sd / sqrt(2 * BUDGET)
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            reference = clone(sd, 10 * options.updates)
            gradient = nn.functional.normalize(torch.randn(ACTION), dim=0)
            for adjoint, pairing in WAYS:
                config = replace(qam.QamConfig(), adjoint=adjoint, pairing=pairing, clip=10.0)
                found[adjoint, pairing].append(
                    tilt(reference, config, gradient, temperature, options.updates)
                )
        for (adjoint, pairing), runs in found.items():
            gain, across, kl = (sum(numbers) / len(runs) for numbers in zip(*runs, strict=True))
            ratio = gain * temperature / sd**2
            print(
                f"| {sd} | {adjoint} | {pairing} | {ratio:.2f} | {across / abs(gain):.2f} | {kl:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
