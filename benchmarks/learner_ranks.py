# SPDX-License-Identifier: Apache-2.0
"""Seconds of one learner step on two ranks of this machine, beside those of one process.

    scripts/run python benchmarks/learner_ranks.py [--quick]

Writes benchmarks/results/learner_ranks.json. The networks are those of the demonstration, one thread per process. A step
takes 256 rows: `update_s_alone_256` by one process, `update_s_ddp` and `update_s_fsdp` by two ranks with 128 each.
`update_s_alone_128` is what a rank would take if agreeing cost nothing, so `overhead_s_*` is what agreeing costs. The
fastest step of each counts: others run on the machine as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results_file
import torch

from lwd_learner.batch import Batch
from lwd_learner.distributed import joined
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_policy.flow_expert import FlowExpert

CONTEXT, HORIZON, ACTION = 274, 10, 14  # of the demonstration
WARM_UP = 3


def random_batch(rows: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    integers = torch.ones(rows, dtype=torch.int64)
    return Batch(
        context=torch.randn(rows, CONTEXT, generator=g),
        action=torch.randn(rows, HORIZON, ACTION, generator=g).clamp(-1, 1),
        mask=torch.arange(HORIZON).expand(rows, -1) < 5,
        valid=torch.ones(rows, HORIZON, dtype=torch.bool),
        reward=torch.rand(rows, generator=g).round(),
        discount=torch.full((rows,), 0.985),
        next_context=torch.randn(rows, CONTEXT, generator=g),
        online=torch.zeros(rows, dtype=torch.bool),
        author=integers,
        outcome=integers,
        policy_version=integers,
        task=integers,
        row=integers,
    )


def measure(out: Path, strategy: str, rows: int, steps: int) -> None:
    """One rank's part: the fastest step to `out`, by the first rank."""
    torch.set_num_threads(1)
    with joined("fsdp" if strategy == "fsdp" else "ddp") as ranks:
        torch.manual_seed(0)
        expert = FlowExpert(CONTEXT, HORIZON, ACTION)
        trainer = Trainer(expert, CONTEXT, HORIZON, ACTION, TrainerConfig(batch=rows), ranks=ranks)
        trainer.freeze_reference()
        batch = random_batch(ranks.share(rows), ranks.index)
        times = []
        for _ in range(WARM_UP + steps):
            ranks.wait()
            began = time.perf_counter()
            trainer.learn(batch)
            times.append(time.perf_counter() - began)
        if ranks.first:
            out.write_text(json.dumps(min(times[WARM_UP:])))


def run(strategy: str, rows: int, steps: int) -> float:
    """`measure` in a process of its own, or on two ranks."""
    launcher = (
        [] if strategy == "alone" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    )
    with tempfile.TemporaryDirectory(prefix="lwd-") as name:
        out = Path(name) / "seconds.json"
        command = [sys.executable, *launcher, __file__, "--rank", str(out), strategy, str(rows), str(steps)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return float(json.loads(out.read_text()))


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        out, strategy, rows, steps = sys.argv[2:]
        measure(Path(out), strategy, int(rows), int(steps))
        return
    began = time.monotonic()
    quick = "--quick" in sys.argv
    steps = 3 if quick else 30
    metrics = {
        "update_s_alone_256": run("alone", 256, steps),
        "update_s_alone_128": run("alone", 128, steps),
        "update_s_ddp": run("ddp", 256, steps),
        "update_s_fsdp": run("fsdp", 256, steps),
    }
    for strategy in ("ddp", "fsdp"):
        metrics[f"overhead_s_{strategy}"] = metrics[f"update_s_{strategy}"] - metrics["update_s_alone_128"]
    print(json.dumps(metrics, indent=1))
    if not quick:
        results_file.write("learner_ranks", metrics, began)


if __name__ == "__main__":
    main()
