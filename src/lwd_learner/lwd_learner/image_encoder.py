# SPDX-License-Identifier: Apache-2.0
"""The critic's own eyes: images and the cached context become the one feature that V and Q read. algorithm.md 1.2, 4.8.

Cached trunk features hold what the policy's trunk was pretrained to find. What else decides an outcome can only be
learned from the images, end to end by the losses of value and critic. It is never shipped to a robot.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lwd_learner.replay_episode import Camera


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of the encoder."""

    channels: tuple[int, ...] = (16, 32, 32)  # of one convolution each, every one halves the image
    grid: int = 4  # cells per side that the last maps are averaged into: where things are, roughly
    view: int = 64  # units of one image
    width: int = 256  # Z, units of the feature

    def __post_init__(self) -> None:
        if not self.channels or min(*self.channels, self.grid, self.view, self.width) < 1:
            raise ValueError(f"an image encoder needs convolutions and positive sizes, not {self}")


@dataclass(frozen=True)
class Sight:
    """What images a critic sees beside a context."""

    history: int  # observations
    cameras: tuple[Camera, ...]  # of one size

    @property
    def views(self) -> int:
        """Images of one context."""
        return self.history * len(self.cameras)


class ImageEncoder(nn.Module):
    """context [B, C], images uint8 [B, history, cameras, 3, h, w] -> feature [B, Z].

    All views share the convolutions; which view is which, their fusion knows. Any h and w will do.
    """

    def __init__(self, context_dim: int, sight: Sight, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.dim = config.width
        layers: list[nn.Module] = []
        for number, (fan_in, fan_out) in enumerate(pairwise((3, *config.channels))):
            kernel = 3 if number else 5
            layers += [nn.Conv2d(fan_in, fan_out, kernel, stride=2, padding=kernel // 2), nn.SiLU()]
        self.look = nn.Sequential(
            *layers,
            nn.AdaptiveAvgPool2d(config.grid),
            nn.Flatten(),
            nn.Linear(config.channels[-1] * config.grid**2, config.view),
            nn.LayerNorm(config.view),
            nn.SiLU(),
        )
        self.fuse = nn.Sequential(
            nn.Linear(context_dim + sight.views * config.view, config.width),
            nn.LayerNorm(config.width),
            nn.SiLU(),
        )

    def forward(self, context: Tensor, images: Tensor) -> Tensor:
        views = images.flatten(0, 2).to(context.dtype) / 127.5 - 1.0
        seen = self.look(views).view(len(context), -1)
        feature: Tensor = self.fuse(torch.cat([context, seen], dim=-1))
        return feature
