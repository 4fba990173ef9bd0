# SPDX-License-Identifier: Apache-2.0
"""The replay: what is drawn, how windows are cut, and what survives a crash."""

import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from lwd_learner import column
from lwd_learner.column import ColumnTooShort
from lwd_learner.ranks import Ranks
from lwd_learner.replay import (
    EVERYTHING,
    Replay,
    ReplayEmpty,
    ReplayLocked,
    ReplayMismatch,
    ReplayMissing,
    ReplayReader,
    Selection,
)
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout
from lwd_learner.shared_replay import SharedReplay

F, H, A = 3, 4, 2
# Segments of three transitions, six chunks, sixteen feature vectors: every test crosses from one into the next.
LAYOUT = ReplayLayout(F, H, A, history=2, feature_key="k", segment_bytes=200)
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


def test_tasks_are_drawn_by_their_weights(opened: Callable[..., Replay]) -> None:
    replay = opened(*(episode(name, name, rows=rows) for name, rows in (("x", 5), ("y", 50), ("z", 5))))
    weights = {"x": 3.0, "z": 0.5}  # y: 1
    batch = replay.sample(100_000, torch.Generator().manual_seed(0), GAMMA, task_weights=weights)
    for name, share in (("x", 3.0), ("y", 1.0), ("z", 0.5)):
        drawn = (batch.task == replay.tasks.index(name)).float().mean().item()
        assert drawn == pytest.approx(share / 4.5, abs=0.01)


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


