# SPDX-License-Identifier: Apache-2.0
"""The velocity network of the published QAM code, for tasks whose whole state is a short vector. algorithm.md 1.8.

Robots use `lwd_policy.flow_expert`; this one is for comparing with published results at equal networks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class StateFlow(nn.Module):
    """A plain MLP of [context, noisy chunk, flow time]: GELU, no normalisation, flow time as it is.

    GELU itself, not its approximation by tanh that the published code has: they differ by .0005 at most, and on a CPU
    the approximation takes three to five times as long.

    width, layers: units and number of the hidden layers. Weights start as published: Xavier, biases 0.
    """

    context_entry = "body.0"  # the linear map by which context enters, with its first columns

    def __init__(
        self, context_dim: int, horizon: int, action_dim: int, width: int = 512, layers: int = 4
    ) -> None:
        super().__init__()
        chunk = horizon * action_dim
        body: list[nn.Module] = []
        for fan_in, fan_out in pairwise([context_dim + chunk + 1] + [width] * layers):
            body += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.body = nn.Sequential(*body)
        self.leave = nn.Linear(width, chunk)
        for layer in (*self.body, self.leave):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        """context: [B, C]; noisy: [B, H, A]; flow_time: [B], 0 noise to 1 action. Returns velocity [B, H, A]."""
        hidden = self.body(torch.cat([context, noisy.flatten(1), flow_time.unsqueeze(-1)], dim=-1))
        # Under autocast too the last product is in full: what is learned is a small difference of two velocities.
        with torch.autocast(hidden.device.type, enabled=False):
            velocity: Tensor = self.leave(hidden.to(self.leave.weight.dtype))
        return velocity.view_as(noisy)
