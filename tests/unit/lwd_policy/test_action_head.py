# SPDX-License-Identifier: Apache-2.0
"""Heads as robots run them: what they do to a chunk, and how they travel with a policy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lwd_policy import checkpoint
from lwd_policy.action_head import (
    EditHead,
    EditSpec,
    HeadSpec,
    OneStepHead,
    OneStepSpec,
    head_from_json,
    head_to_json,
)
from lwd_policy.checkpoint import CARD, WEIGHTS, CheckpointRefused
from lwd_policy.chunk_policy import ChunkPolicy
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.policy_slot import PolicyVersion, load_policy

SPECS = [EditSpec(scale=0.2, width=32), OneStepSpec()]


@pytest.fixture
def make_headed(make_policy: Any) -> Callable[[HeadSpec | None], FlowPolicy]:
    """Factory: a policy with a head that does something; the same flow for all."""

    def make(spec: HeadSpec | None) -> FlowPolicy:
        policy: FlowPolicy = make_policy(representation="joint_relative", head=spec)
        torch.manual_seed(1)
        nn.init.normal_(policy.expert.leave.weight, std=0.02)
        if policy.head is not None:
            for parameter in policy.head.parameters():
                nn.init.normal_(parameter, std=0.05)
        return policy

    return make


def started(policy: FlowPolicy, rows: int = 3) -> tuple[Tensor, Tensor]:
    """A context and the noise that this policy acts from; the flow's part is the same for all."""
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(rows, policy.context_dim, generator=generator)
    steps, size = policy.noise_shape
    flow = torch.randn(rows, policy.action_spec.horizon, size, generator=generator)
    own = torch.randn(rows, steps - policy.action_spec.horizon, size, generator=generator)
    return context, torch.cat([flow, own], dim=1)


def test_an_edit_moves_the_flows_chunk_by_at_most_its_scale_and_never_out_of_the_box(
    make_headed: Any,
) -> None:
    policy = make_headed(EditSpec(scale=0.2, width=32))
    context, noise = started(policy)
    flow, chunk = policy.sample(context, noise[:, :4]), policy.act(context, noise)
    moved = (chunk - flow).abs()
    assert policy.noise_shape == (8, 14)
    assert moved.mean() > 0.001 and moved.max() <= 0.2 + 1e-6 and chunk.abs().max() <= 1
    other = torch.cat([noise[:, :4], -noise[:, 4:]], dim=1)
    assert not torch.equal(policy.act(context, other), chunk), "the edit is drawn"
    at_center = torch.cat([noise[:, :4], torch.zeros_like(noise[:, 4:])], dim=1)
    assert torch.equal(policy.act(context, noise[:, :4]), policy.act(context, at_center))


def test_an_edit_is_what_its_gaussian_says() -> None:
    head = EditHead(2, 1, 1, EditSpec(scale=0.5, width=8, layers=1))
    nn.init.constant_(head.center.bias, 0.3)
    nn.init.constant_(head.log_deviation.bias, np.log(0.4))
    flow = torch.tensor([[[0.1]], [[0.9]]])
    chunk = head.act(torch.zeros(2, 2), flow, torch.tensor([[[-1.0]], [[2.0]]]))
    expected = [0.1 + 0.5 * np.tanh(0.3 - 0.4), 1.0]
    assert chunk.flatten().tolist() == pytest.approx(expected)


def test_a_new_edit_is_centered_on_nothing_with_the_entropy_that_training_aims_at() -> None:
    head = EditHead(3, 2, 2, EditSpec())
    center, log_deviation = head(torch.randn(5, 3), torch.randn(5, 2, 2))
    assert torch.equal(center, torch.zeros(5, 2, 2))
    entropy = log_deviation + 0.5 * np.log(2 * np.pi * np.e)
    assert entropy.detach().numpy() == pytest.approx(-0.5, abs=1e-6)


def test_one_step_is_the_flow_in_one_euler_step_of_another_expert(make_headed: Any) -> None:
    policy = make_headed(OneStepSpec())
    context, noise = started(policy)
    assert policy.noise_shape == (4, 14)
    chunk = policy.act(context, noise)
    assert (chunk - policy.sample(context, noise)).abs().max() > 0.1, "it does not do what the flow does"
    assert isinstance(policy.head, OneStepHead)
    policy.expert = policy.head.expert
    torch.testing.assert_close(chunk, policy.sample(context, noise, steps=1))


def test_a_one_step_policy_asks_one_network_once_and_an_edit_asks_one_more_than_the_flow(
    make_headed: Any,
) -> None:
    for spec, expected in ((OneStepSpec(), 1), (EditSpec(), 11), (None, 10)):
        policy, asked = make_headed(spec), []
        for module in (policy.expert, policy.head.expert if spec == OneStepSpec() else policy.head):
            if module is not None:
                module.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        policy.act(*started(policy))
        assert len(asked) == expected


