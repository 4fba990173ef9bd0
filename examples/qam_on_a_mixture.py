#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Adjoint matching where everything can be seen: one action, two modes, and a critic that prefers the upper one.

A small flow network is cloned from the mixture, then tilted by `lwd_learner.qam` towards Q = -(a - .8)^2 / 1.28 at
temperature 1. The exact answer is known: the same two modes, moved a little, with odds of 4 to 1. The figure shows it
beside what was learned, and below what other choices of pairing, adjoint and roll-out learn from the same clone.

    scripts/run python examples/qam_on_a_mixture.py --out mixture.png      (half a minute on one core)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from lwd_learner import qam
from lwd_learner.descent import Descent
from lwd_learner.schedule import Schedule

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BEST, WIDTH = 0.8, 0.8  # Q / temperature = -(a - BEST)^2 / (2 WIDTH^2)
K = 10  # flow steps, in training and in acting
COSINE = Schedule("cosine")
DEFAULT = qam.QamConfig(steps=K, clip=10.0)  # no box: the critic is the same parabola everywhere

INK, PALE, GREY = "#22303c", "#e7ebef", "#9aa5b1"
UPPER, LOWER = "#d5622a", "#3a6ea5"


# --- the problem ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Components N(mean_j, sd^2) with their weights."""

    mean: Tensor  # [J]
    sd: float
    weight: Tensor  # [J]

    def sample(self, rows: int) -> Tensor:
        """[rows, 1]."""
        chosen = torch.multinomial(self.weight, rows, replacement=True)
        return (self.mean[chosen] + self.sd * torch.randn(rows)).unsqueeze(-1)

    def tilt(self) -> Mixture:
        """The mixture times exp(Q), normalised: a product of Gaussians per component."""
        precision = self.sd**-2 + WIDTH**-2
        mean = (self.mean / self.sd**2 + BEST / WIDTH**2) / precision
        weight = self.weight * torch.exp(-((self.mean - BEST) ** 2) / (2 * (self.sd**2 + WIDTH**2)))
        return Mixture(mean, precision**-0.5, weight / weight.sum())

    def velocity(self, x: Tensor, flow_time: Tensor) -> Tensor:
        """Of its flow, in closed form: x [B, 1], flow_time [B] -> [B, 1]."""
        t = flow_time[:, None]
        variance = (1 - t) ** 2 + t**2 * self.sd**2
        offset = x - t * self.mean
        share = torch.softmax(self.weight.log() - offset.square() / (2 * variance), dim=1)
        return (share * (self.mean + (t * self.sd**2 - (1 - t)) / variance * offset)).sum(dim=1, keepdim=True)

    def density(self, at: Tensor) -> Tensor:
        """[N] at the actions [N]."""
        z = (at[:, None] - self.mean) / self.sd
        return (torch.exp(-z.square() / 2) / (self.sd * (2 * torch.pi) ** 0.5)) @ self.weight

    def cumulative(self, at: Tensor) -> Tensor:
        """[N] at the actions [N]."""
        return torch.special.ndtr((at[:, None] - self.mean) / self.sd) @ self.weight


BASE = Mixture(torch.tensor([-0.6, 0.6]), 0.15, torch.tensor([0.5, 0.5]))


def action_value(action: Tensor) -> Tensor:
    """[B, 1] -> [B]."""
    return -(action[:, 0] - BEST).square() / (2 * WIDTH**2)


# --- learning ------------------------------------------------------------------------------------------------


class Flow(nn.Module):
    """v(x, t) of one action."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(6, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor, flow_time: Tensor) -> Tensor:
        t = flow_time[:, None]
        waves = [torch.sin(torch.pi * t), torch.cos(torch.pi * t), torch.sin(2 * torch.pi * t)]
        velocity: Tensor = self.net(torch.cat([x, t, x * t, *waves], dim=1))
        return velocity


def train(flow: Flow, loss: Callable[[], Tensor], updates: int, rate: float) -> Flow:
    """Adam with a cosine schedule."""
    descent = Descent("flow", flow, partial(torch.optim.Adam, lr=rate), norm_max=1.0)
    for step in range(updates):
        descent.set_rate(rate * COSINE.share(step, updates))
        descent.step(loss())
    return flow.requires_grad_(False)


def clone(updates: int) -> Flow:
    """Flow matching on samples of the mixture."""
    flow = Flow()

    def loss() -> Tensor:
        return qam.flow_matching_loss(flow, BASE.sample(1024), torch.randn(1024, 1), torch.rand(1024))

    return train(flow, loss, updates, 3e-3)


def tilt(reference: Flow, config: qam.QamConfig, updates: int) -> Flow:
    """Adjoint matching, from the clone on."""
    flow = copy.deepcopy(reference).requires_grad_(True)

    def loss() -> Tensor:
        return qam.policy_loss(flow, reference, action_value, torch.randn(K, 256, 1), 1.0, config).loss

    return train(flow, loss, updates, 2e-3)


# --- what a flow makes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The distribution of a flow's actions, from 4001 quantiles of the noise: no sampling error."""

    action: Tensor  # [N], one per quantile

    @staticmethod
    @torch.no_grad()
    def of(velocity: qam.Velocity) -> Outcome:
        noise = torch.special.ndtri((torch.arange(4_001) + 0.5) / 4_001).unsqueeze(-1)
        return Outcome(qam.integrate(velocity, noise, K)[:, 0])

    @property
    def upper_share(self) -> float:
        return float((self.action > 0).float().mean())

    def distance(self, exact: Mixture) -> float:
        """Wasserstein-1."""
        at = torch.linspace(-2, 2, 2001)
        made = torch.searchsorted(self.action.sort().values, at) / len(self.action)
        return float((made - exact.cumulative(at)).abs().sum() * (at[1] - at[0]))

    def density(self, at: Tensor) -> Tensor:
        """[N] at the actions [N], smoothed by a Gaussian of sd .03."""
        z = (at[:, None] - self.action) / SMOOTH
        return torch.exp(-z.square() / 2).mean(dim=1) / (SMOOTH * (2 * torch.pi) ** 0.5)


