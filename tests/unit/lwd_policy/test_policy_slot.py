# SPDX-License-Identifier: Apache-2.0
"""Versions of the policy change between episodes only, and one that cannot be used changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from lwd_policy import checkpoint
from lwd_policy.checkpoint import CheckpointRefused
from lwd_policy.embodiment import Embodiment
from lwd_policy.policy_slot import LoadedPolicy, PolicySlot, PolicyVersion, check_form, load_policy

BETWEEN, WITHIN = True, False
STEP_HZ = 10.0  # of the robot; `make_policy` makes policies with steps of 0.1 s
DIGEST = "0123456789abcdef" * 4


def version(number: int) -> PolicyVersion:
    return PolicyVersion(number, f"file:///policies/{number}", DIGEST)


def ready(number: int) -> LoadedPolicy:
    return LoadedPolicy(version(number), Mock(), Mock())


def active(slot: PolicySlot) -> int | None:
    return None if slot.active is None else slot.active.version.version


@pytest.fixture
def running() -> PolicySlot:
    """Version 1 runs."""
    slot = PolicySlot()
    assert slot.want(version(1))
    slot.loaded(ready(1))
    assert slot.swap(BETWEEN)
    return slot


def test_a_new_version_takes_over_between_episodes_only(running: PolicySlot) -> None:
    assert running.want(version(2))
    assert not running.swap(BETWEEN), "it is not loaded yet"
    running.loaded(ready(2))
    assert not running.swap(WITHIN)
    assert active(running) == 1
    assert running.swap(BETWEEN)
    assert active(running) == 2
    assert not running.swap(BETWEEN), "there is nothing new"


def test_the_first_version_need_not_wait_for_the_end_of_an_episode() -> None:
    slot = PolicySlot()
    slot.want(version(1))
    slot.loaded(ready(1))
    assert slot.swap(WITHIN)
    assert active(slot) == 1


def test_a_refused_version_leaves_the_old_one_in_charge(running: PolicySlot) -> None:
    running.want(version(2))
    running.refuse(version(2), "damaged")
    assert not running.swap(BETWEEN)
    assert active(running) == 1
    assert running.refused == (version(2), "damaged")
    assert running.want(version(2)), "asked for again, it is tried again: the file may be whole now"


def test_a_refusal_is_withdrawn_once_the_same_version_can_be_used(running: PolicySlot) -> None:
    running.want(version(2))
    running.refuse(version(2), "damaged")
    running.want(version(2))
    running.loaded(ready(2))
    assert running.refused is None


def test_a_version_is_loaded_once_however_often_it_is_wanted(running: PolicySlot) -> None:
    assert not running.want(version(1)), "it runs"
    assert running.want(version(2))
    assert not running.want(version(2)), "it is being loaded"
    running.loaded(ready(2))
    assert not running.want(version(2)), "it waits for the end of the episode"


def test_a_version_that_is_wanted_no_longer_never_runs(running: PolicySlot) -> None:
    running.want(version(2))
    running.want(version(3))
    running.loaded(ready(2))
    assert not running.swap(BETWEEN)
    running.loaded(ready(3))
    assert not running.want(version(1)), "back to what runs"
    assert not running.swap(BETWEEN), "3 was ready, then not wanted"
    assert active(running) == 1


def test_the_same_number_of_another_place_is_another_version(running: PolicySlot) -> None:
    assert running.want(PolicyVersion(1, "file:///elsewhere", DIGEST))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any, make_policy: Any) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("policies"), make_policy(representation="joint_relative"))


def wanted(path: Path, number: int = 1) -> PolicyVersion:
    return PolicyVersion(number, path.as_uri(), path.name)


@pytest.mark.parametrize("name", ["policies", "policies of today"])
def test_a_directory_below_an_allowed_one_is_accepted(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / DIGEST
    assert check_form(wanted(folder), [str(tmp_path / "other"), str(tmp_path / name)]) == folder.resolve()


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("elsewhere/x", ["policies"]),
        ("policies/../elsewhere/x", ["policies"]),
        ("policies_2/x", ["policies"]),
        ("policies/x", []),
        ("link/x", ["link/inside"]),
    ],
)
def test_a_uri_outside_of_uri_allow_is_refused(tmp_path: Path, path: str, allowed: list[str]) -> None:
    uri = "file://" + os.fspath(tmp_path / path)
    with pytest.raises(CheckpointRefused, match="outside of uri_allow"):
        check_form(PolicyVersion(1, uri, DIGEST), [str(tmp_path / root) for root in allowed])


def test_a_link_out_of_an_allowed_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointRefused, match="outside of uri_allow"):
        check_form(
            PolicyVersion(1, (tmp_path / "policies/link").as_uri(), DIGEST), [str(tmp_path / "policies")]
        )


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (PolicyVersion(-1, "file:///p/x", DIGEST), "policy.version -1 is negative"),
        (PolicyVersion(1, "file:///p/x", DIGEST[:-1]), "64 lower-case hex digits"),
        (PolicyVersion(1, "file:///p/x", DIGEST.upper()), "64 lower-case hex digits"),
        (PolicyVersion(1, "file:///p/x", ""), "64 lower-case hex digits"),
        (PolicyVersion(1, "http://host/p/x", DIGEST), "only file:///directory"),
        (PolicyVersion(1, "file://host/p/x", DIGEST), "only file:///directory"),
        (PolicyVersion(1, "/p/x", DIGEST), "only file:///directory"),
        (PolicyVersion(1, "", DIGEST), "only file:///directory"),
    ],
)
def test_a_wish_without_a_proper_form_is_refused(asked: PolicyVersion, reason: str) -> None:
    with pytest.raises(CheckpointRefused, match=reason):
        check_form(asked, ["/p"])


def test_a_good_checkpoint_comes_back_ready_to_use(saved: Path, robot: Embodiment, observe: Any) -> None:
    loaded = load_policy(wanted(saved), [str(saved.parent)], robot, STEP_HZ)
    assert (loaded.version, loaded.card.digest) == (wanted(saved), saved.name)
    loaded.policy.begin_episode()
    assert np.isfinite(loaded.policy.chunk([[observe(), observe()]])[0].positions).all()


@pytest.mark.parametrize("kind", ["keypoints", "images", "joints"])
def test_every_kind_of_policy_is_warmed_up(
    tmp_path: Path, robot: Embodiment, make_policy: Any, kind: str
) -> None:
    path = checkpoint.save(tmp_path, make_policy(kind))
    assert load_policy(wanted(path), [str(tmp_path)], robot, STEP_HZ).card.trunk.kind == kind


def test_a_damaged_checkpoint_is_refused_with_its_reason(
    saved: Path, tmp_path: Path, robot: Embodiment
) -> None:
    copy = tmp_path / saved.name
    shutil.copytree(saved, copy)
    weights = bytearray((copy / checkpoint.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (copy / checkpoint.WEIGHTS).write_bytes(weights)
    with pytest.raises(CheckpointRefused, match="damaged"):
        load_policy(wanted(copy), [str(tmp_path)], robot, STEP_HZ)


def test_a_policy_for_another_body_is_refused(saved: Path, robot: Embodiment) -> None:
    content = json.loads(robot.to_json())
    content["home"]["left_joint_1"] += 0.01
    other = Embodiment.from_json(json.dumps(content))
    with pytest.raises(CheckpointRefused, match="made for another description"):
        load_policy(wanted(saved), [str(saved.parent)], other, STEP_HZ)


def test_a_policy_for_another_rate_is_refused(saved: Path, robot: Embodiment) -> None:
    with pytest.raises(CheckpointRefused, match=r"made for steps of 0\.1 s, the robot's are 0\.05 s"):
        load_policy(wanted(saved), [str(saved.parent)], robot, 20.0)
