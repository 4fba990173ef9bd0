# SPDX-License-Identifier: Apache-2.0
"""The catalog: every episode once, in an order that never changes, from any number of processes."""

import multiprocessing
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwd_fleet.data.catalog import POLICY_TRANSITIONS, Catalog, EpisodeConflict, PolicyStateError
from lwd_fleet.data.store import Manifest
from lwd_fleet.data.summary import EpisodeSummary, FileEntry, PolicyInterval


def make_manifest(number: int, content: int = 0, outcome: str = "unlabelled") -> Manifest:
    digest = f"{number:032x}{content:032x}"
    return Manifest(
        EpisodeSummary(
            format_version=1,
            episode_id=f"episode-{number}",
            robot="r1",
            source="robot",
            truncated="",
            task="place",
            instruction="put it there",
            outcome=outcome,
            outcome_source="detector",
            end_reason="",
            sub_step_scores=(1.0,),
            seed=number,
            steps=10,
            authors={"policy": 10},
            policy_intervals=(PolicyInterval(2, "d", 0, 9),),
            message_counts={"/r1/episode": 3},
            start_ns=5_000_000_000,
            end_ns=6_000_000_000,
            digest=digest,
            files=(FileEntry(f"episode-{number}_0.mcap", digest, 100),),
        )
    )


@pytest.fixture
def catalog(tmp_path):
    with Catalog(tmp_path / "catalog.sqlite", clock=lambda: 1234.5) as catalog:
        yield catalog


def test_a_committed_episode_can_be_read_back(catalog):
    manifest = make_manifest(1)
    assert catalog.commit_episode(manifest) == 1
    (row,) = catalog.episodes_since(0)
    assert row.summary == manifest.summary and row.manifest_digest == manifest.digest
    assert (row.seq, row.robot, row.policy_version, row.steps) == (1, "r1", 2, 10)
    assert (row.created_s, row.committed_s) == (5.0, 1234.5)
    assert catalog.episode("episode-1") == row and catalog.episode("episode-2") is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=25))
def test_duplicates_and_any_order_give_each_episode_one_number(deliveries):
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(f"{folder}/c.sqlite")
        numbers = {}
        for number in deliveries:
            seq = catalog.commit_episode(make_manifest(number))
            assert numbers.setdefault(number, seq) == seq
        rows = catalog.episodes_since(0)
        assert [row.seq for row in rows] == list(range(1, len(numbers) + 1))
        assert {row.episode_id: row.seq for row in rows} == {f"episode-{k}": v for k, v in numbers.items()}
        assert catalog.snapshot() == (len(numbers), 0)
        catalog.close()


def test_another_content_under_the_same_id_goes_to_quarantine(catalog):
    first, second = make_manifest(1), make_manifest(1, content=9)
    catalog.commit_episode(first)
    for _ in range(2):
        with pytest.raises(EpisodeConflict, match="kept in quarantine"):
            catalog.commit_episode(second, path="/spool/episode-1")
    (row,) = catalog.episodes_since(0)
    assert row.manifest_digest == first.digest
    (refused,) = catalog.quarantined()
    assert (refused.episode_id, refused.path) == ("episode-1", "/spool/episode-1")
    assert second.digest[:12] in refused.reason


def test_episodes_since_continues_where_a_reader_stopped(catalog):
    for number in range(5):
        catalog.commit_episode(make_manifest(number))
    assert [row.seq for row in catalog.episodes_since(0, limit=2)] == [1, 2]
    assert [row.seq for row in catalog.episodes_since(2)] == [3, 4, 5]
    assert catalog.cursor("learner") == 0
    catalog.set_cursor("learner", 2)
    catalog.set_cursor("learner", 4)
    assert catalog.cursor("learner") == 4 and catalog.cursor("other") == 0


def test_episodes_are_found_by_the_beginning_of_their_id(catalog):
    for number in (10, 2, 1):
        catalog.commit_episode(make_manifest(number))
    assert [row.episode_id for row in catalog.episodes_named("episode-1")] == ["episode-1", "episode-10"]
    assert catalog.episodes_named("episode_1") == catalog.episodes_named("%") == []


