# SPDX-License-Identifier: Apache-2.0
"""Training in bfloat16, and with compiled networks: options that change speed, and results as little as they must."""

from dataclasses import replace

import pytest
import torch
from ranks_worker import CLONE_STEPS, LWD, A, BlockExpert, C, H, tensors, union, updates

from lwd_learner.divl import bootstrap, critic_target
from lwd_learner.ranks import ALONE
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_policy.flow_expert import FlowExpert


def trainer(config: TrainerConfig) -> Trainer:
    torch.manual_seed(0)
    return Trainer(BlockExpert(), C, H, A, config)


def test_bf16_trains_nearly_what_float32_trains_and_keeps_weights_whole() -> None:
    full, half = trainer(LWD), trainer(replace(LWD, precision="bf16"))
    expected, seen = updates(full, ALONE), updates(half, ALONE)
    for name in ("clone_loss",):
        assert seen[0][name] != expected[0][name]
        assert seen[0][name] == pytest.approx(expected[0][name], rel=0.02)
    for name in ("value_loss", "critic_loss", "policy_loss", "path_kl", "q"):
        assert seen[-1][name] == pytest.approx(expected[-1][name], rel=0.05, abs=1e-3), name
    assert {tensor.dtype for tensor in tensors(half).values()} == {torch.float32}


def test_bf16_too_reads_the_target_off_the_value_network_as_just_updated() -> None:
    made = trainer(replace(LWD, precision="bf16", critic_rate=0.1))
    made.freeze_reference()
    rows = union(0)

    def target_now() -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            read = bootstrap(made.values.value(rows.next_context), 0.6, made.config.divl)
        return critic_target(rows.reward, rows.discount, read.value).mean().item()

    before = target_now()
    seen = made.learn(rows)["target"]
    assert abs(seen - before) > 1e-3
    assert seen == pytest.approx(target_now(), abs=1e-6)


def test_the_velocity_of_an_expert_is_in_full_precision_under_autocast() -> None:
    expert = FlowExpert(C, H, A)
    torch.nn.init.normal_(expert.leave.weight)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = expert(torch.randn(3, C), torch.randn(3, H, A), torch.rand(3))
    assert velocity.dtype == torch.float32
    assert not torch.equal(velocity, velocity.bfloat16().float())


@pytest.mark.slow
def test_compiled_networks_train_what_eager_ones_train() -> None:
    eager, compiled = trainer(LWD), trainer(replace(LWD, compile=True))
    until = CLONE_STEPS + 3
    expected, seen = updates(eager, ALONE, until), updates(compiled, ALONE, until)
    for step, (ours, theirs) in enumerate(zip(expected, seen, strict=True)):
        for name, number in ours.items():
            assert theirs[name] == pytest.approx(number, rel=1e-3, abs=1e-5), (step, name)
