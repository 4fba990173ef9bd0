# SPDX-License-Identifier: Apache-2.0
"""From outcomes of single episodes to the table: means, intervals over training seeds and scenes, a corrected ladder.

Every method is evaluated on the same scenes from every training seed, so differences are paired twice, over the seeds
that both methods have. The bootstrap resamples training seeds, and scenes within each task.
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
    """Of all methods on the same scenes. Arrays [seeds, tasks, scenes], each with the seeds of its own method."""

    tasks: tuple[str, ...]
    seeds: Mapping[str, tuple[int, ...]]
    success: Mapping[str, Array]
    score: Mapping[str, Array]

    @classmethod
    def read(cls, *folders: Path, only: Sequence[str] = ()) -> Outcomes:
        """All of <folder>/seed_<s>/<method>.csv, of these tasks if any are given. Raises ValueError if two files do not
        have the same scenes, or if there are none."""
        found: defaultdict[str, dict[int, Path]] = defaultdict(dict)
        for file in sorted(file for folder in folders for file in folder.glob("seed_*/*.csv")):
            found[file.stem][int(file.parent.name.removeprefix("seed_"))] = file
        if not found:
            raise ValueError(f"{' and '.join(map(str, folders))}: no outcomes in seed_<s>/<method>.csv")
        seeds = {method: tuple(sorted(files)) for method, files in found.items()}
        rows = {method: [_rows(found[method][seed], only) for seed in seeds[method]] for method in seeds}
        scenes = [(row["task"], int(row["scene"])) for row in next(iter(rows.values()))[0]]
        tasks = tuple(dict.fromkeys(task for task, _ in scenes))

        def cube(method: str, name: str) -> Array:
            for content in rows[method]:
                if [(row["task"], int(row["scene"])) for row in content] != scenes:
                    raise ValueError(f"{method} was not evaluated on the scenes of {next(iter(rows))}")
            return np.array(
                [
                    [[float(row[name]) for row in content if row["task"] == task] for task in tasks]
                    for content in rows[method]
                ]
            )

        return cls(
            tasks,
            seeds,
            {method: cube(method, "success") for method in rows},
            {method: cube(method, "score") for method in rows},
        )

    def difference(self, better: str, than: str) -> Array:
        """[seeds, tasks, scenes] of scores, from the training seeds that both have."""
        common = sorted(set(self.seeds[better]) & set(self.seeds[than]))
        ours, theirs = (
            self.score[method][[self.seeds[method].index(seed) for seed in common]]
            for method in (better, than)
        )
        return ours - theirs


def _rows(file: Path, only: Sequence[str]) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as content:
        return [row for row in csv.DictReader(content) if not only or row["task"] in only]


def summarise(
    outcomes: Outcomes, comparisons: Sequence[tuple[str, str]] = LADDER, seed: int = 0
) -> dict[str, Any]:
    """`metrics`: score_<m> (successes of short tasks, sub-step means of long ones), success_<m> (strict), long_<m>;
    `intervals` of 95 %; `ladder`: differences of scores in the comparisons (the one expected to be better first), with
    intervals and p-values, Holm's corrected ones beside them."""
    long = [place for place, task in enumerate(outcomes.tasks) if task in LONG]
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for method, score in outcomes.score.items():
        columns = {f"score_{method}": score, f"success_{method}": outcomes.success[method]}
        if long:
            columns[f"long_{method}"] = score[:, long]
        for name, values in columns.items():
            metrics[name] = round(float(values.mean()), 4)
            intervals[name] = _interval(_resample(values, seed))
    rungs = [
        (better, than, outcomes.difference(better, than))
        for better, than in comparisons
        if set(outcomes.seeds.get(better, ())) & set(outcomes.seeds.get(than, ()))
    ]
    drawn = [_resample(difference, seed) for _, _, difference in rungs]
    p_values = [_p_value(one) for one in drawn]
    ladder = [
        {
            "better": better,
            "than": than,
            "seeds": len(difference),
            "difference": round(float(difference.mean()), 4),
            "interval": _interval(one),
            "p": p,
            "p_holm": corrected,
        }
        for (better, than, difference), one, p, corrected in zip(
            rungs, drawn, p_values, holm(p_values), strict=True
        )
    ]
    by_task = {
        method: dict(zip(outcomes.tasks, score.mean(axis=(0, 2)).round(4).tolist(), strict=True))
        for method, score in outcomes.score.items()
    }
    return {
        "metrics": metrics,
        "intervals": intervals,
        "seeds": {method: list(seeds) for method, seeds in outcomes.seeds.items()},
        "ladder": ladder,
        "by_task": by_task,
    }


def _resample(values: Array, seed: int) -> Array:
    """[RESAMPLES] means of [S, T, N] over drawn training seeds and, within each task, drawn scenes."""
    rng = np.random.default_rng(seed)
    seeds = rng.integers(values.shape[0], size=(RESAMPLES, values.shape[0]))
    scenes = rng.integers(values.shape[2], size=(RESAMPLES, *values.shape[1:]))
    tasks = np.arange(values.shape[1])[:, None]
    return np.array(
        [values[chosen][:, tasks, places].mean() for chosen, places in zip(seeds, scenes, strict=True)]
    )


def _interval(drawn: Array) -> list[float]:
    low, high = np.quantile(drawn, [0.025, 0.975]).round(4).tolist()
    return [low, high]


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


_COUNTS = ("episodes", "steps", "human_steps", "succeeded_alone", "assisted", "succeeded_assisted")


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
            total.update({name: count for name, count in wave.items() if name in _COUNTS})
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
        "| method | seeds | score | 95 % interval | strict success | long tasks | steps by people | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        if f"score_{method}" in metrics:
            low, high = intervals[f"score_{method}"]
            long = metrics.get(f"long_{method}")
            worked = summary.get("work", {}).get(method, {})
            people = f"{worked['human_share']:.1%}" if "human_share" in worked else ""
            lines.append(
                f"| {method} | {len(summary['seeds'][method])} | {metrics[f'score_{method}']:.3f} | {low:.3f} to {high:.3f} "
                f"| {metrics[f'success_{method}']:.3f} | {'' if long is None else f'{long:.3f}'} "
                f"| {people} | {worked.get('minutes', '')} |"
            )
    return "\n".join(lines)
