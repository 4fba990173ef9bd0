# SPDX-License-Identifier: Apache-2.0
"""The trainer: order of the updates, frozen parts, exact resume, and a bandit that has to be learned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lwd_learner import qam
from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.descent import NonFiniteLoss
from lwd_learner.divl import bootstrap, critic_target
from lwd_learner.flow_actor import ReferenceMissing
from lwd_learner.qam import QamConfig
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.training_state import ResumeRefused, save_state, saved_states

C, H, A = 6, 4, 2
CONFIG = TrainerConfig(critic=CriticConfig(width=32, embedding=8), batch=16)


class SmallExpert(nn.Module):
    """The interface of a flow expert, in two layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(C + H * A + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, H * A),
        )

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        velocity: Tensor = self.net(torch.cat([context, noisy.flatten(1), flow_time[:, None]], dim=-1))
        return velocity.view_as(noisy)


def batch(seed: int = 0, rows: int = 16, online: bool = False) -> Batch:
    g = torch.Generator().manual_seed(seed)
    executed = torch.randint(1, H + 1, (rows, 1), generator=g)
    done = torch.rand(rows, generator=g) < 0.3
    return Batch(
        context=torch.randn(rows, C, generator=g),
        action=torch.randn(rows, H, A, generator=g).clamp(-1, 1),
        mask=torch.arange(H) < executed,
        valid=torch.ones(rows, H, dtype=torch.bool),
        reward=done.float(),
        discount=torch.where(done, 0.0, 0.97),
        next_context=torch.randn(rows, C, generator=g),
        online=torch.full((rows,), online),
        author=torch.ones(rows, dtype=torch.int64),
        outcome=torch.ones(rows, dtype=torch.int64),
        policy_version=torch.zeros(rows, dtype=torch.int64),
        task=torch.zeros(rows, dtype=torch.int64),
        row=torch.arange(rows),
    )


def trainer(config: TrainerConfig = CONFIG, seed: int = 0, frozen: bool = True) -> Trainer:
    torch.manual_seed(seed)
    made = Trainer(SmallExpert(), C, H, A, config, seed=seed)
    if frozen:
        made.freeze_reference()
    return made


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_target_uses_the_value_network_as_just_updated() -> None:
    made, rows = trainer(), batch()

    def target_now() -> Tensor:
        with torch.no_grad():
            read = bootstrap(made.values.value(rows.next_context), 0.6, made.config.divl)
        return critic_target(rows.reward, rows.discount, read.value)

    before = target_now()
    metrics = made.learn(rows)
    after = target_now()
    assert not torch.equal(before, after)
    assert metrics["target"] == pytest.approx(after.mean().item(), abs=1e-7)
    assert metrics["target"] != pytest.approx(before.mean().item(), abs=1e-7)


def test_a_value_network_that_does_not_learn_leaves_the_target_where_it_was() -> None:
    made, rows = trainer(), batch()
    made.values.value_descent.set_rate(0.0)
    with torch.no_grad():
        read = bootstrap(made.values.value(rows.next_context), 0.6, made.config.divl)
    before = critic_target(rows.reward, rows.discount, read.value).mean().item()
    assert made.learn(rows)["target"] == pytest.approx(before, abs=1e-7)


def test_the_target_critic_moves_by_the_ema_of_the_updated_critic() -> None:
    made = trainer()
    before = state(made.values.target_critic)
    made.learn(batch())
    rate = made.config.divl.ema_rate
    for name, tensor in made.values.target_critic.state_dict().items():
        expected = before[name] + rate * (made.values.critic.state_dict()[name] - before[name])
        assert torch.allclose(tensor, expected, atol=1e-7), name
    assert not same(state(made.values.target_critic), before)


def test_the_reference_never_moves_until_it_is_frozen_anew() -> None:
    made = trainer()
    digest = made.actor.reference_digest()
    for seed in range(3):
        made.learn(batch(seed, online=True))
        made.diagnose(batch(seed))
    assert made.actor.reference_digest() == digest
    made.freeze_reference()
    assert made.actor.reference_digest() != digest


def test_the_policy_stays_while_the_gate_is_closed_and_moves_when_it_opens() -> None:
    made = trainer()
    before = state(made.actor.expert)
    assert made.learn(batch(), update_policy=False)["policy_updated"] == 0.0
    assert same(before, state(made.actor.expert))
    made.learn(batch())
    assert not same(before, state(made.actor.expert))


