# SPDX-License-Identifier: Apache-2.0
"""A policy version on disk: an immutable directory named by its digest, with weights and a card.

    <digest>/weights.safetensors    every tensor of the policy
    <digest>/card.json              how to rebuild it, what it expects, where it came from

The digest is the SHA-256 of the card's canonical JSON followed by the weights' SHA-256. Nothing in here is executed:
tensors are safetensors, the card is JSON, and both are checked before a tensor is looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lwd_policy.action import ActionSpec
from lwd_policy.action_head import HeadSpec, head_from_json, head_to_json
from lwd_policy.embodiment import Embodiment
from lwd_policy.flow_expert import PRESETS
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import ObservationSpec
from lwd_policy.trunk import TrunkConfig, build_trunk

# 1: acts by its flow alone; 2: by the head that `head` describes; 3: from noise that is multiplied with `acting_noise`, with or
# without a head. Each is written with the lowest number that says all: older programs can read it, and its digest is what
# it was.
FORMAT_VERSIONS = (1, 2, 3)
WEIGHTS, CARD = "weights.safetensors", "card.json"
MAX_WEIGHTS_BYTES = 4 * 2**30
MAX_CARD_BYTES = 16 * 2**20


class CheckpointRefused(Exception):
    """A checkpoint is damaged, foreign or does not fit; the text says which, for a person."""


@dataclass(frozen=True)
class Card:
    """What is known of a policy version without loading its tensors."""

    digest: str
    observation_spec: ObservationSpec
    action_spec: ActionSpec
    trunk: TrunkConfig
    expert_size: str
    value_head: bool
    head: HeadSpec | None = None
    acting_noise: float = 1.0
    origin: Mapping[str, Any] = field(default_factory=dict)  # parent, snapshot, metrics, licence, ...


def save(
    folder: Path, policy: FlowPolicy, origin: Mapping[str, Any] | None = None, half: bool = False
) -> Path:
    """Write `<folder>/<digest>` atomically and return it; an equal one that exists is left as it is.

    half: in half precision, to be handed on: half as large, loaded as float32, and no longer the very same policy.
    Raises ValueError for weights that half precision cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format_version": 1,
        "observation": json.loads(policy.observation_spec.to_json()),
        "action": json.loads(policy.action_spec.to_json()),
        "trunk": policy.trunk.config.to_json(),
        "expert_size": policy.expert_size,
        "value_head": policy.value is not None,
        "origin": {"licence": "Apache-2.0", **(origin or {})},
    }
    if policy.head_spec is not None:
        content |= {"format_version": 2, "head": head_to_json(policy.head_spec)}
    if policy.acting_noise != 1.0:
        content |= {"format_version": 3, "acting_noise": policy.acting_noise}
    working = folder / f".{uuid.uuid4().hex}.tmp"
    working.mkdir()
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
        if half:
            tensors = {name: _halved(name, tensor) for name, tensor in tensors.items()}
        save_file(tensors, working / WEIGHTS)
        card = _canonical(content)
        (working / CARD).write_bytes(card)
        target = folder / _digest(card, working / WEIGHTS)
        for file in (working / WEIGHTS, working / CARD, working):
            _sync(file)
        if not target.exists():
            working.rename(target)
            _sync(folder)
    finally:
        if working.exists():
            shutil.rmtree(working)
    return target


def holds(path: Path, policy: FlowPolicy) -> bool:
    """Whether the checkpoint is this very policy, whatever its origin. False for one that is damaged or not there."""
    try:
        origin = read_card(path).origin
    except CheckpointRefused:
        return False
    with tempfile.TemporaryDirectory(prefix="lwd-") as folder:
        return save(Path(folder), policy, origin).name == path.name


