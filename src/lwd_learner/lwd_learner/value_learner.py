# SPDX-License-Identifier: Apache-2.0
"""What judges actions: the value, the critics and their slow copy, and how they learn from replayed transitions."""

from __future__ import annotations

import torch
from torch import Tensor

from lwd_learner import divl
from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig, CriticEnsemble, ValueNetwork
from lwd_learner.critic_features import CriticFeatures, OwnFeatures, TrunkFeatures
from lwd_learner.descent import Descent, MakeOptimiser
from lwd_learner.image_encoder import ImageEncoder, Sight
from lwd_learner.ranks import ALONE, Ranks

Metrics = dict[str, float | Tensor]


class ValueLearner:
    """DIVL: value, then the target read off the updated value, then critic, then the slow copy. algorithm.md 3.
    With `DivlConfig.value` = "expectile" the same is IQL.

    It never asks the policy anything: every target is a property of the data.
    """

    def __init__(
        self,
        context_dim: int,
        horizon: int,
        action_dim: int,
        config: divl.DivlConfig,
        critic: CriticConfig,
        make_optimiser: MakeOptimiser,
        norm_max: float,
        device: torch.device,
        seed: int,
        ranks: Ranks = ALONE,
        sight: Sight | None = None,
    ) -> None:
        """sight: the images that a critic with features of its own gets to see. Raises ValueError where there are none."""
        self.config, self.context_dim = config, context_dim
        self.features: CriticFeatures = TrunkFeatures(context_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if critic.features == "own":
                if sight is None or not sight.views:
                    raise ValueError('a critic with features = "own" needs images, and there is no camera')
                encoder = ImageEncoder(context_dim, sight, critic.encoder).to(device)
                self.features = OwnFeatures(encoder, make_optimiser, norm_max, ranks)
            value = ValueNetwork(self.features.dim, config.outputs, critic).to(device)
            heads = CriticEnsemble(self.features.dim, horizon, action_dim, critic).to(device)
        self.value_descent = Descent("value", ranks.place(value), make_optimiser, norm_max, ranks)
        self.critic_descent = Descent("critic", ranks.place(heads), make_optimiser, norm_max, ranks)
        self.value, self.critic = self.value_descent.network, self.critic_descent.network
        self.target_critic = ranks.copy(heads).requires_grad_(False)

    def update(self, batch: Batch, tau_base: float) -> Metrics:
        """One step of value and critic. Raises NonFiniteLoss."""
        metrics = self._update_value(batch)
        metrics |= self._update_critic(batch, tau_base)
        divl.ema_update(self.target_critic, self.critic, self.config.ema_rate)
        self.features.follow(self.config.ema_rate)
        return metrics

    def _update_value(self, batch: Batch) -> Metrics:
        with torch.no_grad():
            label = divl.value_label(self.target_critic(self.slow_state(batch), batch.action, batch.mask))
        state = self.features.online(batch.context, batch.images)
        loss = divl.fit_loss(self.value(state), label, self.config)
        norm = self.value_descent.step(loss, self.features.descents)
        support = self.config.support
        clipped = ((label < support.low) | (label > support.high)).float().mean()
        return {
            "value_loss": loss,
            "value_gradient": norm,
            "value_label": label.mean(),
            "label_clipped": clipped,
        }

    def _update_critic(self, batch: Batch, tau_base: float) -> Metrics:
        with torch.no_grad():
            read = divl.bootstrap(self.value(self.next_state(batch)), tau_base, self.config)
        target = divl.critic_target(batch.reward, batch.discount, read.value)
        state = self.features.online(batch.context, batch.images)
        q = self.critic(state, batch.action, batch.mask)
        loss = divl.critic_loss(q, target)
        norm = self.critic_descent.step(loss, self.features.descents)
        return {
            "critic_loss": loss,
            "critic_gradient": norm,
            "q": q.detach().mean(),
            "target": target.mean(),
            "tau": read.tau.mean(),
            "entropy": read.entropy.mean(),
            "tau_base": tau_base,
        }

    # What is asked of it; a state is what it sees of a context, [B, Z]: the context itself with features = "trunk".

    @torch.no_grad()
    def state(self, batch: Batch) -> Tensor:
        """As V and the critic in training see it."""
        return self.features.online(batch.context, batch.images)

    @torch.no_grad()
    def next_state(self, batch: Batch) -> Tensor:
        """The same where the window ends."""
        return self.features.online(batch.next_context, batch.next_images)

    @torch.no_grad()
    def slow_state(self, batch: Batch) -> Tensor:
        """As the slow critic sees it: what `q` is to be asked in."""
        return self.features.slow(batch.context, batch.images)

    def q(self, state: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        """[E, B] heads of the slow critic: `slow_state` [B, Z], chunk [B, H, A], mask [B, H] of executed steps."""
        heads: Tensor = self.target_critic(state, chunk, mask)
        return heads

    @torch.no_grad()
    def baseline(self, state: Tensor) -> Tensor:
        """[B] V(s) that advantages are measured from: the mean of the law of Q over replayed actions, or the expectile.
        Not the quantile of the targets: it jumps from mode to mode, and the sign of an advantage would with it."""
        return divl.mean_value(self.value(state), self.config)