def test_only_the_networks_of_a_step_change() -> None:
    made = trainer()
    value, critic = state(made.values.value), state(made.values.critic)
    made.clone(batch())
    assert same(value, state(made.values.value))
    assert same(critic, state(made.values.critic))
    assert all(p.grad is None for p in made.values.target_critic.parameters())
    assert made.actor.reference is not None
    assert all(p.grad is None for p in made.actor.reference.parameters())


def test_learning_without_a_reference_is_refused() -> None:
    with pytest.raises(ReferenceMissing, match="freeze_reference"):
        trainer(frozen=False).learn(batch())


def test_tau_base_climbs_with_online_steps_only() -> None:
    made = trainer(replace(CONFIG, divl=replace(CONFIG.divl, tau_ramp_steps=10)))
    assert made.learn(batch())["tau_base"] == 0.6
    for _ in range(5):
        tau = made.learn(batch(online=True), update_policy=False)["tau_base"]
    assert tau == pytest.approx(0.75)
    assert made.learn(batch(online=True), raise_tau=False)["tau_base"] == pytest.approx(0.75)


def test_a_loss_that_is_not_a_number_stops_with_its_name_and_step_and_spoils_nothing() -> None:
    made = trainer()
    made.learn(batch())
    before = state(made.values.value)
    spoiled = replace(batch(), context=torch.full((16, C), torch.nan))
    with pytest.raises(NonFiniteLoss, match="the value loss is nan at step 1"):
        made.learn(spoiled)
    assert same(before, state(made.values.value))
    with pytest.raises(NonFiniteLoss, match="the critic loss is inf at step 1"):
        made.learn(replace(batch(), reward=torch.full((16,), torch.inf)))


