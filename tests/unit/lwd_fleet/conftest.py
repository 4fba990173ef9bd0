# SPDX-License-Identifier: Apache-2.0
"""A small real episode, as a recorder would write it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lwd_fleet.data.bag import OfferedQos
from lwd_fleet.data.episode import DEFAULT_QOS, EpisodeWriter, SealedInfo, mint_episode_id
from lwd_fleet.data.messages import create, serialise, to_stamp

START_NS = 1_700_000_000_000_000_000
STEP_NS = 100_000_000
LATCHED = OfferedQos(latched=True, depth=1)


def write_messages(writer: EpisodeWriter, episode_id: str, steps: int, outcome: int, robot: str) -> None:
    """Prepare, run `steps` policy steps (the last two by a human) and end with `outcome`."""
    random = np.random.default_rng(0)

    def write(topic: str, message: object, time_ns: int, qos: OfferedQos = DEFAULT_QOS) -> None:
        kind = message.__msgtype__  # type: ignore[attr-defined]
        writer.write(f"/{robot}/{topic}", kind, serialise(message), time_ns, time_ns - 1_000_000, qos)

    def state(number: int, time_ns: int, **fields: object) -> None:
        header = create("std_msgs/msg/Header", stamp=to_stamp(time_ns))
        message = create(
            "lwd_msgs/msg/EpisodeState",
            header=header,
            state=number,
            episode_id=episode_id,
            robot=robot,
            task="place",
            instruction="put the cube into the bowl",
            seed=7,
            **fields,
        )
        write("episode", message, time_ns, LATCHED)

    stale = create(
        "lwd_msgs/msg/EpisodeState", state=3, episode_id="before", outcome=2, end_reason="time limit"
    )
    write("episode", stale, START_NS, LATCHED)
    state(1, START_NS + 1)
    write("task", create("std_msgs/msg/String", data="put the cube into the bowl"), START_NS + 2, LATCHED)
    state(2, START_NS + 3)
    for step in range(steps):
        time_ns = START_NS + (step + 1) * STEP_NS
        image = random.integers(0, 256, 4000, dtype=np.uint8)
        write(
            "camera_top/image_raw/compressed", create("sensor_msgs/msg/CompressedImage", data=image), time_ns
        )
        names = ["left_joint_1", "right_joint_1"]
        joints = create("sensor_msgs/msg/JointState", name=names, position=random.normal(size=2))
        write("joint_states", joints, time_ns + 1)
        human = step >= steps - 2
        action = create(
            "lwd_msgs/msg/ExecutedAction",
            episode_id=episode_id,
            step=step,
            joint_names=names,
            positions=random.normal(size=2),
            arms=["left", "right"],
            author=[2, 2] if human else [1, 1],
            policy_version=-1 if human else 3 + (step >= 4),
            policy_digest="" if human else "ab",
        )
        write("executed_action", action, time_ns + 2)
    end_ns = START_NS + (steps + 1) * STEP_NS
    state(
        3,
        end_ns,
        outcome=outcome,
        sub_step_scores=[1.0, 0.5],
        outcome_source="detector",
        end_reason="success",
    )


@pytest.fixture
def write_episode(tmp_path: Path) -> Callable[..., SealedInfo]:
    """Factory: writes and seals an episode in `tmp_path / "spool"` (or the folder given)."""

    def write(
        steps: int = 10, outcome: int = 1, robot: str = "r1", spool: Path | None = None, truncated: str = ""
    ) -> SealedInfo:
        episode_id = mint_episode_id()
        writer = EpisodeWriter(spool or tmp_path / "spool", episode_id, robot)
        write_messages(writer, episode_id, steps, outcome, robot)
        return writer.seal(truncated)

    return write
