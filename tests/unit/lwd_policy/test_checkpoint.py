# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is saved comes back, and whatever is damaged, foreign or hostile is refused with a reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lwd_policy import checkpoint
from lwd_policy.action_head import OneStepSpec
from lwd_policy.checkpoint import (
    CARD,
    WEIGHTS,
    CheckpointRefused,
    _digest,
    load,
    read_card,
    save,
    verify_against,
)
from lwd_policy.embodiment import Embodiment
from lwd_policy.observation import ObservationSpec


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any, make_policy: Any) -> Path:
    return save(tmp_path_factory.mktemp("policies"), make_policy(), {"parent": 3, "snapshot": [17, 4]})


@pytest.fixture
def forge(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """Factory: a checkpoint with a changed card or changed tensors, whose digest is right again."""

    def make(
        card: Callable[[dict], Any] = lambda c: None, tensors: Callable[[dict], Any] = lambda t: None
    ) -> Path:
        content = json.loads((saved / CARD).read_text())
        weights = load_file(saved / WEIGHTS)
        card(content)
        tensors(weights)
        folder = tmp_path / "forged"
        folder.mkdir()
        save_file(weights, folder / WEIGHTS)
        (folder / CARD).write_text(json.dumps(content))
        return folder.rename(tmp_path / _digest((folder / CARD).read_bytes(), folder / WEIGHTS))

    return make


@pytest.mark.parametrize("kind", ["keypoints", "images", "joints"])
@pytest.mark.parametrize("value_head", [False, True])
def test_a_policy_comes_back_as_it_was(
    kind: str, value_head: bool, make_policy: Any, observe: Any, tmp_path: Path
) -> None:
    policy = make_policy(kind, value_head=value_head, expert_size="base" if value_head else "tiny")
    path = save(tmp_path, policy, {"parent": None})
    copy, card = load(path, path.name)
    assert not copy.training and card.digest == path.name and card.value_head == value_head
    assert card.origin == {"licence": "Apache-2.0", "parent": None}
    feature = policy.feature([observe(images=True)])
    assert torch.equal(copy.feature([observe(images=True)]), feature)
    context, noise = feature.repeat(1, 2), torch.randn(1, 4, 14)
    assert torch.equal(copy.sample(context, noise), policy.sample(context, noise))
    torch.testing.assert_close(copy.estimate(context), policy.estimate(context), equal_nan=True)
    assert copy.action_spec.to_json() == policy.action_spec.to_json()
    assert copy.observation_spec == policy.observation_spec


def test_equal_policies_have_one_directory_and_other_weights_or_origins_another(
    make_policy: Any, tmp_path: Path
) -> None:
    first = save(tmp_path, make_policy())
    assert save(tmp_path, make_policy()) == first
    assert save(tmp_path, make_policy(seed=1)) != first
    assert save(tmp_path, make_policy(), {"parent": 1}) != first
    assert sorted(p.name for p in first.iterdir()) == [CARD, WEIGHTS]
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def test_a_checkpoint_holds_the_policy_it_was_saved_from_and_no_other(
    saved: Path, tmp_path: Path, make_policy: Any
) -> None:
    policy = make_policy()
    assert checkpoint.holds(saved, policy)
    assert checkpoint.holds(save(tmp_path / "again", policy, {"parent": 4}), policy), (
        "the origin does not count"
    )
    assert not checkpoint.holds(saved, make_policy(seed=1))
    assert not checkpoint.holds(saved, make_policy(history=1)), "equal weights may see another world"
    assert not checkpoint.holds(tmp_path / "nothing", policy)
    with torch.no_grad():
        next(policy.expert.parameters()).view(-1)[0] += 1e-3
    assert not checkpoint.holds(saved, policy)


def test_what_cannot_be_written_leaves_nothing_behind(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, make_policy())
    assert list(tmp_path.iterdir()) == []


def copy_of(saved: Path, folder: Path) -> Path:
    target = folder / saved.name
    target.mkdir(parents=True)
    for name in (CARD, WEIGHTS):
        (target / name).write_bytes((saved / name).read_bytes())
    return target


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from([CARD, WEIGHTS]))
def test_a_flipped_bit_is_noticed(
    saved: Path, tmp_path_factory: Any, where: float, bit: int, name: str
) -> None:
    path = copy_of(saved, tmp_path_factory.mktemp("flipped"))
    data = bytearray((path / name).read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    (path / name).write_bytes(data)
    with pytest.raises(CheckpointRefused, match="damaged or another one"):
        load(path)


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
@pytest.mark.parametrize("length", [0, 7, -1])
def test_a_truncated_file_is_noticed(saved: Path, tmp_path: Path, name: str, length: int) -> None:
    path = copy_of(saved, tmp_path)
    (path / name).write_bytes((path / name).read_bytes()[:length])
    with pytest.raises(CheckpointRefused, match="damaged"):
        load(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(card=st.binary(max_size=60), weights=st.binary(max_size=60))
def test_no_bytes_whatever_are_more_than_refused(tmp_path_factory: Any, card: bytes, weights: bytes) -> None:
    path = tmp_path_factory.mktemp("noise")
    (path / CARD).write_bytes(card)
    (path / WEIGHTS).write_bytes(weights)
    with pytest.raises(CheckpointRefused):
        load(path, _digest(card, path / WEIGHTS))


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_a_missing_file_is_named(saved: Path, tmp_path: Path, name: str) -> None:
    path = copy_of(saved, tmp_path)
    (path / name).unlink()
    with pytest.raises(CheckpointRefused, match=f"{name} is missing"):
        load(path)
    (path / name).mkdir()
    with pytest.raises(CheckpointRefused, match=f"{name} is missing"):
        load(path)


def test_another_digest_than_the_expected_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointRefused, match="expected 000000000000"):
        load(saved, "0" * 64)


@pytest.mark.parametrize(("name", "limit"), [(CARD, "MAX_CARD_BYTES"), (WEIGHTS, "MAX_WEIGHTS_BYTES")])
def test_a_file_that_is_too_large_is_not_opened(saved: Path, tmp_path: Path, name: str, limit: str) -> None:
    path = copy_of(saved, tmp_path)
    os.truncate(path / name, getattr(checkpoint, limit) + 1)  # sparse
    with pytest.raises(CheckpointRefused, match=f"{name} has .* bytes, more than"):
        load(path)


def remove(tensors: dict, name: str) -> None:
    del tensors[name]


LEAVE = "expert.leave.bias"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update(extra=torch.zeros(2)), "missing or unknown: extra"),
        (lambda t: remove(t, LEAVE), f"missing or unknown: {LEAVE}"),
        (lambda t: t.update({LEAVE: torch.zeros(55)}), rf"{LEAVE} has shape \(55,\), expected \(56,\)"),
        (lambda t: t.update({LEAVE: torch.zeros(56, 1)}), r"has shape \(56, 1\)"),
        (
            lambda t: t.update({LEAVE: torch.zeros(56, dtype=torch.float64)}),
            "is torch.float64, expected torch.float32",
        ),
        (lambda t: t[LEAVE].fill_(float("nan")), f"{LEAVE} has a number that is not finite"),
        (lambda t: t[LEAVE][3:4].fill_(float("inf")), "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(forge: Any, change: Any, reason: str) -> None:
    with pytest.raises(CheckpointRefused, match=reason):
        load(forge(tensors=change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(format_version=4), "card format 4; this program reads 1, 2, 3"),
        (lambda c: c.update(format_version=2), "card cannot be used: 'head'"),
        (lambda c: c.update(format_version=3), "card cannot be used: 'acting_noise'"),
        (lambda c: c.update(expert_size="huge"), "unknown expert size 'huge'"),
        (lambda c: c.update(expert_size=[]), "card cannot be used"),
        (lambda c: c.pop("trunk"), "card cannot be used: 'trunk'"),
        (lambda c: c["trunk"].update(kind="sonar"), "'sonar'"),
        (lambda c: c["trunk"].update(slots=10**9), "keypoints has shape"),
        (lambda c: c["trunk"].update(slots="many"), "card cannot be used"),
        (lambda c: c["observation"].update(history=9), "has shape"),
        (lambda c: c["observation"].update(history=10**6), "lie within 5 s"),
        (lambda c: c["observation"].update(history=0), "history at least 1"),
        (lambda c: c["observation"]["streams"].pop(), "needs the streams keypoints"),
        (lambda c: c["action"].update(horizon=9), r"center must be finite with shape \(9, 14\)"),
        (lambda c: c["action"].update(horizon=-1), "within 1 and horizon"),
        (lambda c: c["action"]["scale"][0].__setitem__(0, -1.0), "scale must be positive"),
        (
            lambda c: c["action"]["center"][0].__setitem__(0, None),
            "center must be finite|card cannot be used",
        ),
        (lambda c: c["action"]["embodiment"].update(urdf="<robot>"), "card cannot be used"),
        (lambda c: c.update(value_head=True), "missing or unknown: value"),
    ],
)
def test_a_card_that_does_not_fit_is_refused_before_its_tensors_are_read(
    forge: Any, change: Any, reason: str
) -> None:
    with pytest.raises(CheckpointRefused, match=reason):
        load(forge(card=change))


