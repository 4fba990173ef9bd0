# SPDX-License-Identifier: Apache-2.0
"""Heads: small networks by which a policy acts better, or faster, than its flow alone. algorithm.md 1.8, 1.9.

    edit        chunk = clip(flow + scale * e), e in (-1, 1) a squashed Gaussian that knows the context and the flow's chunk
    one step    chunk = clip(z + v(s, z, 0)): what the flow makes of the noise z in many steps, in one

Only what a robot runs is in here; how heads learn is in `lwd_learner.extraction`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_LOG_DEVIATION = (-20.0, 2.0)  # bounds as published
_FIRST_LOG_DEVIATION = -0.5 - 0.5 * math.log(2 * math.pi * math.e)  # entropy -0.5 nat, what training aims at


@dataclass(frozen=True)
class EditSpec:
    """What an edit may do, and the size of its network."""

    scale: float = 0.1  # of a normalised action: the most an edit moves it; as published for most tasks
    width: int = 256  # units of a hidden layer
    layers: int = 2  # hidden layers

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, (int, float)) and 0.0 < self.scale <= 2.0):
            raise ValueError(f"an edit's scale lies in (0, 2], not {self.scale!r}")
        if not (_whole(self.width, 4096) and _whole(self.layers, 16)):
            raise ValueError(
                f"an edit's network has 1-16 layers of 1-4096 units, not {self.layers!r} of {self.width!r}"
            )


@dataclass(frozen=True)
class OneStepSpec:
    """Its network is another one like the flow's."""


HeadSpec = EditSpec | OneStepSpec
_KINDS: dict[str, type[EditSpec] | type[OneStepSpec]] = {"edit": EditSpec, "one_step": OneStepSpec}


def head_to_json(spec: HeadSpec) -> dict[str, Any]:
    """For a card."""
    kind = next(name for name, type_ in _KINDS.items() if isinstance(spec, type_))
    return {"kind": kind, **asdict(spec)}


def head_from_json(content: Mapping[str, Any]) -> HeadSpec:
    """Raises ValueError, KeyError, TypeError for what is none."""
    fields = dict(content)
    kind = fields.pop("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"unknown head {kind!r}")
    return _KINDS[kind](**fields)


class EditHead(nn.Module):
    """Plain MLP of [context, flow chunk]; deviations differ by state, as published.

    It starts as no edit but for a little noise: the centre is 0, the deviation what training aims at. Steps of a chunk
    that are never executed, and so never judged, keep the centre 0.
    """

    def __init__(self, context_dim: int, horizon: int, action_dim: int, spec: EditSpec) -> None:
        super().__init__()
        self.spec = spec
        chunk = horizon * action_dim
        body: list[nn.Module] = []
        for fan_in, fan_out in pairwise([context_dim + chunk] + [spec.width] * spec.layers):
            body += [nn.Linear(fan_in, fan_out), nn.GELU(approximate="tanh")]
        self.body = nn.Sequential(*body)
        self.center = nn.Linear(spec.width, chunk)
        self.log_deviation = nn.Linear(spec.width, chunk)
        for layer in (self.center, self.log_deviation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.log_deviation.bias, _FIRST_LOG_DEVIATION)

    def forward(self, context: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, C], flow chunk [B, H, A] -> centre and log deviation [B, H, A] of the Gaussian before tanh."""
        hidden = self.body(torch.cat([context, flow.flatten(1)], dim=-1))
        log_deviation = self.log_deviation(hidden).clamp(*_LOG_DEVIATION)
        return self.center(hidden).view_as(flow), log_deviation.view_as(flow)

    def apply_edit(self, flow: Tensor, edit: Tensor) -> Tensor:
        """flow [B, H, A] in [-1, 1], edit [B, H, A] in (-1, 1) -> chunk [B, H, A] in [-1, 1]."""
        return (flow + self.spec.scale * edit).clamp(-1.0, 1.0)

    @torch.no_grad()
    def act(self, context: Tensor, flow: Tensor, noise: Tensor) -> Tensor:
        """The chunk [B, H, A] that noise [B, H, A] makes of the flow's; noise 0 gives the edit's centre."""
        center, log_deviation = self(context, flow)
        return self.apply_edit(flow, torch.tanh(center + log_deviation.exp() * noise))


class OneStepHead(nn.Module):
    """`expert` is a velocity field like the flow's, only ever asked about flow time 0."""

    spec = OneStepSpec()

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, context: Tensor, noise: Tensor) -> Tensor:
        """context [B, C], noise [B, H, A] -> chunk [B, H, A], not clipped."""
        velocity: Tensor = self.expert(context, noise, noise.new_zeros(len(noise)))
        return noise + velocity

    @torch.no_grad()
    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """The chunk [B, H, A] in [-1, 1] that noise [B, H, A] becomes."""
        chunk: Tensor = self(context, noise)
        return chunk.clamp(-1.0, 1.0)


ActionHead = EditHead | OneStepHead


def noise_steps(spec: HeadSpec | None, horizon: int) -> int:
    """N of the noise [B, N, A] that acting with this head starts from. An edit is drawn as well: the first `horizon`
    steps are the flow's, the others its own."""
    return 2 * horizon if isinstance(spec, EditSpec) else horizon


def split_noise(noise: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """noise [B, N, A] of an edit head: the flow's [B, H, A] and the edit's [B, H, A], 0 where N is H."""
    start, own = noise[:, :horizon], noise[:, horizon:]
    return start, own if own.shape[1] else torch.zeros_like(start)


def _whole(number: object, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= most
