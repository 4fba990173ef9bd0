# SPDX-License-Identifier: Apache-2.0
"""Where refused sources are noted: one JSON file each, saying what, why, and which bytes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lwd_learner.importers.source import IMPORT_VERSION, ImportRefused


class Quarantine:
    """A directory of refusals. Writing one twice changes nothing, so a repeated import leaves one file per
    source."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(self, source: Path, refusal: ImportRefused, part: str = "") -> Path:
        """Note a refusal of `source` (a bag, or the dataset of which `part` names the episode). Returns the
        file."""
        digest = content_digest(source) if not part else ""
        key = hashlib.sha256(f"{source.name} {digest} {part}".encode()).hexdigest()[:12]
        self.directory.mkdir(parents=True, exist_ok=True)
        target = self.directory / f"{source.stem}-{key}.json"
        entry = {
            "reason": refusal.reason.value,
            "detail": refusal.detail,
            "source": str(source.resolve()),
            "part": part,
            "sha256": digest,
            "importer_version": IMPORT_VERSION,
        }
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)
        return target


def content_digest(source: Path) -> str:
    """sha256 over the names and bytes of all files of a source, hex; empty where there is nothing to read."""
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.is_file())
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
