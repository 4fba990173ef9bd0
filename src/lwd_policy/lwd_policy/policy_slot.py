# SPDX-License-Identifier: Apache-2.0
"""Which policy version a robot should run, which it runs, and when one may take the place of another.

The version changes between episodes only: no episode holds two. A version that cannot be used is refused with its
reason, and whatever ran goes on running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np

from lwd_policy import checkpoint
from lwd_policy.checkpoint import Card, CheckpointRefused
from lwd_policy.chunk_policy import ChunkPolicy
from lwd_policy.embodiment import Embodiment
from lwd_policy.observation import INSTRUCTION, JOINT_POSITIONS, Observation

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class PolicyVersion:
    """A version as the fleet names it."""

    version: int
    uri: str
    digest: str


@dataclass(frozen=True, eq=False)
class LoadedPolicy:
    """A version that was checked and warmed up."""

    version: PolicyVersion
    policy: ChunkPolicy
    card: Card


def check_form(wanted: PolicyVersion, allowed: Sequence[str]) -> Path:
    """The directory a version names. allowed: directories below which policies may lie.

    Raises CheckpointRefused for what can be seen without opening anything: a robot must not be made to read just
    any file by whoever may set a parameter.
    """
    if wanted.version < 0:
        raise CheckpointRefused(f"policy.version {wanted.version} is negative")
    if len(wanted.digest) != 64 or not _HEX.issuperset(wanted.digest):
        raise CheckpointRefused("policy.digest is not a SHA-256 of 64 lower-case hex digits")
    parsed = urlparse(wanted.uri)
    if parsed.scheme != "file" or parsed.netloc:
        raise CheckpointRefused(f"policy.uri {wanted.uri!r}: only file:///directory is served")
    path = Path(unquote(parsed.path)).resolve()
    if not any(path.is_relative_to(Path(root).resolve()) for root in allowed):
        raise CheckpointRefused(
            f"policy.uri {wanted.uri!r} is outside of uri_allow ({', '.join(allowed) or 'empty'})"
        )
    return path


def load_policy(
    wanted: PolicyVersion,
    allowed: Sequence[str],
    embodiment: Embodiment,
    policy_step_hz: float,
    device: str = "cpu",
) -> LoadedPolicy:
    """Check, load and warm up a version: the first inference is slow and must not be the first of an episode.

    policy_step_hz: rate at which the robot plays the actions of a chunk. Raises CheckpointRefused.
    """
    path = check_form(wanted, allowed)
    policy, card = checkpoint.load(path, wanted.digest, device)
    checkpoint.verify_against(card, embodiment)
    step_s = card.action_spec.step_s
    if not abs(step_s * policy_step_hz - 1.0) < 1e-6:  # or the arbiter would refuse every single chunk
        raise CheckpointRefused(
            f"{path}: made for steps of {step_s:g} s, the robot's are {1 / policy_step_hz:g} s"
        )
    chunk_policy = ChunkPolicy(policy)
    chunk_policy.begin_episode()
    chunk = chunk_policy.chunk([[_resting(card, embodiment)] * card.observation_spec.history])[0]
    if not np.isfinite(chunk.positions).all():
        raise CheckpointRefused(
            f"{path}: the policy answers a robot at rest with numbers that are not finite"
        )
    return LoadedPolicy(wanted, chunk_policy, card)


class PolicySlot:
    """Desired, active and refused version of one robot."""

    def __init__(self) -> None:
        self.desired: PolicyVersion | None = None
        self.active: LoadedPolicy | None = None
        self.refused: tuple[PolicyVersion, str] | None = None
        self._ready: LoadedPolicy | None = None
        self._loading: set[PolicyVersion] = set()

    def want(self, version: PolicyVersion) -> bool:
        """Note the desired version; returns whether it has to be loaded (then call `loaded` or `refuse`)."""
        self.desired = version
        if self._ready is not None and self._ready.version != version:
            self._ready = None
        there = [one.version for one in (self.active, self._ready) if one is not None]
        if version in there or version in self._loading:
            return False
        self._loading.add(version)
        return True

    def loaded(self, policy: LoadedPolicy) -> None:
        """A version is ready; one that is no longer desired is dropped."""
        self._loading.discard(policy.version)
        if self.refused is not None and self.refused[0] == policy.version:
            self.refused = None  # it could not be used before; whoever reads that now would give it up
        if policy.version == self.desired:
            self._ready = policy

    def refuse(self, version: PolicyVersion, reason: str) -> None:
        """A version cannot be used."""
        self._loading.discard(version)
        self.refused = (version, reason)

    def swap(self, between_episodes: bool) -> bool:
        """Let the version that is ready take over, if it may now; returns whether it did."""
        if self._ready is None or not (between_episodes or self.active is None):
            return False
        self.active, self._ready = self._ready, None
        return True


def _resting(card: Card, embodiment: Embodiment) -> Observation:
    """An observation of the robot at home, before black cameras, told nothing."""
    values = {
        stream.name: ""
        if stream.kind == "text"
        else embodiment.home
        if stream.kind in ("joints", "command")
        else np.zeros(stream.shape, np.uint8 if stream.kind == "image" else np.float32)
        for stream in card.observation_spec.streams
    }
    values.setdefault(JOINT_POSITIONS, embodiment.home)
    values.setdefault(INSTRUCTION, "")
    return Observation(0, values, {})
