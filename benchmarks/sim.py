# SPDX-License-Identifier: Apache-2.0
"""Speed of the simulated robots on one core, beside plain MuJoCo stepping of the same models.

    scripts/run python benchmarks/sim.py            # two minutes
    scripts/run python benchmarks/sim.py --quick

Metrics: steps_per_s_TASK: control steps of 0.02 s (grasps, liquids, judge and all) while the expert works;
raw_steps_per_s_TASK: `mj_step` of the same model, from the same states with the same commands; steps_share_TASK: their ratio, the
median over pairs; steps_cameras_per_s: with three pictures of 96 px every tenth of a second, all tasks together;
episodes_per_min_TASK: of the expert, headless and recorded as bags, which is how data are made; robot_mb: resident memory
of one more robot in a process.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import mujoco
import numpy as np
import results_file

from lwd_fleet.robot.arbiter import ArbiterTiming
from lwd_fleet.sim import robot
from lwd_fleet.sim.experts import Expert
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_expert
from lwd_fleet.sim.presets import observation_spec
from lwd_fleet.sim.scene import CAMERAS, SUBSTEPS
from lwd_fleet.sim.tasks import SUITES
from lwd_fleet.sim.world import World

SUITE = SUITES["eight"]
TICKS_PER_STEP = 5  # of the policy
SETTLED = 20  # robots between two readings of memory


def commands_of(world: World, seed: int) -> np.ndarray:
    """[ticks, 14] that the expert gives in an episode."""
    world.reset(seed)
    expert, commands = Expert(world, np.random.default_rng(seed)), []
    before = world.joint_positions
    while not world.done() and world.time_s < world.time_limit_s:
        target = expert.command()
        for tick in range(1, TICKS_PER_STEP + 1):
            commands.append(before + (target - before) * tick / TICKS_PER_STEP)
            world.step(commands[-1])
        before = target
    return np.stack(commands)


def speeds(world: World, commands: np.ndarray, seed: int) -> tuple[float, float]:
    """Control steps per second of the world and of its bare model."""
    world.reset(seed)
    model, data = world._model, world._data
    began = [getattr(data, name).copy() for name in ("qpos", "qvel", "ctrl")]
    columns = world._control
    start = time.perf_counter()
    for command in commands:
        world.step(command)
    whole = len(commands) / (time.perf_counter() - start)
    world.reset(seed)
    data.qpos[:], data.qvel[:], data.ctrl[:] = began
    start = time.perf_counter()
    for command in commands:
        data.ctrl[columns] = command
        mujoco.mj_step(model, data, nstep=SUBSTEPS)
    return whole, len(commands) / (time.perf_counter() - start)


def with_cameras(world: World, commands: np.ndarray, seed: int) -> float:
    """Control steps per second with all cameras at 10 Hz."""
    world.reset(seed)
    world.render(CAMERAS[0])
    start = time.perf_counter()
    for tick, command in enumerate(commands):
        if tick % TICKS_PER_STEP == 0:
            for camera in CAMERAS:
                world.render(camera)
        world.step(command)
    return len(commands) / (time.perf_counter() - start)


def episodes_per_minute(task: str, episodes: int) -> float:
    """Recorded, one process."""
    with tempfile.TemporaryDirectory(prefix="lwd-") as folder:
        spec = observation_spec("keypoints", suite=SUITE.name)
        setup = HeadlessSetup(robot.embodiment(), ArbiterTiming(), spec, spool=Path(folder))
        start = time.perf_counter()
        list(run_expert(setup, [EpisodeRequest(task, seed) for seed in range(episodes)], observe_every=2))
        return 60 * episodes / (time.perf_counter() - start)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    began = time.monotonic()
    quick = "--quick" in sys.argv
    pairs, episodes = (1, 2) if quick else (7, 30)
    metrics: dict[str, float] = {}
    pictures = []
    for task in (task.name for task in SUITE.tasks):
        world = World(task)
        found = []
        for seed in range(pairs):
            commands = commands_of(world, seed)
            found.append(speeds(world, commands, seed))
            pictures.append(with_cameras(world, commands, seed))
        whole, raw = np.array(found).T
        metrics[f"steps_per_s_{task}"] = float(np.median(whole))
        metrics[f"raw_steps_per_s_{task}"] = float(np.median(raw))
        metrics[f"steps_share_{task}"] = float(np.median(whole / raw))
        metrics[f"episodes_per_min_{task}"] = episodes_per_minute(task, episodes)
    metrics["steps_cameras_per_s"] = float(np.median(pictures))
    before = resident_mb()
    robots = [World(SUITE.tasks[number % len(SUITE.tasks)].name) for number in range(SETTLED)]
    for number, world in enumerate(robots):
        world.reset(number)
    metrics["robot_mb"] = (resident_mb() - before) / len(robots)
    print(json.dumps(metrics, indent=1))
    if not quick:
        results_file.write("sim", metrics, began, seeds=range(pairs))


if __name__ == "__main__":
    main()