@torch.no_grad()
def paths(velocity: qam.Velocity, count: int) -> Tensor:
    """[K+1, count] Euler paths from quantiles of the noise."""
    x = torch.special.ndtri((torch.arange(count) + 0.5) / count).unsqueeze(-1)
    seen = [x]
    for i in range(K):
        x = x + velocity(x, torch.full((count,), i / K)) / K
        seen.append(x)
    return torch.cat(seen, dim=1).T


# --- the figure ------------------------------------------------------------------------------------------------

AT = torch.linspace(-1.3, 1.4, 301)
SMOOTH = 0.03
STRIP = 0.16  # of flow time that a density of 1 is wide


def draw_flow(ax: Axes, title: str, note: str, velocity: qam.Velocity, outline: Mixture) -> None:
    """Paths from noise on the left to actions on the right, where their density stands on its side."""
    seen = paths(velocity, 130)
    for path in seen.T:
        ax.plot(np.linspace(0, 1, K + 1), path, color=UPPER if path[-1] > 0 else LOWER, lw=0.7, alpha=0.45)
    density = Outcome.of(velocity).density(AT)
    for colour, side in ((UPPER, AT >= 0), (LOWER, AT <= 0)):
        ax.fill_betweenx(AT[side], 1.03, 1.03 + STRIP * density[side], color=colour, alpha=0.8, lw=0)
    ax.plot(1.03 + STRIP * outline.density(AT), AT, color=INK, lw=1.2)
    ax.set(xlim=(-0.02, 1.5), ylim=(-2.1, 2.35), xticks=[0, 1], yticks=[-0.6, 0.6])
    ax.set_xticklabels(["noise", "action"])
    ax.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold", color=INK)
    ax.text(0.0, 1.03, note, transform=ax.transAxes, fontsize=10, color=INK)


def draw_variant(ax: Axes, title: str, made: Outcome, cloned: Outcome, exact: Mixture) -> None:
    """Density of what a variant learned over the clone's, and the exact tilt's outline."""
    ax.fill_between(AT, cloned.density(AT), color=PALE, lw=0)
    density = made.density(AT)
    for colour, side in ((UPPER, AT >= 0), (LOWER, AT <= 0)):
        ax.fill_between(AT[side], density[side], color=colour, alpha=0.8, lw=0)
    ax.plot(AT, exact.density(AT), color=INK, lw=1.2)
    ax.set(xlim=(-1.25, 1.35), ylim=(0, 3.6), xticks=[-0.6, 0.6], yticks=[])
    ax.set_title(title, loc="left", fontsize=10.5, color=INK)
    text = f"upper mode {made.upper_share:.0%}\ndistance {made.distance(exact):.3f}"
    ax.text(0.02, 0.97, text, transform=ax.transAxes, va="top", fontsize=9.5, color=INK)


VARIANTS = {
    "default (pairing official)": DEFAULT,
    "pairing left": replace(DEFAULT, pairing="left"),
    "pairing right": replace(DEFAULT, pairing="right"),
    "adjoint vjp (as published)": replace(DEFAULT, adjoint="vjp"),
    "paths of the reference": replace(DEFAULT, rollout="reference"),
}


def draw(reference: Flow, learned: dict[str, Flow], out: Path) -> None:
    exact, cloned = BASE.tilt(), Outcome.of(reference)
    made = {name: Outcome.of(flow) for name, flow in learned.items()}
    best = next(iter(learned))
    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK}
    )
    figure = plt.figure(figsize=(12, 7.6), dpi=90, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.7, 1], hspace=0.04)
    flows = [
        ("Reference", f"cloned: upper mode {cloned.upper_share:.0%}", reference, BASE),
        ("Exact tilt", f"closed form: upper mode {float(exact.weight[1]):.0%}", exact.velocity, exact),
        ("Learned", f"adjoint matching: upper mode {made[best].upper_share:.0%}", learned[best], exact),
    ]
    for ax, flow in zip(above.subplots(1, 3), flows, strict=True):
        draw_flow(ax, *flow)
    below.suptitle(
        f"Other choices from the same clone, {K} flow steps. Outline: exact tilt; grey: clone; distance: Wasserstein-1",
        x=0.008, ha="left", fontsize=11, color=INK,
    )  # fmt: skip
    for ax, (title, outcome) in zip(below.subplots(1, len(made)), made.items(), strict=True):
        draw_variant(ax, title, outcome, cloned, exact)
    for ax in figure.axes:
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(length=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, pil_kwargs={"optimize": True})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("qam_on_a_mixture.png"), help="the figure (PNG)")
    parser.add_argument(
        "--updates", type=int, default=600, help="of each variant; of cloning three times as many"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = clone(3 * options.updates)
    learned = {}
    for name, config in VARIANTS.items():
        learned[name] = tilt(reference, config, options.updates)
        outcome = Outcome.of(learned[name])
        print(
            f"{name:28} upper mode {outcome.upper_share:.3f}, distance {outcome.distance(BASE.tilt()):.3f}",
            flush=True,
        )
    draw(reference, learned, options.out)
    print(f"{options.out}")


if __name__ == "__main__":
    main()
