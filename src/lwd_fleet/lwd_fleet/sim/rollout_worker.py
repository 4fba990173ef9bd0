# SPDX-License-Identifier: Apache-2.0
"""A process of headless robots: reads one JSON request from a file, prints one JSON line per finished episode.

    python -m lwd_fleet.sim.rollout_worker request.json

With `catalog` and `store` set, episodes are uploaded like those of any robot; with `follow` set, the robots run the
catalog's active policy and take newer versions between two episodes, until SIGTERM; those under way are finished.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lwd_fleet.data.catalog import Catalog
from lwd_fleet.data.store import LocalStore
from lwd_fleet.data.uploader import Uploader
from lwd_fleet.robot.arbiter import ArbiterTiming
from lwd_fleet.sim.headless import EpisodeRequest, EpisodeResult, HeadlessSetup, run_expert, run_policy
from lwd_fleet.sim.operator import OperatorLimits
from lwd_fleet.sim.shift import Shift
from lwd_policy import checkpoint
from lwd_policy.chunk_policy import ChunkPolicy
from lwd_policy.embodiment import Embodiment
from lwd_policy.observation import ObservationSpec

_POLICY_WAIT_S = 1.0


@dataclass(frozen=True)
class RolloutRequest:
    """What one worker shall do. `episodes` are (task, seed) pairs; with `follow` they are repeated with new seeds."""

    robot_file: str
    episodes: list[tuple[str, int]]
    robot: str = "sim_headless"
    shift: str = ""  # a name of shift.SHIFTS or JSON; empty: none
    image_size: int = 96
    robots: int = 8  # in lockstep
    policy: str = ""  # checkpoint directory; empty: the scripted expert, unless `follow`
    policy_version: int = 0
    follow: bool = False
    observation_spec: dict[str, Any] = field(default_factory=dict)  # of the expert's recordings
    observe_every: int = 5  # policy steps between the expert's observations
    expert_noise: float = 1.0
    plays: bool = False  # the expert explores failures instead of doing the task
    exploration: float = 0.0  # of the policy, see `ChunkPolicy`
    operators: bool = False  # simulated operators help the policy, one for every four robots
    spool: str = ""  # empty: nothing is recorded
    store: str = ""
    catalog: str = ""


def work(request: RolloutRequest, stopped: Iterable[bool]) -> Iterator[EpisodeResult]:
    """Run the request; asks `stopped` before every wave of a worker that follows the catalog."""
    embodiment = Embodiment.load(request.robot_file)
    episodes = [EpisodeRequest(task, seed) for task, seed in request.episodes]
    if request.follow:
        yield from _follow(request, embodiment, episodes, stopped)
    elif request.policy:
        policy, card = checkpoint.load(Path(request.policy))
        setup = _setup(request, embodiment, card.observation_spec)
        yield from run_policy(
            setup,
            ChunkPolicy(policy, request.exploration),
            request.policy_version,
            card.digest,
            episodes,
            request.robots,
            _assistance(request),
        )
    else:
        setup = _setup(request, embodiment, ObservationSpec.from_json(json.dumps(request.observation_spec)))
        yield from run_expert(setup, episodes, request.expert_noise, request.observe_every, request.plays)


def _follow(
    request: RolloutRequest, embodiment: Embodiment, episodes: list[EpisodeRequest], stopped: Iterable[bool]
) -> Iterator[EpisodeResult]:
    wave = 0
    active = -1
    with Catalog(request.catalog) as catalog:
        for stop in stopped:
            if stop:
                return
            row = catalog.desired_policy()
            if row is None:
                time.sleep(_POLICY_WAIT_S)
                continue
            if row.version != active:
                policy, card = checkpoint.load(Path(row.uri.removeprefix("file://")), row.digest)
                setup, active = _setup(request, embodiment, card.observation_spec), row.version
            again = [EpisodeRequest(one.task, one.seed + wave * len(episodes)) for one in episodes]
            yield from run_policy(
                setup,
                ChunkPolicy(policy, request.exploration),
                row.version,
                row.digest,
                again,
                request.robots,
                _assistance(request),
            )
            wave += 1


def _assistance(request: RolloutRequest) -> OperatorLimits | None:
    return OperatorLimits() if request.operators else None


def _setup(request: RolloutRequest, embodiment: Embodiment, spec: ObservationSpec) -> HeadlessSetup:
    return HeadlessSetup(
        embodiment=embodiment,
        timing=ArbiterTiming(),
        spec=spec,
        shift=Shift.parse(request.shift),
        image_size=request.image_size,
        spool=Path(request.spool) if request.spool else None,
        robot=request.robot,
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the only argument is the request's file."""
    torch.set_num_threads(1)  # two threads that share cores with other workers are many times slower than one
    (path,) = sys.argv[1:] if arguments is None else arguments
    request = RolloutRequest(**json.loads(Path(path).read_text(encoding="utf-8")))
    stop = False

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    uploader = None
    if request.catalog and request.spool:
        store, catalog = LocalStore(Path(request.store)), Catalog(request.catalog)
        uploader = Uploader(Path(request.spool), store, catalog, delete_committed=True)
    for result in work(request, iter(lambda: stop, None)):
        if uploader is not None and result.path is not None:
            uploader.upload(result.path)
        line = asdict(result) | {"path": str(result.path or "")}
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
