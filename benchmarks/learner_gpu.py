# SPDX-License-Identifier: Apache-2.0
"""Seconds of one QAM update on a CUDA machine: the update of learner.py at growing batches, eager, compiled, in graphs.

    scripts/run python benchmarks/learner_gpu.py [--graphs]

Writes benchmarks/results/learner_gpu.json. --graphs: also torch.compile's "reduce-overhead", which replays each network
as a CUDA graph.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time

import results_file
import torch
from published_update import (
    COMPILED,
    EAGER,
    SIZES,
    PublishedUpdate,
    Size,
    StateBatch,
    Variant,
    gradient_errors,
    seconds_per_update,
)

BATCHES = (256, 512, 1024, 2048, 4096, 8192)
WARM_UP = 5  # updates; the first ones compile


def measure(
    size: Size, variant: Variant, rows: int, device: torch.device, updates: int, mode: str | None = None
) -> float:
    """Wall seconds of one update with a batch of `rows`, after a warm-up."""
    update, batch = PublishedUpdate(size, variant, device, mode), StateBatch.random(rows, device)
    seconds_per_update(lambda: update(batch), WARM_UP, device)
    return seconds_per_update(lambda: update(batch), updates, device)[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", action="store_true", help="also torch.compile(mode='reduce-overhead')")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: benchmarks/learner.py measures the same update on a CPU", file=sys.stderr)
        return 1
    began, device = time.monotonic(), torch.device("cuda")
    modes: list[tuple[Variant, str | None, str]] = [(v, None, v.name) for v in EAGER + COMPILED]
    if options.graphs:
        modes += [(v, "reduce-overhead", f"{v.name}_graphs") for v in COMPILED]
    metrics: dict[str, float] = {}
    for size in SIZES:
        for variant, mode, name in modes:
            for rows in BATCHES:
                torch._dynamo.reset()  # one compilation per batch size, as in training: no dynamic shapes
                seconds = measure(size, variant, rows, device, 50, mode)
                metrics[f"update_s_{size.name}_{name}_b{rows}"] = seconds
                print(f"{size.name} {name} batch {rows}: {seconds * 1e3:.2f} ms", flush=True)
    for kind, error in gradient_errors(SIZES[1], 256, device).items():
        metrics[f"gradient_error_{kind}"] = error
    machine = f"{torch.cuda.get_device_name()}, {platform.machine()}"
    given = "--graphs" if options.graphs else ""
    results_file.write("learner_gpu", metrics, began, options=given, machine=machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
