# SPDX-License-Identifier: Apache-2.0
"""The velocity network for states: size as published, every input matters, a flow is cloned with it."""

import pytest
import torch

from lwd_learner import qam
from lwd_learner.state_networks import StateFlow


def test_it_has_the_parameters_of_the_published_network():
    network = StateFlow(context_dim=28, horizon=5, action_dim=5, width=512, layers=4)
    expected = (28 + 25 + 1) * 512 + 3 * 512 * 512 + 512 * 25 + 4 * 512 + 25
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("changed", ["context", "noisy", "flow_time"])
def test_velocity_depends_on_each_input_of_its_own_row_only(changed):
    torch.manual_seed(0)
    network = StateFlow(3, 2, 4, width=16, layers=2)
    inputs = {"context": torch.randn(2, 3), "noisy": torch.randn(2, 2, 4), "flow_time": torch.rand(2)}
    before = network(**inputs)
    inputs[changed] = inputs[changed].clone()
    inputs[changed][0] += 0.5
    after = network(**inputs)
    assert before.shape == (2, 2, 4)
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_cloning_a_state_dependent_action_reaches_it():
    torch.manual_seed(0)
    network = StateFlow(1, 1, 2, width=64, layers=2)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(300):
        context = torch.rand(128, 1) * 2 - 1
        action = 0.5 * torch.cat([context, -context], dim=-1).unsqueeze(1)
        loss = qam.flow_matching_loss(
            lambda x, t, c=context: network(c, x, t), action, torch.randn_like(action), torch.rand(128)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    context = torch.tensor([[-0.8], [0.0], [0.8]])
    with torch.no_grad():
        end = qam.integrate(
            lambda x, t: network(context, x.unflatten(1, (1, 2)), t).flatten(1), torch.zeros(3, 2), 10
        )
    assert torch.allclose(end, torch.tensor([[-0.4, 0.4], [0.0, 0.0], [0.4, -0.4]]), atol=0.1)
