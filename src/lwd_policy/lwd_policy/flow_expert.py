# SPDX-License-Identifier: Apache-2.0
"""The flow expert: velocity of an action chunk, given what is seen, the noisy chunk and the flow time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_FREQUENCIES = 16


@dataclass(frozen=True)
class ExpertSize:
    """Width of all layers, number of residual blocks that read the context, and of those that the chunk passes."""

    width: int
    context_blocks: int
    blocks: int


PRESETS = {"tiny": ExpertSize(256, 3, 2), "base": ExpertSize(512, 4, 4)}


class FlowExpert(nn.Module):
    """Residual MLP over the flattened chunk; what is seen and the flow time scale and shift every block (FiLM).

    The scaling is what makes it precise: with additive conditioning alone the same demonstrations gave a third of the
    success. So are the blocks that read the context: cloning with them aims tools at 13 mm where it aimed at 17
    without, after as many updates. Adjoint matching evaluates it some sixty times per update, so its cost is the cost
    of learning: all blocks are square.
    """

    context_entry = (
        "context.0"  # the linear map by which context enters: where a constant input can become a bias
    )
    frequency: Tensor

    def __init__(self, context_dim: int, horizon: int, action_dim: int, size: str = "tiny") -> None:
        super().__init__()
        if size not in PRESETS:
            raise ValueError(f"expert size {size!r}; one of {', '.join(PRESETS)}")
        width, blocks = PRESETS[size].width, PRESETS[size].blocks
        reading = [_Block(width) for _ in range(PRESETS[size].context_blocks)]
        self.register_buffer(
            "frequency", math.pi * 2.0 ** torch.linspace(0, 5, _FREQUENCIES), persistent=False
        )
        self.context = nn.Sequential(nn.Linear(context_dim, width), *reading, nn.LayerNorm(width))
        self.time = nn.Linear(2 * _FREQUENCIES, width)
        self.modulate = nn.Linear(width, 2 * blocks * width)
        self.enter = nn.Linear(horizon * action_dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Linear(width, horizon * action_dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        """context: [B, C]; noisy: [B, H, A]; flow_time: [B], 0 noise to 1 action. Returns velocity [B, H, A]."""
        phase = flow_time.unsqueeze(-1) * self.frequency
        condition = self.context(context) + self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        condition = nn.functional.silu(condition)
        modulation = self.modulate(condition).chunk(2 * len(self.blocks), dim=-1)
        hidden = self.enter(noisy.flatten(1)) + condition
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, modulation[2 * index], modulation[2 * index + 1])
        # Under autocast too the last product is in full: what is learned is a small difference of two velocities.
        with torch.autocast(hidden.device.type, enabled=False):
            velocity: Tensor = self.leave(nn.functional.silu(hidden).to(self.leave.weight.dtype))
        return velocity.view_as(noisy)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.body = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, hidden: Tensor, scale: Tensor | float = 0.0, shift: Tensor | float = 0.0) -> Tensor:
        moved: Tensor = hidden + self.body(self.norm(hidden) * (1 + scale) + shift)
        return moved
