# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML page for people (`write_report`) and as numbers for programs (`summary_json`).

The page needs nothing but itself: no network, no script. It claims a difference in words only where the 95 %
interval of the paired comparison excludes zero.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from lwd_learner.charts import SERIES_COLOURS, Mark, curve_chart, interval_chart, stacked_bar, timeline_chart
from lwd_learner.evaluate import Estimate, paired_difference, success_rate
from lwd_learner.report_style import CSS

COMPARISONS = (
    # metric, the one method, the other it is compared with
    ("gain_after_vs_before", "after", "before"),
    ("gain_after_vs_filtered_bc", "after", "filtered_bc"),
    ("gain_offline_vs_before", "offline", "before"),
)

_TREND_EPISODES = 10  # the share of successes over time is that of the latest so many episodes


@dataclass(frozen=True)
class MethodResult:
    """One policy evaluated once per seed."""

    name: str  # "before", "offline", "after", "filtered_bc"; others are shown but not compared
    label: str
    successes: Mapping[int, bool]  # by evaluation seed


@dataclass(frozen=True)
class OnlineEpisode:
    """One episode of the online phase."""

    minute: float  # since the online phase began
    robot: str
    succeeded: bool
    policy_version: str


@dataclass(frozen=True)
class Filmstrip:
    """Camera frames of one episode in order."""

    title: str
    succeeded: bool
    frames: tuple[tuple[str, bytes], ...]  # (caption, JPEG or PNG)


@dataclass(frozen=True)
class DeployedVersion:
    """One policy version that robots received."""

    version: str
    digest: str
    parent: str
    snapshot: str  # of the data it was trained on
    when: str
    robots: tuple[str, ...]  # that ran it


@dataclass(frozen=True)
class EpisodeSource:
    """What one robot contributed to the training data."""

    robot: str
    kind: Literal["ros", "headless"]
    episodes: int
    successes: int


@dataclass(frozen=True)
class RunSummary:
    """Everything a report says. What is left empty is left out of the page."""

    title: str
    created: str  # ISO 8601
    observation: str  # what the policy saw: "pixels, trunk pretrained with privileged keypoints"
    methods: tuple[MethodResult, ...]
    command: str
    commit: str
    machine: str  # "2 cores, CPU model, no GPU"
    wall_s: float  # of the run, after installation
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(
        default_factory=dict
    )  # (steps, values)
    phases: tuple[tuple[float, str], ...] = ()  # (first step, name), in order
    online: tuple[OnlineEpisode, ...] = ()
    filmstrips: tuple[Filmstrip, ...] = ()
    versions: tuple[DeployedVersion, ...] = ()
    sources: tuple[EpisodeSource, ...] = ()
    stages: tuple[tuple[str, float], ...] = ()  # (name, seconds), in order
    multi_stage: MethodResult | None = None  # shown without a claim
    notes: tuple[str, ...] = ()  # what a reader must know to judge the numbers


def rates(run: RunSummary) -> dict[str, Estimate]:
    """Success rate by method name."""
    return {m.name: success_rate(list(m.successes.values())) for m in run.methods}


def comparisons(run: RunSummary) -> dict[str, Estimate]:
    """Paired difference by metric, for those of COMPARISONS whose two methods were evaluated.

    Raises ValueError if two methods were not evaluated on the same seeds.
    """
    by_name = {m.name: m.successes for m in run.methods}
    return {
        metric: paired_difference(by_name[one], by_name[other])
        for metric, one, other in COMPARISONS
        if one in by_name and other in by_name
    }


def summary_json(run: RunSummary) -> dict[str, Any]:
    """The run's numbers in the format of architecture.md section 9; a method not evaluated has no entry."""
    estimates = {f"success_{name}": estimate for name, estimate in rates(run).items()} | comparisons(run)
    metrics: dict[str, float] = {name: estimate.value for name, estimate in estimates.items()}
    seeds = sorted({seed for m in run.methods for seed in m.successes})
    metrics["eval_episodes"] = len(seeds)
    metrics["minutes_after_install"] = run.wall_s / 60.0
    for kind in ("ros", "headless"):
        metrics[f"episodes_{kind}"] = sum(s.episodes for s in run.sources if s.kind == kind)
    return {
        "metrics": metrics,
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "command": run.command,
        "commit": run.commit,
        "seeds": seeds,
        "wall_s": run.wall_s,
        "machine": run.machine,
    }


