# SPDX-License-Identifier: Apache-2.0
"""A critic with eyes of its own: what trains them, what follows them, and what they are good for."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from plain_batch import plain_batch
from torch import Tensor

from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig, CriticEnsemble, ValueNetwork
from lwd_learner.descent import NonFiniteLoss
from lwd_learner.divl import DivlConfig
from lwd_learner.extraction.best_of_n import BestOfNConfig
from lwd_learner.gate import outcome_auc
from lwd_learner.image_encoder import ImageEncoder, ImageEncoderConfig, Sight
from lwd_learner.methods import METHODS
from lwd_learner.replay import Replay
from lwd_learner.replay_episode import TRANSITION, Camera, ReplayEpisode, ReplayLayout, pack_images
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.value_learner import ValueLearner
from lwd_policy.flow_expert import FlowExpert

C, H, A, SIZE = 3, 2, 1, 12
SIGHT = Sight(1, (Camera("top", SIZE, SIZE),))
SMALL = ImageEncoderConfig(channels=(8, 8), grid=3, view=16, width=32)
OWN = CriticConfig(width=32, embedding=8, features="own", encoder=SMALL)
TRUNK = replace(OWN, features="trunk")


def values(critic: CriticConfig, sight: Sight | None = SIGHT) -> ValueLearner:
    adam = partial(torch.optim.Adam, lr=1e-3)
    return ValueLearner(C, H, A, DivlConfig(), critic, adam, 1.0, torch.device("cpu"), seed=0, sight=sight)


def batch(rows: int = 8, images: bool = True) -> Batch:
    random = torch.Generator().manual_seed(0)

    def picture() -> Tensor | None:
        shape = (rows, 1, 1, 3, SIZE, SIZE)
        return torch.randint(256, shape, dtype=torch.uint8, generator=random) if images else None

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    return plain_batch(
        normal(rows, C),
        normal(rows, H, A).tanh(),
        reward=normal(rows).sigmoid(),
        discount=torch.full((rows,), 0.9),
        next_context=normal(rows, C),
        images=picture(),
        next_images=picture(),
    )


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_losses_of_value_and_critic_both_train_the_encoder() -> None:
    own = values(OWN)
    encoder = own.features.modules["encoder"]
    steps = [partial(own._update_value, batch()), partial(own._update_critic, batch(), 0.6)]
    for step in steps:
        before = weights(encoder)
        step()
        changed = [not torch.equal(a, b) for a, b in zip(before, weights(encoder), strict=True)]
        assert all(changed), "every layer, the first convolution too"


def test_the_copy_of_the_encoder_follows_as_that_of_the_critic_does() -> None:
    own = values(OWN)
    encoder, target = own.features.modules["encoder"], own.features.modules["target_encoder"]
    before = weights(target)
    assert same(before, weights(encoder))
    own.update(batch(), 0.6)
    rate = own.config.ema_rate
    for old, new, slow in zip(before, weights(encoder), weights(target), strict=True):
        torch.testing.assert_close(slow, (1 - rate) * old + rate * new)
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_the_label_and_the_policy_read_the_slow_copy_and_the_target_the_encoder_in_training() -> None:
    own = values(OWN)
    rows = batch()
    with torch.no_grad():
        for parameter in own.features.modules["encoder"].parameters():
            parameter.add_(torch.randn_like(parameter))
    encoder, target = own.features.modules["encoder"], own.features.modules["target_encoder"]
    assert torch.equal(own.slow_state(rows), target(rows.context, rows.images))
    assert torch.equal(own.state(rows), encoder(rows.context, rows.images))
    assert torch.equal(own.next_state(rows), encoder(rows.next_context, rows.next_images))
    assert not torch.equal(own.state(rows), own.slow_state(rows))
    chunk = rows.action.clone().requires_grad_()
    own.q(own.slow_state(rows), chunk, rows.mask).sum().backward()  # type: ignore[no-untyped-call]
    assert chunk.grad is not None and chunk.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_an_encoder_knows_its_views_apart_and_any_size() -> None:
    sight = Sight(2, (Camera("left", 9, 12), Camera("right", 9, 12)))
    encoder = ImageEncoder(C, sight, SMALL)
    context = torch.zeros(1, C)
    images = torch.randint(256, (1, 2, 2, 3, 9, 12), dtype=torch.uint8)
    feature = encoder(context, images)
    assert feature.shape == (1, encoder.dim)
    for axis in (1, 2):
        assert not torch.allclose(feature, encoder(context, images.flip(axis)))
    assert not torch.allclose(feature, encoder(context + 1, images))


def test_with_trunk_features_nothing_has_changed() -> None:
    """Neither by what was built, nor by images that a batch happens to bring."""
    blind, seeing = values(TRUNK), values(TRUNK)
    torch.manual_seed(0)
    value = ValueNetwork(C, blind.config.outputs, TRUNK)
    critic = CriticEnsemble(C, H, A, TRUNK)
    assert same(weights(blind.value), weights(value)) and same(weights(blind.critic), weights(critic))
    assert not blind.features.modules and not blind.features.descents
    rows = batch()
    assert blind.state(rows) is rows.context and blind.slow_state(rows) is rows.context
    for _ in range(3):
        blind.update(replace(rows, images=None, next_images=None), 0.6)
        seeing.update(rows, 0.6)
    assert same(weights(blind.value), weights(seeing.value))
    assert same(weights(blind.target_critic), weights(seeing.target_critic))


def test_what_cannot_see_is_refused() -> None:
    for sight in (None, Sight(2, ())):
        with pytest.raises(ValueError, match="no camera"):
            values(OWN, sight)
    with pytest.raises(ValueError, match="drawn without"):
        values(OWN).update(batch(images=False), 0.6)
    config = TrainerConfig(critic=OWN, extraction=BestOfNConfig())
    with pytest.raises(ValueError, match="best-of-N"):
        Trainer(FlowExpert(C, H, A, "tiny"), C, H, A, config, sight=SIGHT)


def test_a_gradient_that_is_no_number_changes_neither_network() -> None:
    own = values(OWN)
    encoder = own.features.modules["encoder"]
    next(encoder.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    before = weights(encoder), weights(own.value)
    with pytest.raises(NonFiniteLoss, match="encoder gradient"):
        own.update(batch(), 0.6)
    assert same(before[0], weights(encoder)) and same(before[1], weights(own.value))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.judges])
def test_every_method_that_judges_may_see_and_resumes_exactly(method: str, tmp_path: Path) -> None:
    config = METHODS[method].adapt(TrainerConfig(critic=OWN))

    def trainer() -> Trainer:
        torch.manual_seed(0)
        made = Trainer(FlowExpert(C, H, A, "tiny"), C, H, A, config, sight=SIGHT)
        made.freeze_reference()
        return made

    through, stopped, resumed = trainer(), trainer(), trainer()
    rows = batch()
    for _ in range(2):
        through.learn(rows)
    stopped.learn(rows)
    stopped.save(tmp_path)
    resumed.load(tmp_path)
    resumed.learn(rows)
    for name in ("encoder", "target_encoder"):
        modules = [one.values.features.modules[name] for one in (through, resumed)]
        assert same(*map(weights, modules))
    assert torch.equal(through.judge(rows), resumed.judge(rows))


def shown(bright_left: bool, random: np.random.Generator) -> bytes:
    """A bright half and a dark one, in noise."""
    rgb = random.integers(0, 100, (SIZE, SIZE, 3))
    rgb[:, : SIZE // 2] += 100 * bright_left
    rgb[:, SIZE // 2 :] += 100 * (not bright_left)
    return cv2.imencode(".jpg", rgb.astype(np.uint8))[1].tobytes()


def fill(replay: Replay, episodes: int, seed: int) -> None:
    """One chunk each. Whether it succeeds stands in its image; features and actions are noise."""
    random = np.random.default_rng(seed)

    def one(number: int) -> ReplayEpisode:
        success = bool(number % 2)
        table = np.zeros(1, TRANSITION)
        table["next_point"], table["done"], table["reward"] = -1, True, float(success)
        table["executed"] = table["planned"] = H
        return ReplayEpisode(
            f"{seed}/{number}",
            "t",
            "offline",
            1 if success else 2,
            random.standard_normal((1, C)).astype(np.float32),
            np.zeros(1, np.int64),
            random.uniform(-1, 1, (1, H, A)).astype(np.float32),
            table,
            *pack_images([[shown(success, random)]]),
        )

    replay.extend(one(number) for number in range(episodes))


def auc_of(critic: CriticConfig, learned: Replay, held_out: Replay) -> float:
    config = TrainerConfig(divl=DivlConfig(ema_rate=0.05), critic=critic, critic_rate=3e-3)
    trainer = Trainer(FlowExpert(C, H, A, "tiny"), C, H, A, config, seed=0, sight=SIGHT)
    for _ in range(150):
        batch = learned.sample(32, trainer.sampling, config.gamma, images=critic.features == "own")
        trainer.learn(batch, update_policy=False)
    batch = held_out.batch(held_out.rows(), config.gamma, images=True)
    success = (batch.outcome == 1).numpy()
    return float(outcome_auc(trainer.judge(batch).numpy(), success, np.zeros(len(success))))


def test_what_only_an_image_shows_is_learned_with_features_of_its_own_and_not_from_the_trunk(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    layout = ReplayLayout(C, H, A, history=1, cameras=SIGHT.cameras)
    options: dict[str, Any] = {"layout": layout}
    with (
        Replay(tmp_path / "learned", **options) as learned,
        Replay(tmp_path / "held_out", **options) as held_out,
    ):
        fill(learned, 200, seed=0)
        fill(held_out, 100, seed=1)
        assert auc_of(OWN, learned, held_out) > 0.9
        assert 0.3 < auc_of(TRUNK, learned, held_out) < 0.7
