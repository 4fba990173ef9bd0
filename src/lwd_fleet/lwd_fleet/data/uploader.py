# SPDX-License-Identifier: Apache-2.0
"""Sealed directory -> store -> catalog, at least once, with the effect of exactly once.

The spool is the journal: a sealed episode without a receipt still has to be uploaded. A crash anywhere is
therefore resumed by doing it again; blobs are content-addressed, the commit is idempotent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lwd_fleet.data.catalog import Catalog, EpisodeConflict
from lwd_fleet.data.episode import PARTIAL_SUFFIX, EpisodeReader, EpisodeRejected
from lwd_fleet.data.files import write_atomically
from lwd_fleet.data.salvage import QUARANTINE, SALVAGE_SUFFIX, quarantine
from lwd_fleet.data.store import BlobStore, Manifest

RECEIPTS = "receipts"


@dataclass(frozen=True)
class Receipt:
    """The catalog's word that an episode is committed."""

    episode_id: str
    seq: int
    manifest_digest: str


@dataclass(frozen=True)
class Backlog:
    """Sealed episodes still to upload. `oldest_s`: when the oldest was sealed, Unix time; None if none."""

    episodes: int
    size_bytes: int
    oldest_s: float | None


class Uploader:
    """Uploads one spool. `delete_committed` removes the local copy, and only after the catalog's receipt."""

    def __init__(
        self,
        spool: Path,
        store: BlobStore,
        catalog: Catalog,
        delete_committed: bool = False,
        step: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`step` is called with the name of every step that has just become durable."""
        self._spool = spool
        self._receipts = spool / RECEIPTS
        self._receipts.mkdir(parents=True, exist_ok=True)
        self._store = store
        self._catalog = catalog
        self._delete = delete_committed
        self._step = step

    def pending(self) -> list[Path]:
        """Sealed episodes without a receipt, oldest first."""
        return [path for path in self._sealed() if not self._receipt_file(path.name).exists()]

    def backlog(self) -> Backlog:
        """How far behind the uploader is."""
        pending = self.pending()
        size = sum(file.stat().st_size for path in pending for file in path.glob("*.mcap"))
        return Backlog(len(pending), size, pending[0].stat().st_mtime if pending else None)

    def upload(self, path: Path) -> Receipt:
        """Upload and commit one sealed episode; resumes whatever an earlier attempt has done.

        Raises `EpisodeRejected` or `EpisodeConflict` after moving the directory to the spool's quarantine
        and noting it in the catalog; anything else (store or catalog away) leaves it pending.
        """
        try:
            manifest, seq = commit(path, self._store, self._catalog, self._step)
        except (EpisodeRejected, EpisodeConflict) as error:
            moved = quarantine(path, str(error)).quarantined
            self._catalog.quarantine(path.name, str(error), str(moved))
            raise
        self._step("commit")
        receipt = Receipt(manifest.summary.episode_id, seq, manifest.digest)
        content = json.dumps(receipt.__dict__, sort_keys=True) + "\n"
        write_atomically(self._receipt_file(path.name), content.encode())
        self._step("receipt")
        if self._delete:
            shutil.rmtree(path)
        return receipt

    def tidy(self) -> None:
        """Finish deletions that a crash interrupted."""
        if self._delete:
            for path in self._sealed():
                if self._receipt_file(path.name).exists():
                    shutil.rmtree(path)

    def receipt(self, episode_id: str) -> Receipt | None:
        """The receipt of an episode, or None."""
        file = self._receipt_file(episode_id)
        return Receipt(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def _sealed(self) -> list[Path]:
        return sorted(
            path
            for path in self._spool.iterdir()
            if path.is_dir()
            and path.name not in (RECEIPTS, QUARANTINE)
            and not path.name.startswith(".")
            and not path.name.endswith((PARTIAL_SUFFIX, SALVAGE_SUFFIX))
        )

    def _receipt_file(self, episode_id: str) -> Path:
        return self._receipts / f"{episode_id}.json"


def commit(
    path: Path, store: BlobStore, catalog: Catalog, step: Callable[[str], None] = lambda name: None
) -> tuple[Manifest, int]:
    """Check, store and commit one sealed episode, which stays where it is; returns its manifest and sequence number.
    Raises `EpisodeRejected`, `EpisodeConflict`, `BlobDamaged`, `OSError`."""
    manifest = Manifest(EpisodeReader(path).summary)
    for file in manifest.summary.files:
        store.put(path / file.name, file.sha256)
        step("blob")
    store.put_manifest(manifest)
    step("manifest")
    return manifest, catalog.commit_episode(manifest, str(path))
