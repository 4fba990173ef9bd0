# SPDX-License-Identifier: Apache-2.0
"""A pretrained trunk on disk: half-precision tensors and a card that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lwd_policy.trunk import Trunk

WEIGHTS, CARD = "trunk.safetensors", "trunk.json"


class TrunkRefused(Exception):
    """A trunk file is damaged or made for another trunk; the text says which."""


def save_trunk(folder: Path, trunk: Trunk, origin: Mapping[str, Any]) -> None:
    """Write `trunk.safetensors` (float16) and `trunk.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.detach().cpu().half().contiguous() for name, tensor in trunk.state_dict().items()}
    save_file(half, folder / WEIGHTS)
    card = {"trunk": trunk.config.to_json(), "licence": "Apache-2.0", **origin}
    (folder / CARD).write_text(json.dumps(card, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_trunk(folder: Path, trunk: Trunk) -> dict[str, Any]:
    """Fill `trunk` with the weights it shares with the file; returns the card. Raises TrunkRefused.

    A trunk of another kind takes over what it has in common (the understanding of instructions); a trunk of the
    same kind has to find every tensor.
    """
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrunkRefused(f"{folder}: {error}") from error
    own = trunk.state_dict()
    if card["trunk"]["kind"] == trunk.config.kind and own.keys() != tensors.keys():
        raise TrunkRefused(f"{folder}: tensors differ: {sorted(own.keys() ^ tensors.keys())[:5]}")
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape or not torch.isfinite(tensors[name]).all():
            raise TrunkRefused(f"{folder}: {name} has shape {tuple(tensors[name].shape)} or is not finite")
    trunk.load_state_dict({name: tensors[name].float() for name in own.keys() & tensors.keys()}, strict=False)
    return card
