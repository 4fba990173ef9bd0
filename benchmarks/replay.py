# SPDX-License-Identifier: Apache-2.0
"""A replay of a million chunk transitions: how fast it takes them in, opens, and gives minibatches, and in how much memory.

    scripts/run python benchmarks/replay.py [--quick]

Writes benchmarks/results/replay.json. Beside each speed stands that of the plainest thing that could do the work on this
machine, measured in the same run: a memory map of one flat file for minibatches, reading the file for ingestion. Each part
runs in a process of its own, so that its memory is its own; files are in the page cache throughout.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import torch
from mcap.reader import make_reader
from numpy.typing import NDArray

from lwd_fleet.data.episode import bag_messages
from lwd_fleet.robot.arbiter import ArbiterTiming
from lwd_fleet.sim import robot
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_expert
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_learner.learner import topics_of, trace_episode
from lwd_learner.replay import Replay, ReplayReader
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout
from lwd_learner.transitions import episode_rows
from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.trunk import build_trunk

LAYOUT = ReplayLayout(
    feature_dim=137, horizon=10, action_dim=14, history=2, feature_key="benchmark"
)  # of the demonstration
EPISODE_ROWS = 20  # chunks of half a second: an episode of 10 s; the shorter, the longer is the index
GAMMA = 0.97**0.1
BATCH = 256
STRIDE = 5


def synthetic_episode(number: int, random: np.random.Generator) -> ReplayEpisode:
    """Chunks by the policy or by a person, of one of eight tasks, a third of them online."""
    table = np.zeros(EPISODE_ROWS, TRANSITION)
    table["point"] = np.arange(EPISODE_ROWS)
    table["next_point"] = np.arange(1, EPISODE_ROWS + 1)
    table["next_point"][-1], table["done"][-1], table["reward"][-1] = -1, True, 1.0
    table["executed"], table["planned"] = 5, LAYOUT.horizon
    table["author"] = np.where(np.arange(EPISODE_ROWS) < random.integers(EPISODE_ROWS), 1, 2)
    return ReplayEpisode(
        episode_id=f"robot/{number:06d}",
        task=f"task {number % 8}",
        source="online" if number % 3 == 0 else "offline",
        outcome=1,
        features=random.standard_normal((EPISODE_ROWS, LAYOUT.feature_dim), np.float32),
        previous=np.maximum(np.arange(EPISODE_ROWS) - 1, 0),
        actions=random.standard_normal((EPISODE_ROWS, LAYOUT.horizon, LAYOUT.action_dim), np.float32),
        transitions=table,
    )


def fill(folder: Path, rows: int) -> dict[str, float]:
    """Append `rows` transitions, a hundred episodes at a time, and a few one at a time, as a learner does online."""
    random = np.random.default_rng(0)
    one_by_one = 50
    with Replay(folder / "replay", LAYOUT) as replay:
        replay.count()  # an index that has to follow
        spent, number, total = 0.0, 0, rows // EPISODE_ROWS
        while number < total - one_by_one:
            group = [
                synthetic_episode(i, random) for i in range(number, min(number + 100, total - one_by_one))
            ]
            began = time.perf_counter()
            replay.extend(group)
            spent += time.perf_counter() - began
            number += len(group)
        singly = [synthetic_episode(i, random) for i in range(number, total)]
        append_s = timed([lambda episode=episode: replay.append(episode) for episode in singly])
        return {
            "transitions": len(replay),
            "append_transitions_per_s": number * EPISODE_ROWS / spent,
            "append_one_episode_p50_ms": float(np.median(append_s) * 1e3),
        }


def flatten(folder: Path) -> None:
    """The same columns as flat files, for the reference."""
    for name in ("features.f32", "actions.f32", "transitions.bin", "previous.i64"):
        with (folder / name).open("wb") as flat:
            for segment in sorted((folder / "replay").glob(f"{name}.*")):
                flat.write(segment.read_bytes())


def draw(folder: Path) -> dict[str, float]:
    """Open, draw, and the memory of a process that has touched every row."""
    torch.set_num_threads(1)
    before_mb = anonymous_mb()
    opened = timed([lambda: ReplayReader(folder / "replay").close()] * 20)
    began = time.perf_counter()
    replay = ReplayReader(folder / "replay")
    generator = torch.Generator().manual_seed(0)
    replay.sample(BATCH, generator, GAMMA)
    first_batch_s = time.perf_counter() - began
    for rows in np.array_split(replay.rows(), len(replay) // 4096):
        replay.batch(rows, GAMMA)
    one = timed([lambda: replay.sample(BATCH, generator, GAMMA)] * 2000)
    ten = timed([lambda: replay.sample(BATCH, generator, GAMMA, n_step=10)] * 1000)
    shard = replay.shard(0, 2)
    shard.sample(BATCH, generator, GAMMA)
    halved = timed([lambda: shard.sample(BATCH, generator, GAMMA)] * 1000)
    return {
        "replay_open_ms": float(np.median(opened) * 1e3),
        "replay_open_and_first_batch_ms": first_batch_s * 1e3,
        "replay_batch256_ms": float(np.median(one) * 1e3),
        "replay_batch256_p99_ms": float(np.quantile(one, 0.99) * 1e3),
        "replay_batch256_n10_ms": float(np.median(ten) * 1e3),
        "replay_batch256_shard_ms": float(np.median(halved) * 1e3),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # with the files' pages
        "memory_without_files_mb": anonymous_mb(),
        "memory_without_files_before_opening_mb": before_mb,
    }


def plain_gather(folder: Path, rows: int) -> dict[str, float]:
    """The same bytes at random rows by np.memmap: four feature vectors (two contexts of two observations), a chunk and
    a record for each transition. It knows neither tasks nor windows nor what follows what."""
    torch.set_num_threads(1)
    features = np.memmap(folder / "features.f32", np.float32, "r").reshape(-1, LAYOUT.feature_dim)
    actions = np.memmap(folder / "actions.f32", np.float32, "r").reshape(
        -1, LAYOUT.horizon * LAYOUT.action_dim
    )
    records = np.memmap(folder / "transitions.bin", TRANSITION, "r")
    random = np.random.default_rng(1)

    def gather(index: NDArray[np.int64]) -> object:
        points = index[:, None] + np.arange(-1, 3)
        return torch.from_numpy(features[points]), torch.from_numpy(actions[index]), records[index]

    for index in np.array_split(
        np.arange(1, rows - 2), rows // 4096
    ):  # every page is mapped, as for the replay
        gather(index)
    seconds = timed([lambda: gather(random.integers(1, rows - 2, BATCH))] * 2000)
    return {
        "reference_memmap_batch256_ms": float(np.median(seconds) * 1e3),
        "reference_memmap_batch256_p99_ms": float(np.quantile(seconds, 0.99) * 1e3),
    }


def ingest(folder: Path, kind: str, episodes: int) -> dict[str, float]:
    """From bags of the simulated robot to transitions in a replay, beside reading the same bags."""
    torch.set_num_threads(1)
    body = robot.embodiment()
    action = ActionSpec.unnormalised(body, "joint_relative", LAYOUT.horizon, 0.1, 5)
    spread = np.ones((LAYOUT.horizon, action.dim))
    action = replace(action, center=0 * spread, scale=0.3 * spread)
    policy = FlowPolicy(build_trunk(trunk_config(kind), body), observation_spec(kind), action)
    setup = HeadlessSetup(body, ArbiterTiming(), observation_spec(kind), spool=folder / kind)
    # One more than asked for: imports and first allocations are not the subject.
    done = list(run_expert(setup, [EpisodeRequest("place", seed) for seed in range(episodes + 1)]))
    bags = {result.path.name: next(result.path.glob("*.mcap")) for result in done if result.path is not None}
    first, *measured = bags.items()
    with Replay(folder / f"{kind}_replay", replace(LAYOUT, feature_dim=policy.feature_dim)) as replay:

        def take(name: str, bag: Path) -> None:
            trace = trace_episode(name, bag_messages(bag, *topics_of(policy)), policy, STRIDE)
            replay.append(ReplayEpisode.from_rows(episode_rows(trace, policy), "offline"))

        take(*first)
        before = len(replay)
        spent = sum(timed([lambda one=one: take(*one) for one in measured]))
        transitions = len(replay) - before
    bare = sum(timed([lambda bag=bag: read_all(bag) for _, bag in measured]))
    return {
        f"ingest_{kind}_episodes_per_s": episodes / spent,
        f"ingest_{kind}_transitions_per_s": transitions / spent,
        f"ingest_{kind}_mb_per_s": sum(bag.stat().st_size for _, bag in measured) / spent / 1e6,
        f"ingest_{kind}_real_time_factor": sum(result.duration_s for result in done[1:]) / spent,
        f"ingest_{kind}_times_bare_read": spent / bare,
        f"reference_read_{kind}_episodes_per_s": episodes / bare,
    }


def read_all(bag: Path) -> int:
    """Every message of a bag in log order, undecoded: what any ingestion has to do."""
    with bag.open("rb") as file:
        return sum(len(message.data) for _, _, message in make_reader(file).iter_messages())


def timed(calls: list[Callable[[], object]]) -> list[float]:
    """Seconds of each."""
    seconds = []
    for call in calls:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def anonymous_mb() -> float:
    """Memory of this process that is not a file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def apart(part: Callable[..., Any], *arguments: object) -> Any:
    """What the part returns, from a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(part, arguments)


def main() -> None:
    began = time.monotonic()
    quick = "--quick" in sys.argv
    with tempfile.TemporaryDirectory(prefix="lwd-") as name:
        folder = Path(name)
        metrics = apart(fill, folder, 50_000 if quick else 1_000_000)
        flatten(folder)
        metrics |= apart(draw, folder) | apart(plain_gather, folder, metrics["transitions"])
        for kind in ("keypoints", "images"):
            metrics |= apart(ingest, folder, kind, 2 if quick else 10)
        metrics["ingest_episodes_per_s"] = metrics["ingest_images_episodes_per_s"]
    print(json.dumps(metrics, indent=1))
    if not quick:
        results_file.write("replay", metrics, began)


if __name__ == "__main__":
    main()