@pytest.mark.parametrize("adjoint", ["denoiser", "gaussian"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, adjoint: qam.Adjoint) -> None:
    config = replace(CONFIG, extraction=replace(CONFIG.extraction, adjoint=adjoint))

    def run(made: Trainer, steps: range) -> list[float]:
        return [
            made.learn(batch(int(torch.randint(9, (1,), generator=made.sampling))))["policy_loss"]
            for _ in steps
        ]

    straight = trainer(config)
    straight.clone(batch())
    run(straight, range(3))
    straight.save(tmp_path)
    first = run(straight, range(3))
    resumed = trainer(config, seed=7)
    resumed.load(tmp_path)
    assert run(resumed, range(3)) == first
    for (name, module), (_, other) in zip(straight._modules(), resumed._modules(), strict=True):
        assert same(state(module), state(other)), name
    assert resumed.report() == straight.report()
    assert resumed.extraction.numbers == straight.extraction.numbers
    assert resumed.actor.reference_digest() == straight.actor.reference_digest()


def test_a_state_saved_before_there_was_a_reference_resumes(tmp_path: Path) -> None:
    made = trainer(frozen=False)
    made.clone(batch())
    made.save(tmp_path)
    resumed = trainer(seed=3)
    resumed.load(tmp_path)
    assert resumed.actor.reference is None
    assert resumed.clone(batch()) == made.clone(batch())


def test_a_state_of_another_configuration_or_size_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    trainer().save(tmp_path)
    other = trainer(replace(CONFIG, extraction=replace(CONFIG.extraction, kl_budget=0.5)))
    with pytest.raises(ResumeRefused, match=r"extraction\.kl_budget = 0\.05, not 0\.5"):
        other.load(tmp_path)
    wide = Trainer(SmallExpert(64), C, H, A, CONFIG)
    before = state(wide.values.value)
    with pytest.raises(ResumeRefused, match=r"expert: net\.0\.weight has shape"):
        wide.load(tmp_path)
    assert same(before, state(wide.values.value))
    assert wide.actor.reference is None


def test_damaged_and_missing_states_are_refused(tmp_path: Path) -> None:
    made = trainer()
    with pytest.raises(ResumeRefused, match="no training state"):
        made.load(tmp_path / "nothing")
    path = made.save(tmp_path)
    (path / "state.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ResumeRefused, match="not a readable"):
        made.load(tmp_path)


def test_an_interrupted_save_is_invisible_and_old_states_are_dropped(tmp_path: Path) -> None:
    (tmp_path / ".step_000000009.partial").mkdir()
    for step in (9, 10, 11):
        save_state(tmp_path, step, {"x": torch.zeros(1)}, {"step": step})
    assert [path.name for path in saved_states(tmp_path)] == ["step_000000010", "step_000000011"]
    assert json.loads((tmp_path / "step_000000011" / "state.json").read_text()) == {"step": 11}


def test_reports_are_means_since_the_last_report() -> None:
    made = trainer()
    losses = [made.learn(batch(seed))["value_loss"] for seed in range(3)]
    assert made.report()["value_loss"] == pytest.approx(sum(losses) / 3)
    assert made.report() == {}


def test_the_policy_step_may_use_fewer_rows_than_the_batch() -> None:
    made = trainer(replace(CONFIG, policy_rows=4))
    seen: set[int] = set()
    made.actor.expert.register_forward_hook(lambda module, given, out: seen.add(len(out)))
    made.learn(batch())
    assert seen == {4}


def test_the_paper_preset_changes_what_it_says() -> None:
    paper = CONFIG.paper()
    assert paper.gamma == pytest.approx(0.9999**3)  # 10 Hz
    assert (paper.divl.quantile, paper.extraction.rollout, paper.extraction.temperature) == (
        "hard",
        "reference",
        "fixed",
    )
    assert (paper.extraction.adjoint, paper.extraction.pairing) == ("vjp", "official")
    assert trainer(paper).learn(batch())["lambda"] == 2.0


@pytest.mark.parametrize("adjoint", ["denoiser", "vjp", "scalar", "gaussian"])
def test_the_policy_step_carries_the_adjoint_as_configured(
    adjoint: qam.Adjoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    ways = {"vjp": "lean_adjoint"} | {name: f"{name}_adjoint" for name in ("denoiser", "scalar", "gaussian")}
    for name in ways.values():
        whole = getattr(qam, name)
        monkeypatch.setattr(
            qam, name, lambda *given, name=name, whole=whole: (used.append(name), whole(*given))[1]
        )
    trainer(replace(CONFIG, extraction=replace(CONFIG.extraction, adjoint=adjoint))).learn(batch())
    assert used == [ways[adjoint]]


def test_cloning_leaves_the_precision_of_others_alone() -> None:
    before = torch.get_float32_matmul_precision()
    trainer().clone(batch())
    assert torch.get_float32_matmul_precision() == before


def test_a_bandit_with_two_modes_learns_the_one_that_pays() -> None:
    """One state, one executed step: the demonstrator goes left or right, right pays. algorithm.md 2.6."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = TrainerConfig(
        extraction=QamConfig(temperature="fixed", fixed_lambda=0.15),
        critic=CriticConfig(width=32, embedding=8),
        policy_rate=1e-3,
        critic_rate=2e-3,
    )
    made = Trainer(SmallExpert(64), C, H, A, config)
    generator = torch.Generator().manual_seed(0)

    def demonstrate(rows: int) -> Batch:
        action = torch.zeros(rows, H, A)
        side = torch.where(torch.rand(rows, generator=generator) < 0.5, 1.0, -1.0)
        action[:, 0, 0] = 0.6 * side + 0.1 * torch.randn(rows, generator=generator)
        mask = (torch.arange(H) < 1).expand(rows, H)
        plain = batch(rows=rows)
        return replace(
            plain,
            context=torch.zeros(rows, C),
            next_context=torch.zeros(rows, C),
            action=action,
            mask=mask,
            reward=(action[:, 0, 0] > 0).float(),
            discount=torch.zeros(rows),
        )

    def success() -> float:
        noise = torch.randn(1000, H, A, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            x = noise
            for i in range(10):
                x = x + made.actor.expert(torch.zeros(1000, C), x, torch.full((1000,), i / 10)) / 10
        return (x[:, 0, 0] > 0).float().mean().item()

    for _ in range(400):
        made.clone(demonstrate(128))
    made.freeze_reference()
    cloned = success()
    for step in range(500):
        made.learn(demonstrate(128), update_policy=step >= 200)
    assert 0.35 < cloned < 0.65
    assert success() > cloned + 0.2
    assert made.diagnose(demonstrate(128))["q_gain"] > 0.1
