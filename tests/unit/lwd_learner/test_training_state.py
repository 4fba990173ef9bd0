# SPDX-License-Identifier: Apache-2.0
"""Saved states: what a reader may see while one is written, and after a kill at any moment of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lwd_learner.training_state import load_state, save_state, saved_states

_WRITER = """
    import sys
    from pathlib import Path
    import torch
    from lwd_learner.training_state import save_state, saved_states

    parent, same_step = Path(sys.argv[1]), sys.argv[2] == "same"
    number = 0
    while True:
        number += 1
        tensors = {f"t{k}": torch.full((200_000,), float(number)) for k in range(8)}
        save_state(parent, 5 if same_step else number, tensors, {"number": number})
        print(number, flush=True)
"""


def save(parent: Path, step: int, number: int) -> Path:
    return save_state(parent, step, {"x": torch.tensor([float(number)])}, {"number": number})


def test_a_state_of_the_same_step_joins_the_one_before_and_comes_after_it(tmp_path: Path) -> None:
    paths = [save(tmp_path, 5, number) for number in range(13)]
    assert len(set(paths)) == 13 and saved_states(tmp_path) == paths[-2:]
    assert load_state(saved_states(tmp_path)[-1])[1] == {"number": 12}
    later, earlier = save(tmp_path, 11, 13), save(tmp_path, 9, 14)
    assert saved_states(tmp_path) == [earlier, later], "the newest is that of the latest step"


def test_the_state_before_is_there_until_the_next_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of a name during a save leaves a complete newest state behind, also of a step saved twice."""
    before = save(tmp_path, 5, 0)
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        assert before in saved_states(tmp_path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    after = save(tmp_path, 5, 1)
    assert saved_states(tmp_path) == [before, after]


@pytest.mark.parametrize("steps", ["same", "rising"])
def test_a_kill_at_any_moment_of_a_save_loses_no_state_that_was_reported(tmp_path: Path, steps: str) -> None:
    parent = tmp_path / "states"
    random_ = random.Random(steps)
    reported = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WRITER), str(parent), steps],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        for _ in range(2):  # at least two saves, then a kill inside the one that follows
            reported = int(process.stdout.readline())
        while not list(parent.glob(".*.partial")):
            pass
        time.sleep(random_.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = [int(line) for line in process.stdout.read().split()]
        reported = max([reported, *left])
        states = saved_states(parent)
        for path in states:
            tensors, record = load_state(path)
            assert all((tensor == record["number"]).all() for tensor in tensors.values())
        assert json.loads((states[-1] / "state.json").read_text())["number"] >= reported
        if steps == "rising":
            break  # numbers begin anew in the next process; one kill is like another
