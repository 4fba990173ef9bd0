# SPDX-License-Identifier: Apache-2.0
"""What judges actions: the value, the critics and their slow copy, and how they learn from replayed transitions."""

from __future__ import annotations

import torch
from torch import Tensor

from lwd_learner import divl
from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig, CriticEnsemble, ValueNetwork
from lwd_learner.descent import Descent, MakeOptimiser
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
    ) -> None:
        self.config, self.context_dim = config, context_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            value = ValueNetwork(context_dim, config.outputs, critic).to(device)
            heads = CriticEnsemble(context_dim, horizon, action_dim, critic).to(device)
        self.value_descent = Descent("value", ranks.place(value), make_optimiser, norm_max, ranks)
        self.critic_descent = Descent("critic", ranks.place(heads), make_optimiser, norm_max, ranks)
        self.value, self.critic = self.value_descent.network, self.critic_descent.network
        self.target_critic = ranks.copy(heads).requires_grad_(False)

    def update(self, batch: Batch, tau_base: float) -> Metrics:
        """One step of value and critic. Raises NonFiniteLoss."""
        metrics = self._update_value(batch)
        metrics |= self._update_critic(batch, tau_base)
        divl.ema_update(self.target_critic, self.critic, self.config.ema_rate)
        return metrics

    def _update_value(self, batch: Batch) -> Metrics:
        with torch.no_grad():
            label = divl.value_label(self.target_critic(batch.context, batch.action, batch.mask))
        loss = divl.fit_loss(self.value(batch.context), label, self.config)
        norm = self.value_descent.step(loss)
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
            read = divl.bootstrap(self.value(batch.next_context), tau_base, self.config)
        target = divl.critic_target(batch.reward, batch.discount, read.value)
        q = self.critic(batch.context, batch.action, batch.mask)
        loss = divl.critic_loss(q, target)
        norm = self.critic_descent.step(loss)
        return {
            "critic_loss": loss,
            "critic_gradient": norm,
            "q": q.detach().mean(),
            "target": target.mean(),
            "tau": read.tau.mean(),
            "entropy": read.entropy.mean(),
            "tau_base": tau_base,
        }

    def q(self, context: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        """[E, B] heads of the slow critic: context [B, C], chunk [B, H, A], mask [B, H] of executed steps."""
        heads: Tensor = self.target_critic(context, chunk, mask)
        return heads

    @torch.no_grad()
    def baseline(self, context: Tensor) -> Tensor:
        """[B] V(s) that advantages are measured from: the mean of the law of Q over replayed actions, or the expectile.
        Not the quantile of the targets: it jumps from mode to mode, and the sign of an advantage would with it."""
        return divl.mean_value(self.value(context), self.config)
