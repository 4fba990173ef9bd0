# SPDX-License-Identifier: Apache-2.0
"""From outcomes of single episodes to the table: means, intervals over training seeds and scenes, a corrected ladder.

Every method is evaluated on the same scenes from every training seed, so differences are paired twice. The bootstrap
resamples training seeds, and scenes within each task, together for all methods.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.fleet_study.plan import LONG

LADDER = (
    ("lwd_offline", "sft"),
    ("lwd_online", "lwd_offline"),
    ("lwd_online", "sft"),
    ("lwd_online", "filtered_bc"),
    ("lwd_online", "hg_dagger"),
    ("lwd_online", "recap"),
    ("lwd_online", "iql_expectile"),
    ("lwd_online", "lwd_paper"),
    ("lwd_online", "lwd_online_no_interventions"),
)
RESAMPLES = 10_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Of all methods that have the same training seeds and scenes: arrays [seeds, tasks, scenes]."""

    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    success: Mapping[str, Array]
    score: Mapping[str, Array]

    @classmethod
    def read(cls, folder: Path) -> Outcomes:
        """All methods of `folder`/seed_<s>/<method>.csv; seeds that a method lacks are left out for all. Raises ValueError
        if two files do not have the same scenes."""
        files = {
            int(directory.name.removeprefix("seed_")): {file.stem: file for file in directory.glob("*.csv")}
            for directory in folder.glob("seed_*")
        }
        methods = sorted(set().union(*files.values()))
        seeds = tuple(sorted(seed for seed, found in files.items() if found.keys() >= set(methods)))
        if not seeds:
            raise ValueError(f"{folder}: no training seed has all of {', '.join(methods) or 'any method'}")
        rows = {method: [_rows(files[seed][method]) for seed in seeds] for method in methods}
        scenes = [(row["task"], int(row["scene"])) for row in rows[methods[0]][0]]
        tasks = tuple(dict.fromkeys(task for task, _ in scenes))

        def cube(method: str, name: str) -> Array:
            for found in rows[method]:
                if [(row["task"], int(row["scene"])) for row in found] != scenes:
                    raise ValueError(f"{method} was not evaluated on the scenes of {methods[0]}")
            return np.array(
                [
                    [[float(row[name]) for row in found if row["task"] == task] for task in tasks]
                    for found in rows[method]
                ]
            )

        return cls(
            seeds,
            tasks,
            {method: cube(method, "success") for method in methods},
            {method: cube(method, "score") for method in methods},
        )


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as content:
        return list(csv.DictReader(content))


def summarise(outcomes: Outcomes, seed: int = 0) -> dict[str, Any]:
    """`metrics`: score_<m> (successes of short tasks, sub-step means of long ones), success_<m> (strict), long_<m>;
    `intervals` of 95 %; `ladder`: differences of scores with intervals and p-values, Holm's corrected ones beside them."""
    rng = np.random.default_rng(seed)
    shape = next(iter(outcomes.score.values())).shape
    seeds = rng.integers(shape[0], size=(RESAMPLES, shape[0]))
    scenes = rng.integers(shape[2], size=(RESAMPLES, *shape[1:]))
    long = [place for place, task in enumerate(outcomes.tasks) if task in LONG]
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    resampled: dict[str, Array] = {}
    for method in outcomes.score:
        resampled[method] = _resample(outcomes.score[method], seeds, scenes)
        columns = {
            f"score_{method}": (outcomes.score[method].mean(), resampled[method].mean(axis=1)),
            f"success_{method}": (
                outcomes.success[method].mean(),
                _resample(outcomes.success[method], seeds, scenes).mean(axis=1),
            ),
        }
        if long:
            whole = outcomes.score[method][:, long].mean()
            columns[f"long_{method}"] = (whole, resampled[method][:, long].mean(axis=1))
        for name, (value, drawn) in columns.items():
            metrics[name] = round(float(value), 4)
            intervals[name] = np.quantile(drawn, [0.025, 0.975]).round(4).tolist()
    steps = [(a, b) for a, b in LADDER if a in resampled and b in resampled]
    drawn = [resampled[a].mean(axis=1) - resampled[b].mean(axis=1) for a, b in steps]
    p_values = [_p_value(one) for one in drawn]
    ladder = [
        {
            "better": a,
            "than": b,
            "difference": round(metrics[f"score_{a}"] - metrics[f"score_{b}"], 4),
            "interval": np.quantile(one, [0.025, 0.975]).round(4).tolist(),
            "p": p,
            "p_holm": corrected,
        }
        for (a, b), one, p, corrected in zip(steps, drawn, p_values, holm(p_values), strict=True)
    ]
    by_task = {
        method: dict(zip(outcomes.tasks, score.mean(axis=(0, 2)).round(4).tolist(), strict=True))
        for method, score in outcomes.score.items()
    }
    return {
        "metrics": metrics,
        "intervals": intervals,
        "seeds": list(outcomes.seeds),
        "ladder": ladder,
        "by_task": by_task,
    }


def _resample(values: Array, seeds: NDArray[np.int64], scenes: NDArray[np.int64]) -> Array:
    """[R, tasks]: means of values [S, T, N] over drawn seeds [R, S] and drawn scenes [R, T, N]."""
    drawn = [
        values[chosen][:, np.arange(values.shape[1])[:, None], places].mean(axis=(0, 2))
        for chosen, places in zip(seeds, scenes, strict=True)
    ]
    return np.stack(drawn)


def _p_value(drawn: Array) -> float:
    """Two-sided, of no difference: how often the bootstrap finds the other sign (counted once more, so that it is
    never zero)."""
    beyond = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * beyond / (len(drawn) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false claim among all stays below what is compared with."""
    order = np.argsort(p_values)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def read_work(folder: Path) -> dict[str, dict[str, float]]:
    """From `folder`/seed_<s>/<method>.json, how the fleet worked while a method learned, over all training seeds: the share
    of steps that people did, success of episodes with and without their help, and minutes of learning and working. Methods
    that only learned from what was there have the minutes alone."""
    found = defaultdict(list)
    for file in sorted(folder.glob("seed_*/*.json")):
        found[file.stem].append(json.loads(file.read_text(encoding="utf-8")))
    return {method: _worked(cells) for method, cells in found.items()}


def _worked(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for cell in cells:
        for wave in cell["waves"]:
            total.update(wave)
    worked = {"minutes": round(sum(cell["wall_s"] for cell in cells) / len(cells) / 60, 1)}
    if total["steps"]:
        worked["human_share"] = round(total["human_steps"] / total["steps"], 4)
    for name, episodes in (("alone", total["episodes"] - total["assisted"]), ("assisted", total["assisted"])):
        if episodes:
            worked[f"success_{name}"] = round(total[f"succeeded_{name}"] / episodes, 4)
    return worked


def table(summary: Mapping[str, Any], methods: Iterable[str]) -> str:
    """Markdown."""
    metrics, intervals = summary["metrics"], summary["intervals"]
    lines = [
        "| method | score | 95 % interval | strict success | long tasks | steps by people | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        if f"score_{method}" in metrics:
            low, high = intervals[f"score_{method}"]
            long = metrics.get(f"long_{method}")
            worked = summary.get("work", {}).get(method, {})
            people = f"{worked['human_share']:.1%}" if "human_share" in worked else ""
            lines.append(
                f"| {method} | {metrics[f'score_{method}']:.3f} | {low:.3f} to {high:.3f} "
                f"| {metrics[f'success_{method}']:.3f} | {'' if long is None else f'{long:.3f}'} "
                f"| {people} | {worked.get('minutes', '')} |"
            )
    return "\n".join(lines)