def read_card(path: Path, expected_digest: str | None = None) -> Card:
    """Check a checkpoint's files against its digest and read the card. Raises CheckpointRefused."""
    card_file, weights_file = path / CARD, path / WEIGHTS
    for file, limit in ((card_file, MAX_CARD_BYTES), (weights_file, MAX_WEIGHTS_BYTES)):
        if not file.is_file():
            raise CheckpointRefused(f"{path}: {file.name} is missing")
        if file.stat().st_size > limit:
            raise CheckpointRefused(f"{path}: {file.name} has {file.stat().st_size} bytes, more than {limit}")
    try:
        card = card_file.read_bytes()
        digest = _digest(card, weights_file)
    except OSError as error:
        raise CheckpointRefused(f"{path}: cannot be read: {error}") from error
    if digest != (expected_digest or path.name):
        raise CheckpointRefused(
            f"{path}: the files have digest {digest[:12]}, expected {(expected_digest or path.name)[:12]}; "
            "the checkpoint is damaged or another one"
        )
    try:
        content = json.loads(card)
        version = content["format_version"]
        if version not in FORMAT_VERSIONS:
            raise CheckpointRefused(
                f"{path}: card format {version}; this program reads {', '.join(map(str, FORMAT_VERSIONS))}"
            )
        if content["expert_size"] not in PRESETS:
            raise CheckpointRefused(f"{path}: unknown expert size {content['expert_size']!r}")
        return Card(
            digest=digest,
            observation_spec=ObservationSpec.from_json(json.dumps(content["observation"])),
            action_spec=ActionSpec.from_json(json.dumps(content["action"])),
            trunk=TrunkConfig.from_json(content["trunk"]),
            expert_size=content["expert_size"],
            value_head=bool(content.get("value_head", False)),
            head=head_from_json(content["head"]) if version == 2 or "head" in content else None,
            acting_noise=float(content["acting_noise"]) if version == 3 else 1.0,
            origin=content["origin"],
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointRefused(f"{path}: the card cannot be used: {error}") from error


def load(
    path: Path, expected_digest: str | None = None, device: str | torch.device = "cpu"
) -> tuple[FlowPolicy, Card]:
    """Check, rebuild and fill a policy. Raises CheckpointRefused."""
    card = read_card(path, expected_digest)
    try:
        with torch.device("meta"):  # nothing is allocated that the file does not hold
            wanted = _rebuild(card).state_dict()
        _compare(path, wanted)
        policy = _rebuild(card)
        tensors = load_file(path / WEIGHTS, device=str(device))
    except (ValueError, IndexError, RuntimeError, SafetensorError, OSError) as error:
        raise CheckpointRefused(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and wanted[name].dtype == torch.float32:
            tensors[name] = tensor = tensor.float()
        if tensor.dtype != wanted[name].dtype:
            raise CheckpointRefused(f"{path}: {name} is {tensor.dtype}, expected {wanted[name].dtype}")
        if not torch.isfinite(tensor).all():
            raise CheckpointRefused(f"{path}: {name} has a number that is not finite")
    policy.load_state_dict(tensors)
    return policy.to(device).eval(), card


def verify_against(
    card: Card, embodiment: Embodiment, observation_spec: ObservationSpec | None = None
) -> None:
    """Refuse a policy made for another body: joint order, limits and kinematics must be the robot's own, and where
    it is given what the robot publishes, the streams too.

    A policy for other limits or a shifted tool would run and be subtly wrong. Raises CheckpointRefused.
    """
    own, its = embodiment, card.action_spec.embodiment
    if its.joint_names != own.joint_names:
        raise CheckpointRefused(
            f"made for joints {list(its.joint_names)}, the robot has {list(own.joint_names)}"
        )
    if not (np.array_equal(its.lower, own.lower) and np.array_equal(its.upper, own.upper)):
        raise CheckpointRefused(f"made for other joint limits than those of {own.name}")
    if its.to_json() != own.to_json():
        raise CheckpointRefused(f"made for another description of {its.name}: kinematics or home differ")
    there = {} if observation_spec is None else {stream.name: stream for stream in observation_spec.streams}
    for stream in card.observation_spec.streams:
        known = there.get(stream.name)
        if observation_spec is None or (known is None and not stream.required):
            continue
        if known is None:
            raise CheckpointRefused(f"needs the stream {stream.name}, the robot has {', '.join(there)}")
        for what in ("topic", "kind", "shape"):
            if getattr(stream, what) != getattr(known, what):
                raise CheckpointRefused(
                    f"made for {stream.name} with {what} {getattr(stream, what)}, the robot's is {getattr(known, what)}"
                )


def _rebuild(card: Card) -> FlowPolicy:
    trunk = build_trunk(card.trunk, card.action_spec.embodiment)
    return FlowPolicy(
        trunk,
        card.observation_spec,
        card.action_spec,
        card.expert_size,
        card.value_head,
        card.head,
        card.acting_noise,
    )


def _compare(path: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    """Names and shapes of the file's tensors, without reading the tensors. Raises CheckpointRefused."""
    with safe_open(path / WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    if wanted.keys() != shapes.keys():
        difference = ", ".join(sorted(wanted.keys() ^ shapes.keys())[:5])
        raise CheckpointRefused(f"{path}: tensors missing or unknown: {difference}")
    for name, shape in shapes.items():
        if shape != tuple(wanted[name].shape):
            raise CheckpointRefused(f"{path}: {name} has shape {shape}, expected {tuple(wanted[name].shape)}")


def _halved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """In half precision, if it is of floating point."""
    if not tensor.is_floating_point():
        return tensor
    halved = tensor.half()
    if not torch.equal(halved.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} has a number too large for half precision; save it in full")
    return halved


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(card: bytes, weights: Path) -> str:
    digest = hashlib.sha256()
    with weights.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return hashlib.sha256(card + digest.hexdigest().encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
