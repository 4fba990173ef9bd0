# SPDX-License-Identifier: Apache-2.0
"""Where payloads lie: content-addressed blobs, and manifests that name them.

A blob's key is the digest of its content, so writing it twice is harmless and reading it can be checked. A
manifest is written after all its blobs: whoever finds a manifest finds everything it names. Neither commits
anything; that is the catalog's part, which does not depend on what a store promises about conditional writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from lwd_fleet.data.files import sha256_of, sync_directory, write_atomically
from lwd_fleet.data.summary import EpisodeSummary

_HEX = frozenset("0123456789abcdef")


class BlobMissing(Exception):
    """The store has no such blob or manifest."""


class BlobDamaged(Exception):
    """What the store returned is not what its digest says."""


@dataclass(frozen=True)
class Manifest:
    """What an episode consists of: its summary, as canonical JSON, and the digest of that text."""

    summary: EpisodeSummary

    @property
    def content(self) -> bytes:
        """Canonical JSON: equal episodes have equal bytes."""
        return json.dumps(self.summary.to_json(), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of `content`, hex."""
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def from_content(cls, content: bytes) -> Manifest:
        """Inverse of `content`. Raises `ValueError`."""
        return cls(EpisodeSummary.from_json(json.loads(content)))


class BlobStore(Protocol):
    """What a store has to do. Digests are SHA-256 in hex; every method may raise `OSError`."""

    def put(self, source: Path, digest: str) -> None:
        """Store a file under its digest, durably. Raises `BlobDamaged` if the content is another."""

    def get(self, digest: str, target: Path) -> None:
        """Write a blob to a new file, checked. Raises `BlobMissing`, `BlobDamaged`."""

    def size(self, digest: str) -> int | None:
        """Size in bytes, or None if there is no such blob."""

    def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest, after its blobs. Raises `BlobMissing` naming a blob that is not there."""

    def manifest(self, episode_id: str, digest: str) -> Manifest:
        """Read a manifest, checked. Raises `BlobMissing`, `BlobDamaged`."""

    def manifests(self) -> Iterator[tuple[str, str]]:
        """All (episode id, manifest digest) in the store."""


class LocalStore:
    """A store in a directory, for one machine or a shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._blobs = self.root / "blobs" / "sha256"
        self._manifests = self.root / "manifests"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._manifests.mkdir(parents=True, exist_ok=True)

    def put(self, source: Path, digest: str) -> None:
        target = self._blob(digest)
        if target.exists():
            return
        temporary = self._blobs / f".{digest}.{os.getpid()}.tmp"
        with source.open("rb") as content, temporary.open("wb") as stream:
            shutil.copyfileobj(content, stream, 1 << 20)
            stream.flush()
            os.fsync(stream.fileno())
        if (found := sha256_of(temporary)) != digest:
            temporary.unlink()
            raise BlobDamaged(f"{source} has digest {found[:12]}, not {digest[:12]}")
        temporary.rename(target)
        sync_directory(self._blobs)

    def get(self, digest: str, target: Path) -> None:
        blob = self._blob(digest)
        if not blob.exists():
            raise BlobMissing(f"no blob {digest[:12]} in {self.root}")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(blob, temporary)
        if (found := sha256_of(temporary)) != digest:
            temporary.unlink()
            raise BlobDamaged(f"blob {digest[:12]} in {self.root} has digest {found[:12]}")
        temporary.rename(target)

    def size(self, digest: str) -> int | None:
        blob = self._blob(digest)
        return blob.stat().st_size if blob.exists() else None

    def put_manifest(self, manifest: Manifest) -> None:
        for file in manifest.summary.files:
            if self.size(file.sha256) != file.size:
                raise BlobMissing(
                    f"{manifest.summary.episode_id}: {file.name} is not completely in {self.root}"
                )
        folder = self._manifests / manifest.summary.episode_id
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            sync_directory(self._manifests)
        write_atomically(folder / f"{manifest.digest}.json", manifest.content)

    def manifest(self, episode_id: str, digest: str) -> Manifest:
        path = self._manifests / episode_id / f"{digest}.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise BlobMissing(f"no manifest {digest[:12]} of {episode_id} in {self.root}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise BlobDamaged(f"manifest {digest[:12]} of {episode_id} in {self.root} is damaged")
        return Manifest.from_content(content)

    def manifests(self) -> Iterator[tuple[str, str]]:
        for path in sorted(self._manifests.glob("*/*.json")):
            if not path.name.startswith("."):
                yield path.parent.name, path.stem

    def _blob(self, digest: str) -> Path:
        if len(digest) != 64 or not _HEX.issuperset(digest):
            raise ValueError(f"not a SHA-256 in hex: {digest!r}")
        return self._blobs / digest


def open_store(uri: str) -> BlobStore:
    """The store at a path or `file://` URI. Raises `ValueError` for anything else."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file") or parsed.netloc:
        raise ValueError(f"store {uri!r}: only a directory or file:///directory is served")
    return LocalStore(Path(unquote(parsed.path)))
