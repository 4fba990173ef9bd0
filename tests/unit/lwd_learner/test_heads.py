# SPDX-License-Identifier: Apache-2.0
"""Heads in training: closed forms of what an edit and a one-step policy become, and their place in a trainer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import two_mode_bandit
from plain_batch import plain_batch
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.extraction.cloning import CloningConfig
from lwd_learner.extraction.edit import EditConfig, squash, temperature_loss
from lwd_learner.extraction.head import climbed_value
from lwd_learner.extraction.headed import HeadConfig, Headed, make_head
from lwd_learner.extraction.one_step import OneStepConfig
from lwd_learner.qam import QamConfig
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.training_state import ResumeRefused
from lwd_policy.action_head import EditHead, EditSpec, OneStepHead

C, H, A, ROWS = 3, 2, 2, 64
HEADS = [EditConfig(head=EditSpec(width=16), acts_after=2), OneStepConfig(acts_after=2)]
EULER = 0.9**10  # what ten steps of dx/dt = -x leave of x


class Linear(nn.Module):
    """Velocity slope * x + shift; with slope -1 a flow whose end is known."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.zeros(()))

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        return self.slope * noisy + self.shift


class Paraboloid(nn.Module):
    """Two heads of Q = -steepness * sum of (a - top)^2 over executed steps; of two heads the mean counts."""

    def __init__(self, top: float, steepness: float) -> None:
        super().__init__()
        self.top, self.steepness = nn.Parameter(torch.tensor(top)), steepness

    def forward(self, context: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        q = -self.steepness * ((chunk - self.top).square() * mask.unsqueeze(-1)).sum(dim=(1, 2))
        return torch.stack([q + 1, q - 1])


def batch(executed: int = H, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return plain_batch(
        torch.randn(ROWS, C, generator=generator),
        torch.randn(ROWS, H, A, generator=generator).clamp(-1, 1),
        mask=(torch.arange(H) < executed).expand(ROWS, H),
        reward=torch.rand(ROWS, generator=generator),
    )


def trainer(
    head: HeadConfig | None, slope: float = -1.0, rate: float = 1e-2, qam: bool = False, seed: int = 0
) -> Trainer:
    """Of a linear flow; nothing moves it but adjoint matching, if asked for."""
    torch.set_num_threads(1)
    extraction = QamConfig(temperature="fixed") if qam else CloningConfig()
    config = TrainerConfig(
        extraction=extraction,
        head=head,
        critic=CriticConfig(width=16, embedding=4),
        policy_rate=rate,
        batch=ROWS,
    )
    made = Trainer(Linear(slope), C, H, A, config, seed=seed)
    made.freeze_reference()
    return made


def headed(made: Trainer) -> Headed:
    assert isinstance(made.extraction, Headed)
    return made.extraction


def state(made: Trainer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in made._modules()
        for key, tensor in module.state_dict().items()
    }


# --- edit -------------------------------------------------------------------------------------------------


def test_an_edit_and_its_density_are_those_of_a_squashed_gaussian() -> None:
    torch.manual_seed(0)
    center, log_deviation, noise = (torch.randn(5, H, A, dtype=torch.float64) for _ in range(3))
    edit, density = squash(center, log_deviation, noise)
    law = TransformedDistribution(Normal(center, log_deviation.exp()), TanhTransform())
    torch.testing.assert_close(edit, torch.tanh(center + log_deviation.exp() * noise))
    torch.testing.assert_close(density, law.log_prob(edit), rtol=1e-6, atol=1e-6)
    far = torch.full((1, H, A), 200.0, requires_grad=True)
    edit, density = squash(far, torch.zeros(1, H, A), torch.zeros(1, H, A))
    density.sum().backward()
    assert torch.isfinite(density).all() and far.grad is not None and torch.isfinite(far.grad).all()


@pytest.mark.parametrize(("top", "center"), [(0.04, 0.4), (-0.06, -0.6), (0.5, 1.0), (-3.0, -1.0)])
def test_an_edit_goes_to_the_top_of_a_known_q_or_as_far_as_its_box_lets_it(top: float, center: float) -> None:
    """The flow always gives 0 and an edit moves it by 0.1 at most."""
    config = EditConfig(head=EditSpec(width=16), acts_after=0)
    made = trainer(config)
    made.actor.expert.slope.data.fill_(0.0)
    made.values.critic_descent.module = Paraboloid(top, 20.0)
    head = headed(made).head
    rows = batch()
    head._flow = lambda context, noise: torch.zeros_like(noise)
    for _ in range(400):
        head.update(rows)
    chunk = head.act(rows.context, torch.zeros(ROWS, H, A))
    assert chunk == pytest.approx(torch.full((ROWS, H, A), 0.1 * center).numpy(), abs=0.012)


def test_the_temperature_ends_where_the_edit_is_as_random_as_asked() -> None:
    """Under Q = -k (s e)^2 the best Gaussian edit of temperature T has variance T / (2 k s^2), so a wanted entropy
    has one temperature."""
    steepness, scale = 20.0, 0.1
    made = trainer(EditConfig(head=EditSpec(scale=scale, width=16)))
    made.values.critic_descent.module = Paraboloid(0.0, steepness)
    head, rows = headed(made).head, batch()
    head._flow = lambda context, noise: torch.zeros_like(noise)
    seen = [head.update(rows) for _ in range(1000)][-200:]
    variance = math.exp(2 * -0.5) / (2 * math.pi * math.e)
    entropy, temperature = (
        sum(float(metrics[name]) for metrics in seen) / len(seen)
        for name in ("edit_entropy", "edit_temperature")
    )
    assert entropy == pytest.approx(-0.5, abs=0.02)
    assert temperature == pytest.approx(2 * steepness * scale**2 * variance, rel=0.1)


def test_the_temperature_falls_while_the_edit_is_more_random_than_asked_and_rises_otherwise() -> None:
    target = torch.tensor([-1.0, -1.0])
    for entropy, sign in ((torch.tensor([0.0, 1.0]), 1.0), (torch.tensor([-3.0, -2.0]), -1.0)):
        temperature = torch.tensor(0.3, requires_grad=True)
        temperature_loss(temperature, entropy, target).backward()
        assert temperature.grad is not None and torch.sign(temperature.grad) == sign


def test_steps_that_are_never_executed_are_never_edited_but_for_the_first_noise() -> None:
    made = trainer(EditConfig(head=EditSpec(width=16), acts_after=0))
    made.values.critic_descent.module = Paraboloid(0.5, 20.0)
    head, rows = headed(made).head, batch(executed=1)
    first = head.update(rows)
    assert float(first["edit_entropy"]) == pytest.approx(-0.5, abs=0.1), "of executed coordinates"
    for _ in range(50):
        head.update(rows)
    assert isinstance(head.network, EditHead)
    center, log_deviation = head.network(rows.context, rows.action)
    assert torch.equal(center[:, 1], torch.zeros(ROWS, A)) and (center[:, 0] > 0.1).all()
    assert log_deviation[:, 1].detach().numpy() == pytest.approx(-1.919, abs=1e-3)


# --- one step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steepness", "top"), [(0.0, 0.0), (0.5, 0.3), (4.0, -0.2)])
def test_one_step_ends_between_the_end_of_the_flow_and_the_top_of_q_as_the_weights_say(
    steepness: float, top: float
) -> None:
    """Per coordinate distillation / D (m - f)^2 + k (m - top)^2 is least at the mean of f and top by weight."""
    distillation = 4.0
    made = trainer(OneStepConfig(distillation=distillation))
    made.values.critic_descent.module = Paraboloid(top, steepness)
    head = headed(made).head
    for step in range(600):
        head.update(batch(seed=step))
    assert isinstance(head.network, OneStepHead)
    expert = head.network.expert
    own = distillation / (H * A) / (distillation / (H * A) + steepness)
    assert 1 + float(expert.slope.detach()) == pytest.approx(own * EULER, abs=0.02)
    assert float(expert.shift.detach()) == pytest.approx((1 - own) * top, abs=0.02)


def test_the_flow_of_a_one_step_head_is_the_one_that_learns_not_the_reference() -> None:
    made = trainer(OneStepConfig(acts_after=0))
    made.values.critic_descent.module = Paraboloid(0.0, 0.0)
    made.actor.expert.slope.data.fill_(-0.5)
    for step in range(400):
        headed(made).head.update(batch(seed=step))
    noise = torch.full((1, H, A), 0.5)
    assert made.act(torch.zeros(1, C), noise).numpy() == pytest.approx(0.5 * 0.95**10, abs=0.02)


# --- in a trainer -----------------------------------------------------------------------------------------


def test_the_value_that_heads_climb_has_a_gradient_in_executed_actions_only() -> None:
    made, rows = trainer(HEADS[0]), batch(executed=1)
    chunk = rows.action.clone().requires_grad_(True)
    value = climbed_value(made.values, rows.context, chunk, rows.mask)
    torch.testing.assert_close(value, made.values.critic(rows.context, chunk, rows.mask).mean(dim=0))
    value.sum().backward()
    assert chunk.grad is not None
    assert torch.equal(chunk.grad[:, 1], torch.zeros(ROWS, A)) and chunk.grad[:, 0].abs().sum() > 0
    parameters = list(made.values.critic.parameters())
    assert all(p.grad is None and p.requires_grad for p in parameters)


@pytest.mark.parametrize("config", HEADS)
@pytest.mark.parametrize("qam", [False, True])
def test_a_head_changes_nothing_but_itself(config: HeadConfig, qam: bool) -> None:
    made = trainer(config, qam=qam)
    before = state(made)
    headed(made).head.update(batch())
    after = state(made)
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(headed(made).head.modules)


@pytest.mark.parametrize("config", HEADS)
def test_what_learns_below_a_head_learns_as_it_does_without_until_the_noise_differs(
    config: HeadConfig,
) -> None:
    alone, with_one = trainer(None, qam=True), trainer(config, qam=True)
    for made in (alone, with_one):
        made.learn(batch())
    ours, theirs = state(with_one), state(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert alone.learn(batch(seed=1))["critic_loss"] == with_one.learn(batch(seed=1))["critic_loss"]


@pytest.mark.parametrize("config", HEADS)
def test_a_head_acts_once_it_has_followed_a_reference_long_enough_and_goes_on_with_the_next(
    config: HeadConfig,
) -> None:
    made = trainer(config)
    context, noise = batch().context, torch.randn(ROWS, *made.noise_shape)

    def flow() -> Tensor:
        return headed(made).extraction.act(context, noise[:, :H])

    for acts in (0.0, 0.0, 1.0):
        assert torch.equal(made.act(context, noise), flow())
        assert made.learn(batch())["head_acts"] == acts
        if made.steps == 1:
            made.freeze_reference()  # what it had followed by then was another one
    acting = made.act(context, noise)
    assert not torch.equal(acting, flow())
    made.freeze_reference()
    assert torch.equal(made.act(context, noise), acting), "it follows the new reference while it acts"


def test_a_one_step_head_begins_as_the_first_step_of_the_flow() -> None:
    made = trainer(OneStepConfig(acts_after=0))
    made.actor.expert.slope.data.fill_(-0.3)
    made.freeze_reference()
    noise = torch.full((1, H, A), 0.5)
    shift = float(made.actor.expert.shift.detach())
    assert made.act(torch.zeros(1, C), noise).numpy() == pytest.approx(0.5 * 0.7 + shift)


def test_an_edit_is_drawn_from_noise_of_its_own_and_without_it_stays_at_its_center() -> None:
    made = trainer(EditConfig(head=EditSpec(scale=0.3, width=16), acts_after=0))
    assert made.noise_shape == (2 * H, A)
    context, noise = batch().context, torch.randn(ROWS, 2 * H, A)
    flow = headed(made).extraction.act(context, noise[:, :H])
    drawn, center = made.act(context, noise), made.act(context, noise[:, :H])
    assert torch.equal(center, flow), "an untrained edit has the centre 0"
    assert 0.01 < (drawn - flow).abs().mean() < 0.3 and (drawn - flow).abs().max() <= 0.3 + 1e-6
    assert torch.equal(drawn, made.act(context, noise))
    assert made.diagnose(batch()).keys() == {"q_policy", "q_reference", "q_gain"}


@pytest.mark.parametrize("config", HEADS)
def test_a_resumed_run_with_a_head_continues_bit_for_bit(config: HeadConfig, tmp_path: Path) -> None:
    straight, resumed = trainer(config, qam=True), trainer(config, qam=True, seed=5)
    for step in range(3):
        straight.learn(batch(seed=step))
    straight.save(tmp_path)
    resumed.load(tmp_path)
    for made in (straight, resumed):
        for step in range(3):
            made.learn(batch(seed=step))
    ours, theirs = state(resumed), state(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.report() == straight.report()
    noise = torch.randn(ROWS, *straight.noise_shape)
    assert torch.equal(resumed.act(batch().context, noise), straight.act(batch().context, noise))


def test_a_state_of_another_head_is_refused_and_one_of_before_there_were_heads_is_not(tmp_path: Path) -> None:
    trainer(HEADS[0]).save(tmp_path)
    for other in (None, HEADS[1], replace(HEADS[0], entropy=-1.0)):
        with pytest.raises(ResumeRefused, match="head"):
            trainer(other).load(tmp_path)
    trainer(None).save(tmp_path / "alone")
    (record,) = (tmp_path / "alone").glob("*/state.json")
    record.write_text(record.read_text().replace('  "head": null,\n', ""))
    assert '"head"' not in record.read_text()
    trainer(None).load(tmp_path / "alone")


@pytest.mark.parametrize(
    "head",
    [
        EditConfig(head=EditSpec(scale=1.2, width=64), acts_after=0),
        OneStepConfig(distillation=0.3, acts_after=0),
    ],
)
def test_a_cloned_flow_goes_both_ways_and_with_a_head_it_goes_where_that_pays(head: HeadConfig) -> None:
    """One state, two modes, of which one pays; the edit may reach from one to the other."""
    config = replace(two_mode_bandit.made(CloningConfig()).config, head=head)
    size = two_mode_bandit.C, two_mode_bandit.H, two_mode_bandit.A
    made = Trainer(two_mode_bandit.Expert(), *size, config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        made.clone(two_mode_bandit.replayed(generator))
    made.freeze_reference()
    for _ in range(150):
        made.learn(two_mode_bandit.replayed(generator))
    assert two_mode_bandit.share_right(made) > 0.95
    made.extraction = headed(made).extraction
    assert 0.35 < two_mode_bandit.share_right(made) < 0.65


# --- beside a flow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", HEADS)
def test_a_head_that_is_made_beside_a_flow_follows_it_and_leaves_its_noise_alone(config: HeadConfig) -> None:
    def flow_after(updates_of_the_head: int) -> dict[str, Tensor]:
        made = trainer(None, qam=True)
        beside = made.actor.beside(seed=7)
        head = make_head(config, made.extraction, beside, made.values)
        before = [parameter.detach().clone() for parameter in head.network.parameters()]
        noise = beside.noise.get_state()
        for step in range(3):
            made.learn(batch(seed=step))
            for _ in range(updates_of_the_head):
                head.update(batch(seed=step))
        trained = any(not torch.equal(a, b) for a, b in zip(before, head.network.parameters(), strict=True))
        assert trained == (updates_of_the_head > 0) != torch.equal(noise, beside.noise.get_state())
        assert beside.expert is made.actor.expert and beside.frozen is made.actor.frozen
        return state(made)

    alone, together = flow_after(0), flow_after(2)
    assert all(torch.equal(alone[name], together[name]) for name in alone)