@pytest.mark.parametrize("spec", SPECS)
def test_a_head_is_put_on_and_taken_off_and_the_rest_stays_the_same_object(
    make_headed: Any, spec: HeadSpec
) -> None:
    policy, plain = make_headed(spec), make_headed(None)
    before = torch.random.get_rng_state()
    bare = policy.with_head(None)
    assert torch.equal(torch.random.get_rng_state(), before), "nothing is drawn for it"
    assert bare.trunk is policy.trunk and bare.expert is policy.expert and bare.head_spec is None
    assert bare.state_dict().keys() == plain.state_dict().keys()
    context, noise = started(bare)
    assert torch.equal(bare.act(context, noise), plain.act(context, noise))
    again = bare.with_head(policy.head)
    context, noise = started(again)
    assert torch.equal(again.act(context, noise), policy.act(context, noise)) and again.head_spec == spec


# --- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_a_policy_comes_back_with_its_head(make_headed: Any, spec: HeadSpec, tmp_path: Path) -> None:
    policy = make_headed(spec)
    path = checkpoint.save(tmp_path, policy)
    copy, card = checkpoint.load(path, path.name)
    assert card.head == copy.head_spec == spec
    context, noise = started(policy)
    assert torch.equal(copy.act(context, noise), policy.act(context, noise))
    assert checkpoint.holds(path, policy) and not checkpoint.holds(path, policy.with_head(None))
    content = json.loads((path / CARD).read_text())
    assert content["format_version"] == 2, "a program that knows no heads must not run the flow in its place"
    with torch.no_grad():
        next(policy.head.parameters()).view(-1)[0] += 1e-3
    assert not checkpoint.holds(path, policy)


def test_a_policy_without_a_head_is_written_as_it_was_before_there_were_heads(
    make_headed: Any, tmp_path: Path
) -> None:
    path = checkpoint.save(tmp_path, make_headed(None))
    content = json.loads((path / CARD).read_text())
    first_format = {"format_version", "observation", "action", "trunk", "expert_size", "value_head", "origin"}
    assert content.keys() == first_format and content["format_version"] == 1
    assert checkpoint.load(path, path.name)[1].head is None


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ({"kind": "wing"}, "unknown head 'wing'"),
        ({"kind": []}, "unknown head"),
        ({}, "kind"),
        (None, "card cannot be used"),
        ({"kind": "one_step", "scale": 1.0}, "card cannot be used"),
        ({"kind": "edit", "scale": 0.0}, r"scale lies in \(0, 2\]"),
        ({"kind": "edit", "scale": float("nan")}, r"scale lies in \(0, 2\]"),
        ({"kind": "edit", "scale": "much"}, r"scale lies in \(0, 2\]"),
        ({"kind": "edit", "layers": 10**9}, "1-16 layers"),
        ({"kind": "edit", "width": 2.5}, "1-4096 units"),
        ({"kind": "edit", "scale": 0.2, "width": 64}, "head.body.0.weight has shape|has shape"),
        ({"kind": "one_step"}, "tensors missing or unknown: head"),
    ],
)
def test_a_head_that_cannot_be_is_refused(make_headed: Any, tmp_path: Path, head: Any, reason: str) -> None:
    path = checkpoint.save(tmp_path, make_headed(EditSpec(scale=0.2, width=32)))
    content = json.loads((path / CARD).read_text()) | {"head": head}
    (path / CARD).write_text(json.dumps(content))
    forged = path.rename(tmp_path / checkpoint._digest((path / CARD).read_bytes(), path / WEIGHTS))
    with pytest.raises(CheckpointRefused, match=reason):
        checkpoint.load(forged)


@pytest.mark.parametrize("spec", SPECS)
def test_a_head_is_described_by_its_card(spec: HeadSpec) -> None:
    assert head_from_json(json.loads(json.dumps(head_to_json(spec)))) == spec


# --- on a robot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_a_robot_runs_a_version_with_a_head_and_an_episode_can_be_repeated(
    make_headed: Any, spec: HeadSpec, robot: Any, observe: Any, tmp_path: Path
) -> None:
    path = checkpoint.save(tmp_path, make_headed(spec))
    loaded = load_policy(PolicyVersion(1, path.as_uri(), path.name), [str(tmp_path)], robot, 10.0)
    seen = [[observe(0), observe(0)]]

    def episode(policy: ChunkPolicy) -> list[np.ndarray]:
        policy.begin_episode(0, seed=4)
        return [policy.chunk(seen)[0].normalised for _ in range(2)]

    first, second = episode(loaded.policy), episode(ChunkPolicy(make_headed(spec)))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(*first), "each chunk has noise of its own"
    without = episode(ChunkPolicy(make_headed(None)))
    assert not np.array_equal(first[0], without[0])


def test_what_a_robot_loads_does_not_load_the_learner() -> None:
    code = (
        "import lwd_policy.action_head, lwd_policy.policy_slot, sys; sys.exit('lwd_learner' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
