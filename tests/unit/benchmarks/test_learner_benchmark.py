# SPDX-License-Identifier: Apache-2.0
"""The benchmark's update is an update of the published agent, and its numbers are what their names say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import learner
import learner_gpu
from published_update import (
    EAGER,
    PublishedUpdate,
    Size,
    StateBatch,
    Variant,
    gradient_errors,
    seconds_per_update,
)

CPU = torch.device("cpu")
SMALL = Size("16x2_q3", 16, 2, 3)


@pytest.mark.parametrize("variant", EAGER, ids=lambda variant: variant.name)
def test_an_update_moves_every_weight_and_a_little_every_slow_copy(variant: Variant) -> None:
    update = PublishedUpdate(SMALL, variant, CPU)
    modules = (update.critic, update.cloned, update.acting, update.slow_critic, update.slow_cloned)
    before = [[p.detach().clone() for p in module.parameters()] for module in modules]
    precision = torch.get_float32_matmul_precision()
    update(StateBatch.random(32, CPU))
    assert torch.get_float32_matmul_precision() == precision
    for module, old in zip(modules, before, strict=True):
        moved = [float((p.detach() - q).abs().max()) for p, q in zip(module.parameters(), old, strict=True)]
        largest = 3.1e-4 if module in modules[:3] else 2e-6  # Adam's first step is its rate
        assert all(0 < move < largest for move in moved), moved


def test_the_networks_have_as_many_weights_as_the_published_ones() -> None:
    update = PublishedUpdate(Size("512x4_q10", 512, 4, 10), Variant("float32", "float32"), CPU)
    hidden = 3 * (512 * 512 + 512)
    critic = (53 * 512 + 512) + hidden + 4 * 2 * 512 + (512 + 1)
    actor = (54 * 512 + 512) + hidden + (512 * 25 + 25)
    assert sum(p.numel() for p in update.critic.parameters()) == 10 * critic
    assert sum(p.numel() for p in update.descent.module.parameters()) == 10 * critic + 2 * actor


def test_faster_arithmetic_gives_nearly_the_gradient_of_float64() -> None:
    errors = gradient_errors(SMALL, 64, CPU)
    assert errors["float32"] < 1e-5
    assert errors["medium"] < 0.03
    assert 1e-5 < errors["bfloat16"] < 0.03


def test_time_is_per_update() -> None:
    calls: list[None] = []
    wall, processor = seconds_per_update(lambda: calls.append(None), 7, CPU)
    assert len(calls) == 7
    assert wall > 0 and processor >= 0


def test_a_speedup_is_the_median_of_ratios_taken_in_the_same_round() -> None:
    seconds = {
        "s/eager": [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)],
        "s/peer": [(3.0, 2.0), (4.0, 2.0), (12.0, 2.0)],
    }
    metrics, intervals = learner.summarise(seconds, "")
    assert metrics["update_s_s"] == 2.0 and metrics["peer_update_s_s"] == 4.0
    assert metrics["speedup_update_s_s"] == 3.0
    assert intervals["speedup_update_s_s"] == [2.5, 3.0]


def test_the_gpu_benchmark_measures_with_the_same_update_on_any_device() -> None:
    assert learner_gpu.measure(SMALL, EAGER[-1], 8, CPU, updates=2) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_refuses_a_machine_without_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["learner_gpu.py"])
    assert learner_gpu.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
