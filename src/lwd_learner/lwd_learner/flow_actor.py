# SPDX-License-Identifier: Apache-2.0
"""The policy in training: a flow expert, the frozen reference it is measured from, and the way it clones."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lwd_learner import qam
from lwd_learner.batch import Batch
from lwd_learner.descent import Descent, MakeOptimiser
from lwd_learner.ranks import ALONE, Ranks
from lwd_policy.flow_policy import FLOW_STEPS


class ReferenceMissing(Exception):
    """Reinforcement learning was asked for before there was a frozen reference to stay near."""


class FlowActor:
    """Trains `expert(context [B, C], noisy [B, H, A], flow_time [B]) -> velocity [B, H, A]` in place.

    `noise` is the one source of randomness of everything that trains a policy: all ranks draw from it for the whole
    global batch, and keep what belongs to their rows.
    """

    def __init__(
        self,
        expert: nn.Module,
        horizon: int,
        action_dim: int,
        make_optimiser: MakeOptimiser,
        norm_max: float,
        device: torch.device,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.reference: nn.Module | None = None
        self.chunk = (horizon, action_dim)
        self.device = device
        self.noise = torch.Generator(device).manual_seed(seed)  # of paths and flow times
        self.descent = Descent("policy", ranks.place(expert.to(device)), make_optimiser, norm_max, ranks)
        self.expert = self.descent.network

    @property
    def frozen(self) -> nn.Module:
        """The reference. Raises ReferenceMissing."""
        if self.reference is None:
            raise ReferenceMissing("freeze_reference() comes between cloning and learning")
        return self.reference

    def freeze_reference(self) -> None:
        """Make the present policy the reference, and forget how it was reached."""
        self.reference = self.copy_expert()
        self.descent.restart()

    def beside(self, seed: int) -> FlowActor:
        """The same expert and the present reference with another stream of noise: what trains with it leaves no trace in
        this one's."""
        other = copy.copy(self)
        other.noise = torch.Generator(self.device).manual_seed(seed)
        return other

    def copy_expert(self) -> nn.Module:
        """The present policy, frozen."""
        return self.ranks.copy(self.descent.module).requires_grad_(False).eval()

    @torch.no_grad()
    def write_expert(self, expert: nn.Module) -> None:
        """Give another one, whole on this rank, the values of the trained one; nothing if it is the same."""
        if expert is self.descent.module:
            return
        for kept, trained in zip(expert.parameters(), self.descent.module.parameters(), strict=True):
            kept.copy_(self.ranks.whole(trained))

    def reference_digest(self) -> str:
        """sha256 of the reference's weights. Raises ReferenceMissing."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self.frozen.state_dict().items()):
            hasher.update(name.encode())
            hasher.update(self.ranks.whole(tensor.detach()).cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def normal(self, shape: tuple[int, ...] | torch.Size, axis: int = 0) -> Tensor:
        """Standard normal numbers, the next ones of the actor's stream. axis: that of the batch's rows."""
        return self._draw(torch.randn, shape, axis)

    def uniform(self, shape: tuple[int, ...] | torch.Size, axis: int = 0) -> Tensor:
        """Uniform numbers in [0, 1), the next ones of the same stream."""
        return self._draw(torch.rand, shape, axis)

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...], axis: int) -> Tensor:
        every = (*shape[:axis], shape[axis] * self.ranks.size, *shape[axis + 1 :])
        return self.ranks.mine(draw(every, generator=self.noise, device=self.device), axis)

    def velocity(self, expert: nn.Module, context: Tensor) -> qam.Velocity:
        """An expert with its context bound, over flat chunks: (x [B, D], flow_time [B]) -> [B, D]."""

        def velocity(x: Tensor, flow_time: Tensor) -> Tensor:
            chunk: Tensor = expert(context, x.view(-1, *self.chunk), flow_time)
            return chunk.flatten(1)

        return velocity

    def cloning_loss(
        self, batch: Batch, weight: Tensor | None = None, expert: nn.Module | None = None
    ) -> Tensor:
        """Flow matching to the batch's actions, where valid. algorithm.md 2.5.

        weight: [B] >= 0, how much each row counts, relative to the others of the batch: a loss that grew with all
        weights would turn them into a learning rate, or into noise of the clipped gradient. expert: another than
        the actor's own that imitates.
        """
        imitates = self.expert if expert is None else expert
        noise = self.normal(batch.action.shape)
        flow_time = self.uniform((len(batch),))
        counts = batch.valid.unsqueeze(-1)
        if weight is not None:
            share = weight / self.ranks.mean(weight.mean()).clamp_min(torch.finfo(weight.dtype).tiny)
            counts = counts * share.reshape(-1, 1, 1)
        loss = qam.flow_matching_loss(
            lambda x, t: imitates(batch.context, x, t), batch.action, noise, flow_time, counts
        )
        # A mean over what counts here; the mean over ranks of this product is the mean over what counts anywhere.
        count = counts.expand_as(batch.action).sum().to(loss.dtype)
        return loss * (count.clamp_min(1.0) * self.ranks.size / self.ranks.total(count).clamp_min(1.0))

    @torch.no_grad()
    def sample(self, expert: nn.Module, context: Tensor, noise: Tensor, steps: int = FLOW_STEPS) -> Tensor:
        """Chunks [B, H, A] in [-1, 1] that an expert makes of noise [B, H, A] by Euler steps, as robots do."""
        end = qam.integrate(self.velocity(expert, context), noise.flatten(1), steps)
        return end.clamp(-1.0, 1.0).view(-1, *self.chunk)


@contextmanager
def fast_products() -> Iterator[None]:
    """Factors of matrix products rounded to bfloat16 where the processor has instructions for it; weights and sums
    stay in float32. Without such instructions nothing changes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
