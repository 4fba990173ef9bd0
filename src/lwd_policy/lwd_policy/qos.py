# SPDX-License-Identifier: Apache-2.0
"""Quality of service by class of data: one profile per class, used by every node (architecture.md 3)."""

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy


def _profile(depth: int, reliable: bool = True, latched: bool = False) -> QoSProfile:
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


LATCHED = _profile(1, latched=True)
"""State, mode and status: a late joiner gets the last value."""

COMMAND = _profile(1)
"""Commands and joint states: only the newest counts."""

EVENTS = _profile(100)
"""One message per policy step or event; none may be lost."""

IMAGE_PUBLISH = _profile(60)
"""Compressed images as published: reliable, two seconds at 30 Hz, so that a recorder misses none."""

IMAGE_LATEST = _profile(1, reliable=False)
"""Compressed images as the policy reads them: the newest, never a queue."""


def record(depth: int, latched: bool = False) -> QoSProfile:
    """Profile of a recorder's subscription: reliable; `depth` messages must cover two seconds of data."""
    return _profile(depth, latched=latched)
