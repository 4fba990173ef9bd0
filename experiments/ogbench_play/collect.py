# SPDX-License-Identifier: Apache-2.0
"""Play data of OGBench's manipulation tasks, made as its authors made theirs: scripted oracles that follow noisy plans."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import ogbench.manipspace  # noqa: F401  registers the environments
from numpy.typing import NDArray
from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

EPISODE_STEPS = 1001  # as published; the last action has no next state, 1000 transitions remain
PLAN_NOISE = 0.1  # of the action range, added to the plan, as published
PLAN_NOISE_SMOOTHING = 0.5  # control steps, as published
_CUBE_QPOS = slice(14, 17)  # position of the first cube


@dataclass(frozen=True)
class Playground:
    """What differs between the data of two environments."""

    oracles: Mapping[str, type[Any]]  # by the task that the environment sets next
    p_stack: float  # probability that a cube's next place is on top of another one
    healthy: Callable[[NDArray[np.floating]], bool]  # qpos [T, Q] of an episode; others are made again


def _cube_in_sight(qpos: NDArray[np.floating]) -> bool:
    """Whether the cube of `scene` never left the table to where no goal could show it; the published limits, in m."""
    _, y, z = qpos[:, _CUBE_QPOS].T
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return not bool((y >= 0.29).any() or ((y <= -0.3) & ~in_drawer).any())


PLAYGROUNDS = {
    "cube-single": Playground({"cube": CubePlanOracle}, 0.0, lambda qpos: True),
    "scene": Playground(
        {
            "cube": CubePlanOracle,
            "button": ButtonPlanOracle,
            "drawer": DrawerPlanOracle,
            "window": WindowPlanOracle,
        },
        0.5,
        _cube_in_sight,
    ),
}


def collect(environment: str, episodes: int, seed: int) -> dict[str, NDArray[Any]]:
    """Rows of `episodes` x EPISODE_STEPS control steps in OGBench's file layout: observations [N, O], actions [N, A],
    terminals [N], qpos [N, Q], where there are buttons button_states [N, 2]."""
    ground = PLAYGROUNDS[environment]
    env = gymnasium.make(
        f"{environment}-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=EPISODE_STEPS
    )
    oracles = {
        name: oracle(env=env, noise=PLAN_NOISE, noise_smoothing=PLAN_NOISE_SMOOTHING)
        for name, oracle in ground.oracles.items()
    }
    np.random.seed(seed)  # the oracles draw from NumPy's global stream
    env.reset(seed=seed)
    kept: list[dict[str, NDArray[Any]]] = []
    while len(kept) < episodes:
        episode = _play(env, oracles, ground.p_stack)
        if ground.healthy(episode["qpos"]):
            kept.append(episode)
    return {name: np.concatenate([episode[name] for episode in kept]) for name in kept[0]}


def _play(env: Any, oracles: Mapping[str, Any], p_stack: float) -> dict[str, NDArray[Any]]:
    """One episode: task after task, each started where the last one ended."""
    rows: defaultdict[str, list[Any]] = defaultdict(list)
    observation, info = env.reset()
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    ended = False
    while not ended:
        action = np.clip(oracle.select_action(observation, info), -1.0, 1.0)
        following, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        if oracle.done:
            task_observation, task_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[task_info["privileged/target_task"]]
            oracle.reset(task_observation, task_info)
        rows["observations"].append(observation)
        rows["actions"].append(action)
        rows["terminals"].append(ended)
        rows["qpos"].append(info["prev_qpos"])
        if "prev_button_states" in info:
            rows["button_states"].append(info["prev_button_states"])
        observation = following
    kinds = {"terminals": np.bool_, "button_states": np.int64}
    return {name: np.array(values, dtype=kinds.get(name, np.float32)) for name, values in rows.items()}


def digest(rows: Mapping[str, NDArray[Any]]) -> str:
    """sha256 of names and contents: which data a result is about."""
    hasher = hashlib.sha256()
    for name in sorted(rows):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(rows[name]).tobytes())
    return hasher.hexdigest()


def load_or_collect(folder: Path, environment: str, episodes: int, seed: int) -> dict[str, NDArray[Any]]:
    """The rows of `collect`, kept in a file below `folder` that appears whole or not at all."""
    path = folder / f"{environment}-play-{episodes}x{EPISODE_STEPS}-seed{seed}.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, **collect(environment, episodes, seed))
        partial.rename(path)
    with np.load(path) as file:
        return {name: file[name] for name in file.files}
