# SPDX-License-Identifier: Apache-2.0
"""What the runs together say: success with intervals, and curves against updates and processor time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LAST = 3  # evaluations that a run's success is the mean of: the published protocol's way against noise
RESAMPLES = 10_000
LABELS = {
    "bc": "cloning",
    "best_of_n": "cloning, best of N by the critic",
    "awr": "IQL + AWR",
    "fql": "FQL",
    "qam": "QAM, fixed temperature",
    "qam_kl": "QAM, path-KL temperature",
    "qam_edit": "QAM-E (QAM, fixed, with an edit head)",
}
Run = dict[str, Any]


def load_runs(folder: Path) -> list[Run]:
    """All runs below `folder`."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def finished(run: Run) -> bool:
    """Whether a run came to its end; unfinished ones have the beginning of their curve."""
    return bool(run["curve"][-1]["updates"] >= run["harness"]["updates"])


def final_success(run: Run) -> NDArray[np.float64]:
    """[LAST, 2] successes and episodes of a run's last evaluations."""
    return np.array([(point["successes"], point["episodes"]) for point in run["curve"][-LAST:]], float)


def interval(runs: Sequence[NDArray[np.float64]], seed: int = 0) -> tuple[float, float]:
    """95 % of the mean success: a bootstrap over seeds, and over episodes inside each.

    runs: one [E, 2] of successes and episodes per seed. Seeds are drawn with replacement, then each evaluation's
    successes from a binomial at its rate. Three seeds are few for it: read it as what repeats at least, not more.
    """
    rng = np.random.default_rng(seed)
    data = np.stack(runs)
    drawn = data[rng.integers(len(data), size=(RESAMPLES, len(data)))]
    episodes = drawn[..., 1].astype(np.int64)
    means = (rng.binomial(episodes, drawn[..., 0] / drawn[..., 1]) / episodes).mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarise(runs: Iterable[Run]) -> dict[str, Any]:
    """`metrics`, `intervals` and the seeds of each method. `cube-single` has the plain names."""
    groups: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        prefix = "" if run["environment"] == "cube-single" else f"{run['environment']}_"
        groups[prefix + run["method"]].append(run)
    metrics, intervals, seeds = {}, {}, {}
    for name, group in groups.items():
        finals = [final_success(run) for run in group]
        metrics[f"success_{name}"] = float(np.mean([final[:, 0] / final[:, 1] for final in finals]))
        metrics[f"cpu_minutes_{name}"] = float(np.mean([run["curve"][-1]["cpu_s"] for run in group])) / 60
        metrics[f"updates_{name}"] = min(run["curve"][-1]["updates"] for run in group)
        intervals[f"success_{name}"] = list(interval(finals))
        seeds[name] = [run["seed"] for run in group]
    return {"metrics": metrics, "intervals": intervals, "seeds": seeds}


def trials(runs: Iterable[Run]) -> dict[str, dict[str, float]]:
    """Of each method and setting the success over all evaluations since cloning: what the choice is made by."""
    table: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for run in runs:
        points = run["curve"][1:]
        successes, episodes = (sum(point[key] for point in points) for key in ("successes", "episodes"))
        table[run["method"]][run["setting"]] = successes / episodes
    return dict(table)


def figure(runs: Sequence[Run], path: Path) -> None:
    """One row per environment: success against updates, and against processor minutes with cloning included."""
    environments = sorted({run["environment"] for run in runs})
    chart, axes = plt.subplots(
        len(environments), 2, figsize=(10, 3.6 * len(environments)), squeeze=False, sharey="row"
    )
    for row, environment in zip(axes, environments, strict=True):
        for colour, (method, label) in enumerate(LABELS.items()):
            group = [run for run in runs if (run["environment"], run["method"]) == (environment, method)]
            if group:
                _curves(row, group, f"C{colour}", label)
        row[0].set_ylabel(f"{environment}\nsuccess")
        row[0].set_xlabel("updates after cloning")
        row[1].set_xlabel("processor minutes, cloning and critics included")
        row[0].set_ylim(-0.02, 1.02)
        row[0].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    plt.close(chart)


def _curves(row: NDArray[Any], group: Sequence[Run], colour: str, label: str) -> None:
    """Mean over seeds as a line, each seed faintly."""
    length = min(len(run["curve"]) for run in group)
    success = np.array([[p["successes"] / p["episodes"] for p in run["curve"][:length]] for run in group])
    updates = [point["updates"] for point in group[0]["curve"][:length]]
    minutes = np.mean([[p["cpu_s"] / 60 for p in run["curve"][:length]] for run in group], axis=0)
    for axis, x in zip(row, (updates, minutes), strict=True):
        for one in success:
            axis.plot(x, one, color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(x, success.mean(axis=0), color=colour, label=f"{label} ({len(group)} seeds)")
