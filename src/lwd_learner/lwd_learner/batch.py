# SPDX-License-Identifier: Apache-2.0
"""What the learner sees of the replay: one minibatch of chunk transitions, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B transitions in the n-step view. algorithm.md 2.1, 2.2."""

    context: Tensor  # [B, C] float32, feature history at the decision, oldest first
    action: Tensor  # [B, H, A] float32 normalised
    mask: Tensor  # [B, H] bool, executed steps: all that a critic may see
    valid: Tensor  # [B, H] bool, steps that the same author took: what cloning may imitate
    reward: Tensor  # [B] float32, discounted over the window
    discount: Tensor  # [B] float32, of the bootstrap; 0 where the episode ended in the window
    next_context: Tensor  # [B, C] float32, where the window ends; meaningless where discount is 0
    online: Tensor  # [B] bool
    author: Tensor  # [B] int64, AUTHOR_* of transitions.py
    outcome: Tensor  # [B] int64, OUTCOME_* of the episode
    policy_version: Tensor  # [B] int64
    task: Tensor  # [B] int64, index into Replay.tasks
    row: Tensor  # [B] int64, row of the replay
    # uint8 [B, history, cameras, 3, height, width], RGB of the same observations as `context` and `next_context`; None
    # unless asked for
    images: Tensor | None = None
    next_images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def first(self, rows: int | None) -> Batch:
        """The first rows, drawn at random as all are; None: all."""
        return self.each(lambda tensor: tensor[:rows])

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on another device; itself where it is there already."""
        return self.each(lambda tensor: tensor.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed; what is not there stays away."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})
