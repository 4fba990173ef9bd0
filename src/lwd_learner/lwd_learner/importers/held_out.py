# SPDX-License-Identifier: Apache-2.0
"""Does cloning learn anything from these recordings? Train on some episodes, predict the actions of another.

The path is the one that the learner takes: episode bag -> `read_trace` -> `episode_rows` -> flow matching. What is new
is only the measure: error of predicted joint targets in a demonstration that was not trained on, beside three
predictors that learn nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwd_fleet.data.episode import EpisodeReader
from lwd_learner.importers.embodiment import embodiment_from_positions
from lwd_learner.qam import flow_matching_loss
from lwd_learner.transitions import EpisodeRows, EpisodeTrace, chunk_transitions, episode_rows, read_trace
from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import JOINT_POSITIONS, ObservationSpec, reference_position
from lwd_policy.trunk import TrunkConfig, build_trunk

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CloneConfig:
    """A small cloning run."""

    representation: str = "joint_relative"
    horizon: int = 30  # actions; one second at 30 Hz
    execute_steps: int = 10
    updates: int = 500
    batch: int = 128
    learning_rate: float = 1e-3  # cosine to zero
    weight_decay: float = 1e-2
    context_noise: float = 0.05  # of a feature's spread: few demonstrations are otherwise learned by heart
    samples: int = 16  # chunks drawn per prediction; their mean is the prediction
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """Errors of one predictor on one held-out episode. error: [W, H, n] |predicted - commanded|, NaN after the end
    of the demonstration; in the units of the data."""

    name: str
    error: Array

    def ahead(self, columns: NDArray[np.intp]) -> Array:
        """[H] mean over windows and the joints of `columns`, by how many steps the action lies ahead."""
        by_step: Array = np.nanmean(self.error[:, :, columns], axis=(0, 2))
        return by_step


def load_trace(
    episode: Path, spec: ObservationSpec, joint_names: Sequence[str], stride: int = 1
) -> EpisodeTrace:
    """The trace of an episode directory, with an observation point every `stride` steps."""
    reader = EpisodeReader(episode)
    topics = [*(stream.topic for stream in spec.streams), "episode", "executed_action"]
    messages = ((m.topic, m.log_time_ns, m.message) for m in reader.messages(*dict.fromkeys(topics)))
    return read_trace(reader.summary.episode_id, messages, spec, joint_names, stride)


def without_images(spec: ObservationSpec) -> ObservationSpec:
    """What a joint-space policy looks at; images would be decoded for nothing."""
    return replace(spec, streams=tuple(stream for stream in spec.streams if stream.kind != "image"))


def clone(
    robot: str,
    joint_names: Sequence[str],
    traces: Sequence[EpisodeTrace],
    spec: ObservationSpec,
    step_s: float,
    config: CloneConfig,
) -> FlowPolicy:
    """A flow policy over joints trained on the traces by behaviour cloning (algorithm.md 2.5)."""
    torch.manual_seed(config.seed)
    tables = [np.concatenate([_measured(trace), trace.positions]) for trace in traces]
    embodiment = embodiment_from_positions(robot, joint_names, tables, step_s)
    raw_spec = ActionSpec.unnormalised(
        embodiment, config.representation, config.horizon, step_s, config.execute_steps
    )
    trunk = build_trunk(TrunkConfig("joints"), embodiment).eval()
    rows = [episode_rows(trace, FlowPolicy(trunk, spec, raw_spec)) for trace in traces]
    raw = np.concatenate([part.actions for part in rows]).astype(np.float64)
    valid = np.concatenate([_valid(part, config.horizon) for part in rows])
    action_spec = raw_spec.with_statistics(raw, valid)
    policy = FlowPolicy(trunk, spec, action_spec)
    context = torch.from_numpy(np.concatenate([_context(part) for part in rows]))
    target = torch.from_numpy(action_spec.normalise(raw).astype(np.float32)).clamp(-1.0, 1.0)
    _fit(policy, context, target, torch.from_numpy(valid), config)
    return policy.eval()


def predictions(
    policy: FlowPolicy, held_out: EpisodeTrace, trained: Sequence[EpisodeTrace], config: CloneConfig
) -> list[Prediction]:
    """Errors of the policy ("cloned"), of the last action repeated, of it going on at its present speed, and of the
    mean action of the training episodes."""
    rows = episode_rows(held_out, policy)
    spec, windows = policy.action_spec, rows.transitions
    decided = chunk_transitions(held_out, spec.horizon, spec.execute_steps)
    observations = [held_out.points[window.point].observation for window in decided]
    reference = np.stack([reference_position(observation) for observation in observations])  # [W, n]
    truth = np.full((len(windows), spec.horizon, reference.shape[1]), np.nan)
    for row, window in zip(truth, windows, strict=True):
        row[: window.planned] = held_out.positions[window.first : window.first + window.planned]
    # Nothing is known of the speed before two actions have been seen.
    before = np.stack(
        [
            held_out.positions[w.first - 2] if w.first > 1 else r
            for w, r in zip(windows, reference, strict=True)
        ]
    )
    ahead = np.arange(1, spec.horizon + 1)[:, None]
    guesses = {
        "cloned": _sampled(policy, torch.from_numpy(_context(rows)), reference, config),
        "repeat_last": np.broadcast_to(reference[:, None], truth.shape),
        "constant_speed": reference[:, None] + ahead * (reference - before)[:, None],
        "mean_action": np.broadcast_to(
            np.concatenate([t.positions for t in trained]).mean(axis=0), truth.shape
        ),
    }
    return [Prediction(name, np.abs(guess - truth)) for name, guess in guesses.items()]


def _sampled(policy: FlowPolicy, context: Tensor, reference: Array, config: CloneConfig) -> Array:
    generator = torch.Generator().manual_seed(config.seed + 1)
    spec = policy.action_spec
    total = np.zeros((len(context), spec.horizon, spec.dim))
    for _ in range(config.samples):
        noise = torch.randn(len(context), spec.horizon, spec.dim, generator=generator)
        total += policy.sample(context, noise).numpy()
    return spec.decode(spec.denormalise(total / config.samples), reference)


def _fit(policy: FlowPolicy, context: Tensor, target: Tensor, valid: Tensor, config: CloneConfig) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.AdamW(
        policy.expert.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.updates)
    spread = context.std(dim=0, keepdim=True)
    for batch in _batches(len(context), config, generator):
        seen = context[batch]
        seen = seen + config.context_noise * spread * torch.randn(seen.shape, generator=generator)
        noise = torch.randn(target[batch].shape, generator=generator)
        time = torch.rand(len(batch), generator=generator)

        def velocity(chunk: Tensor, flow_time: Tensor, seen: Tensor = seen) -> Tensor:
            return policy.velocity(seen, chunk, flow_time)

        loss = flow_matching_loss(velocity, target[batch], noise, time, valid[batch].unsqueeze(-1))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()


def _batches(rows: int, config: CloneConfig, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(config.updates):
        yield torch.randint(rows, (min(config.batch, rows),), generator=generator)


def _context(rows: EpisodeRows) -> NDArray[np.float32]:
    """[R, C] of a history of two."""
    now = [window.point for window in rows.transitions]
    return np.concatenate([rows.features[rows.previous[now]], rows.features[now]], axis=1)


def _valid(rows: EpisodeRows, horizon: int) -> NDArray[np.bool_]:
    planned = np.array([window.planned for window in rows.transitions])
    valid: NDArray[np.bool_] = np.arange(horizon)[None] < planned[:, None]
    return valid


def _measured(trace: EpisodeTrace) -> Array:
    return np.stack([point.observation.values[JOINT_POSITIONS] for point in trace.points])
