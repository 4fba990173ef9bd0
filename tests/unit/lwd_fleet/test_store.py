# SPDX-License-Identifier: Apache-2.0
"""The local store: what is in it is complete and checked, whatever happened on the way."""

import hashlib

import pytest

from lwd_fleet.data.store import BlobDamaged, BlobMissing, LocalStore, Manifest, open_store


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


def _put(store, sealed):
    manifest = Manifest(sealed.summary)
    for file in sealed.summary.files:
        store.put(sealed.path / file.name, file.sha256)
    store.put_manifest(manifest)
    return manifest


def test_blobs_are_found_by_digest_and_checked_when_read(store, tmp_path):
    source = tmp_path / "payload"
    source.write_bytes(b"payload")
    digest = hashlib.sha256(b"payload").hexdigest()
    assert store.size(digest) is None
    store.put(source, digest)
    store.put(source, digest)
    assert store.size(digest) == 7
    store.get(digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"payload"

    (store.root / "blobs" / "sha256" / digest).write_bytes(b"pAyload")
    with pytest.raises(BlobDamaged):
        store.get(digest, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_content_that_changed_since_it_was_hashed_is_not_stored(store, tmp_path):
    source = tmp_path / "payload"
    source.write_bytes(b"other")
    digest = hashlib.sha256(b"payload").hexdigest()
    with pytest.raises(BlobDamaged):
        store.put(source, digest)
    assert store.size(digest) is None and list(store.root.rglob("*.tmp")) == []


def test_missing_blobs_and_manifests_are_named(store, tmp_path):
    with pytest.raises(BlobMissing, match="no blob"):
        store.get("0" * 64, tmp_path / "x")
    with pytest.raises(BlobMissing, match="no manifest"):
        store.manifest("e", "0" * 64)
    with pytest.raises(ValueError, match="not a SHA-256"):
        store.size("../../etc/passwd")


def test_a_manifest_is_refused_before_its_blobs_are_there(store, write_episode):
    sealed = write_episode()
    with pytest.raises(BlobMissing, match="not completely"):
        store.put_manifest(Manifest(sealed.summary))
    manifest = _put(store, sealed)
    assert list(store.manifests()) == [(sealed.episode_id, manifest.digest)]
    assert store.manifest(sealed.episode_id, manifest.digest) == manifest


def test_a_damaged_manifest_is_noticed(store, write_episode):
    manifest = _put(store, write_episode())
    path = next(store.root.glob("manifests/*/*.json"))
    path.write_bytes(path.read_bytes().replace(b'"r1"', b'"r2"'))
    with pytest.raises(BlobDamaged):
        store.manifest(manifest.summary.episode_id, manifest.digest)


def test_stores_are_opened_by_path_or_file_uri(tmp_path):
    assert open_store(f"file://{tmp_path}/a").root == open_store(f"{tmp_path}/a").root
    with pytest.raises(ValueError, match="s3"):
        open_store("s3://bucket/prefix")
