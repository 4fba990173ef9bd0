# SPDX-License-Identifier: Apache-2.0
"""`python -m lwd_learner.importers lerobot|bags ...`: import from the command line. See docs/import.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lwd_learner.importers.command import NOTHING_IMPORTED, from_bags, from_lerobot, quarantine_of
from lwd_learner.importers.write import ImportResult


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything came in; 1: something was refused, each with its reason; 2: nothing could be tried."""
    options = _parser().parse_args(arguments)
    quarantine = options.quarantine or quarantine_of(options.out)
    try:
        if options.kind == "lerobot":
            results = from_lerobot(
                options.source, options.out, _say, options.robot, options.episodes, quarantine
            )
        else:
            results = from_bags(options.source, options.mapping, options.out, _say, quarantine)
    except NOTHING_IMPORTED as error:
        print(f"nothing imported: {error}", file=sys.stderr)
        return 2
    refused = sum(not result.imported for result in results)
    print(f"{len(results) - refused} of {len(results)} imported into {options.out}")
    if refused:
        print(f"{refused} refused, see {quarantine}")
    return 1 if refused else 0


def _say(result: ImportResult, done: int, total: int) -> None:
    print(f"[{done}/{total}] {result}", flush=True)
    for note in result.notes:
        print(f"    note: {note}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lwd_learner.importers", description="Recordings to lwd episodes."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    lerobot = kinds.add_parser("lerobot", help="a LeRobot dataset, v2.0 to v3.0")
    lerobot.add_argument("source", type=Path, help="its directory, or one that contains it")
    lerobot.add_argument("--robot", help="name of the robot; default: the dataset's robot type")
    lerobot.add_argument(
        "--episodes", type=int, nargs="+", help="only these; default: all that `meta/` describes"
    )
    bags = kinds.add_parser("bags", help="rosbag2 recordings, MCAP or SQLite")
    bags.add_argument("source", type=Path, nargs="+", help="bags, or directories that contain them")
    bags.add_argument("--mapping", type=Path, required=True, help="YAML, see config/mappings/")
    for kind in (lerobot, bags):
        kind.add_argument("--out", type=Path, required=True, help="directory of the episodes")
        kind.add_argument(
            "--quarantine", type=Path, help="where refusals are noted; default: <out>/quarantine"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
