# SPDX-License-Identifier: Apache-2.0
"""Upload and commit: done again after any crash, with the effect of once."""

import shutil

import pytest

from lwd_fleet.data.catalog import Catalog, EpisodeConflict
from lwd_fleet.data.episode import EpisodeRejected, bag_file
from lwd_fleet.data.salvage import salvage
from lwd_fleet.data.store import LocalStore
from lwd_fleet.data.uploader import Uploader


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    yield catalog
    catalog.close()


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "spool"


def test_a_sealed_episode_arrives_whole(spool, store, catalog, write_episode, tmp_path):
    sealed = write_episode()
    uploader = Uploader(spool, store, catalog)
    backlog = uploader.backlog()
    assert (backlog.episodes, backlog.size_bytes) == (1, sealed.summary.size_bytes)
    receipt = uploader.upload(sealed.path)
    assert uploader.receipt(sealed.episode_id) == receipt
    assert uploader.pending() == [] and uploader.backlog().oldest_s is None
    (row,) = catalog.episodes_since(0)
    assert row.seq == receipt.seq and row.summary == sealed.summary
    (file,) = row.summary.files
    store.get(file.sha256, tmp_path / file.name)  # checks the digest
    assert sealed.path.exists()


class Crash(Exception):
    pass


@pytest.mark.parametrize("crash_after", ["blob", "manifest", "commit", "receipt"])
def test_a_crash_after_any_step_is_resumed(spool, store, catalog, write_episode, crash_after):
    def crash(step):
        if step == crash_after:
            raise Crash

    sealed = write_episode()
    with pytest.raises(Crash):
        Uploader(spool, store, catalog, delete_committed=True, step=crash).upload(sealed.path)
    assert sealed.path.exists()  # never deleted before the receipt
    resumed = Uploader(spool, store, catalog, delete_committed=True)
    for path in resumed.pending():
        resumed.upload(path)
    resumed.tidy()
    assert not sealed.path.exists()
    assert [row.episode_id for row in catalog.episodes_since(0)] == [sealed.episode_id]
    assert resumed.receipt(sealed.episode_id).seq == 1


def test_what_is_being_recorded_is_not_touched(spool, store, catalog, write_episode):
    sealed = write_episode()
    shutil.copytree(sealed.path, spool / "other.partial")
    (spool / "quarantine").mkdir()
    assert Uploader(spool, store, catalog).pending() == [sealed.path]


def test_a_damaged_episode_is_set_aside_and_noted(spool, store, catalog, write_episode):
    sealed, good = write_episode(), write_episode()
    file = sealed.path / bag_file(sealed.episode_id)
    file.write_bytes(file.read_bytes()[:-100])
    uploader = Uploader(spool, store, catalog)
    with pytest.raises(EpisodeRejected):
        uploader.upload(sealed.path)
    assert uploader.pending() == [good.path]
    (note,) = catalog.quarantined()
    assert note.episode_id == sealed.episode_id and note.path.startswith(str(spool / "quarantine"))
    assert list(store.manifests()) == []


def test_a_second_content_of_a_committed_episode_is_set_aside(spool, store, catalog, write_episode, tmp_path):
    sealed = write_episode()
    other = tmp_path / "clone"
    shutil.copytree(sealed.path, other / sealed.episode_id)
    file = next((other / sealed.episode_id).glob("*.mcap"))
    partial = other / f"{sealed.episode_id}.partial"
    (other / sealed.episode_id).rename(partial)
    file = partial / file.name
    file.write_bytes(file.read_bytes()[:-100])
    assert salvage(partial).sealed.digest != sealed.digest
    Uploader(spool, store, catalog).upload(sealed.path)
    with pytest.raises(EpisodeConflict):
        Uploader(other, store, catalog).upload(other / sealed.episode_id)
    assert [row.manifest["digest"] for row in catalog.episodes_since(0)] == [sealed.digest]
    assert not (other / sealed.episode_id).exists()