def test_what_a_crash_left_beyond_the_ledger_is_written_over(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    first, stored = episode("a"), episode("b")
    opened(first).close()
    for file in (tmp_path / "replay").glob("actions.f32.*"):
        used = min(5 * 32, 192) if file.name.endswith("0") else 0
        file.write_bytes(file.read_bytes()[:used].ljust(192, b"\xff"))
    (tmp_path / "replay" / "actions.f32.00001").write_bytes(
        b""
    )  # killed when the file had a name and no size
    with opened(stored) as replay:
        actions = replay.batch(np.arange(10), GAMMA).action
    assert torch.equal(actions, torch.from_numpy(np.concatenate([first.actions, stored.actions])))


def append_until_killed(directory: Path, first: int, promise: int) -> None:
    with Replay(directory, LAYOUT) as replay:
        for number in count(first):
            replay.append(episode(f"e{number}", rows=1 + number % 7))
            os.write(promise, b".")


def test_kill_9_at_any_moment_leaves_whole_episodes(tmp_path: Path) -> None:
    """Every append begins segments here, so kills fall between the creation of one and its first row, too. Every other
    writer is let live until it has promised something, so that there is something to lose."""
    moments = random.Random(0)
    held = 0
    for attempt in range(12):
        read, write = os.pipe()
        writer = multiprocessing.get_context("fork").Process(
            target=append_until_killed, args=(tmp_path / "replay", held, write)
        )
        writer.start()
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            promised = held + len(pipe.read(attempt % 2))
            time.sleep(moments.uniform(0.0, 0.06))
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            promised += len(pipe.read())
        if promised == held and not (tmp_path / "replay" / "ledger.sqlite3").exists():
            continue  # it had hardly begun
        with Replay(tmp_path / "replay", LAYOUT) as replay, ReplayReader(tmp_path / "replay") as reader:
            held = replay.stored
            assert held in (promised, promised + 1)  # all that was promised, at most one that was under way
            expected = [episode(f"e{number}", rows=1 + number % 7) for number in range(held)]
            assert replay.episode_ids == {one.episode_id for one in expected}
            for one in (replay, reader):
                if held:
                    actions = one.batch(one.rows(), GAMMA).action
                    assert torch.equal(
                        actions, torch.from_numpy(np.concatenate([e.actions for e in expected]))
                    )
    assert held >= 6


def test_a_reader_needs_nobody_to_tidy_up_after_a_killed_writer(tmp_path: Path) -> None:
    read, write = os.pipe()
    writer = multiprocessing.get_context("fork").Process(
        target=append_until_killed, args=(tmp_path / "replay", 0, write)
    )
    writer.start()
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        pipe.read(5)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        promised = 5 + len(pipe.read())
    with ReplayReader(tmp_path / "replay") as reader:
        assert reader.stored in (promised, promised + 1)


def fingerprints(directory: Path, stored: int, times: int, send: int) -> None:
    for _ in range(times):
        with ReplayReader(directory, stored) as reader:
            batch = reader.sample(64, torch.Generator().manual_seed(0), GAMMA, n_step=3)
            seen = hashlib.sha256(batch.context.numpy().tobytes() + batch.row.numpy().tobytes()).digest()
        os.write(send, seen)


def test_processes_that_agree_on_a_number_see_the_same_rows_while_another_appends(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    """Also where what they see is superseded meanwhile."""
    replay = opened(episode("a"), episode("b", "y", "online"), episode("c", outcome=UNLABELLED))
    read, write = os.pipe()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            fingerprints(tmp_path / "replay", 3, 20, write)
            os._exit(0)
        pids.append(pid)
    os.close(write)
    replay.append(episode("c", outcome=SUCCESS))
    for number in range(20):
        replay.append(episode(f"later {number}", "x"))
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    with os.fdopen(read, "rb") as pipe:
        seen = pipe.read()
    assert len(seen) == 2 * 20 * 32
    assert len({seen[i : i + 32] for i in range(0, len(seen), 32)}) == 1


def test_a_reader_sees_what_it_is_told_to(opened: Callable[..., Replay], tmp_path: Path) -> None:
    replay = opened(episode("a"), episode("b"))
    with ReplayReader(tmp_path / "replay") as reader:
        assert (reader.seen, len(reader), reader.layout) == (2, 10, LAYOUT)
        reader.count()
        replay.append(episode("c", "new"))
        assert (reader.seen, reader.stored, len(reader), reader.tasks) == (2, 3, 10, ["place"])
        reader.see(3)
        assert (len(reader), reader.count(), reader.tasks) == (15, 15, ["place", "new"])
        reader.see(1)
        assert (len(reader), reader.count(), reader.tasks) == (5, 5, ["place"])
        with pytest.raises(ReplayMissing, match="4 episodes were asked for, 3 are stored"):
            reader.see(4)
        with pytest.raises(IndexError, match="rows 5 to 5"):
            reader.batch(np.array([5]), GAMMA)
    with pytest.raises(ReplayMissing, match="no replay"):
        ReplayReader(tmp_path / "elsewhere")


def test_several_are_appended_as_one(opened: Callable[..., Replay], tmp_path: Path) -> None:
    replay = opened(episode("a"))

    def some_wrong() -> Iterator[ReplayEpisode]:
        yield episode("b")
        yield replace(episode("c"), actions=np.zeros((5, H + 1, A), np.float32))

    with pytest.raises(ValueError, match="c: .*actions"):
        replay.extend(some_wrong())
    assert len(replay) == 5 and replay.stored == 1
    relabelled = episode("d", outcome=SUCCESS)
    assert replay.extend([episode("a"), episode("d", outcome=FAILURE), relabelled, episode("e", "y")]) == 3
    assert len(replay) == 15 and replay.tasks == ["place", "y"]
    assert torch.equal(replay.batch(replay.rows(), GAMMA).action[5:10], torch.from_numpy(relabelled.actions))
    with ReplayReader(tmp_path / "replay") as reader:
        assert reader.episode_ids == {"a", "d", "e"}


def test_an_index_that_followed_appends_is_that_of_a_replay_opened_afterwards(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    demonstrated = Selection(authors=frozenset({HUMAN}))
    selections = [
        EVERYTHING,
        Selection(outcomes=frozenset({SUCCESS})),
        Selection(source="online"),
        Selection(authors=frozenset({POLICY}), outcomes=frozenset({SUCCESS}), otherwise=demonstrated),
    ]
    chance = random.Random(1)
    replay = opened()
    for number in range(40):
        rows = chance.randint(1, 9)
        name = f"e{chance.randint(0, number)}"  # some come again with another label
        one = episode(
            name, chance.choice("xyz"), chance.choice(["offline", "online"]), chance.choice([0, 1, 2]), rows
        )
        one.transitions["author"] = [chance.choice([POLICY, HUMAN]) for _ in range(rows)]
        replay.append(one)
        followed = [replay.rows(selection).tolist() for selection in selections]
        parts = [replay.shard(i, 3) for i in range(3)]
        with ReplayReader(tmp_path / "replay") as fresh:
            assert followed == [fresh.rows(selection).tolist() for selection in selections]
            for selection in selections[:2]:
                if replay.count(selection):
                    drawn = [
                        one.sample(
                            20, torch.Generator().manual_seed(0), GAMMA, selection=selection
                        ).row.tolist()
                        for one in (replay, fresh)
                    ]
                    assert drawn[0] == drawn[1]
            rows_of = [set(part.rows().tolist()) for part in parts]
            assert set.union(*rows_of) == set(fresh.rows().tolist())


def test_shards_part_the_episodes_of_every_task_and_source(opened: Callable[..., Replay]) -> None:
    many = [
        episode(f"{t}{s}{i}", t, s, rows=3) for t in "xy" for s in ("offline", "online") for i in range(5)
    ]
    replay = opened(*many, episode("only one", "z"))
    shards = [replay.shard(i, 2) for i in range(2)]
    first, second = (set(shard.rows().tolist()) for shard in shards)
    shared = set(range(60, 65))  # one episode cannot be parted
    assert first | second == set(range(65)) and first & second == shared
    for shard in shards:
        batch = shard.sample(6000, torch.Generator().manual_seed(0), GAMMA)
        for task in range(3):
            of_task = batch.task == task
            assert of_task.float().mean().item() == pytest.approx(1 / 3, abs=0.02)
            if task < 2:
                assert batch.online[of_task].float().mean().item() == pytest.approx(0.5, abs=0.03)
    replay.append(episode("another", "x"))
    assert set(replay.shard(0, 2).rows().tolist()) >= first  # what a shard has, it keeps
    with pytest.raises(ValueError, match="shard 2 of 2"):
        replay.shard(2, 2)


def test_missing_bytes_are_an_error_and_not_zeros(opened: Callable[..., Replay], tmp_path: Path) -> None:
    opened(episode("a")).close()
    os.truncate(tmp_path / "replay" / "actions.f32.00000", 40)
    with pytest.raises(ColumnTooShort, match=r"actions\.f32\.00000 has 40 of 192 bytes.*; move it away"):
        opened()
    (tmp_path / "replay" / "actions.f32.00000").unlink()
    with pytest.raises(ColumnTooShort, match="0 of 192 bytes"):
        ReplayReader(tmp_path / "replay")


def test_a_segment_that_goes_while_it_is_read_is_an_error_in_words(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    opened(episode("a")).close()
    with ReplayReader(tmp_path / "replay") as replay:
        (tmp_path / "replay" / "actions.f32.00000").unlink()
        with pytest.raises(ColumnTooShort, match=r"actions\.f32\.00000 has 0 of 192 bytes.*; move it away"):
            replay.batch(np.array([0]), GAMMA)


def test_names_that_a_killed_writer_did_not_sync_are_synced_by_the_next(
    opened: Callable[..., Replay], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All segments are there already, so that the second writer creates none."""
    opened(episode("a")).close()
    synced: list[Path] = []
    monkeypatch.setattr(column, "sync_directory", synced.append)
    replay = opened(episode("b", rows=1))
    assert {*synced} == {tmp_path / "replay"}
    replay.close()


def test_a_damaged_ledger_is_refused_in_words(opened: Callable[..., Replay], tmp_path: Path) -> None:
    opened(episode("a")).close()
    (tmp_path / "replay" / "ledger.sqlite3").write_bytes(b"anything else" * 100)
    for opening in (lambda: Replay(tmp_path / "replay", LAYOUT), lambda: ReplayReader(tmp_path / "replay")):
        with pytest.raises(ReplayMismatch, match="not a database.*; move it away"):
            opening()


def test_a_replay_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "replay").mkdir()
    with sqlite3.connect(tmp_path / "replay" / "ledger.sqlite3") as old:
        old.execute("CREATE TABLE layout (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        old.executemany("INSERT INTO layout VALUES (?, ?)", [("format", "1"), ("feature_dim", "3")])
    old.close()
    with pytest.raises(ReplayMismatch, match="format 1 not 2; move it away"):
        Replay(tmp_path / "replay", LAYOUT)
    with pytest.raises(ReplayMismatch, match="format 1 not 2; move it away"):
        ReplayReader(tmp_path / "replay")


def test_a_layout_that_lacks_a_field_is_refused_in_words(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    opened(episode("a")).close()
    with sqlite3.connect(tmp_path / "replay" / "ledger.sqlite3") as damaged:
        damaged.execute("DELETE FROM layout WHERE key = 'horizon'")
    damaged.close()
    with pytest.raises(ReplayMismatch, match="does not say horizon; move it away"):
        ReplayReader(tmp_path / "replay")


class SecondOfTwo(Ranks):
    """The other host, as its replay sees it; the first one has `stored` episodes with this fingerprint."""

    index, size = 1, 2

    def __init__(self, stored: int, fingerprint: int) -> None:
        self._stored, self._said = stored, iter([fingerprint, stored])

    def newest(self, number: int) -> int:
        return next(self._said)

    def least(self, number: int) -> int:
        return min(number, self._stored)


def test_a_copy_of_another_replay_than_the_first_ranks_is_refused(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    with opened(episode("a"), episode("b"), directory="copy") as copy:
        one, two = copy.fingerprint(1), copy.fingerprint(2)
    with opened(episode("b"), episode("a"), directory="turned") as turned:
        assert turned.fingerprint(2) != two
    for stored, fingerprint in ((3, two), (2, two)):  # it ends where the first one goes on, or with it
        SharedReplay(tmp_path / "copy", LAYOUT, SecondOfTwo(stored, fingerprint)).close()
    for stored, fingerprint in ((3, one), (1, one)):  # others in it, or more than the first one has
        with pytest.raises(ReplayMismatch, match="copy is not of the first rank's replay; remove"):
            SharedReplay(tmp_path / "copy", LAYOUT, SecondOfTwo(stored, fingerprint))


def test_one_writer_at_a_time(opened: Callable[..., Replay]) -> None:
    opened(episode("a"))
    with pytest.raises(ReplayLocked):
        opened()


def test_features_of_another_trunk_are_refused(opened: Callable[..., Replay], tmp_path: Path) -> None:
    opened(episode("a")).close()
    with pytest.raises(ReplayMismatch, match='feature_key "k" not "other"'):
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
