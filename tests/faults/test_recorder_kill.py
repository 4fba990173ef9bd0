# SPDX-License-Identifier: Apache-2.0
"""Killing the writer of an episode loses what was not flushed yet, and nothing else."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from lwd_fleet.data.episode import EpisodeReader, mint_episode_id
from lwd_fleet.data.salvage import salvage_spool

WRITER = """
import sys
from pathlib import Path
from lwd_fleet.data.episode import EpisodeWriter
from lwd_fleet.data.messages import create, serialise

writer = EpisodeWriter(Path(sys.argv[1]), sys.argv[2], "r1")
number = 0
while True:
    for _ in range(20):
        text = create("std_msgs/msg/String", data=f"{number}")
        writer.write("/r1/task", "std_msgs/msg/String", serialise(text), number, number)
        number += 1
    writer.flush()
    print(number, flush=True)  # this many messages must survive
"""


@pytest.mark.parametrize("round_number", range(6))
def test_killed_writer_loses_nothing_that_was_flushed(tmp_path, round_number):
    episode_id = mint_episode_id()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), episode_id], stdout=subprocess.PIPE, text=True
    )
    promised = int(process.stdout.readline())
    wait_s = random.Random(round_number).uniform(0.0, 0.2)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        promised = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    promised = max([promised, *(int(line) for line in rest if line)])

    (result,) = salvage_spool(tmp_path)
    reader = EpisodeReader(tmp_path / episode_id)
    numbers = [int(entry.message.data) for entry in reader]
    assert len(numbers) >= promised
    assert numbers == list(range(len(numbers)))  # a prefix: no hole, no double, no damaged message
    assert f"{len(numbers)} messages salvaged" in result.reason
    assert reader.summary.truncated == result.reason
    assert reader.summary.outcome == "unlabelled"


def test_episode_killed_before_its_first_flush_is_set_aside(tmp_path):
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lwd_fleet.data.episode import EpisodeWriter\n"
        "EpisodeWriter(Path(sys.argv[1]), 'e', 'r1')\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    (result,) = salvage_spool(tmp_path)
    assert result.sealed is None and "no message can be read" in result.reason
    assert result.quarantined.is_dir()