def test_a_card_is_read_without_its_tensors(saved: Path) -> None:
    card = read_card(saved)
    assert card.origin["snapshot"] == [17, 4] and card.expert_size == "tiny" and card.digest == saved.name


def test_a_policy_for_another_body_is_refused(saved: Path, robot: Embodiment) -> None:
    card = read_card(saved)
    verify_against(card, robot)
    swapped = replace(robot, joint_names=robot.joint_names[::-1])
    with pytest.raises(
        CheckpointRefused, match="made for joints .*'left_joint_1'.*the robot has .*'right_gripper'"
    ):
        verify_against(card, swapped)
    with pytest.raises(CheckpointRefused, match="other joint limits"):
        verify_against(card, replace(robot, upper=robot.upper + 0.01))
    content = json.loads(robot.to_json())
    content["home"]["left_joint_1"] += 0.01
    with pytest.raises(CheckpointRefused, match="kinematics or home differ"):
        verify_against(card, Embodiment.from_json(json.dumps(content)))


def test_a_policy_for_other_streams_is_refused(saved: Path, robot: Embodiment, make_spec: Any) -> None:
    card, own = read_card(saved), make_spec()
    verify_against(card, robot, own)
    verify_against(
        card, robot, ObservationSpec(tuple(s for s in own.streams if s.required))
    )  # the command is optional
    with pytest.raises(CheckpointRefused, match="needs the stream keypoints, the robot has joint_positions"):
        verify_against(card, robot, make_spec("joints"))
    *others, points = own.streams
    for change, reason in (
        ({"shape": (6, 3)}, "shape"),
        ({"topic": "else"}, "topic"),
        ({"kind": "vector"}, "kind"),
    ):
        with pytest.raises(CheckpointRefused, match=f"made for keypoints with {reason}"):
            verify_against(card, robot, ObservationSpec((*others, replace(points, **change))))


