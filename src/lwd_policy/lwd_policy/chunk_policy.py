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
    """positions: [H, n] absolute, rad or m. normalised: [H, A] as the policy gave it. feature: [F] of the trunk.
    value: estimate in [0, 1], NaN where the policy has no value head."""

    positions: NDArray[np.float64]
    normalised: NDArray[np.float32]
    feature: NDArray[np.float32]
    value: float


_PERSISTENCE = (
    0.8  # correlation of an excursion with that of the chunk before: an error of one's own, not a tremor
)

_Key = tuple[int, tuple[tuple[str, int], ...]]  # time and stamps of an observation


@dataclass
class _Slot:
    generator: torch.Generator
    features: dict[_Key, Tensor]  # of the newest observations: most are looked at again as another's past
    excursion: Tensor | None = None  # [A] of the last chunk, in units of `exploration`


class ChunkPolicy:
    """Keeps the source of noise and the newest features of each robot ("slot"). ROS-free: the policy node has one
    slot, the headless runner one per robot. Not thread-safe."""

    def __init__(self, policy: FlowPolicy, exploration: float = 0.0) -> None:
        """exploration: how far chunks go astray on purpose, as a standard deviation in units of normalised actions. A
        critic cannot rank actions that are all alike, as those of a good clone are; it is for robots that gather data, and
        never for an evaluation."""
        self.policy = policy.eval()
        self.exploration = exploration
        self._slots: dict[int, _Slot] = {}

    @property
    def action_spec(self) -> ActionSpec:
        """How its chunks are to be executed."""
        return self.policy.action_spec

    def begin_episode(self, slot: int = 0, seed: int | None = None) -> None:
        """Begin anew in a slot. seed: makes its noise, and so its episode, repeatable."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        self._slots[slot] = _Slot(generator, {})

    def chunk(
        self, contexts: Sequence[Sequence[Observation]], slots: Sequence[int] = (0,)
    ) -> list[PolicyChunk]:
        """One chunk per context (`history` observations, oldest first; `ObservationBuffer.context`); `slots` says of
        which robot each is. Raises KeyError for a slot whose episode was not begun."""
        self._see(contexts, slots)
        chosen, noises = [], []
        for observations, number in zip(contexts, slots, strict=True):
            slot = self._slots[number]
            slot.features = {key: slot.features[key] for key in map(_key, observations)}
            chosen.append(torch.stack([slot.features[_key(observation)] for observation in observations]))
            noises.append(torch.randn(self.policy.noise_shape, generator=slot.generator))
        features = torch.stack(chosen)  # [B, history, F]
        noise = torch.stack(noises).to(features.device)
        context = self.policy.context(features)
        normalised = self.policy.act(context, noise).cpu()
        if self.exploration:
            astray = torch.stack([self._excursion(self._slots[number]) for number in slots])
            normalised = (normalised + self.exploration * astray.unsqueeze(1)).clamp(-1.0, 1.0)
        values = self.policy.estimate(context).cpu().numpy()
        reference = np.stack([reference_position(observations[-1]) for observations in contexts])
        positions = self.action_spec.decode(
            self.action_spec.denormalise(normalised.numpy().astype(np.float64)), reference
        )
        return [
            PolicyChunk(positions[i], normalised[i].numpy(), features[i, -1].cpu().numpy(), float(values[i]))
            for i in range(len(contexts))
        ]

    def _excursion(self, slot: _Slot) -> Tensor:
        """[A] standard normal: the same for all steps of a chunk, whose range grows with its steps; drifts between chunks."""
        fresh = torch.randn(self.action_spec.dim, generator=slot.generator)
        if slot.excursion is not None:
            fresh = _PERSISTENCE * slot.excursion + (1.0 - _PERSISTENCE**2) ** 0.5 * fresh
        slot.excursion = fresh
        return fresh

    def _see(self, contexts: Sequence[Sequence[Observation]], slots: Sequence[int]) -> None:
        """Compute the features that are not known yet, all in one batch."""
        new = {
            (number, _key(observation)): observation
            for observations, number in zip(contexts, slots, strict=True)
            for observation in observations
            if _key(observation) not in self._slots[number].features
        }
        if new:
            for (number, key), feature in zip(new, self.policy.feature(list(new.values())), strict=True):
                self._slots[number].features[key] = feature


def _key(observation: Observation) -> _Key:
    return observation.time_ns, tuple(observation.stamps.items())
