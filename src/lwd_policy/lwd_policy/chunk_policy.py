# SPDX-License-Identifier: Apache-2.0
"""A policy in use: observations of one or many robots in, chunks of absolute joint positions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import Observation, reference_position


@dataclass(frozen=True, eq=False)
class PolicyChunk:
    """positions: [H, n] absolute, rad or m. normalised: [H, A] as the expert gave it. feature: [F] of the trunk.
    value: estimate in [0, 1], NaN where the policy has no value head."""

    positions: NDArray[np.float64]
    normalised: NDArray[np.float32]
    feature: NDArray[np.float32]
    value: float


@dataclass
class _Slot:
    generator: torch.Generator
    features: list[Tensor]


class ChunkPolicy:
    """Keeps the history of features of each robot ("slot"). ROS-free: the policy node has one slot, the headless
    runner one per robot. Not thread-safe."""

    def __init__(self, policy: FlowPolicy) -> None:
        self.policy = policy.eval()
        self._slots: dict[int, _Slot] = {}

    @property
    def action_spec(self) -> ActionSpec:
        """How its chunks are to be executed."""
        return self.policy.action_spec

    def begin_episode(self, slot: int = 0, seed: int | None = None) -> None:
        """Forget the history of a slot. seed: makes its noise, and so its episode, repeatable."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        self._slots[slot] = _Slot(generator, [])

    def chunk(self, observations: Sequence[Observation], slots: Sequence[int] = (0,)) -> list[PolicyChunk]:
        """One chunk per observation; `slots` says of which robot each is. Raises KeyError for a slot whose episode
        was not begun."""
        history = self.policy.observation_spec.history
        features = self.policy.feature(observations)
        contexts, noises = [], []
        for feature, number in zip(features, slots, strict=True):
            slot = self._slots[number]
            # At its beginning an episode has no past: the first feature stands in for it, here and in the learner.
            slot.features = [*(slot.features or [feature] * (history - 1)), feature][-history:]
            contexts.append(self.policy.context(torch.stack(slot.features).unsqueeze(0)))
            noises.append(
                torch.randn(self.action_spec.horizon, self.action_spec.dim, generator=slot.generator)
            )
        noise = torch.stack(noises).to(features.device)
        context = torch.cat(contexts)
        normalised = self.policy.sample(context, noise).cpu().numpy()
        values = self.policy.estimate(context).cpu().numpy()
        reference = np.stack([reference_position(observation) for observation in observations])
        positions = self.action_spec.decode(
            self.action_spec.denormalise(normalised.astype(np.float64)), reference
        )
        return [
            PolicyChunk(positions[i], normalised[i], features[i].cpu().numpy(), float(values[i]))
            for i in range(len(observations))
        ]
