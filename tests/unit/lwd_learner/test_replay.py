# SPDX-License-Identifier: Apache-2.0
"""The replay: what is drawn, how windows are cut, and what survives a crash."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lwd_learner.column import ColumnTooShort
from lwd_learner.replay import Replay, ReplayEmpty, ReplayLocked, ReplayMismatch, Selection
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout

F, H, A = 3, 4, 2
LAYOUT = ReplayLayout(F, H, A, history=2, feature_key="k")
SUCCESS, FAILURE, UNLABELLED = 1, 2, 0
POLICY, HUMAN = 1, 2
GAMMA = 0.9


def episode(
    name: str,
    task: str = "place",
    source: str = "offline",
    outcome: int = SUCCESS,
    rows: int = 5,
    author: list[int] | None = None,
    executed: int = 3,
) -> ReplayEpisode:
    """A chain of `rows` chunks; feature k of point k is its number, so that contexts can be read."""
    random = np.random.default_rng([*name.encode()])
    labelled = outcome != UNLABELLED
    points = rows + (0 if labelled else 1)
    features = random.normal(size=(points, F)).astype(np.float32)
    features[:, 0] = np.arange(points)
    table = np.zeros(rows, TRANSITION)
    table["point"] = np.arange(rows)
    table["next_point"] = np.arange(1, rows + 1)
    table["executed"], table["planned"] = executed, H
    table["author"] = author or [POLICY] * rows
    if labelled:
        table["next_point"][-1], table["done"][-1], table["reward"][-1] = -1, True, float(outcome == SUCCESS)
    previous = np.maximum(np.arange(points) - 1, 0)
    actions = random.normal(size=(rows, H, A)).astype(np.float32)
    return ReplayEpisode(name, task, source, outcome, features, previous, actions, table)  # type: ignore[arg-type]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Replay]:
    def make(*episodes: ReplayEpisode, directory: str = "replay") -> Replay:
        replay = Replay(tmp_path / directory, LAYOUT)
        for each in episodes:
            assert replay.append(each)
        return replay

    return make


def test_a_row_comes_back_as_it_was_put_in(opened: Callable[..., Replay]) -> None:
    stored = episode("b", outcome=FAILURE)
    replay = opened(episode("a"), stored)
    batch = replay.batch(np.array([5, 7, 9]), GAMMA)
    assert torch.equal(batch.action, torch.from_numpy(stored.actions[[0, 2, 4]]))
    history = stored.features[[[0, 0], [1, 2], [3, 4]]].reshape(3, -1)
    assert torch.equal(batch.context, torch.from_numpy(history))
    assert torch.equal(
        batch.next_context[:2], torch.from_numpy(stored.features[[[0, 1], [2, 3]]].reshape(2, -1))
    )
    assert batch.mask.sum(1).tolist() == [3, 3, 3]
    assert batch.valid.sum(1).tolist() == [4, 4, 4]
    assert torch.allclose(batch.discount, torch.tensor([GAMMA**3, GAMMA**3, 0.0]))
    assert batch.outcome.tolist() == [FAILURE] * 3


def test_a_success_is_discounted_to_the_start_of_its_window(opened: Callable[..., Replay]) -> None:
    batch = opened(episode("a")).batch(np.arange(5), GAMMA, n_step=3)
    assert torch.allclose(batch.reward, torch.tensor([0, 0, GAMMA**8, GAMMA**5, GAMMA**2]))
    assert torch.allclose(batch.discount, torch.tensor([GAMMA**9, GAMMA**9, 0, 0, 0]))
    assert batch.next_context.view(5, 2, F)[:2, 1, 0].tolist() == [3, 4]


def test_one_step_is_the_one_step_view_whatever_the_window_of_others(opened: Callable[..., Replay]) -> None:
    replay = opened(
        episode("a", task="short"), episode("b", task="long"), episode("c", task="long", source="online")
    )
    mixed = replay.batch(np.arange(15), GAMMA, n_step={"long": 10})
    one = replay.batch(np.arange(15), GAMMA)
    for rows in (slice(0, 5), slice(10, 15)):  # a short task; online rows of a long one
        assert torch.equal(mixed.reward[rows], one.reward[rows])
        assert torch.equal(mixed.discount[rows], one.discount[rows])
    assert torch.allclose(mixed.reward[5], torch.tensor(GAMMA**14))
    everywhere = replay.batch(np.arange(15), GAMMA, n_step=10)
    assert torch.equal(everywhere.reward[10:], one.reward[10:])  # online stays one chunk, however it is asked
    assert torch.equal(everywhere.discount[10:], one.discount[10:])


def test_a_window_does_not_cross_a_change_of_author(opened: Callable[..., Replay]) -> None:
    batch = opened(episode("a", author=[POLICY, POLICY, HUMAN, HUMAN, HUMAN])).batch(
        np.arange(5), GAMMA, n_step=10
    )
    assert torch.allclose(batch.reward, torch.tensor([0, 0, GAMMA**8, GAMMA**5, GAMMA**2]))
    assert torch.allclose(batch.discount, torch.tensor([GAMMA**6, GAMMA**3, 0, 0, 0]))
    assert batch.next_context.view(5, 2, F)[:2, 1, 0].tolist() == [2, 2]


def test_a_cut_and_an_unlabelled_end_bootstrap(opened: Callable[..., Replay]) -> None:
    unlabelled = episode("a", outcome=UNLABELLED)
    unlabelled.transitions["cut"][1] = True
    batch = opened(unlabelled).batch(np.arange(5), GAMMA, n_step=10)
    assert (batch.reward == 0).all()
    assert torch.allclose(batch.discount, torch.tensor([GAMMA**6, GAMMA**3, GAMMA**9, GAMMA**6, GAMMA**3]))
    assert batch.next_context.view(5, 2, F)[:, 1, 0].tolist() == [2, 2, 5, 5, 5]


def test_tasks_are_uniform_and_sources_one_to_one(opened: Callable[..., Replay]) -> None:
    replay = opened(
        episode("a", "x", rows=50),
        episode("b", "x", "online", rows=2),
        episode("c", "y", rows=3),
        episode("d", "z", "online", rows=4),
    )
    generator = torch.Generator().manual_seed(0)
    task, online = [], []
    for _ in range(1000):
        batch = replay.sample(256, generator, GAMMA)
        task.append(batch.task)
        online.append(batch.online)
    tasks, from_online = torch.cat(task), torch.cat(online)
    assert replay.tasks == ["x", "y", "z"]
    for t in range(3):
        assert (tasks == t).float().mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert from_online[tasks == 0].float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert not from_online[tasks == 1].any()  # nothing online yet: offline alone
    assert from_online[tasks == 2].all()


def test_the_share_of_online_rows_may_be_set_by_task(opened: Callable[..., Replay]) -> None:
    names = [("a", "x", "offline"), ("b", "x", "online"), ("c", "y", "offline"), ("d", "y", "online")]
    replay = opened(*(episode(name, task, source) for name, task, source in names))
    shares = {"x": 0.8, "y": 0.2}
    batch = replay.sample(100_000, torch.Generator().manual_seed(0), GAMMA, online_share=shares)
    for task, name in enumerate(replay.tasks):
        assert batch.online[batch.task == task].float().mean().item() == pytest.approx(shares[name], abs=0.01)


def test_it_can_be_seen_as_it_was_earlier(opened: Callable[..., Replay]) -> None:
    """Also where a later label took the place of an episode, and where one brought another task."""

    def draw(replay: Replay) -> list[torch.Tensor]:
        batch = replay.sample(64, torch.Generator().manual_seed(0), GAMMA, n_step=3)
        return [batch.context, batch.reward, batch.online, batch.task, batch.row]

    later = [episode("a", outcome=SUCCESS), episode("d", "b", source="online")]
    with opened(episode("a", outcome=FAILURE), episode("b", "x", source="online")) as replay:
        stored, before = replay.stored, draw(replay)
        for one in later:
            replay.append(one)
        after = draw(replay)
        assert replay.stored == stored + 2 and not torch.equal(before[-1], after[-1])
    with opened() as replay:
        replay.see(stored)
        assert replay.episode_ids == {"a", "b"} and len(replay) == 10
        assert all(torch.equal(one, other) for one, other in zip(draw(replay), before, strict=True))
        assert not replay.append(later[0]), "what is there is there, seen or not"
        replay.see(None)
        assert replay.episode_ids == {"a", "b", "d"}
        assert all(torch.equal(one, other) for one, other in zip(draw(replay), after, strict=True))


def test_drawing_is_a_function_of_the_generator(opened: Callable[..., Replay]) -> None:
    replay = opened(episode("a"), episode("b", "y", "online"))
    first, second = (replay.sample(64, torch.Generator().manual_seed(5), GAMMA).row for _ in range(2))
    assert torch.equal(first, second)


def test_a_selection_restricts_authors_outcomes_and_sources(opened: Callable[..., Replay]) -> None:
    replay = opened(
        episode("a", author=[POLICY, POLICY, HUMAN, HUMAN, HUMAN]),
        episode("b", outcome=FAILURE),
        episode("c", source="online"),
    )
    generator = torch.Generator().manual_seed(0)
    human = replay.sample(64, generator, GAMMA, selection=Selection(authors=frozenset({HUMAN})))
    assert set(human.row.tolist()) == {2, 3, 4}
    failed = replay.sample(64, generator, GAMMA, selection=Selection(outcomes=frozenset({FAILURE})))
    assert set(failed.row.tolist()) == set(range(5, 10))
    assert replay.count(Selection(source="online")) == 5
    with pytest.raises(ReplayEmpty, match="15 in 3 episodes"):
        replay.sample(1, generator, GAMMA, selection=Selection(authors=frozenset({9})))


def test_an_episode_is_taken_once_and_a_new_label_replaces_it(opened: Callable[..., Replay]) -> None:
    replay = opened(episode("a", outcome=UNLABELLED), episode("b"))
    assert not replay.append(episode("b"))
    assert len(replay) == 10
    assert replay.append(episode("a", outcome=SUCCESS))
    assert len(replay) == 10
    assert replay.episode_ids == {"a", "b"}
    rows = replay.sample(256, torch.Generator().manual_seed(0), GAMMA).row
    assert rows.min() == 5  # no row of the first version of a
    assert replay.count(Selection(outcomes=frozenset({UNLABELLED}))) == 0


def test_it_reopens_as_it_was(opened: Callable[..., Replay]) -> None:
    with opened(episode("a"), episode("b", "y")) as replay:
        before = replay.sample(32, torch.Generator().manual_seed(0), GAMMA, n_step=4)
    with opened() as replay:
        after = replay.sample(32, torch.Generator().manual_seed(0), GAMMA, n_step=4)
        assert torch.equal(before.context, after.context)
        assert torch.equal(before.reward, after.reward)


def test_what_a_crash_left_beyond_the_ledger_is_cut_off(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    opened(episode("a")).close()
    for name in ("features.f32", "previous.i64", "actions.f32", "transitions.bin"):
        with open(tmp_path / "replay" / name, "ab") as file:
            file.write(b"\xff" * 57)
    stored = episode("b")
    with opened(stored) as replay:
        assert torch.equal(replay.batch(np.arange(5, 10), GAMMA).action, torch.from_numpy(stored.actions))


def test_a_killed_writer_leaves_whole_episodes(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_replay import LAYOUT, Replay, episode
        replay = Replay(Path(sys.argv[1]), LAYOUT)
        for i in range(100_000):
            replay.append(episode(f"e{i}", rows=1 + i % 7))
            print(i, flush=True)
    """)
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "replay"), here],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert child.stdout is not None
    reported = -1
    for line in child.stdout:
        reported = int(line)
        if reported >= 20:
            break
    child.send_signal(signal.SIGKILL)
    reported = max([reported, *(int(line) for line in child.stdout if line.endswith("\n"))])
    child.wait()
    with Replay(tmp_path / "replay", LAYOUT) as replay:
        held = len(replay.episode_ids)
        assert held in (reported + 1, reported + 2)  # all that was promised, at most one that was under way
        assert len(replay) == sum(1 + i % 7 for i in range(held))
        assert replay.batch(replay.rows(), GAMMA).context.isfinite().all()
        assert replay.append(episode("after"))


