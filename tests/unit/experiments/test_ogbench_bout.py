# SPDX-License-Identifier: Apache-2.0
"""A bout is fair and repeats: same start for all, nothing seen of each other, and a kill changes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from experiments.ogbench_play.batches import ChunkSampler, Play
from experiments.ogbench_play.bout import Act, Bout, Competitor, Context, Entry, Harness
from lwd_learner.extraction.awr import AwrConfig
from lwd_learner.extraction.cloning import CloningConfig
from lwd_learner.extraction.edit import EditConfig
from lwd_learner.extraction.one_step import OneStepConfig
from lwd_learner.qam import QamConfig

HARNESS = Harness(
    width=16, layers=1, horizon=2, batch=16, clone_updates=6, updates=6, evaluate_every=3, episodes=4
)
QAM = QamConfig(steps=3, temperature="fixed", fixed_lambda=0.1)
ENTRIES = (
    Entry("bc", "", CloningConfig()),
    Entry("awr", "", AwrConfig(0.1)),
    Entry("fql", "", CloningConfig(), OneStepConfig(), None, 8),
    Entry("qam", "", QAM, None, 8),
    Entry("qam_edit", "", QAM, EditConfig(), 8, 8),
)


class FirstActionIsPositive:
    """Succeeds half of the time for a policy of noise, and at each seed the same."""

    environment, index, name = "toy", 1, "toy-1"

    def succeeds(self, act: Act, context: Context, noise_steps: int, seed: int) -> bool:
        noise = torch.randn((1, noise_steps, 2), generator=torch.Generator().manual_seed(seed))
        return bool(act(context(np.zeros((1, 3), np.float32)), noise)[0, 0, 0] > 0)


def bout(entries: tuple[Entry, ...] = ENTRIES, updates: int = HARNESS.updates, seed: int = 0) -> Bout:
    rng = np.random.default_rng(0)
    rows = 60
    success = rng.random(rows) < 0.1
    play = Play(
        observations=rng.normal(size=(rows, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        last=np.arange(rows) % 20 == 19,
        rewards=success.astype(np.float32) - 1,
        success=success,
    )
    sampler = ChunkSampler(play, 1, HARNESS.horizon, 0.99)
    return Bout(replace(HARNESS, updates=updates), FirstActionIsPositive(), sampler, seed, entries)


def ignore(competitor: Competitor) -> None:
    pass


def outcome(one: Bout, method: str) -> list[torch.Tensor]:
    """All weights that decide what a method does."""
    competitor = next(found for found in one.competitors if found.entry.method == method)
    modules = [competitor.flow.actor.expert]
    if competitor.head is not None:
        modules += list(competitor.head.modules.values())
    return [parameter.detach() for module in modules for parameter in module.parameters()]


def equal(left: Bout, right: Bout, method: str) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outcome(left, method), outcome(right, method), strict=True))


def test_an_interrupted_bout_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = bout()
    whole.run(tmp_path / "whole", tmp_path / "start_of_whole", ignore)
    bout(updates=3).run(tmp_path / "parts", tmp_path / "start_of_parts", ignore)
    rest = bout()
    rest.run(tmp_path / "parts", tmp_path / "start_of_parts", ignore)
    for before, after in zip(whole.competitors, rest.competitors, strict=True):
        assert equal(whole, rest, before.entry.method)
        assert [point["successes"] for point in before.curve] == [point["successes"] for point in after.curve]


def test_methods_do_not_see_each_other(tmp_path: Path) -> None:
    together = bout()
    together.run(tmp_path / "together", tmp_path / "start", ignore)
    for entry in ENTRIES:
        alone = bout((entry,))
        alone.run(tmp_path / entry.method, tmp_path / "start", ignore)
        assert equal(together, alone, entry.method)


def test_all_methods_learn_from_the_cloned_policy_on(tmp_path: Path) -> None:
    untrained = bout(updates=0)
    untrained.run(tmp_path / "state", tmp_path / "start", ignore)
    cloned = list(untrained.cloned.expert.parameters())
    for competitor in untrained.competitors:
        flow = list(competitor.flow.actor.expert.parameters())
        assert all(torch.equal(a, b) for a, b in zip(cloned, flow, strict=True))
        assert untrained.result(competitor)["curve"][0] == untrained.start


def test_whoever_asks_is_told_of_every_evaluation_also_after_a_kill(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []

    def hear(competitor: Competitor) -> None:
        heard.append((competitor.entry.method, len(competitor.curve)))

    bout(ENTRIES[:1], updates=3).run(tmp_path / "state", tmp_path / "start", hear)
    bout(ENTRIES[:1]).run(tmp_path / "state", tmp_path / "start", hear)
    assert heard == [("bc", 0), ("bc", 1), ("bc", 1), ("bc", 2)]


def test_a_state_of_another_harness_is_refused(tmp_path: Path) -> None:
    bout().run(tmp_path / "state", tmp_path / "start", ignore)
    other = bout()
    other.harness = replace(HARNESS, batch=8)
    try:
        other.run(tmp_path / "state", tmp_path / "start", ignore)
    except ValueError as error:
        assert "remove it" in str(error)
    else:
        raise AssertionError("continued with another batch size")


def test_processor_time_counts_what_is_shared_and_what_is_own(tmp_path: Path) -> None:
    one = bout()
    one.run(tmp_path / "state", tmp_path / "start", ignore)
    last = {competitor.entry.method: competitor.curve[-1]["cpu_s"] for competitor in one.competitors}
    values, clone = one.clocks["values"].cpu_s, one.clocks["clone"].cpu_s
    flows = {competitor.entry.method: competitor.flow.clock.cpu_s for competitor in one.competitors}
    heads = {competitor.entry.method: competitor.clock.cpu_s for competitor in one.competitors}
    assert last["bc"] <= clone + flows["bc"]
    assert last["qam"] > values and heads["qam"] == 0.0
    assert last["qam_edit"] - last["qam"] > 0.9 * heads["qam_edit"] > 0.0
