# SPDX-License-Identifier: Apache-2.0
"""Writing that survives a power cut: content reaches the disk before its name does."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BLOCK = 1 << 20


def write_atomically(path: Path, content: bytes) -> None:
    """Create or replace `path` so that a reader sees the old content or the new, after a crash too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names within a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory, and what lacks above it, with durable names; nothing if it is there."""
    if not path.is_dir():
        make_directory(path.absolute().parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.absolute().parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
