# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: results/<name>.json with its numbers, and where and how they were measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write(
    name: str,
    metrics: Mapping[str, float],
    began: float,
    *,
    options: str = "",
    intervals: Mapping[str, Sequence[float]] | None = None,
    seeds: Sequence[int] = (0,),
    machine: str = "",
) -> None:
    """Write the numbers of benchmarks/<name>.py. began: `time.monotonic()` at its start; options: of its command line;
    machine: in words, by default the number of cores."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False, cwd=ROOT)
    result = {
        "metrics": metrics,
        "intervals": intervals or {},
        "command": f"scripts/run python benchmarks/{name}.py {options}".strip(),
        "commit": commit.stdout.strip(),
        "seeds": list(seeds),
        "wall_s": time.monotonic() - began,
        "machine": machine or f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
    }
    target = ROOT / "benchmarks" / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
