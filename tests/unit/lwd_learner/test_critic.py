# SPDX-License-Identifier: Apache-2.0
"""The value and critic networks: shapes, masks, independence of heads."""

import pytest
import torch
from torch import Tensor

from lwd_learner.critic import CriticConfig, CriticEnsemble, ValueNetwork


def inputs(rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(6)[None, :] < torch.tensor([6, 3, 1, 5, 2])[:rows, None]
    return torch.randn(rows, 8), torch.randn(rows, 6, 3), mask


def critic(heads: int) -> CriticEnsemble:
    torch.manual_seed(0)
    return CriticEnsemble(8, 6, 3, CriticConfig(heads=heads, width=16, embedding=8))


def test_the_value_starts_uniform() -> None:
    logits = ValueNetwork(8, 201, CriticConfig())(torch.randn(4, 8))
    assert logits.shape == (4, 201)
    assert torch.softmax(logits, -1).max() < 1.1 / 201


@pytest.mark.parametrize("heads", [1, 2, 10])
def test_every_head_judges_every_row_and_starts_near_zero(heads: int) -> None:
    q = critic(heads)(*inputs())
    assert q.shape == (heads, 5)
    assert q.abs().max() < 0.1


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_steps_that_were_not_executed_change_nothing_and_get_no_gradient(garbage: float) -> None:
    context, chunk, mask = inputs()
    network = critic(2)
    spoiled = torch.where(mask.unsqueeze(-1), chunk, torch.full_like(chunk, garbage))
    assert torch.equal(network(context, chunk, mask), network(context, spoiled, mask))
    chunk.requires_grad_(True)
    network(context, chunk, mask).sum().backward()
    assert (chunk.grad[~mask] == 0).all()
    assert (chunk.grad[mask] != 0).any(-1).all()


def test_heads_are_independent() -> None:
    network = critic(3)
    network(*inputs())[1].sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad[0] == 0).all(), name
        assert (parameter.grad[2] == 0).all(), name
        assert parameter.grad[1].abs().sum() > 0 or name.endswith("bias"), name


def test_rows_do_not_see_each_other() -> None:
    context, chunk, mask = inputs()
    network = critic(2)
    alone = network(context[2:3], chunk[2:3], mask[2:3])
    assert torch.allclose(network(context, chunk, mask)[:, 2:3], alone, atol=1e-7)


def test_the_order_of_steps_matters() -> None:
    context, chunk, _ = inputs()
    mask = torch.ones(5, 6, dtype=torch.bool)
    network = critic(2)
    assert not torch.allclose(network(context, chunk, mask), network(context, chunk.flip(1), mask), atol=1e-5)


def test_it_can_fit_a_function_of_when_something_happens() -> None:
    torch.manual_seed(0)
    network = critic(2)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    context, mask = torch.zeros(128, 8), torch.ones(128, 6, dtype=torch.bool)
    for _ in range(150):
        chunk = torch.rand(128, 6, 3) * 2 - 1
        loss = (network(context, chunk, mask) - (chunk[:, 1, 0] - chunk[:, 4, 0])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1  # the variance of what it fits is 0.67


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="heads"):
        CriticConfig(heads=0)