def test_a_snapshot_means_the_same_after_later_verdicts(catalog):
    catalog.commit_episode(make_manifest(1, outcome="failure"))
    catalog.commit_episode(make_manifest(2))
    catalog.label("episode-2", "failure", "operator:anna")
    before = catalog.snapshot()
    catalog.label("episode-2", "success", "operator:anna", [1.0, 0.5])
    catalog.label("episode-3", "success", "operator:anna")  # not committed yet
    catalog.commit_episode(make_manifest(3))
    assert before == (2, 1)
    assert catalog.outcomes(before) == {"episode-1": "failure", "episode-2": "failure"}
    assert catalog.outcomes(catalog.snapshot()) == {
        "episode-1": "failure",
        "episode-2": "success",
        "episode-3": "success",
    }
    assert [row.sub_step_scores for row in catalog.labels("episode-2")] == [[], [1.0, 0.5]]
    with pytest.raises(ValueError, match="one of unlabelled, success, failure"):
        catalog.label("episode-1", "won", "x")


def test_policy_versions_rise_and_the_same_digest_is_the_same_version(catalog):
    first = catalog.register_policy("a" * 64, "file:///a", (10, 2), metrics={"loss": 0.5})
    second = catalog.register_policy("b" * 64, "file:///b", (20, 3), parent=first)
    assert (first, second) == (1, 2)
    assert catalog.register_policy("a" * 64, "file:///a", (10, 2)) == first
    row = catalog.policy(second)
    assert (row.parent, row.snapshot_n, row.label_m, row.state) == (1, 20, 3, "candidate")
    assert catalog.policy(first).metrics == {"loss": 0.5}
    assert [row.version for row in catalog.policies()] == [1, 2]


def _policy_in_state(catalog, state):
    version = catalog.register_policy(f"{len(catalog.policies()):064x}", "file:///p", (0, 0))
    path = {
        "candidate": (),
        "canary": ("canary",),
        "active": ("active",),
        "retired": ("retired",),
        "rolled_back": ("canary", "rolled_back"),
    }[state]
    for step in path:
        catalog.set_policy_state(version, step)
    return version


@pytest.mark.parametrize("state", POLICY_TRANSITIONS)
@pytest.mark.parametrize("wanted", POLICY_TRANSITIONS)
def test_policy_states_change_only_along_the_table(catalog, state, wanted):
    version = _policy_in_state(catalog, state)
    if wanted == state or wanted in POLICY_TRANSITIONS[state]:
        catalog.set_policy_state(version, wanted)
        assert catalog.policy(version).state == wanted
    else:
        with pytest.raises(PolicyStateError, match=f"is {state}"):
            catalog.set_policy_state(version, wanted)
        assert catalog.policy(version).state == state


def test_there_is_one_active_policy_and_a_rollback_returns_to_the_one_before(catalog):
    assert catalog.desired_policy() is None
    versions = [_policy_in_state(catalog, "active") for _ in range(3)]
    assert [row.state for row in catalog.policies()] == ["retired", "retired", "active"]
    assert catalog.roll_back(versions[2]).version == versions[1]
    assert [row.state for row in catalog.policies()] == ["retired", "active", "rolled_back"]
    canary = _policy_in_state(catalog, "canary")
    assert catalog.roll_back(canary).version == versions[1]
    with pytest.raises(PolicyStateError, match="no policy version 99"):
        catalog.set_policy_state(99, "active")


def _commit_and_label(path: str, numbers: list[int]) -> None:
    catalog = Catalog(path)
    for number in numbers:
        catalog.commit_episode(make_manifest(number))
        catalog.label(f"episode-{number}", "success", "test")
        catalog.register_policy(f"{number:064x}", "file:///p", catalog.snapshot())
    catalog.close()


def test_processes_commit_at_the_same_time_without_losing_or_doubling(tmp_path):
    path = str(Path(tmp_path) / "catalog.sqlite")
    context = multiprocessing.get_context("spawn")
    parts = [list(range(40)), list(range(39, 19, -1)), list(range(10, 50))]
    processes = [context.Process(target=_commit_and_label, args=(path, part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    catalog = Catalog(path)
    rows = catalog.episodes_since(0)
    assert [row.seq for row in rows] == list(range(1, 51))
    assert len({row.episode_id for row in rows}) == 50
    assert catalog.snapshot() == (50, sum(map(len, parts)))
    assert [row.version for row in catalog.policies()] == list(range(1, 51))
    catalog.close()