def write_report(run: RunSummary, path: Path) -> None:
    """Write the page. Raises ValueError if the methods were not evaluated on the same seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(run), encoding="utf-8")


def _page(run: RunSummary) -> str:
    sections = [
        _result(run),
        _pair(_rates(run), _differences(run)),
        _pair(_online(run), _sources(run)),
        _filmstrips(run),
        _curves(run),
        _versions(run),
        _pair(_stages(run), _multi_stage(run) + _provenance(run)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(run.title)}</title>
<style>{CSS}</style>
</head>
<body><main>
<header>
<h1>{escape(run.title)}</h1>
<p class="quiet">{escape(run.created)} · {_duration(run.wall_s)} · {escape(run.machine)}</p>
<span class="pill">Policy observes: {escape(run.observation)}</span>
</header>
{"".join(sections)}
</main></body>
</html>
"""


def _result(run: RunSummary) -> str:
    labels = {m.name: m.label for m in run.methods}
    found = comparisons(run)
    items = [
        _finding(labels[one], labels[other], found[metric])
        for metric, one, other in COMPARISONS
        if metric in found
    ]
    if not items:
        return _section("Result", "<p>No two methods were evaluated, so there is nothing to compare.</p>")
    notes = "".join(f'<p class="quiet">{escape(note)}</p>' for note in run.notes)
    return _section("Result", f'<ul class="findings">{"".join(items)}</ul>' + notes)


def _finding(one: str, other: str, difference: Estimate) -> str:
    """One sentence; it claims a difference only if the interval excludes zero."""
    numbers = f"{_points(difference.value)} points, 95 % interval {_points_interval(difference)}"
    if not difference.excludes_zero:
        return (
            f"<li><strong>No difference was shown between {escape(one)} and {escape(other)}</strong>"
            f"<span>Measured {numbers}; the interval includes zero.</span></li>"
        )
    kind, word = ("better", "more") if difference.value > 0.0 else ("worse", "less")
    return (
        f'<li class="{kind}"><strong>{escape(one)} succeeds {word} often than {escape(other)}</strong>'
        f"<span>{numbers}, on equal seeds.</span></li>"
    )


def _rates(run: RunSummary) -> str:
    if not run.methods:
        return ""
    found = rates(run)
    rows = [
        (
            m.label,
            found[m.name],
            f"{_percent(found[m.name].value)} ({sum(m.successes.values())}/{len(m.successes)})",
        )
        for m in run.methods
    ]
    chart = interval_chart(rows, 0.0, 1.0, "Success rate of each policy with its 95 % interval")
    note = '<p class="quiet">Evaluation seeds that no training used. Bars: 95 % Wilson interval.</p>'
    return _section("Success on the short task", note + chart)


def _differences(run: RunSummary) -> str:
    found, labels = comparisons(run), {m.name: m.label for m in run.methods}
    rows = [
        (f"{labels[one]} − {labels[other]}", found[metric], _points(found[metric].value))
        for metric, one, other in COMPARISONS
        if metric in found
    ]
    if not rows:
        return ""
    reach = max(0.1, *(abs(end) for e in found.values() for end in (e.low, e.high))) * 1.08
    chart = interval_chart(rows, -reach, reach, "Paired differences in success with their 95 % intervals")
    note = (
        '<p class="quiet">Percentage points, seed by seed. Bars: 95 % bootstrap interval over seeds, each for its own '
        "comparison. Where a bar touches zero, no difference was shown.</p>"
    )
    return _section("Paired differences", note + chart)


def _online(run: RunSummary) -> str:
    if not run.online:
        return ""
    episodes = sorted(run.online, key=lambda e: e.minute)
    trend: list[tuple[float, float]] = []
    first_use: dict[str, float] = {}
    for i, episode in enumerate(episodes):
        latest = episodes[max(0, i + 1 - _TREND_EPISODES) : i + 1]
        if len(latest) == min(_TREND_EPISODES, len(episodes)):
            trend.append((episode.minute, sum(e.succeeded for e in latest) / len(latest)))
        first_use.setdefault(episode.policy_version, episode.minute)
    marks = [
        Mark(
            e.minute,
            e.robot,
            e.succeeded,
            f"{e.robot}, {e.policy_version}, {e.minute:.1f} min: {'success' if e.succeeded else 'failure'}",
        )
        for e in episodes
    ]
    changes = [(minute, version) for version, minute in first_use.items()]
    note = (
        f'<p class="quiet">Line: share of successes in the latest {min(_TREND_EPISODES, len(episodes))} episodes of '
        "all robots; it is a view of the training data, not an evaluation. Disc: success; cross: failure; dashed: first "
        "episode of a policy version.</p>"
    )
    chart = timeline_chart(marks, trend, changes, "Success of each robot's episodes over the online phase")
    return _section("While the robots worked", note + chart)


def _filmstrips(run: RunSummary) -> str:
    strips = []
    for strip in run.filmstrips:
        if not strip.frames:
            continue
        outcome = "success" if strip.succeeded else "failure"
        frames = "".join(
            f'<figure><img src="{_data_uri(image)}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, image in strip.frames
        )
        strips.append(f'<h3>{escape(strip.title)} ({outcome})</h3><div class="strip">{frames}</div>')
    return _section("What the cameras saw", "".join(strips)) if strips else ""