def test_missing_bytes_are_an_error_and_not_zeros(opened: Callable[..., Replay], tmp_path: Path) -> None:
    opened(episode("a")).close()
    os.truncate(tmp_path / "replay" / "actions.f32", 40)
    with pytest.raises(ColumnTooShort, match=r"actions\.f32"):
        opened()


def test_one_writer_at_a_time(opened: Callable[..., Replay]) -> None:
    opened(episode("a"))
    with pytest.raises(ReplayLocked):
        opened()


def test_features_of_another_trunk_are_refused(opened: Callable[..., Replay], tmp_path: Path) -> None:
    opened(episode("a")).close()
    with pytest.raises(ReplayMismatch, match="feature_key k not other"):
        Replay(tmp_path / "replay", replace(LAYOUT, feature_key="other"))
    assert len(opened()) == 5  # and the refusal left nothing locked


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"features": np.full((5, F), np.nan, np.float32)}, "finiteness"),
        ({"actions": np.zeros((5, H + 1, A), np.float32)}, "actions"),
        ({"previous": np.full(5, 4)}, "previous"),
        ({"source": "elsewhere"}, "source"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_and_changes_nothing(
    opened: Callable[..., Replay], change: dict[str, object], name: str
) -> None:
    replay = opened(episode("a"))
    with pytest.raises(ValueError, match=f"b: .*{name}"):
        replay.append(replace(episode("b"), **change))  # type: ignore[arg-type]
    unfinished = episode("c", outcome=UNLABELLED)
    unfinished.transitions["next_point"][-1] = -1
    with pytest.raises(ValueError, match="done"):
        replay.append(unfinished)
    assert len(replay) == 5


def test_tasks_that_a_selection_has_nothing_of_may_be_drawn_from_another(
    opened: Callable[..., Replay],
) -> None:
    demonstrated = Selection(authors=frozenset({HUMAN}))
    deployed = Selection(authors=frozenset({POLICY}), otherwise=demonstrated)
    stowed = episode("s", "stow", author=[HUMAN] * 5)
    replay = opened(
        episode("h", author=[HUMAN] * 5), episode("p"), stowed, episode("f", "fold", outcome=FAILURE)
    )
    drawn = replay.sample(600, torch.Generator().manual_seed(0), GAMMA, selection=deployed)
    assert set(drawn.row.tolist()) == {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}
    assert replay.count(deployed) == 15 and replay.count(replace(deployed, otherwise=None)) == 10
