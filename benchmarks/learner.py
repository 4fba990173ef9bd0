# SPDX-License-Identifier: Apache-2.0
"""Seconds of one QAM update with the networks of the published code, beside that code where it is at hand.

    scripts/run python benchmarks/learner.py [--quick] [--cores N] [--peer CHECKOUT --peer-python PYTHON]

Writes benchmarks/results/learner.json. --peer: a checkout of the published code; --peer-python: a Python with its
packages (jax, flax, optax, distrax, ml_collections). Both may be given as LWD_PEER and LWD_PEER_PYTHON. Ours and the
peer are processes that wait for their turn: each round measures all of them one after the other, a ratio is the median
over rounds of what was measured in the same round, and intervals are the quartiles. Everything is measured on one core
and on all, to which both sides are bound.

Names: update_s_SIZE, in float32 as the published code, eager; _compiled: with torch.compile; _default_products: float32
products by torch's default library; _bf16: under autocast; _denoiser: the adjoint that this project takes by default,
from the evaluations of the roll-out; learn_s_SIZE: one step of the trainer, DIVL and QAM with its defaults and the same
networks; _1core: on one core; cpu_: processor time on one core, which other processes disturb least; speedup_: the
peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import results_file
import torch
from published_update import (
    ACTION,
    COMPILED,
    EAGER,
    HORIZON,
    SIZES,
    STATE,
    PublishedUpdate,
    Size,
    StateBatch,
    Step,
    Variant,
    gradient_errors,
    seconds_per_update,
)
from replay import apart, draw, fill

from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.state_networks import StateFlow
from lwd_learner.trainer import Trainer, TrainerConfig

ROWS = 256
CPU = torch.device("cpu")
UPDATES = {"512x4_q10": 3, "256x3_q2": 12}  # of one measurement: about a second


class Worker:
    """A process that times updates on the given cores when it is told to."""

    def __init__(self, command: Sequence[str], cores: Sequence[int]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def time(self, case: str, updates: int) -> tuple[float, float]:
        """Mean wall and processor seconds of one update."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{case} {updates}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._process.args}: ended while measuring {case}")
        wall, processor = map(float, answer.split())
        return wall, processor

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def serve() -> None:
    """The worker of our side: `SIZE/VARIANT UPDATES` on its input, wall and processor seconds on its output."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch._dynamo.config.recompile_limit = (
        64  # of one function; all variants take turns, and past the limit they would run eager
    )
    variants = {variant.name: variant for variant in EAGER + COMPILED}
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        case, updates = line.split()
        if case not in steps:
            name, _, kind = case.partition("/")
            size = next(size for size in SIZES if size.name == name)
            steps[case] = trainer_step(size) if kind == "learn" else published_step(size, variants[kind])
        print(*seconds_per_update(steps[case], int(updates), CPU), flush=True)


def published_step(size: Size, variant: Variant) -> Step:
    """An update of the published agent."""
    update, batch = PublishedUpdate(size, variant, CPU), StateBatch.random(ROWS, CPU)
    return lambda: update(batch)


def trainer_step(size: Size) -> Step:
    """A step of this project's trainer: DIVL and QAM with their defaults."""
    config = TrainerConfig(
        critic=CriticConfig(
            heads=size.critics, width=size.width, layers=size.layers, chunk_encoder="flat", hidden="gelu_norm"
        )
    )
    expert = StateFlow(STATE, HORIZON, ACTION, size.width, size.layers)
    trainer = Trainer(expert, STATE, HORIZON, ACTION, config)
    trainer.freeze_reference()
    source = StateBatch.random(ROWS, CPU)
    counts = torch.zeros(ROWS, dtype=torch.int64)
    batch = Batch(
        context=source.state,
        action=source.action,
        mask=source.mask,
        valid=source.mask,
        reward=torch.zeros(ROWS),
        discount=torch.full((ROWS,), 0.98),
        next_context=source.next_state,
        online=torch.zeros(ROWS, dtype=torch.bool),
        author=counts,
        outcome=counts,
        policy_version=counts,
        task=counts,
        row=counts,
    )
    return lambda: trainer.learn(batch)


