# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import pytest

from lwd_learner.evaluate import paired_difference, success_rate
from lwd_learner.report import (
    DeployedVersion,
    EpisodeSource,
    Filmstrip,
    MethodResult,
    OnlineEpisode,
    RunSummary,
    summary_json,
    write_report,
)

SEEDS = range(1000, 1200)
VOID = {"meta", "img", "br", "link", "input", "hr"}
JPEG = b"\xff\xd8\xff\xe0invented"


def evaluated(name: str, successes: int, label: str | None = None) -> MethodResult:
    return MethodResult(
        name, label or f"Policy {name}", {seed: i < successes for i, seed in enumerate(SEEDS)}
    )


def bare(*methods: MethodResult) -> RunSummary:
    return RunSummary(
        title="Push",
        created="2025-01-07T12:30:00Z",
        observation="keypoints",
        methods=methods,
        command="make demo",
        commit="c0ffee",
        machine="2 cores, no GPU",
        wall_s=810.0,
    )


def full() -> RunSummary:
    methods = (
        evaluated("before", 80),
        evaluated("offline", 80),
        evaluated("after", 130),
        evaluated("filtered_bc", 90),
    )
    return replace(
        bare(*methods),
        curves={"critic loss": ([0, 10, 20], [3.0, 2.0, 1.5]), "flow loss": ([5], [0.25])},
        phases=((0, "offline RL"), (10, "online")),
        online=(OnlineEpisode(0.5, "robot_1", False, "v1"), OnlineEpisode(1.5, "robot_2", True, "v2")),
        filmstrips=(
            Filmstrip("robot_2", True, (("0.0 s", JPEG),)),
            Filmstrip("robot_1", False, (("0.1 s", JPEG),)),
        ),
        versions=(
            DeployedVersion("v2", "sha256:0123456789abcdef", "v1", "snap-7", "12:40", ("robot_1", "robot_2")),
        ),
        sources=(EpisodeSource("robot_1", "ros", 20, 12), EpisodeSource("worker", "headless", 40, 10)),
        stages=(("offline RL", 125.0), ("evaluation", 59.0)),
        multi_stage=evaluated("multi_stage", 20, "Pick and close"),
        notes=("Two cores only.",),
    )


