# SPDX-License-Identifier: Apache-2.0
"""Several ranks, each a process started by torchrun, train what one process would have trained."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks_worker import CASES, CLONE_STEPS, LEARN_STEPS, NEED_WHOLE_NETWORKS, tensors, trainer, updates
from safetensors.torch import load_file
from small_run import SmallRun

from lwd_learner.distributed import LaunchRefused, joined
from lwd_learner.ranks import ALONE, Ranks, UnevenRows
from lwd_learner.replay import ReplayReader
from lwd_learner.training_state import saved_states
from lwd_policy import checkpoint

FSDP_CASES = ["lwd", "crowded", "own"]
WORKER = Path(__file__).parent / "ranks_worker.py"


def launch(*arguments: str) -> subprocess.Popen[str]:
    """Start torchrun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(*arguments: str, restarts: int = 0) -> None:
    """Run a command on two ranks of this machine."""
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    launcher = launch(*options, *arguments)
    try:
        _, errors = launcher.communicate(timeout=150)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, errors[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ddp")
    torchrun(str(WORKER), str(out), "ddp", "compare", *CASES)
    return out


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fsdp")
    torchrun(str(WORKER), str(out), "fsdp", "compare", *FSDP_CASES)
    return out


@pytest.fixture
def in_double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def require_same_training(out: Path, case: str) -> None:
    made = trainer(case)
    curve = updates(made, ALONE)
    ours, theirs = tensors(made), load_file(out / f"{case}.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name
    seen = json.loads((out / f"{case}.json").read_text())
    assert len(seen) == len(curve) == CLONE_STEPS + LEARN_STEPS
    for alone, together in zip(curve, seen, strict=True):
        for name in set(alone) - {"weight_max", "effective_rows"}:  # not means over rows
            assert together[name] == pytest.approx(alone[name], abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_trains_on_the_union_of_their_rows(
    case: str, ddp: Path, in_double: None
) -> None:
    require_same_training(ddp, case)


@pytest.mark.parametrize("case", FSDP_CASES)
def test_two_ranks_that_hold_half_of_each_parameter_train_the_same(
    case: str, fsdp: Path, in_double: None
) -> None:
    require_same_training(fsdp, case)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_no_number_on_one_rank_stops_all_and_changes_nothing(
    strategy: str, request: pytest.FixtureRequest
) -> None:
    for seen in agreed(request.getfixturevalue(strategy)):
        assert seen["non_finite"] == "the critic loss is nan"
        assert seen["unchanged"]


def test_what_needs_whole_networks_is_refused_where_ranks_hold_pieces(ddp: Path, fsdp: Path) -> None:
    for seen in agreed(fsdp):
        assert len(seen["refused"]) == len(NEED_WHOLE_NETWORKS)
        assert all("train it with ddp, not fsdp" in text for text in seen["refused"])
    assert all(not any(seen["refused"]) for seen in agreed(ddp))


def test_ranks_draw_different_minibatches_from_a_stream_that_stays_common(ddp: Path) -> None:
    first, second = agreed(ddp)
    assert first["draws"] != second["draws"]
    assert first["next"] == second["next"]


def test_a_state_is_not_saved_when_ranks_hold_different_parameters(ddp: Path) -> None:
    for seen in agreed(ddp):
        assert "value/trunk.0.weight" in seen["diverged"]
    assert not saved_states(ddp / "diverged")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_from_what_two_ranks_saved(
    strategy: str, request: pytest.FixtureRequest, in_double: None
) -> None:
    made = trainer("lwd", seed=1)
    made.load(request.getfixturevalue(strategy) / "whole")
    assert made.steps == CLONE_STEPS + 2
    updates(made, ALONE)
    never_saved = trainer("lwd")
    updates(never_saved, ALONE)
    ours, theirs = tensors(never_saved), tensors(made)
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_go_on_from_what_they_saved_bit_for_bit(
    strategy: str, request: pytest.FixtureRequest
) -> None:
    assert all(seen["goes_on"] for seen in agreed(request.getfixturevalue(strategy)))


def test_training_whose_rank_was_killed_ends_as_if_nothing_had_happened(ddp: Path, tmp_path: Path) -> None:
    torchrun(str(WORKER), str(tmp_path), "ddp", "survive", restarts=1)
    written = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [step for step, _ in written] == [*range(1, 14), *range(11, CLONE_STEPS + LEARN_STEPS + 1)]
    curve = json.loads((ddp / "lwd.json").read_text())
    for step, metrics in written:  # those before the kill that were done twice as well
        assert metrics == curve[step - 1], step
    ours, theirs = load_file(ddp / "lwd.safetensors"), load_file(tmp_path / "end.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ranks_of_different_speed_see_the_same_episodes_at_every_step(ddp: Path) -> None:
    """algorithm.md, test 25; with one replay for both, and with a copy of it on another host."""
    for hosts in (1, 2):
        seen = [json.loads((ddp / f"seen.{hosts}.{index}.json").read_text()) for index in range(2)]
        (first, stored), (second, copied) = seen
        counts = [count for count, _, _ in first]
        assert counts == [count for count, _, _ in second]
        assert counts == sorted(counts) and len(set(counts)) > 8
        assert stored == copied and len(stored) > counts[-1]
        with ReplayReader(ddp / f"{hosts}.host0", 0) as replay:
            for (count, mine, _), (_, other, _) in zip(first, second, strict=True):
                replay.see(count)
                assert {*mine, *other} <= {*replay.rows().tolist()}
                assert count == 1 or not {*mine} & {
                    *other
                }  # minibatches of one view, from parts of their own
        for _, rows, features in (*first, *second):  # a row is the same transition in every copy
            with ReplayReader(ddp / f"{hosts}.host0") as replay:
                assert replay.batch(np.array(rows), 0.9).context[:, -1].tolist() == features


def test_the_command_trains_on_two_hosts_of_which_one_has_nothing(tmp_path: Path) -> None:
    """Two launchers with a run directory each, as on two machines; the second one's is empty."""
    run = SmallRun(tmp_path / "here")
    run.commit([1, 2, 3])  # names are random, and a tenth of them is held out: hardly ever all of them
    policy = checkpoint.save(tmp_path / "start", run.policy())
    command = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--local-addr=localhost"]
    command += [f"--rdzv-endpoint=localhost:{free_port()}", "--monitor-interval=0.1"]
    command += ["-m", "lwd_learner.cli", "train", "bc", "--steps=12", "--batch=32"]
    launchers = [
        launch(*command, f"--run-dir={tmp_path / 'there'}"),  # torchrun's rank 0: it was there first
        launch(*command, f"--run-dir={run.root}", f"--policy={policy}"),
    ]
    for launcher in launchers:
        _, errors = launcher.communicate(timeout=150)
        assert launcher.returncode == 0, errors[-4000:]
    version = run.catalog.policies()[-1]
    assert not checkpoint.holds(policy, checkpoint.load(Path(version.uri.removeprefix("file://")))[0])
    assert saved_states(run.root / "learner" / "state")[-1].name == "step_000000012"
    for name in ("replay", "held_out"):
        with (
            ReplayReader(run.root / "learner" / name) as here,
            ReplayReader(tmp_path / "there" / "learner" / name) as there,
        ):
            assert there.episode_ids == here.episode_ids
            assert len(there) == len(here)
    assert not saved_states(tmp_path / "there" / "learner" / "state")


def test_restarts_are_refused_where_they_would_look_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(LaunchRefused, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), joined("ddp"):
        pass


def test_without_torchrun_there_is_one_rank() -> None:
    with joined("ddp") as ranks:
        assert ranks is ALONE


def test_rows_of_a_rank_are_dealt_out_like_cards() -> None:
    rows = torch.arange(12).reshape(2, 6)
    parts = []
    for index in range(3):
        ranks = Ranks()
        ranks.index, ranks.size = index, 3
        assert ranks.share(6) == 2
        parts.append(ranks.mine(rows, axis=1))
    assert torch.equal(torch.stack(parts, dim=2).flatten(1), rows)
    # the first n of the whole are the first n / R of each, which a policy step on some of the rows needs
    assert torch.equal(torch.stack([part[:, :1] for part in parts], dim=2).flatten(1), rows[:, :3])
    with pytest.raises(UnevenRows, match="multiple of 3"):
        ranks.share(7)


def agreed(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"agreed.{index}.json").read_text()) for index in range(2)]
