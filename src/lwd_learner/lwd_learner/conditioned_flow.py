# SPDX-License-Identifier: Apache-2.0
"""A flow expert that sees an indicator beside its context, and the plain expert that is left once it is fixed.

Context enters an expert by one linear map first (`context_entry` names it). A constant input to a linear map is a
bias: for any fixed indicator there is a plain expert that does exactly the same, and robots need nothing new.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def widened(expert: nn.Module, context_dim: int, inputs: int) -> nn.Module:
    """A copy that takes context [B, C + inputs]; it does not heed the new inputs yet. Raises ValueError if the expert
    does not say where its context enters."""
    name, entry = _entry(expert)
    wide = copy.deepcopy(expert)
    linear = nn.Linear(entry.in_features + inputs, entry.out_features).to(entry.weight)
    wide.set_submodule(name, linear)
    spread(expert, wide, context_dim)
    return wide


@torch.no_grad()
def spread(expert: nn.Module, wide: nn.Module, context_dim: int) -> None:
    """Set `wide` to do what `expert` does, whatever the indicator."""
    name, entry = _entry(expert)
    _, linear = _entry(wide)
    inputs = linear.in_features - entry.in_features
    before, after = entry.weight[:, :context_dim], entry.weight[:, context_dim:]
    state = dict(expert.state_dict())
    state[f"{name}.weight"] = torch.cat([before, before.new_zeros(len(before), inputs), after], dim=1)
    wide.load_state_dict(state)


@torch.no_grad()
def fold(wide: nn.Module, expert: nn.Module, context_dim: int, indicator: Tensor) -> None:
    """Set `expert` to do what `wide` does with this indicator, [inputs]. The inverse of `spread`."""
    name, linear = _entry(wide)
    end = context_dim + len(indicator)
    state = dict(wide.state_dict())
    state[f"{name}.weight"] = torch.cat([linear.weight[:, :context_dim], linear.weight[:, end:]], dim=1)
    state[f"{name}.bias"] = linear.bias + linear.weight[:, context_dim:end] @ indicator.to(linear.weight)
    expert.load_state_dict(state)


def _entry(expert: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the linear map whose first columns are the context's."""
    name = getattr(expert, "context_entry", None)
    entry = expert.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(entry, nn.Linear):
        raise ValueError(
            f"{type(expert).__name__} names no linear map in `context_entry`; it cannot be given an indicator"
        )
    return name, entry
