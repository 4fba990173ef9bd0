# SPDX-License-Identifier: Apache-2.0
"""Saved training states: directories of tensors and numbers that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _RECORD = "state.safetensors", "state.json"
_PREFIX = "step_"


class ResumeRefused(Exception):
    """A saved state is missing, damaged or made by another configuration; the text says which and where."""


def save_state(
    parent: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any], keep: int = 2
) -> Path:
    """Write `parent/step_<step>` by rename, synced, and drop all but the newest `keep`. Returns the directory."""
    parent.mkdir(parents=True, exist_ok=True)
    final, partial = parent / f"{_PREFIX}{step:09d}", parent / f".{_PREFIX}{step:09d}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    partial.mkdir()
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        partial / _TENSORS,
    )
    (partial / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
    for path in (partial / _TENSORS, partial / _RECORD, partial):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(parent)
    for old in saved_states(parent)[:-keep]:
        shutil.rmtree(old)
    return final


def saved_states(parent: Path) -> list[Path]:
    """Complete states, oldest first."""
    return sorted(parent.glob(f"{_PREFIX}*")) if parent.is_dir() else []


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and record of one state. Raises ResumeRefused."""
    try:
        record = json.loads((path / _RECORD).read_text())
        return load_file(path / _TENSORS), record
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeRefused(f"{path}: not a readable training state ({error})") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
