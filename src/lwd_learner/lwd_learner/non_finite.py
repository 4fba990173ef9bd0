# SPDX-License-Identifier: Apache-2.0
"""What is kept of a step whose loss was no number, so that a person can find out why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lwd_learner.batch import Batch


def save_evidence(
    folder: Path, step: int, batch: Batch, episodes: Sequence[str], record: Mapping[str, Any]
) -> Path:
    """Write the batch (`batch.safetensors`), and `record.json`: what is said of the step, the episode of each row, and
    which rows hold what is no number. The same step, taken again by a resumed run, is written over. Returns its folder."""
    path = folder / f"step_{step}"
    path.mkdir(parents=True, exist_ok=True)
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in found.items() if value is not None}
    save_file(tensors, path / "batch.safetensors")
    content = {"step": step, **record, "episodes": list(episodes), "non_finite_rows": _spoiled(tensors)}
    (path / "record.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _spoiled(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """By field, the places in the batch that are not finite."""
    found = {
        name: torch.nonzero(~torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)).flatten().tolist()
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point()
    }
    return {name: rows for name, rows in found.items() if rows}
