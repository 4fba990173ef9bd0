# SPDX-License-Identifier: Apache-2.0
"""A learner that is killed again and again takes the very steps of one that is not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from event_files import read_events
from resumed_run import ARRIVALS, STEPS
from small_run import SmallRun

from lwd_learner.training_state import load_state, saved_states

_SLOW_SAVE_S = 0.03  # between two files of it, so that kills meet it


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = SmallRun(tmp_path_factory.mktemp("committed"))
    run.commit(range(1, 1 + max(ARRIVALS.values())))
    run.catalog.close()
    return run.root


def start(root: Path) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("resumed_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script), str(root), str(_SLOW_SAVE_S)], env=environment)


def said(root: Path) -> list[tuple[int, dict[str, str]]]:
    """(step, what it said) in the order of time; a line that a kill tore is left out."""
    path = root / "steps.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(record["step"], record["said"]) for record in map(json.loads, lines)]


def last_step(root: Path) -> int:
    return max((step for step, _ in said(root)), default=0)


def kill_when(root: Path, condition: Callable[[], bool]) -> bool:
    """Start it and kill it at that moment; whether it was killed before it was done."""
    process = start(root)
    while process.poll() is None and not condition():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_learner_killed_at_any_moment_repeats_its_steps_bit_for_bit(
    committed: Path, tmp_path: Path
) -> None:
    straight, killed = (shutil.copytree(committed, tmp_path / name) for name in ("straight", "killed"))
    not_killed = start(straight)
    random_ = random.Random(0)
    states, journal = killed / "learner" / "state", killed / "learner" / "ingests.jsonl"

    def after(step: int) -> Callable[[], bool]:
        """A moment that differs between runs, soon after this step."""
        end = float("inf")

        def reached() -> bool:
            nonlocal end
            if last_step(killed) >= step:
                end = min(end, time.monotonic() + random_.uniform(0, 0.1))
            return time.monotonic() >= end

        return reached

    def saving() -> bool:
        return last_step(killed) > 12 and bool(list(states.glob(".*.partial")))

    def learned_from_what_no_state_knows() -> bool:
        """Episodes came in after the last save, and steps were taken with them."""
        arrived = json.loads(journal.read_text().splitlines()[-1])[0] if journal.exists() else 0
        newest = saved_states(states)[-1:]
        saved = json.loads((newest[0] / "state.json").read_text())["steps"] if newest else 0
        return arrived > 0 and saved <= arrived < last_step(killed)

    moments = (
        after(random_.randrange(2, 5)),  # before any other state than that of the beginning
        learned_from_what_no_state_knows,
        saving,
        after(random_.randrange(19, 22)),  # in the refit, which is repeated as a whole
        learned_from_what_no_state_knows,
        after(random_.randrange(32, 40)),
    )
    for moment in moments:
        assert kill_when(killed, moment)
    assert start(killed).wait() == 0
    assert not_killed.wait() == 0
    expected = dict(said(straight))
    assert sorted(expected) == list(range(1, STEPS + 1))

    taken = said(killed)
    assert len(taken) > STEPS, "no kill cost a step"
    for step, one in taken:
        assert one == expected[step], f"step {step}"
    assert {step for step, _ in taken} == set(expected)

    ends = [saved_states(root / "learner" / "state")[-1] for root in (straight, killed)]
    (tensors, record), (others, other) = map(load_state, ends)
    assert ends[0].name == ends[1].name and record == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    curves = [read_events(root / "learner" / "tensorboard") for root in (straight, killed)]
    assert curves[0] == curves[1] and curves[0]["critic_loss"]
