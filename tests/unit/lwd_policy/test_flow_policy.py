# SPDX-License-Identifier: Apache-2.0
"""The flow expert and the policy: shapes, initial state, Euler integration against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lwd_policy.flow_expert import PRESETS, FlowExpert
from lwd_policy.flow_policy import FlowPolicy


@pytest.mark.parametrize("size", PRESETS)
def test_an_untrained_expert_is_still_and_has_gradients_everywhere_after_one_step(size: str) -> None:
    torch.manual_seed(0)
    expert = FlowExpert(20, 4, 3, size)
    inputs = torch.randn(8, 20), torch.randn(8, 4, 3), torch.rand(8)
    assert torch.equal(expert(*inputs), torch.zeros(8, 4, 3))
    optimiser = torch.optim.SGD(expert.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        (expert(*inputs) - 1).pow(2).mean().backward()
        optimiser.step()
    silent = [name for name, p in expert.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_velocity_depends_on_context_chunk_and_flow_time(make_policy: Any) -> None:
    policy = make_policy()
    torch.manual_seed(0)
    context, noisy, time = torch.randn(1, policy.context_dim), torch.randn(1, 4, 14), torch.tensor([0.3])
    base = policy.velocity(context, noisy, time)
    assert base.shape == (1, 4, 14) and base.dtype == torch.float32
    for other in ((context + 1, noisy, time), (context, noisy + 1, time), (context, noisy, time + 0.01)):
        assert (policy.velocity(*other) - base).abs().max() > 1e-5


class Field(torch.nn.Module):
    """A velocity known in closed form, in the place of the expert."""

    def __init__(self, law: Any) -> None:
        super().__init__()
        self.law = law

    def forward(self, context: torch.Tensor, noisy: torch.Tensor, flow_time: torch.Tensor) -> torch.Tensor:
        return self.law(noisy, flow_time.view(-1, 1, 1))


def with_field(policy: FlowPolicy, law: Any) -> FlowPolicy:
    policy.expert = Field(law)  # type: ignore[assignment]
    return policy


def test_sampling_is_euler_integration_from_noise_at_zero_to_action_at_one(make_policy: Any) -> None:
    noise = torch.linspace(-0.3, 0.3, 56).view(1, 4, 14)
    context = torch.zeros(1, 1)
    straight = with_field(make_policy(), lambda x, t: (0.5 - x) / (1 - t))  # towards the action 0.5
    torch.testing.assert_close(straight.sample(context, noise), torch.full_like(noise, 0.5))
    decay = with_field(make_policy(), lambda x, t: -x)
    torch.testing.assert_close(decay.sample(context, noise), noise * 0.9**10)
    torch.testing.assert_close(decay.sample(context, noise, steps=4), noise * 0.75**4)
    clock = with_field(make_policy(), lambda x, t: t + 0 * x)
    torch.testing.assert_close(clock.sample(context, noise), noise + 0.45)  # left sums of t


def test_samples_are_deterministic_in_their_noise_and_within_the_box(make_policy: Any) -> None:
    policy = make_policy()
    torch.manual_seed(1)
    context, noise = torch.randn(3, policy.context_dim), 2 * torch.randn(3, 4, 14)
    chunk = policy.sample(context, noise)
    assert torch.equal(chunk, policy.sample(context, noise)) and chunk.abs().max() <= 1
    assert (chunk - policy.sample(context, -noise)).abs().max() > 0.1


def test_less_noise_to_act_from_is_the_same_as_smaller_noise(make_policy: Any) -> None:
    full, less = make_policy(), make_policy(acting_noise=0.25)
    context, noise = torch.randn(3, full.context_dim), torch.randn(3, 4, 14)
    assert torch.equal(less.act(context, noise), full.act(context, 0.25 * noise))
    assert torch.equal(less.sample(context, noise), full.sample(context, noise))  # what is trained on stays
    assert torch.equal(less.with_head(None).act(context, noise), less.act(context, noise))


def test_a_context_is_the_features_of_the_history_oldest_first(make_policy: Any, observe: Any) -> None:
    policy = make_policy(history=3)
    features = policy.feature([observe(i) for i in range(3)])
    assert features.shape == (3, policy.feature_dim) and not features.requires_grad
    context = policy.context(features.unsqueeze(0))
    assert context.shape == (1, policy.context_dim)
    assert torch.equal(context[0, : policy.feature_dim], features[0])


def test_a_policy_whose_observation_lacks_what_its_trunk_sees_is_refused(
    make_policy: Any, make_spec: Any
) -> None:
    policy = make_policy("images")
    with pytest.raises(ValueError, match="trunk needs .*camera_top"):
        FlowPolicy(policy.trunk, make_spec("keypoints"), policy.action_spec)


def test_the_value_head_is_optional_and_estimates_within_zero_and_one(make_policy: Any) -> None:
    context = torch.randn(6, make_policy().context_dim) * 100
    assert make_policy().estimate(context).isnan().all()
    value = make_policy(value_head=True).estimate(context)
    assert value.shape == (6,) and value.min() >= 0 and value.max() <= 1


def test_a_size_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="huge.*tiny, base"):
        FlowExpert(4, 2, 2, "huge")
