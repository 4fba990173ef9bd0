# SPDX-License-Identifier: Apache-2.0
"""Curves and histograms of training, read back from the event files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from event_files import read_events
from test_trainer import batch, state, trainer

from lwd_learner.divl import Support
from lwd_learner.training_log import EVERY, TrainingLog, calibration


def test_points_are_means_of_so_many_steps_and_leave_out_what_is_no_number(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    log.begin(0)
    for step in range(1, 2 * EVERY + 1):
        log.add(step, {"loss": float(step), "rare": 7.0 if step == 3 else float("nan")})
    log.close()
    events = read_events(tmp_path)
    assert events["loss"] == {EVERY: (EVERY + 1) / 2, 2 * EVERY: EVERY + (EVERY + 1) / 2}
    assert events["rare"] == {EVERY: 7.0}


def test_a_resumed_log_has_the_curve_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def loss(step: int) -> float:
        return float(np.random.default_rng(step).normal())

    def write(log: TrainingLog, steps: range) -> None:
        for step in steps:
            log.add(step, {"loss": loss(step)})

    straight = TrainingLog(tmp_path / "straight")
    straight.begin(0)
    write(straight, range(1, 61))
    straight.close()
    first = TrainingLog(tmp_path / "resumed")
    first.begin(0)
    write(first, range(1, 26))
    saved = first.state  # and with it the trainer's, at step 25
    for step in range(26, 45):  # lost with the process; the points they made must go
        first.add(step, {"loss": 1e6})
    first.close()
    second = TrainingLog(tmp_path / "resumed")
    second.restore(saved)
    second.begin(25)
    write(second, range(26, 61))
    second.close()
    assert read_events(tmp_path / "resumed") == read_events(tmp_path / "straight")


def test_nothing_is_written_before_it_begins(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log")
    log.add(EVERY, {"loss": 1.0})
    log.look(trainer(), batch())
    log.judge(EVERY, np.ones(3), np.zeros(3))
    log.flush()
    log.close()
    assert not (tmp_path / "log").exists() and log.state == {}


def test_a_look_shows_the_laws_of_the_values_and_disturbs_nothing(tmp_path: Path) -> None:
    made = trainer()
    made.learn(batch())
    before = state(made.actor.expert), made.actor.noise.get_state(), made.sampling.get_state()
    log = TrainingLog(tmp_path)
    log.begin(0)
    log.look(made, batch())
    log.close()
    assert torch.equal(before[1], made.actor.noise.get_state())
    assert torch.equal(before[2], made.sampling.get_state())
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state(made.actor.expert).items())
    events = read_events(tmp_path)
    law = events["value/law"][1]
    assert sum(law.bucket) == pytest.approx(1.0) and len(law.bucket) == made.config.divl.support.size
    with torch.no_grad():
        mean = torch.softmax(made.values.value(batch().next_context), dim=-1).mean(dim=0)
    assert law.bucket == pytest.approx(mean.tolist(), abs=1e-6)
    assert events["value/tau"][1].num == events["critic/q"][1].num == len(batch())
    assert 0.0 < events["value/entropy"][1].max <= 1.0
    diagnosed = made.diagnose(batch())
    assert events["policy/q_gain"][1] == pytest.approx(diagnosed["q_gain"], abs=1e-6)


def test_a_law_lies_where_its_atoms_do(tmp_path: Path) -> None:
    support = Support()
    masses = np.zeros(support.size)
    masses[[17, 183]] = 0.25, 0.75
    log = TrainingLog(tmp_path)
    log.begin(0)
    log.law(5, "law", masses, support)
    log.close()
    law = read_events(tmp_path)["law"][5]
    limits = np.array(law.bucket_limit)
    for atom, mass in ((17, 0.25), (183, 0.75)):
        value = float(support.atoms()[atom])
        bucket = int(np.searchsorted(limits, value))
        assert law.bucket[bucket] == mass
        assert limits[bucket] - value == pytest.approx(support.spacing / 2, abs=1e-6)
    assert law.sum == pytest.approx(0.25 * 0.002 + 0.75 * 0.998, abs=1e-6)


def test_held_out_judgements_become_a_histogram_of_errors_and_numbers(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    log.begin(0)
    log.judge(50, np.array([0.2, 0.6, 1.0]), np.array([0.0, 1.0, 1.0]))
    log.close()
    events = read_events(tmp_path)
    assert events["held_out/q_minus_outcome"][50].min == pytest.approx(-0.4)
    assert events["held_out/bias"][50] == pytest.approx(-0.2 / 3)
    assert events["held_out/absolute_error"][50] == pytest.approx(0.2)


def test_calibration_compares_means_within_bins_of_the_prediction() -> None:
    q = np.repeat(np.arange(10) / 10, 10)
    rng = np.random.default_rng(0)
    outcome = np.concatenate([rng.permutation(np.arange(10) < 10 * value) for value in np.arange(10) / 10])
    right = calibration(q, outcome.astype(float))
    assert right["calibration_error"] == pytest.approx(0.0, abs=1e-12) and right["bias"] == pytest.approx(0.0)
    assert right["absolute_error"] == pytest.approx(2 * np.mean(q * (1 - q)))
    shifted = calibration(q + 0.1, outcome.astype(float))
    assert shifted["calibration_error"] == pytest.approx(0.1) and shifted["bias"] == pytest.approx(0.1)
    swung = calibration(1 - q, outcome.astype(float))
    assert swung["calibration_error"] == pytest.approx(np.mean(np.abs(1 - 2 * q)))