class Page(HTMLParser):
    """Fails on a tag closed out of order; collects the text a person reads and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def html_of(run: RunSummary, tmp_path: Path) -> str:
    path = tmp_path / "runs" / "a" / "report.html"
    write_report(run, path)
    return path.read_text(encoding="utf-8")


def test_the_numbers_of_the_run_are_on_the_page(tmp_path: Path) -> None:
    text = Page(html_of(full(), tmp_path)).text
    for number in (
        "40 % (80/200)",
        "65 % (130/200)",
        "45 % (90/200)",
        "+25",
        "+20",
        "13 min 30 s",
        "2 min 05 s",
    ):
        assert number in text
    for words in (
        "keypoints",
        "robot_1, robot_2",
        "0123456789ab",
        "snap-7",
        "c0ffee",
        "make demo",
        "200 seeds",
    ):
        assert words in text


def test_a_gain_is_claimed_where_the_interval_excludes_zero(tmp_path: Path) -> None:
    text = Page(html_of(bare(evaluated("before", 80), evaluated("after", 130)), tmp_path)).text
    assert "Policy after succeeds more often than Policy before" in text
    assert "No difference was shown" not in text


def test_a_loss_is_told_as_a_loss(tmp_path: Path) -> None:
    text = Page(html_of(bare(evaluated("before", 130), evaluated("after", 80)), tmp_path)).text
    assert "Policy after succeeds less often than Policy before" in text


@pytest.mark.parametrize("after", [99, 100, 101], ids=["slightly worse", "equal", "slightly better"])
def test_nothing_is_claimed_where_the_interval_includes_zero(after: int, tmp_path: Path) -> None:
    text = Page(html_of(bare(evaluated("before", 100), evaluated("after", after)), tmp_path)).text
    assert "No difference was shown between Policy after and Policy before" in text
    assert "more often" not in text
    assert "less often" not in text


def test_the_multi_stage_task_is_shown_without_a_claim(tmp_path: Path) -> None:
    text = Page(html_of(full(), tmp_path)).text
    assert "20 of 200 episodes succeeded" in text
    assert "No claim is made" in text


def test_methods_of_different_seeds_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    run = bare(evaluated("before", 80), MethodResult("after", "After", {1: True}))
    with pytest.raises(ValueError, match="not paired"):
        html_of(run, tmp_path)
    assert not list(tmp_path.rglob("*.html"))


def test_hostile_text_is_text(tmp_path: Path) -> None:
    hostile = "\"'><script>alert(1)</script>"
    run = full()
    run = replace(
        run,
        **dict.fromkeys(("title", "created", "observation", "command", "commit", "machine"), hostile),
        methods=tuple(replace(m, label=hostile) for m in run.methods),
        curves={hostile: ([0, 1], [0.0, 1.0])},
        phases=((0, hostile),),
        online=(OnlineEpisode(0.5, hostile, True, hostile),),
        filmstrips=(Filmstrip(hostile, True, ((hostile, JPEG),)),),
        versions=(DeployedVersion(*[hostile] * 5, (hostile,)),),
        sources=(EpisodeSource(hostile, "ros", 1, 1),),
        stages=((hostile, 1.0),),
        multi_stage=evaluated("multi_stage", 1, hostile),
        notes=(hostile,),
    )
    html = html_of(run, tmp_path)
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert hostile in page.text


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    html = html_of(full(), tmp_path)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert all(value.startswith("data:image/") for name, value in page.attributes if name in ("src", "href"))
    assert not page.tags & {"script", "link", "iframe", "object"}


def test_what_a_run_does_not_have_is_left_out(tmp_path: Path) -> None:
    text = Page(html_of(bare(evaluated("before", 80)), tmp_path)).text
    assert "nothing to compare" in text
    for title in (
        "Learning curves",
        "cameras",
        "Policy versions",
        "time went",
        "episodes came",
        "Multi-stage",
    ):
        assert title not in text


def test_a_run_without_any_evaluation_still_has_a_page(tmp_path: Path) -> None:
    assert "nothing to compare" in Page(html_of(bare(), tmp_path)).text


@pytest.mark.parametrize(
    "curve",
    [([], []), ([0], [1.0]), ([0, 1], [nan, nan]), ([0, 1], [2.0, 2.0]), (range(100_000), [0.0] * 100_000)],
    ids=["empty", "one point", "never finite", "constant", "long"],
)
def test_any_curve_can_be_drawn_in_little_space(curve: tuple[list[int], list[float]], tmp_path: Path) -> None:
    html = html_of(replace(full(), curves={"loss": curve}), tmp_path)
    Page(html)
    assert not re.search(r'"[^"]*\bnan\b[^"]*"', html)
    assert len(html) < 60_000


def test_the_summary_has_each_metric_and_its_interval() -> None:
    run = full()
    after, before = run.methods[2].successes, run.methods[0].successes
    rate, gain = success_rate(list(after.values())), paired_difference(after, before)
    summary = summary_json(run)
    assert summary["metrics"] == {
        "success_before": 0.4,
        "success_offline": 0.4,
        "success_after": 0.65,
        "success_filtered_bc": 0.45,
        "gain_after_vs_before": 0.25,
        "gain_after_vs_filtered_bc": 0.2,
        "gain_offline_vs_before": 0.0,
        "eval_episodes": 200,
        "minutes_after_install": 13.5,
        "episodes_ros": 20,
        "episodes_headless": 40,
    }
    assert summary["intervals"]["success_after"] == [rate.low, rate.high]
    assert summary["intervals"]["gain_after_vs_before"] == [gain.low, gain.high]
    assert set(summary["intervals"]) == {m for m in summary["metrics"] if m.startswith(("success_", "gain_"))}
    assert summary["seeds"] == list(SEEDS)
    assert {k: summary[k] for k in ("command", "commit", "wall_s", "machine")} == {
        "command": "make demo",
        "commit": "c0ffee",
        "wall_s": 810.0,
        "machine": "2 cores, no GPU",
    }


def test_a_method_that_was_not_evaluated_has_no_number() -> None:
    metrics = summary_json(bare(evaluated("before", 80), evaluated("after", 90)))["metrics"]
    assert "success_filtered_bc" not in metrics
    assert "gain_after_vs_filtered_bc" not in metrics
