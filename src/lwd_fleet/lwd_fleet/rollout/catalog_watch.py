# SPDX-License-Identifier: Apache-2.0
"""Looks at the catalog in a thread of its own: a database that hangs must not stop the fleet."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.rollout.coordinator import Desired


@dataclass(frozen=True)
class CatalogView:
    """The catalog as last seen. `looks` counts the answers, `error` says why there is none since."""

    desired: Desired | None = None
    committed: int = 0
    looks: int = 0
    error: str = ""


class CatalogWatch:
    """`view` is the newest answer. The thread dies with the process: a call of it may never end."""

    def __init__(self, url: str, period_s: float = 1.0) -> None:
        self._url, self._period_s = url, period_s
        self.view = CatalogView()  # replaced as a whole, so that no reader sees half of it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catalog watch", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop looking; waits at most `timeout_s`."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        catalog: Catalog | None = None
        while not self._stop.is_set():
            view = self.view
            try:
                catalog = catalog or Catalog(self._url)
                row = catalog.desired_policy()
                desired = None if row is None else Desired(row.version, row.uri, row.digest)
                self.view = CatalogView(desired, catalog.snapshot()[0], view.looks + 1)
            except (SQLAlchemyError, OSError) as error:
                self.view = CatalogView(
                    view.desired, view.committed, view.looks, f"{type(error).__name__}: {error}"
                )
            self._stop.wait(self._period_s)
        if catalog is not None:
            catalog.close()
