# SPDX-License-Identifier: Apache-2.0
"""Everything in training that changes, as tensors: what a killed bout continues from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lwd_learner.descent import Descent


@dataclass
class Parts:
    """The things whose state is kept, by name."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    descents: dict[str, Descent] = field(default_factory=dict)
    generators: dict[str, torch.Generator] = field(default_factory=dict)


def snapshot(parts: Parts) -> dict[str, Tensor]:
    """Keys are kind:name:place."""
    tensors = {
        f"module:{name}:{key}": tensor
        for name, module in parts.modules.items()
        for key, tensor in module.state_dict().items()
    }
    for name, descent in parts.descents.items():
        for index, state in descent.optimiser.state_dict()["state"].items():
            tensors |= {f"descent:{name}:{index}/{key}": tensor for key, tensor in state.items()}
    return tensors | {
        f"generator:{name}:": generator.get_state() for name, generator in parts.generators.items()
    }


def restore(parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    """Put everything back that `snapshot` took of the same parts."""
    groups: defaultdict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        kind, name, place = key.split(":")
        groups[kind, name][place] = tensor
    for name, module in parts.modules.items():
        module.load_state_dict(groups["module", name])
    for name, descent in parts.descents.items():
        moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for place, tensor in groups["descent", name].items():
            index, key = place.split("/")
            moments[int(index)][key] = tensor
        descent.optimiser.load_state_dict({**descent.optimiser.state_dict(), "state": dict(moments)})
    for name, generator in parts.generators.items():
        generator.set_state(groups["generator", name][""])
