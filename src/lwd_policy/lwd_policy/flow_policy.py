# SPDX-License-Identifier: Apache-2.0
"""The policy: a trunk that sees and a flow expert that acts. Flow time runs 0 = noise to 1 = action."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lwd_policy.action import ActionSpec
from lwd_policy.flow_expert import FlowExpert
from lwd_policy.observation import Observation, ObservationSpec
from lwd_policy.trunk import Trunk

FLOW_STEPS = 10  # Euler steps; below 10 the published method loses most of its success (algorithm.md 1.9)


class FlowPolicy(nn.Module):
    """`trunk` gives a feature per observation, the features of the last `history` chunk boundaries are the context,
    `expert` is the velocity field over normalised chunks [H, A]."""

    def __init__(
        self,
        trunk: Trunk,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        expert_size: str = "tiny",
    ) -> None:
        super().__init__()
        self.observation_spec = observation_spec
        self.action_spec = action_spec
        self.expert_size = expert_size
        self.trunk = trunk
        self.expert = FlowExpert(self.context_dim, action_spec.horizon, action_spec.dim, expert_size)

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.trunk.feature_dim

    @property
    def context_dim(self) -> int:
        """C = history * F."""
        return self.observation_spec.history * self.trunk.feature_dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.expert.parameters()).device

    @torch.no_grad()
    def feature(self, observations: Sequence[Observation]) -> Tensor:
        """Trunk features [B, F]; without gradient."""
        inputs = {name: value.to(self.device) for name, value in self.trunk.inputs(observations).items()}
        feature: Tensor = self.trunk(inputs)
        return feature

    def context(self, features: Tensor) -> Tensor:
        """[B, history, F], oldest first -> [B, C]."""
        return features.flatten(1)

    def velocity(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        """context [B, C], noisy [B, H, A], flow_time [B] -> [B, H, A]."""
        velocity: Tensor = self.expert(context, noisy, flow_time)
        return velocity

    @torch.no_grad()
    def sample(self, context: Tensor, noise: Tensor, steps: int = FLOW_STEPS) -> Tensor:
        """Euler integration of the flow from noise [B, H, A] at time 0; clipped to [-1, 1]."""
        chunk = noise
        for step in range(steps):
            time = torch.full((len(chunk),), step / steps, device=chunk.device, dtype=chunk.dtype)
            chunk = chunk + self.velocity(context, chunk, time) / steps
        return chunk.clamp(-1.0, 1.0)
