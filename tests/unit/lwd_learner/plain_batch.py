# SPDX-License-Identifier: Apache-2.0
"""Batches of which a test says only what it is about."""

from __future__ import annotations

import torch
from torch import Tensor

from lwd_learner.batch import Batch


def plain_batch(context: Tensor, action: Tensor, **others: Tensor) -> Batch:
    """context: [B, C], action: [B, H, A]. Unless `others` say so: all steps executed, no reward, nothing to bootstrap
    from, one task, nobody's, offline."""
    rows, horizon, _ = action.shape
    every, nothing = torch.ones(rows, horizon, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    fields = {
        "context": context,
        "action": action,
        "mask": every,
        "valid": every,
        "reward": torch.zeros(rows),
        "discount": torch.zeros(rows),
        "next_context": torch.zeros_like(context),
        "online": torch.zeros(rows, dtype=torch.bool),
        "author": nothing,
        "outcome": nothing,
        "policy_version": nothing,
        "task": nothing,
        "row": torch.arange(rows),
    }
    return Batch(**{**fields, **others})