def _curves(run: RunSummary) -> str:
    charts = [
        f"<div><h3>{escape(name)}</h3>{curve_chart(steps, values, run.phases, f'{name} over training')}</div>"
        for name, (steps, values) in run.curves.items()
        if len(steps)
    ]
    if not charts:
        return ""
    return _section(
        "Learning curves",
        f'<p class="quiet">Horizontal: gradient updates.</p><div class="charts">{"".join(charts)}</div>',
    )


def _stages(run: RunSummary) -> str:
    if not run.stages:
        return ""
    total = sum(seconds for _, seconds in run.stages)
    rows = [
        (
            f'<span class="key" style="background:var(--series-{i % SERIES_COLOURS})"></span>{escape(name)}',
            _duration(seconds),
            _percent(round(seconds / total, 2)) if total > 0.0 else "",
        )
        for i, (name, seconds) in enumerate(run.stages)
    ]
    bar = stacked_bar(run.stages, "Time spent in each stage")
    return _section("Where the time went", bar + _table(("Stage", "Time", "Share"), rows, numbers=(1, 2)))


def _sources(run: RunSummary) -> str:
    if not run.sources:
        return ""
    kinds = {"ros": "ROS", "headless": "headless"}
    rows = [
        (escape(s.robot), kinds[s.kind], str(s.episodes), f"{s.successes}" + _share(s.successes, s.episodes))
        for s in run.sources
    ]
    episodes, successes = sum(s.episodes for s in run.sources), sum(s.successes for s in run.sources)
    rows.append(("<b>all</b>", "", f"<b>{episodes}</b>", f"<b>{successes}</b>" + _share(successes, episodes)))
    table = _table(("Robot", "Runs as", "Episodes", "Successes"), rows, numbers=(2, 3))
    return _section("Where the episodes came from", table)


def _versions(run: RunSummary) -> str:
    if not run.versions:
        return ""
    rows = [
        (
            f"<b>{escape(v.version)}</b>",
            _short_code(v.digest),
            escape(v.parent),
            _short_code(v.snapshot),
            escape(v.when),
            escape(", ".join(v.robots)) or "none",
        )
        for v in run.versions
    ]
    heads = ("Version", "Digest", "Parent", "Snapshot", "When", "Robots that ran it")
    return _section("Policy versions deployed", _table(heads, rows))


def _multi_stage(run: RunSummary) -> str:
    result = run.multi_stage
    if result is None or not result.successes:
        return ""
    rate = success_rate(list(result.successes.values()))
    return _section(
        "Multi-stage task",
        f"<p>{escape(result.label)}: {sum(result.successes.values())} of {len(result.successes)} episodes succeeded "
        f"({_percent(rate.value)}, 95 % interval {_percent(rate.low)} to {_percent(rate.high)}).</p>"
        '<p class="quiet">Shown to say that it runs. No claim is made about it.</p>',
    )


def _provenance(run: RunSummary) -> str:
    seeds = sorted({seed for m in run.methods for seed in m.successes})
    span = f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}" if seeds else "none"
    return _section(
        "How to repeat this",
        f"<dl><dt>Command</dt><dd><code>{escape(run.command)}</code></dd>"
        f"<dt>Commit</dt><dd><code>{escape(run.commit)}</code></dd>"
        f"<dt>Machine</dt><dd>{escape(run.machine)}</dd>"
        f"<dt>Evaluation</dt><dd>{span}</dd></dl>",
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _pair(*columns: str) -> str:
    """The columns that are not empty: side by side where there is room, else below each other."""
    return '<div class="pair">' + "".join(f"<div>{column}</div>" for column in columns if column) + "</div>\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: tuple[int, ...] = ()) -> str:
    """rows: cells that are already HTML; numbers: the columns to align right."""
    kind = [' class="number"' if i in numbers else "" for i in range(len(heads))]
    head = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kind, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(image).decode('ascii')}"


def _short_code(text: str) -> str:
    """The first characters of a digest; the whole as its hint."""
    return f'<code title="{escape(text)}">{escape(text.removeprefix("sha256:")[:12])}</code>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _share(part: int, whole: int) -> str:
    return f' <span class="quiet">({round(100 * part / whole)} %)</span>' if whole else ""


def _points(difference: float) -> str:
    text = f"{100 * difference:+.1f}".removesuffix(".0").replace("-", "−")
    return "0" if text in ("+0", "−0") else text


def _points_interval(difference: Estimate) -> str:
    return f"{_points(difference.low)} to {_points(difference.high)}"


def _duration(seconds: float) -> str:
    if seconds < 60.0:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
