# SPDX-License-Identifier: Apache-2.0
"""The networks that judge: a categorical value of a context, and an ensemble of critics of a context and a chunk.

Both read the features of `critic_features`; neither is ever shipped to a robot. B rows, C context size, H steps, A action
size, E heads. All heads of the ensemble run as one batched product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lwd_learner.image_encoder import ImageEncoderConfig

_FINAL_SCALE = 0.01  # logits and values start near 0: no state is preferred before anything was learned


@dataclass(frozen=True)
class CriticConfig:
    """Sizes of the value and critic networks."""

    heads: int = 2  # critics; as published; 5-10 are worth it online where they can be afforded, 4.10
    width: int = 256  # units of the hidden layers of both networks
    layers: int = 2  # hidden layers of both networks
    embedding: int = 64  # units of one embedded action step
    queries: int = 4  # learned queries of the temporal attention; several keep what happens when apart
    chunk_encoder: Literal["attention", "flat"] = (
        "attention"  # flat, as in QAM's code: all steps as one vector
    )
    hidden: Literal["norm_silu", "gelu_norm"] = (
        "norm_silu"  # after each product; gelu_norm: as in QAM's code, 1.8
    )
    features: Literal["trunk", "own"] = (
        "trunk"  # cached ones of the policy's frozen trunk; own: beside them what an encoder makes of images, 1.2
    )
    encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)  # with features = "own"

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= 16 or min(self.width, self.layers, self.embedding, self.queries) < 1:
            raise ValueError(f"a critic needs 1-16 heads and positive sizes, not {self}")


class ValueNetwork(nn.Module):
    """V: context [B, C] -> [B, outputs]: logits of the atoms, or one number. algorithm.md 1.2, 2.3."""

    def __init__(self, context_dim: int, outputs: int, config: CriticConfig) -> None:
        super().__init__()
        widths = [context_dim] + [config.width] * config.layers
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear, norm = nn.Linear(fan_in, fan_out), nn.LayerNorm(fan_out)
            if config.hidden == "norm_silu":
                layers += [linear, norm, nn.SiLU()]
            else:
                layers += [linear, nn.GELU(), norm]
        self.trunk = nn.Sequential(*layers)
        self.logits = nn.Linear(widths[-1], outputs)
        with torch.no_grad():
            self.logits.weight.mul_(_FINAL_SCALE)
            self.logits.bias.zero_()

    def forward(self, context: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.trunk(context))
        return logits


class CriticEnsemble(nn.Module):
    """Q: context [B, C], chunk [B, H, A], mask [B, H] bool -> [E, B]. algorithm.md 1.2.

    mask: the executed steps; whatever stands in the others changes nothing. Heads share no parameter. With
    chunk_encoder="flat" a chunk executed in part looks like one whose rest is 0: for data without such chunks.
    """

    def __init__(self, context_dim: int, horizon: int, action_dim: int, config: CriticConfig) -> None:
        super().__init__()
        self.norm_first = config.hidden == "norm_silu"
        self.pool: nn.Module
        if config.chunk_encoder == "attention":
            encoded = config.embedding * config.queries
            self.pool = _TemporalPool(config.heads, horizon, action_dim, config.embedding, config.queries)
        else:
            encoded = horizon * action_dim
            self.pool = _Flat()
        widths = [context_dim + encoded] + [config.width] * config.layers
        self.hidden = nn.ModuleList(
            _HeadsLinear(config.heads, fan_in, fan_out) for fan_in, fan_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(_HeadsNorm(config.heads, width) for width in widths[1:])
        self.value = _HeadsLinear(config.heads, widths[-1], 1)
        with torch.no_grad():
            self.value.weight.mul_(_FINAL_SCALE)
            self.value.bias.zero_()

    def forward(self, context: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        encoded = self.pool(chunk, mask)
        hidden = torch.cat([context.expand(encoded.shape[0], *context.shape), encoded], dim=-1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            hidden = linear(hidden)
            if self.norm_first:
                hidden = functional.silu(norm(hidden))
            else:
                hidden = norm(functional.gelu(hidden))
        # Under autocast too the last product is in full: bfloat16 would round values to one part in 256.
        with torch.autocast(hidden.device.type, enabled=False):
            value: Tensor = self.value(hidden.to(self.value.weight.dtype))
        return value.squeeze(-1)


class _TemporalPool(nn.Module):
    """Attention of learned queries over the executed steps: [B, H, A], [B, H] -> [E, B, queries * embedding]."""

    def __init__(self, heads: int, horizon: int, action_dim: int, embedding: int, queries: int) -> None:
        super().__init__()
        self.embed = _HeadsLinear(heads, action_dim, embedding)
        self.position = nn.Parameter(0.5 * torch.randn(heads, 1, horizon, embedding))
        self.query = nn.Parameter(torch.randn(heads, 1, embedding, queries))

    def forward(self, chunk: Tensor, mask: Tensor) -> Tensor:
        rows, horizon, _ = chunk.shape
        # `where`, not a product: an unexecuted step may hold anything.
        chunk = torch.where(mask.unsqueeze(-1), chunk, torch.zeros_like(chunk))
        step = self.embed(chunk.reshape(1, rows * horizon, -1)).unflatten(1, (rows, horizon))
        step = torch.tanh(step + self.position)  # [E, B, H, embedding]
        score = step @ self.query / sqrt(step.shape[-1])  # [E, B, H, queries]
        score = score.masked_fill(
            ~mask[None, :, :, None], -1e9
        )  # finite: a row without any step stays finite
        weight = torch.softmax(score, dim=2)
        return (weight.transpose(-1, -2) @ step).flatten(2)


class _Flat(nn.Module):
    """The executed steps one after the other, 0 elsewhere, the same for all heads: [B, H, A], [B, H] -> [1, B, H*A]."""

    def forward(self, chunk: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(-1), chunk, torch.zeros_like(chunk)).flatten(1).unsqueeze(0)


class _HeadsLinear(nn.Module):
    """E linear maps at once: [E or 1, N, fan_in] -> [E, N, fan_out]."""

    def __init__(self, heads: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        bound = 1 / sqrt(fan_in)
        self.weight = nn.Parameter(torch.empty(heads, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.expand(self.weight.shape[0], -1, -1), self.weight)


class _HeadsNorm(nn.Module):
    """Layer normalisation with a scale and shift per head: [E, N, width]."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, 1, width))
        self.shift = nn.Parameter(torch.zeros(heads, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        # In one dtype: under autocast the addition of bfloat16 to float32 is slower than all the rest.
        scale, shift = self.scale.to(x.dtype), self.shift.to(x.dtype)
        return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:]), scale)