def test_a_checkpoint_in_half_precision_is_half_as_large_and_acts_almost_alike(
    make_policy: Any, tmp_path: Path
) -> None:
    policy = make_policy()
    whole, half = save(tmp_path, policy), save(tmp_path, policy, half=True)
    assert whole.name != half.name
    assert (half / WEIGHTS).stat().st_size < 0.6 * (whole / WEIGHTS).stat().st_size
    loaded, _ = load(half)
    for name, tensor in policy.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-6)
    assert save(tmp_path, loaded, half=True) == half  # rounding once is rounding for good
    with torch.no_grad():
        policy.expert.leave.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="leave.weight has a number too large"):
        save(tmp_path, policy, half=True)


@pytest.mark.parametrize("head", [None, OneStepSpec()])
def test_a_policy_that_acts_from_less_noise_comes_back_as_one_and_in_a_format_of_its_own(
    make_policy: Any, tmp_path: Path, head: Any
) -> None:
    policy = make_policy(acting_noise=0.3, head=head)
    path = save(tmp_path, policy)
    copy, card = load(path, path.name)
    assert card.acting_noise == copy.acting_noise == 0.3 and card.head == head
    context, noise = torch.randn(2, policy.context_dim), torch.randn(2, *policy.noise_shape)
    assert torch.equal(copy.act(context, noise), policy.act(context, noise))
    content = json.loads((path / CARD).read_text())
    assert content["format_version"] == 3, "a program that knows of no scale must not act from all the noise"


def test_a_scale_of_noise_beyond_one_is_refused(forge: Callable[..., Path]) -> None:
    path = forge(lambda card: card.update(format_version=3, acting_noise=1.5))
    with pytest.raises(CheckpointRefused, match="acting_noise 1.5"):
        load(path)
