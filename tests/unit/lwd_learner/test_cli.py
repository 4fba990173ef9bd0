# SPDX-License-Identifier: Apache-2.0
"""The commands as a person types them: what they do, what they say, and how they exit."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import SmallRun
from typer.testing import CliRunner, Result

from lwd_fleet.data.catalog import Catalog
from lwd_learner.cli import app
from lwd_learner.learner import Learner
from lwd_learner.methods import METHODS
from lwd_policy import checkpoint

MAPPING = Path(__file__).parents[3] / "config" / "mappings" / "rosbag2_cpp_mcap.yaml"


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def lwd(*words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = SmallRun(tmp_path_factory.mktemp("spool"))
    run.expert([1, 2])
    return run.root / "spool"


def test_every_command_explains_itself() -> None:
    commands = ("up", "doctor", "episodes", "policies", "report", "ingest", "train", "eval", "import")
    said = lwd("--help").output
    assert all(command in said for command in commands)
    for command in commands:
        assert lwd(command, "--help").exit_code == 0


def test_the_methods_to_train_by_are_listed_and_an_unknown_one_names_them(tmp_path: Path) -> None:
    listed = lwd("train", "--help").output
    (tmp_path / "catalog.db").touch()
    refused = lwd("train", "offline", "--run", tmp_path, "--method", "magic", "--steps", 1).stderr
    assert all(name in listed and name in refused for name in METHODS) and "no method 'magic'" in refused


def test_what_cannot_be_tried_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    (tmp_path / "catalog.db").touch()
    for words in (
        ("import", "lerobot", nowhere, "--out", tmp_path / "out"),
        ("import", "bags", nowhere, "--mapping", MAPPING, "--out", tmp_path / "out"),
        ("ingest", nowhere, "--run", tmp_path / "run"),
        ("train", "bc", "--run", nowhere, "--policy", nowhere, "--steps", 1),
        ("train", "bc", "--run", tmp_path, "--policy", nowhere, "--steps", 1),
        ("train", "offline", "--run", tmp_path, "--method", "magic", "--steps", 1),
        ("train", "bc", "--run", tmp_path, "--suite", "nine", "--steps", 1),
        ("eval", "--policy", nowhere),
        ("eval", "--policy", nowhere, "--task", "juggle"),
        ("eval", "--policy", nowhere, "--suite", "nine"),
        ("eval", "--policy", nowhere, "--shift", "weather"),
        ("episodes",),
        ("episodes", "--catalog", nowhere),
        ("episodes", "show", "0192", "--catalog", nowhere),
        ("policies", "--catalog", nowhere),
        ("report", nowhere),
    ):
        result = lwd(*words)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_bag_that_cannot_be_read_is_refused_with_a_reason(tmp_path: Path) -> None:
    bag = tmp_path / "bag.mcap"
    bag.write_bytes(b"not a bag")
    result = lwd("import", "bags", bag, "--mapping", MAPPING, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "0 of 1 imported" in result.output and "refused" in result.output
    (note,) = (tmp_path / "out" / "quarantine").glob("*.json")
    assert json.loads(note.read_text())["reason"]


def test_ingest_commits_what_it_can_and_lists_the_rest(tmp_path: Path, spool: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "broken.mcap").write_bytes(b"not a bag")
    result = lwd("ingest", spool, broken, "--run", tmp_path / "run")
    assert result.exit_code == 1 and "2 added, 1 refused" in result.output
    assert broken.is_dir()
    assert "2 added" not in lwd("ingest", spool, "--run", tmp_path / "run").output
    table = lwd("episodes", "--catalog", tmp_path / "run" / "catalog.db").output
    assert "place" in table and "in quarantine" in table


def test_one_episode_is_shown_with_everything_known_of_it(tmp_path: Path, spool: Path) -> None:
    assert lwd("ingest", spool, "--run", tmp_path).exit_code == 0
    file = tmp_path / "catalog.db"
    with Catalog(file) as catalog:
        one, other = catalog.episodes_since(0)
        catalog.label(one.episode_id, "failure", "operator", [0.5, 0.0])
        catalog.quarantine(one.episode_id, "not ingested: [a reason]", "")
        catalog.quarantine("0000-lost", "no .mcap file", "/spool/0000-lost")
    prefix = next(n for n in range(36) if one.episode_id[:n] != other.episode_id[:n])
    said = lwd("episodes", "show", one.episode_id[:prefix], "--catalog", file).output
    (bag,) = one.summary.files
    for text in (
        one.episode_id, one.robot, one.instruction, bag.sha256, "failure by operator", "scores 0.5 0",
        "failure (label 1); as recorded: success by detector", "expert 100%", f"seed {one.summary.seed}",
        "not ingested: [a reason]",
    ):  # fmt: skip
        assert text in said, said
    assert other.episode_id not in said
    lost = lwd("episodes", "show", "0000", "--catalog", file)
    assert lost.exit_code == 0 and "no .mcap file" in lost.output and "/spool/0000-lost" in lost.output
    several = lwd("episodes", "show", "0", "--catalog", file)
    assert several.exit_code == 2 and all(
        name in several.stderr for name in (one.episode_id, other.episode_id)
    )
    unknown = lwd("episodes", "show", "x", "--catalog", file)
    assert unknown.exit_code == 2 and "no episode begins with 'x'" in unknown.stderr


def test_a_report_is_the_numbers_that_were_stored_and_the_page_beside_them(tmp_path: Path) -> None:
    summary = {
        "metrics": {"success_before": 0.5, "eval_episodes": 200},
        "intervals": {"success_before": [0.43, 0.57]},
        "command": "lwd demo",
        "commit": "0123abc",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    said = lwd("report", tmp_path).output
    assert "success_before" in said and "0.430 to 0.570" in said and "200" in said and "0123abc" in said
    assert "page" not in said
    (tmp_path / "report.html").touch()
    assert str(tmp_path / "report.html") in lwd("report", tmp_path).output
    (tmp_path / "summary.json").write_text('{"metrics": [1]}')
    damaged = lwd("report", tmp_path)
    assert damaged.exit_code == 2 and "cannot be used" in damaged.stderr


def test_train_publishes_and_the_same_command_goes_on(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Names of episodes are random: one time in a hundred both would only judge the critic.
    monkeypatch.setattr(Learner, "_is_held_out", lambda learner, episode_id: False)
    start = checkpoint.save(tmp_path / "start", SmallRun(tmp_path / "other").policy())
    run = tmp_path / "run"
    assert lwd("ingest", spool, "--run", run).exit_code == 0
    common = ("--run", run, "--policy", start, "--batch", 8)
    result = lwd("train", "bc", "--steps", 3, *common)
    assert result.exit_code == 0, result.stderr
    assert "version 1 after 3 steps" in result.output and "clone_loss" in result.output
    result = lwd("train", "bc", "--steps", 5, *common)
    assert "goes on from step 3" in result.output and "version 2 after 5 steps" in result.output
    result = lwd("train", "offline", "--steps", 2, *common)
    assert result.exit_code == 0 and "policy unchanged, still version 2, after 2 steps" in result.output
    refused = lwd("train", "offline", "--steps", 4, *common[:-1], 9)
    assert refused.exit_code == 2 and "batch = 8" in refused.stderr
    table = lwd("policies", "--catalog", run / "catalog.db").output
    assert "active" in table and table.count("retired") == 1


def test_eval_says_the_rate_with_its_interval(tmp_path: Path) -> None:
    policy = checkpoint.save(tmp_path, SmallRun(tmp_path / "run").policy())
    words = (
        "eval",
        "--policy",
        policy,
        "--episodes",
        2,
        "--workers",
        2,
        "--first-seed",
        7,
        "--shift",
        "placement",
    )
    said = json.loads(lwd(*words, "--json").stdout)
    assert said["shift"] == "placement" and said["policy"] == policy.name
    (record,) = said["tasks"]
    assert record["task"] == "place" and record["outcomes"].keys() == {"7", "8"}
    rate = record["success"]
    assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1 and 0 <= record["sub_steps"] <= 1


def test_eval_of_a_suite_judges_all_of_its_tasks(tmp_path: Path) -> None:
    policy = checkpoint.save(tmp_path, SmallRun(tmp_path / "run").policy())
    said = lwd("eval", "--policy", policy, "--suite", "demo", "--episodes", 1).output
    assert "place: " in said and "stow: " in said and "of 1 succeeded" in said and "sub-steps" in said
