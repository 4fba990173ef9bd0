# SPDX-License-Identifier: Apache-2.0
"""Uploads the robot's sealed episodes in a thread; what and how is in `uploader.py`."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from lwd_msgs.msg import SealedEpisode
from sqlalchemy.exc import SQLAlchemyError

from lwd_fleet.data.catalog import Catalog, EpisodeConflict
from lwd_fleet.data.episode import EpisodeRejected
from lwd_fleet.data.store import BlobDamaged, BlobMissing, open_store
from lwd_fleet.data.uploader import Uploader
from lwd_policy.managed_node import OK, WARN, Check, ConfigurationError, ManagedNode, parameter, run_node
from lwd_policy.qos import LATCHED


@dataclass(frozen=True)
class UploaderParameters:
    """Parameters of the uploader node."""

    spool: str = parameter("", "directory of this robot's recordings")
    store: str = parameter("", "directory or file:// URI of the store")
    catalog: str = parameter("", "path of an SQLite file or SQLAlchemy URL of the catalog")
    delete_committed: bool = parameter(False, "delete a local recording once the catalog has committed it")
    scan_s: float = parameter(
        10.0, "the spool is scanned at least this often", unit="s", low=0.1, high=3600.0
    )


class UploaderNode(ManagedNode):
    """Scans the spool at start, after every `recorder/sealed` and now and then; reports by diagnostics."""

    parameters_type = UploaderParameters

    def __init__(self) -> None:
        super().__init__("uploader")
        self._uploader: Uploader | None = None
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._committed = 0

    def configure(self) -> None:
        options: UploaderParameters = self.parameters
        if not (options.spool and options.store and options.catalog):
            raise ConfigurationError("parameters spool, store and catalog have to be given")
        try:
            self._catalog = Catalog(options.catalog)
            store = open_store(options.store)
            self._uploader = Uploader(Path(options.spool), store, self._catalog, options.delete_committed)
        except (ValueError, OSError, SQLAlchemyError) as error:
            raise ConfigurationError(f"spool, store or catalog: {error}") from error
        self._sealed = self.create_subscription(
            SealedEpisode, "recorder/sealed", lambda message: self._wake.set(), LATCHED
        )

    def activate(self) -> None:
        self._ending.clear()
        self._thread = threading.Thread(target=self._work, name="upload")
        self._thread.start()

    def deactivate(self) -> None:
        """An upload in progress is broken off at the next episode; whatever is half done is resumed."""
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def cleanup(self) -> None:
        if self._uploader is not None:
            self._uploader = None
            self.destroy_subscription(self._sealed)
            self._catalog.close()

    def diagnose(self) -> list[Check]:
        if self._uploader is None:
            return []
        backlog = self._uploader.backlog()
        values = {
            "backlog_episodes": backlog.episodes,
            "backlog_bytes": backlog.size_bytes,
            "oldest_unix_s": backlog.oldest_s or 0.0,
            "committed": self._committed,
        }
        return [Check("upload", WARN if self._problem else OK, self._problem or "up to date", values)]

    def _work(self) -> None:
        uploader = self._uploader
        assert uploader is not None
        uploader.tidy()
        while not self._ending.is_set():
            self._wake.clear()
            for path in uploader.pending():
                if self._ending.is_set():
                    return
                self._upload(uploader, path)
            self._wake.wait(self.parameters.scan_s)

    def _upload(self, uploader: Uploader, path: Path) -> None:
        try:
            receipt = uploader.upload(path)
        except (EpisodeRejected, EpisodeConflict) as error:
            self._problem = str(error)
            self.get_logger().error(f"set aside: {error}")
        except (OSError, SQLAlchemyError, BlobDamaged, BlobMissing) as error:
            self._problem = f"{path.name} waits: {error}"
            self.get_logger().warning(self._problem)
        else:
            self._problem = ""
            self._committed += 1
            self.get_logger().info(f"committed {receipt.episode_id} as {receipt.seq}")


def main(args: list[str] | None = None) -> int:
    return run_node(UploaderNode, args)


if __name__ == "__main__":
    sys.exit(main())
