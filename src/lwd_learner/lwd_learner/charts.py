# SPDX-License-Identifier: Apache-2.0
"""The charts of a report as inline SVG: colours come from the page's CSS, so they follow light and dark mode.

Every chart is drawn 380 units wide: on a phone a unit is about a pixel, so its text stays readable there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

from lwd_learner.evaluate import Estimate

WIDTH = 380.0
SERIES_COLOURS = 8  # the page's CSS defines --series-0 to --series-7

_POINTS_PER_CURVE = 300  # more than a screen shows; a curve of 100 000 updates would make the page megabytes


@dataclass(frozen=True)
class Mark:
    """One episode on a timeline."""

    at: float
    lane: str
    succeeded: bool
    hint: str


def interval_chart(rows: Sequence[tuple[str, Estimate, str]], low: float, high: float, describe: str) -> str:
    """One row per estimate: label and value above, dot and 95 % interval below. low, high: the axis' range.

    rows: (label, estimate, its value as text).
    """
    row_height, left, right = 50.0, 10.0, WIDTH - 10.0
    bottom = row_height * len(rows)
    x = _scale(low, high, left, right)
    parts = []
    for tick in _ticks(low, high, 5):
        kind = "zero" if tick == 0.0 and low < 0.0 else "grid"
        parts.append(_line(x(tick), 22, x(tick), bottom, kind))
        parts.append(_text(x(tick), bottom + 17, _signed_percent(tick, low < 0.0), "tick middle"))
    for i, (label, estimate, value) in enumerate(rows):
        top = i * row_height
        y = top + 33
        parts.append(_text(left, top + 17, _fitted(label, right - left - 8.0 * len(value)), "label"))
        parts.append(_text(right, top + 17, value, "value end"))
        parts.append(f"<g><title>{escape(f'{label}: {value}')}</title>")
        parts.append(_line(x(estimate.low), y, x(estimate.high), y, "whisker"))
        parts += [_line(x(end), y - 5, x(end), y + 5, "whisker") for end in (estimate.low, estimate.high)]
        parts.append(f'<circle cx="{x(estimate.value):.1f}" cy="{y:.1f}" r="6" class="dot"/></g>')
    return _svg(bottom + 24, describe, parts)


def curve_chart(
    steps: Sequence[float], values: Sequence[float], phases: Sequence[tuple[float, str]], describe: str
) -> str:
    """One learning curve; phases: (first step, name). Points that are not finite are left out."""
    points = [(s, v) for s, v in zip(steps, values, strict=True) if isfinite(s) and isfinite(v)]
    if not points:
        return '<p class="quiet">No finite value was recorded.</p>'
    left, right, top, bottom = 52.0, WIDTH - 10.0, 24.0, 160.0
    first, last = min(s for s, _ in points), max(s for s, _ in points)
    shown = _thinned(points)
    low, high = _padded(min(v for _, v in shown), max(v for _, v in shown))
    x, y = _scale(first, max(last, first + 1e-9), left, right), _scale(low, high, bottom, top)
    parts = []
    inside = [(max(start, first), name) for start, name in phases if start <= last]
    for i, (start, name) in enumerate(inside):
        end = inside[i + 1][0] if i + 1 < len(inside) else last
        if i % 2 == 0:
            width = max(0.0, x(end) - x(start))
            parts.append(
                f'<rect x="{x(start):.1f}" y="{top}" width="{width:.1f}" height="{bottom - top}" class="band"/>'
            )
        parts.append(_text(x(start) + 3, top - 7, _fitted(name, x(end) - x(start)), "tick"))
    for tick in _ticks(low, high, 4):
        parts += [
            _line(left, y(tick), right, y(tick), "grid"),
            _text(left - 6, y(tick) + 4, f"{tick:.4g}", "tick end"),
        ]
    for tick in _ticks(first, last, 4):
        parts.append(_text(x(tick), bottom + 17, f"{tick:,.6g}", "tick middle"))
    if len(shown) == 1:
        parts.append(f'<circle cx="{x(shown[0][0]):.1f}" cy="{y(shown[0][1]):.1f}" r="4" class="dot"/>')
    else:
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in shown)
        parts.append(f'<polyline points="{path}" class="curve"/>')
    return _svg(bottom + 24, describe, parts)


def timeline_chart(
    marks: Sequence[Mark],
    trend: Sequence[tuple[float, float]],
    changes: Sequence[tuple[float, str]],
    describe: str,
) -> str:
    """Success share over time above, one lane of episodes per robot below, a line where a version first worked.

    marks: episodes; trend: (time, share in 0..1); changes: (time, version).
    """
    lanes = sorted({m.lane for m in marks})
    left, right, top, middle, lane_height = 52.0, WIDTH - 12.0, 24.0, 124.0, 38.0
    bottom = middle + 14 + lane_height * len(lanes)
    x = _scale(min(0.0, *(m.at for m in marks)), max(1e-9, *(m.at for m in marks)), left, right)
    y = _scale(0.0, 1.0, middle, top)
    parts = []
    for share in (0.0, 0.5, 1.0):
        parts.append(_line(left, y(share), right, y(share), "grid"))
        parts.append(_text(left - 6, y(share) + 4, _signed_percent(share, False), "tick end"))
    labelled_to = -100.0
    for at, version in changes:
        parts.append(_line(x(at), top, x(at), bottom, "change"))
        if x(at) - labelled_to > 30:  # labels closer than this would be printed over each other
            parts.append(_text(x(at) + (0 if x(at) < right - 20 else -4), top - 7, version, "tick middle"))
            labelled_to = x(at)
    if trend:
        path = " ".join(f"{x(at):.1f},{y(share):.1f}" for at, share in trend)
        parts.append(f'<polyline points="{path}" class="curve"/>')
    for i, lane in enumerate(lanes):
        base = middle + 14 + lane_height * i
        parts += [
            _text(left, base + 12, lane, "tick halo"),
            _line(left, base + 26, right, base + 26, "grid"),
        ]
        for m in marks:
            if m.lane == lane:
                parts.append(_episode(x(m.at), base + 26, m))
    for minute in _ticks(0.0, max(m.at for m in marks), 5):
        parts.append(_text(x(minute), bottom + 16, f"{minute:g} min", "tick middle"))
    return _svg(bottom + 24, describe, parts)


def stacked_bar(stages: Sequence[tuple[str, float]], describe: str) -> str:
    """One bar whose parts have widths in proportion to their values."""
    total = sum(value for _, value in stages)
    at, parts = 0.0, []
    for i, (name, value) in enumerate(stages):
        width = WIDTH * value / total if total > 0.0 else 0.0
        colour = i % SERIES_COLOURS
        parts.append(
            f'<rect x="{at:.2f}" y="0" width="{max(0.0, width - 1.5):.2f}" height="34" rx="2" '
            f'style="fill:var(--series-{colour})"><title>{escape(name)}</title></rect>'
        )
        at += width
    return _svg(34, describe, parts)


def _episode(x: float, y: float, mark: Mark) -> str:
    """A full disc for a success, a cross for a failure: the shape says it without the colour."""
    hint = f"<title>{escape(mark.hint)}</title>"
    if mark.succeeded:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" class="hit">{hint}</circle>'
    return f'<path d="M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6" class="miss">{hint}</path>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps a range of values onto a range of the drawing, clipped to it."""

    def place(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return start + (end - start) * min(1.0, max(0.0, share))

    return place


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _POINTS_PER_CURVE points, each the mean of a run of neighbours."""
    size = ceil(len(points) / _POINTS_PER_CURVE)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in run) / len(run), sum(v for _, v in run) / len(run)) for run in runs]


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within [low, high], about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    magnitude = 10.0 ** floor(log10(raw))
    step = next(m * magnitude for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * magnitude >= raw * (1 - 1e-9))
    return [round(i * step, 12) for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _signed_percent(share: float, signed: bool) -> str:
    text = f"{100 * share:+.0f}" if signed and share else f"{100 * share:.0f}"
    return text.replace("-", "\u2212") + ("" if signed else " %")


def _fitted(text: str, width: float) -> str:
    room = max(0, int(width / 6.5))
    return text if len(text) <= room else text[: max(0, room - 1)] + "\u2026" if room > 3 else ""


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _svg(height: float, describe: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(describe)}">{"".join(parts)}</svg>'
