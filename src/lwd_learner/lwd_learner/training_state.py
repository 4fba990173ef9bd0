# SPDX-License-Identifier: Apache-2.0
"""Saved training states: directories of tensors and numbers that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwd_fleet.data.files import make_directory

_TENSORS, _RECORD = "state.safetensors", "state.json"
_NAME = re.compile(r"step_(\d+)(?:\.(\d+))?")  # of the second and later states of one step, with their number


class ResumeRefused(Exception):
    """A saved state is missing, damaged or made by another configuration; the text says which and where."""


def save_state(
    parent: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any], keep: int = 2
) -> Path:
    """Write `parent/step_<step>` by rename, synced, and drop all but the newest `keep`. Returns the directory.

    A state that is there is never replaced, but joined by another one of the same step and dropped in its turn: at
    no moment is there less than before. One process writes to `parent`.
    """
    make_directory(parent)
    for left in parent.glob(".*.partial"):  # of a run that was killed here
        shutil.rmtree(left)
    taken = [number for at, number in map(_order, saved_states(parent)) if at == step]
    final = parent / (f"step_{step:09d}.{max(taken) + 1}" if taken else f"step_{step:09d}")
    partial = parent / f".{final.name}.partial"
    partial.mkdir()
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        partial / _TENSORS,
    )
    (partial / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
    for path in (partial / _TENSORS, partial / _RECORD, partial):
        _sync(path)
    partial.rename(final)
    _sync(parent)
    for old in saved_states(parent)[:-keep]:
        shutil.rmtree(old.rename(parent / f".{old.name}.partial"))  # half a state must not look like one
    return final


def saved_states(parent: Path) -> list[Path]:
    """Complete states, oldest first."""
    found = parent.iterdir() if parent.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_order)


def _order(path: Path) -> tuple[int, int]:
    """Step, and number among the states of this step."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


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
