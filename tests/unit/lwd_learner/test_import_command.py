# SPDX-License-Identifier: Apache-2.0
"""The command line of the importers: what it says, where it writes, how it exits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lwd_learner.importers.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("LWD_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
MAPPING = str(REPOSITORY / "config" / "mappings" / "rosbag2_cpp_mcap.yaml")


def test_a_source_that_is_not_there_is_said_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    assert main(["lerobot", nowhere, "--out", out]) == 2
    assert main(["bags", nowhere, "--mapping", MAPPING, "--out", out]) == 2
    assert main(["bags", str(tmp_path), "--mapping", nowhere, "--out", out]) == 2
    assert capsys.readouterr().err.count("nothing imported") == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real recordings at {SHARED}")
def test_a_refused_bag_shows_in_the_exit_code_and_the_quarantine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = SHARED / "rosbag2_cpp_mcap", SHARED / "rosbag2_official" / "rosbag2_tests"
    command = ["bags", "--mapping", MAPPING, "--out", str(tmp_path)]
    assert main([*command, str(good)]) == 0
    assert "no CRC" in capsys.readouterr().out
    assert main([*command, str(good), str(bad)]) == 1
    said = capsys.readouterr().out
    assert "was imported before" in said and "wrong_serialization" in said and "3 refused" in said
    assert len(list((tmp_path / "quarantine").glob("*.json"))) == 3
