# SPDX-License-Identifier: Apache-2.0
"""What a command line does to import: find the sources, import them, note what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lwd_learner.importers.lerobot import import_lerobot
from lwd_learner.importers.lerobot_layout import find_dataset
from lwd_learner.importers.mapping import MappingError, load_mapping
from lwd_learner.importers.quarantine import Quarantine
from lwd_learner.importers.rosbag import find_bags, import_bags
from lwd_learner.importers.source import ImportRefused
from lwd_learner.importers.write import ImportResult, Progress

NOTHING_IMPORTED = (ImportRefused, MappingError, OSError)
"""What both functions raise where nothing could be tried."""


def quarantine_of(out: Path) -> Path:
    """Where refusals are noted unless another place is named."""
    return out / "quarantine"


def from_lerobot(
    source: Path,
    out: Path,
    progress: Progress,
    robot: str | None = None,
    episodes: Sequence[int] | None = None,
    quarantine: Path | None = None,
) -> list[ImportResult]:
    """Import the dataset at or below `source`. Raises NOTHING_IMPORTED."""
    refusals = Quarantine(quarantine or quarantine_of(out))
    return import_lerobot(find_dataset(source), out, robot, progress, episodes=episodes, quarantine=refusals)


def from_bags(
    sources: Sequence[Path], mapping: Path, out: Path, progress: Progress, quarantine: Path | None = None
) -> list[ImportResult]:
    """Import the bags at or below `sources`. Raises NOTHING_IMPORTED."""
    bags = [bag for source in sources for bag in find_bags(source)]
    return import_bags(
        bags, load_mapping(mapping), out, Quarantine(quarantine or quarantine_of(out)), progress
    )
