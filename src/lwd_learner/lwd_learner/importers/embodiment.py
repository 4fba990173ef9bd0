# SPDX-License-Identifier: Apache-2.0
"""A joint space for recordings whose robot nobody described: enough to train on, never enough to move
anything.

The limits are the range of the data, widened. `Embodiment.from_data` is true, there are no arms and no
kinematics, so only the joint representations of `ActionSpec` work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from lwd_learner.importers.lerobot import columns_of
from lwd_learner.importers.lerobot_layout import Dataset, open_dataset, read_rows
from lwd_learner.importers.source import ImportRefused, Reason
from lwd_policy.embodiment import Embodiment
from lwd_policy.observation import ObservationSpec

_WIDENING = 0.1  # of the range, on both sides
_MIN_MARGIN = 0.01  # joints that never moved in the data still need an interval
_REACTION_S = 0.1  # acceleration limit: full speed within this time


def embodiment_from_dataset(
    dataset_dir: Path, episodes: Sequence[int] | None = None, image_size: int = 96, history: int = 2
) -> tuple[Embodiment, ObservationSpec]:
    """Joint space and streams of a LeRobot dataset, from the tables of its (present) episodes.

    `episodes`: which may be looked at; leave out the ones held out for evaluation. Raises ImportRefused.
    """
    dataset = open_dataset(dataset_dir)
    tables = _positions(dataset, episodes)
    embodiment = embodiment_from_positions(dataset.robot, dataset.joint_names, tables, 1.0 / dataset.fps)
    return embodiment, dataset.observation_spec(image_size, history)


def embodiment_from_positions(
    robot: str, joint_names: Sequence[str], episodes: Sequence[NDArray[np.float64]], step_s: float
) -> Embodiment:
    """`episodes`: joint positions [K_e, n] in the units of the data, one row per step of `step_s` seconds."""
    positions = np.concatenate(episodes)
    low, high = positions.min(axis=0), positions.max(axis=0)
    margin = np.maximum(_WIDENING * (high - low), _MIN_MARGIN)
    speeds = [
        np.abs(np.diff(episode, axis=0)).max(axis=0) / step_s for episode in episodes if len(episode) > 1
    ]
    speed = np.maximum(1.5 * np.max(speeds, axis=0, initial=0.0), _MIN_MARGIN / step_s)
    middle = np.median(positions, axis=0)
    content = {
        "name": f"{robot}_from_data",
        "limits_from": "data",
        "urdf": _urdf(robot, joint_names, low - margin, high + margin, speed),
        "base_link": "base_link",
        "joint_names": list(joint_names),
        "max_acceleration": dict(zip(joint_names, (speed / _REACTION_S).tolist(), strict=True)),
        "home": dict(zip(joint_names, middle.tolist(), strict=True)),
        "arms": [],
    }
    return Embodiment.from_json(json.dumps(content))


def _positions(dataset: Dataset, episodes: Sequence[int] | None) -> list[NDArray[np.float64]]:
    tables = []
    for entry in dataset.episodes:
        if not entry.table.is_file() or (episodes is not None and entry.index not in episodes):
            continue
        rows = read_rows(dataset, entry)
        for column in ("observation.state", "action"):
            tables.append(columns_of(rows, column, dataset.joint_names, dataset.name_of(entry)))
    if not tables:
        raise ImportRefused(
            Reason.MISSING_FILE, f"{dataset.root.name}: none of the episodes asked for is present"
        )
    return tables


def _urdf(
    robot: str,
    names: Sequence[str],
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    speed: NDArray[np.float64],
) -> str:
    """Joints side by side on the base: limits without geometry."""
    lines = [f"<robot name={quoteattr(robot)}>", '<link name="base_link"/>']
    for name, low, high, velocity in zip(names, lower.tolist(), upper.tolist(), speed.tolist(), strict=True):
        link = quoteattr(f"{name}_link")
        lines += [
            f"<link name={link}/>",
            f'<joint name={quoteattr(name)} type="revolute"><parent link="base_link"/><child link={link}/>'
            f'<axis xyz="0 0 1"/><limit lower="{low!r}" upper="{high!r}" velocity="{velocity!r}" effort="0"/>',
            "</joint>",
        ]
    return "\n".join([*lines, "</robot>"])
