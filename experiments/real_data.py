# SPDX-License-Identifier: Apache-2.0
"""Real recordings, end to end: import LeRobot datasets, clone a flow policy, predict a demonstration it never saw.

    scripts/run python experiments/real_data.py --data <recordings>            # a few minutes on one core
    scripts/run python experiments/real_data.py --data <recordings> --quick    # under a minute: does it run?

Writes summary.json and a figure into experiments/results/real_data; the README.md there says what they show.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import typer
from numpy.typing import NDArray

from lwd_learner.importers.held_out import (
    CloneConfig,
    Prediction,
    clone,
    load_trace,
    predictions,
    without_images,
)
from lwd_learner.importers.lerobot import import_lerobot
from lwd_learner.importers.lerobot_layout import find_dataset, open_dataset
from lwd_learner.transitions import EpisodeTrace
from lwd_policy.observation import ObservationSpec

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SOURCES = {"g1": "g1_dual_arm_lerobot_v2", "so101": "so101_lerobot_v3"}
PREDICTORS = {
    "cloned": "cloned policy",
    "repeat_last": "repeat the last action",
    "constant_speed": "go on at the same speed",
    "mean_action": "mean action",
}
Curves = dict[tuple[str, str], NDArray[np.float64]]  # (predictor, group of joints) -> [folds, H]
GROUPS = {"arm": ("rad", "arm joints"), "hand": ("fraction", "hand joints, 0 to 1")}


@dataclass(frozen=True)
class Recording:
    """One imported dataset. groups: joint columns by what they move."""

    robot: str
    joint_names: tuple[str, ...]
    fps: float
    spec: ObservationSpec
    traces: list[EpisodeTrace]
    groups: dict[str, NDArray[np.intp]]


def main(
    data: Annotated[Path, typer.Option(help="Directory with the recordings")] = Path("../shared/data"),
    out: Annotated[Path, typer.Option(help="Where results are written")] = Path(
        "experiments/results/real_data"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="One fold, few updates: a smoke test")] = False,
    seed: Annotated[int, typer.Option(help="Of training and sampling")] = 0,
) -> None:
    """Import, train, compare, write the results."""
    torch.set_num_threads(1)
    started = time.monotonic()
    config = CloneConfig(seed=seed)
    if quick:
        config = replace(config, updates=40, samples=2)
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, folder in SOURCES.items():
            recording = import_recording(data / folder, Path(work) / name)
            # Where nothing moves, one held-out episode is enough to see that.
            moving = moving_joints(recording)
            folds = len(recording.traces) if moving and not quick else 1
            metrics[f"{name}_episodes"] = len(recording.traces)
            metrics[f"{name}_steps"] = sum(len(trace.positions) for trace in recording.traces)
            metrics[f"{name}_moving_joints"] = moving
            found = [evaluate_fold(recording, index, config) for index in range(folds)]
            curves = error_ahead(found, recording.groups)
            _summarise(name, curves, config, recording.fps, metrics, intervals)
            print(f"{name}: {folds} folds, {time.monotonic() - started:.0f} s", flush=True)
            if moving and not quick:
                out.mkdir(parents=True, exist_ok=True)
                _figure(out / f"{name}_error_ahead.png", curves, recording.fps)
    _write(out, metrics, intervals, seed, time.monotonic() - started)
    print(json.dumps(metrics, indent=1))


def import_recording(dataset_dir: Path, episodes: Path) -> Recording:
    """Import a dataset into `episodes` and read it back as traces."""
    dataset = open_dataset(find_dataset(dataset_dir))
    results = import_lerobot(dataset.root, episodes)
    spec = without_images(dataset.observation_spec())
    hands = np.array(["hand" in name.lower() for name in dataset.joint_names])
    groups = {"arm": np.flatnonzero(~hands), "hand": np.flatnonzero(hands)}
    return Recording(
        dataset.robot,
        dataset.joint_names,
        dataset.fps,
        spec,
        [load_trace(result.path, spec, dataset.joint_names) for result in results if result.path],
        {name: columns for name, columns in groups.items() if columns.size},
    )


def moving_joints(recording: Recording) -> int:
    """Joints that were commanded to more than one place in all of the recording."""
    positions = np.concatenate([trace.positions for trace in recording.traces])
    return int((np.ptp(positions, axis=0) > 1e-6).sum())


def evaluate_fold(recording: Recording, held_out: int, config: CloneConfig) -> list[Prediction]:
    """Train on all episodes but one and predict that one."""
    trained = [trace for index, trace in enumerate(recording.traces) if index != held_out]
    policy = clone(
        recording.robot, recording.joint_names, trained, recording.spec, 1.0 / recording.fps, config
    )
    return predictions(policy, recording.traces[held_out], trained, config)


def error_ahead(folds: list[list[Prediction]], groups: dict[str, NDArray[np.intp]]) -> Curves:
    """Mean error [folds, H] of each predictor and group of joints."""
    return {
        (prediction.name, group): np.stack([fold[number].ahead(columns) for fold in folds])
        for number, prediction in enumerate(folds[0])
        for group, columns in groups.items()
    }


def _summarise(
    name: str,
    curves: Curves,
    config: CloneConfig,
    fps: float,
    metrics: dict[str, float],
    intervals: dict[str, list[float]],
) -> None:
    """Means over the executed part of a chunk and over all of it; the interval is the range over the folds."""
    for (predictor, group), curve in curves.items():
        for steps in (config.execute_steps, config.horizon):
            by_fold = curve[:, :steps].mean(axis=1)
            key = f"{name}_{predictor}_{group}_error_{steps / fps:.1f}s_{GROUPS[group][0]}".replace(".", "_")
            _put(key, by_fold, metrics, intervals)
            if predictor == "cloned":  # paired: the same episodes, only the difference counts
                paired = by_fold - curves["repeat_last", group][:, :steps].mean(axis=1)
                _put(key.replace("cloned", "cloned_minus_repeat_last"), paired, metrics, intervals)


def _put(
    key: str, by_fold: NDArray[np.float64], metrics: dict[str, float], intervals: dict[str, list[float]]
) -> None:
    metrics[key] = round(float(by_fold.mean()), 6)
    intervals[key] = [round(float(by_fold.min()), 6), round(float(by_fold.max()), 6)]


def _figure(file: Path, curves: Curves, fps: float) -> None:
    groups = list(dict.fromkeys(group for _, group in curves))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.4), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        for predictor, label in PREDICTORS.items():
            curve = curves[predictor, group]
            ahead = np.arange(1, curve.shape[1] + 1) / fps
            axis.plot(ahead, curve.mean(axis=0), label=label)
            axis.fill_between(ahead, curve.min(axis=0), curve.max(axis=0), alpha=0.15)
        axis.set(xlabel="time ahead [s]", ylabel=f"mean error [{GROUPS[group][0]}]", title=GROUPS[group][1])
        axis.set_ylim(0, 1.6 * float(curves["repeat_last", group].max()))
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _write(
    out: Path, metrics: dict[str, float], intervals: dict[str, list[float]], seed: int, wall_s: float
) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    summary = {
        "metrics": metrics,
        "intervals": intervals,
        "command": " ".join(["python", *sys.argv]),
        "commit": head.stdout.strip(),
        "seeds": [seed],
        "wall_s": round(wall_s, 1),
        "machine": f"{os.cpu_count()} cores, {_cpu_model()}, one thread used, no GPU",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    typer.run(main)