def measure(
    cores: Sequence[int], rounds: int, peer: Sequence[str] | None
) -> dict[str, list[tuple[float, float]]]:
    """Seconds by SIZE/CASE, one entry per round; the case of the published code is `peer`."""
    kinds = [variant.name for variant in (EAGER if len(cores) == 1 else EAGER + COMPILED)] + ["learn"]
    seconds = defaultdict(list)
    with ExitStack() as stack:
        ours = stack.enter_context(Worker([sys.executable, __file__, "--serve"], cores))
        theirs = stack.enter_context(Worker(peer, cores)) if peer else None
        for size in SIZES:
            turns = [(f"{size.name}/{kind}", ours, f"{size.name}/{kind}") for kind in kinds]
            if theirs is not None:
                turns.append((f"{size.name}/peer", theirs, size.name))
            for round_ in range(rounds + 1):
                for name, worker, case in turns:
                    taken = worker.time(case, UPDATES[size.name])
                    if round_ > 0:  # the first compiles and warms up
                        seconds[name].append(taken)
    return seconds


def summarise(
    seconds: dict[str, list[tuple[float, float]]], suffix: str
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and their quartiles."""
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}

    def put(name: str, values: Sequence[float]) -> None:
        metrics[name] = float(np.median(values))
        intervals[name] = [float(np.quantile(values, 0.25)), float(np.quantile(values, 0.75))]

    for case, taken in seconds.items():
        size, _, kind = case.partition("/")
        name = {"peer": f"peer_update_s_{size}", "learn": f"learn_s_{size}", "eager": f"update_s_{size}"}.get(
            kind, f"update_s_{size}_{kind}"
        )
        put(name + suffix, [wall for wall, _ in taken])
        if suffix:
            put(f"cpu_{name}{suffix}", [processor for _, processor in taken])
        if kind != "peer" and f"{size}/peer" in seconds:
            theirs = seconds[f"{size}/peer"]
            put(
                f"speedup_{name}{suffix}", [peer[0] / our[0] for peer, our in zip(theirs, taken, strict=True)]
            )
            if suffix:
                both = zip(theirs, taken, strict=True)
                put(f"speedup_cpu_{name}{suffix}", [peer[1] / our[1] for peer, our in both])
    return metrics, intervals


def replay_batch_ms(rows: int) -> float:
    """A minibatch from the replay of replay.py, measured as there."""
    with tempfile.TemporaryDirectory(prefix="lwd-") as folder:
        apart(fill, Path(folder), rows)
        return float(apart(draw, Path(folder))["replay_batch256_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rounds and a small replay; writes nothing")
    parser.add_argument("--peer", default=os.environ.get("LWD_PEER"), help="checkout of the published code")
    parser.add_argument("--peer-python", default=os.environ.get("LWD_PEER_PYTHON", sys.executable))
    parser.add_argument("--cores", type=int, help="use no more than these; 1 leaves out what needs several")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    began = time.monotonic()
    rounds = 2 if options.quick else 5
    peer = None
    if options.peer:
        peer = [options.peer_python, str(Path(__file__).with_name("learner_peer.py")), options.peer]
    available = sorted(os.sched_getaffinity(0))[: options.cores]
    metrics: dict[str, float] = {
        "replay_batch256_ms": replay_batch_ms(50_000 if options.quick else 1_000_000)
    }
    intervals: dict[str, list[float]] = {}
    for cores, suffix in ((available[:1], "_1core"), (available, ""))[: len(available)]:
        some, quartiles = summarise(measure(cores, rounds, peer), suffix)
        metrics |= some
        intervals |= quartiles
    torch.set_num_threads(1)
    for kind, error in gradient_errors(SIZES[1], ROWS, CPU).items():
        metrics[f"gradient_error_{kind}"] = error
    print(json.dumps(metrics, indent=1))
    if not options.quick:
        machine = (
            f"{len(available)} cores, {platform.machine()}, no GPU; load {os.getloadavg()[2]:.1f} at the end"
        )
        peers = "--peer CHECKOUT --peer-python PYTHON" if peer else ""
        results_file.write("learner", metrics, began, options=peers, intervals=intervals, machine=machine)


if __name__ == "__main__":
    main()
