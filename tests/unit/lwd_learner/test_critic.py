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


PUBLISHED = {"chunk_encoder": "flat", "hidden": "gelu_norm"}  # the networks of QAM's code
EITHER = pytest.mark.parametrize("layout", [{}, PUBLISHED], ids=["default", "published"])


def critic(heads: int, layout: dict[str, str] | None = None) -> CriticEnsemble:
    torch.manual_seed(0)
    return CriticEnsemble(8, 6, 3, CriticConfig(heads=heads, width=16, embedding=8, **(layout or {})))


@EITHER
def test_the_value_starts_uniform(layout: dict[str, str]) -> None:
    logits = ValueNetwork(8, 201, CriticConfig(**layout))(torch.randn(4, 8))
    assert logits.shape == (4, 201)
    assert torch.softmax(logits, -1).max() < 1.1 / 201


@EITHER
@pytest.mark.parametrize("heads", [1, 2, 10])
def test_every_head_judges_every_row_and_starts_near_zero(heads: int, layout: dict[str, str]) -> None:
    q = critic(heads, layout)(*inputs())
    assert q.shape == (heads, 5)
    assert q.abs().max() < 0.1


@EITHER
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_steps_that_were_not_executed_change_nothing_and_get_no_gradient(
    garbage: float, layout: dict[str, str]
) -> None:
    context, chunk, mask = inputs()
    network = critic(2, layout)
    spoiled = torch.where(mask.unsqueeze(-1), chunk, torch.full_like(chunk, garbage))
    assert torch.equal(network(context, chunk, mask), network(context, spoiled, mask))
    chunk.requires_grad_(True)
    network(context, chunk, mask).sum().backward()
    assert (chunk.grad[~mask] == 0).all()
    assert (chunk.grad[mask] != 0).any(-1).all()


@EITHER
def test_heads_are_independent(layout: dict[str, str]) -> None:
    network = critic(3, layout)
    network(*inputs())[1].sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad[0] == 0).all(), name
        assert (parameter.grad[2] == 0).all(), name
        assert parameter.grad[1].abs().sum() > 0 or name.endswith("bias"), name


@EITHER
def test_rows_do_not_see_each_other(layout: dict[str, str]) -> None:
    context, chunk, mask = inputs()
    network = critic(2, layout)
    alone = network(context[2:3], chunk[2:3], mask[2:3])
    assert torch.allclose(network(context, chunk, mask)[:, 2:3], alone, atol=1e-7)


@EITHER
def test_the_order_of_steps_matters(layout: dict[str, str]) -> None:
    context, chunk, _ = inputs()
    mask = torch.ones(5, 6, dtype=torch.bool)
    network = critic(2, layout)
    assert not torch.allclose(network(context, chunk, mask), network(context, chunk.flip(1), mask), atol=1e-5)


@EITHER
def test_it_can_fit_a_function_of_when_something_happens(layout: dict[str, str]) -> None:
    torch.manual_seed(0)
    network = critic(2, layout)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    context, mask = torch.zeros(128, 8), torch.ones(128, 6, dtype=torch.bool)
    for _ in range(150):
        chunk = torch.rand(128, 6, 3) * 2 - 1
        loss = (network(context, chunk, mask) - (chunk[:, 1, 0] - chunk[:, 4, 0])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1  # the variance of what it fits is 0.67


def test_the_published_layout_is_the_network_of_qams_code() -> None:
    """Each head against torch's own layers: products, GELU, then layer normalisation, of [context, chunk]."""
    context, chunk, _ = inputs()
    mask = torch.ones(5, 6, dtype=torch.bool)
    network = critic(3, PUBLISHED)
    with torch.no_grad():
        for norm in network.norms:
            norm.scale.normal_()
            norm.shift.normal_()
        together = network(context, chunk, mask)
        for head in range(3):
            x = torch.cat([context, chunk.flatten(1)], dim=-1)
            for linear, norm in zip(network.hidden, network.norms, strict=True):
                x = torch.nn.functional.gelu(x @ linear.weight[head] + linear.bias[head])
                x = torch.nn.functional.layer_norm(x, (16,), norm.scale[head, 0], norm.shift[head, 0])
            alone = (x @ network.value.weight[head] + network.value.bias[head]).squeeze(-1)
            assert torch.allclose(together[head], alone, atol=1e-6)
    expected = 3 * ((26 * 16 + 16) + (16 * 16 + 16) + 2 * 2 * 16 + 17)
    assert sum(p.numel() for p in network.parameters()) == expected


@EITHER
def test_values_keep_their_digits_under_autocast(layout: dict[str, str]) -> None:
    network = critic(2, layout)
    whole = network(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        fast = network(*inputs())
    assert fast.dtype == torch.float32
    assert (fast - whole).abs().max() < 0.02 * whole.abs().max()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="heads"):
        CriticConfig(heads=0)
