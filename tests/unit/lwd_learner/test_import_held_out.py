# SPDX-License-Identifier: Apache-2.0
"""The measure of cloning on recordings: it rewards a policy that learned something and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lwd_learner.importers.held_out import CloneConfig, Prediction, clone, predictions
from lwd_learner.transitions import AUTHOR_HUMAN, EpisodeTrace, ObservationPoint
from lwd_policy.observation import COMMAND, INSTRUCTION, JOINT_POSITIONS, Observation, ObservationSpec, Stream

NAMES = ("shoulder", "elbow")
STEP_S = 0.1
SPEC = ObservationSpec(
    (
        Stream(JOINT_POSITIONS, "joint_states", "joints", (2,), 0.2),
        Stream(COMMAND, "executed_action", "command", (2,), 1.0, required=False),
        Stream(INSTRUCTION, "task", "text", (), 0.0),
    )
)
CONFIG = CloneConfig(horizon=5, execute_steps=2, updates=300, batch=64, samples=4, context_noise=0.0)


def circle(phase: float, steps: int = 60) -> EpisodeTrace:
    """Joints that follow a circle: where they go next is a function of where they are."""
    angle = phase + 0.2 * np.arange(steps + 1)
    path = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    trace = EpisodeTrace("an episode", positions=path[1:])
    trace.author = np.full(steps, AUTHOR_HUMAN)
    trace.policy_version = np.full(steps, -1)
    for step in range(-1, steps):
        values = {JOINT_POSITIONS: path[step + 1], COMMAND: path[step + 1], INSTRUCTION: "circle"}
        time_ns = step * 100_000_000
        seen = Observation(time_ns, values, dict.fromkeys(values, time_ns))
        before = trace.points[-2].observation if step > 0 else seen
        trace.points.append(ObservationPoint(step, (before, seen)))
    return trace


def mean(prediction: Prediction) -> float:
    return float(prediction.ahead(np.arange(2)).mean())


@pytest.fixture(scope="module")
def found() -> dict[str, Prediction]:
    torch.set_num_threads(1)
    trained = [circle(0.0), circle(2.0)]
    policy = clone("r1", NAMES, trained, SPEC, STEP_S, CONFIG)
    return {prediction.name: prediction for prediction in predictions(policy, circle(1.0), trained, CONFIG)}


def test_the_action_repeated_errs_by_the_distance_moved(found: dict[str, Prediction]) -> None:
    first = found["repeat_last"].error[0, 0]  # from angle 1.0 to 1.2
    np.testing.assert_allclose(first, np.abs([np.cos(1.2) - np.cos(1.0), np.sin(1.2) - np.sin(1.0)]))


def test_the_further_ahead_the_larger_the_error_of_the_repeated_action(found: dict[str, Prediction]) -> None:
    assert (np.diff(found["repeat_last"].ahead(np.arange(2))) > 0).all()


def test_a_policy_that_can_learn_the_motion_beats_all_that_learn_nothing(
    found: dict[str, Prediction],
) -> None:
    others = min(mean(found[name]) for name in ("repeat_last", "constant_speed", "mean_action"))
    assert mean(found["cloned"]) < 0.7 * others


def test_actions_after_the_end_of_the_demonstration_are_not_judged(found: dict[str, Prediction]) -> None:
    judged = np.isfinite(found["cloned"].error[:, :, 0])
    assert judged[0].all()
    np.testing.assert_array_equal(judged, np.isfinite(found["repeat_last"].error[:, :, 0]))
    assert judged[-1].sum() < CONFIG.horizon


def test_training_and_prediction_are_repeatable() -> None:
    quick = CloneConfig(horizon=5, execute_steps=2, updates=5, samples=2)
    errors = []
    for _ in range(2):
        policy = clone("r1", NAMES, [circle(0.0, 20)], SPEC, STEP_S, quick)
        errors.append(predictions(policy, circle(1.0, 20), [circle(0.0, 20)], quick)[0].error)
    np.testing.assert_array_equal(errors[0], errors[1])
