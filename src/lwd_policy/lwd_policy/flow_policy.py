# SPDX-License-Identifier: Apache-2.0
"""The policy: a trunk that sees and a flow expert that acts. Flow time runs 0 = noise to 1 = action."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lwd_policy.action import ActionSpec
from lwd_policy.action_head import (
    ActionHead,
    EditHead,
    EditSpec,
    HeadSpec,
    OneStepHead,
    noise_steps,
    split_noise,
)
from lwd_policy.flow_expert import FlowExpert
from lwd_policy.observation import INSTRUCTION, JOINT_POSITIONS, KEYPOINTS, Observation, ObservationSpec
from lwd_policy.trunk import Trunk

FLOW_STEPS = 10  # Euler steps; below 10 the published method loses most of its success (algorithm.md 1.9)


class ValueHead(nn.Module):
    """Chance of success [B] in [0, 1] of a context [B, C]: what robots and monitors show, never what they act on."""

    def __init__(self, context_dim: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(context_dim, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, context: Tensor) -> Tensor:
        value: Tensor = self.layers(context).squeeze(-1).sigmoid()
        return value


class FlowPolicy(nn.Module):
    """`trunk` gives a feature per observation, the features of the last `history` chunk boundaries are the context,
    `expert` is the velocity field over normalised chunks [H, A]; `head`, what acts on top of it or in its place, and
    `value` may be None.

    acting_noise: what the noise that acting starts from is multiplied with. A clone acts best from less noise than it was
    trained with: what is rare in the demonstrations, their misses above all, becomes rarer yet.

    Raises ValueError where the observation lacks what the trunk sees or has another shape of it, and for a acting_noise
    outside [0, 1].
    """

    def __init__(
        self,
        trunk: Trunk,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        expert_size: str = "tiny",
        value_head: bool = False,
        head: HeadSpec | None = None,
        acting_noise: float = 1.0,
    ) -> None:
        super().__init__()
        _require_inputs(trunk, observation_spec)
        if not 0.0 <= acting_noise <= 1.0:
            raise ValueError(f"acting_noise {acting_noise} is not between 0 and 1")
        self.acting_noise = acting_noise
        self.observation_spec = observation_spec
        self.action_spec = action_spec
        self.expert_size = expert_size
        self.trunk = trunk
        self.expert = FlowExpert(self.context_dim, action_spec.horizon, action_spec.dim, expert_size)
        self.value = ValueHead(self.context_dim) if value_head else None
        self.head = self._fresh_head(head)

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
    def estimate(self, context: Tensor) -> Tensor:
        """Value of contexts [B, C]: [B] in [0, 1]; NaN without a value head."""
        if self.value is None:
            return context.new_full((len(context),), torch.nan)
        value: Tensor = self.value(context)
        return value

    @property
    def head_spec(self) -> HeadSpec | None:
        """What would make a head like this one."""
        return None if self.head is None else self.head.spec

    def with_head(self, head: ActionHead | None) -> FlowPolicy:
        """This policy with that head instead of its own; all networks are shared, not copied."""
        with torch.device("meta"):  # nothing is allocated, or drawn at random, only to be replaced
            policy = FlowPolicy(
                self.trunk,
                self.observation_spec,
                self.action_spec,
                self.expert_size,
                acting_noise=self.acting_noise,
            )
        policy.expert, policy.value, policy.head = self.expert, self.value, head
        policy.training = self.training
        return policy

    def _fresh_head(self, spec: HeadSpec | None) -> ActionHead | None:
        if spec is None:
            return None
        size = self.context_dim, self.action_spec.horizon, self.action_spec.dim
        if isinstance(spec, EditSpec):
            return EditHead(*size, spec)
        return OneStepHead(FlowExpert(*size, self.expert_size))

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(N, A) of the noise that acting starts from. N is H, or more where a head draws something too."""
        return noise_steps(self.head_spec, self.action_spec.horizon), self.action_spec.dim

    def act(self, context: Tensor, noise: Tensor) -> Tensor:
        """What the policy does: context [B, C], standard noise [B, N, A] -> chunk [B, H, A] in [-1, 1]. Noise [B, H, A]
        makes an edit head act by its centre."""
        noise = noise * self.acting_noise
        if self.head is None:
            return self.sample(context, noise)
        if isinstance(self.head, OneStepHead):
            return self.head.act(context, noise)
        start, own = split_noise(noise, self.action_spec.horizon)
        return self.head.act(context, self.sample(context, start), own)

    @torch.no_grad()
    def sample(self, context: Tensor, noise: Tensor, steps: int = FLOW_STEPS) -> Tensor:
        """The flow alone: Euler integration from noise [B, H, A] at time 0; clipped to [-1, 1]."""
        chunk = noise
        for step in range(steps):
            time = torch.full((len(chunk),), step / steps, device=chunk.device, dtype=chunk.dtype)
            chunk = chunk + self.velocity(context, chunk, time) / steps
        return chunk.clamp(-1.0, 1.0)


def _require_inputs(trunk: Trunk, spec: ObservationSpec) -> None:
    config = trunk.config
    joints = (len(trunk.embodiment.joint_names),)
    needed: dict[str, tuple[int, ...]] = {JOINT_POSITIONS: joints, INSTRUCTION: ()}
    if config.kind == "keypoints":
        needed[KEYPOINTS] = (config.slots, 3)
    shapes = {stream.name: stream.shape for stream in spec.streams}
    missing = [name for name in (*needed, *config.cameras) if name not in shapes]
    if missing:
        raise ValueError(f"the trunk needs the streams {', '.join(missing)}, which the observation lacks")
    for name, shape in needed.items():
        if shapes[name] != shape:
            raise ValueError(f"stream {name} has shape {shapes[name]}, the trunk needs {shape}")
