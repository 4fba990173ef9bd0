# SPDX-License-Identifier: Apache-2.0
"""The recorder as a process: what was published is in the bag, whatever ends the recording."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from lwd_msgs.msg import EpisodeState, RecorderStatus, SealedEpisode
from lwd_msgs.srv import StartRecording, StopRecording
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import Int32, String

from lwd_fleet.data.episode import EpisodeReader, mint_episode_id
from lwd_fleet.deployment import NodeSpec
from lwd_policy.qos import EVENTS, IMAGE_PUBLISH, LATCHED

NAMESPACE = "/sim_r1"
TOPICS = [
    "episode lwd_msgs/msg/EpisodeState latched",
    "task std_msgs/msg/String latched",
    "count std_msgs/msg/Int32",
    "camera_top/image_raw/compressed sensor_msgs/msg/CompressedImage rate=30",
    "absent std_msgs/msg/String optional",
]


class Robot:
    """Publishes what a robot publishes; counts upwards so that a hole would show."""

    def __init__(self, stage, spool: Path, topics=tuple(TOPICS), **parameters) -> None:
        self.stage, self.spool = stage, spool
        self.spec = NodeSpec(
            "lwd_fleet",
            "recorder_node",
            "recorder",
            NAMESPACE,
            {"spool": str(spool), "topics": list(topics), **parameters},
            respawn=True,
        )
        node = stage.node
        self._episode = node.create_publisher(EpisodeState, f"{NAMESPACE}/episode", LATCHED)
        self._task = node.create_publisher(String, f"{NAMESPACE}/task", LATCHED)
        self._count = node.create_publisher(Int32, f"{NAMESPACE}/count", EVENTS)
        self._image = node.create_publisher(
            CompressedImage, f"{NAMESPACE}/camera_top/image_raw/compressed", IMAGE_PUBLISH
        )
        self.sealed = stage.collect(SealedEpisode, f"{NAMESPACE}/recorder/sealed", LATCHED)
        self.status = stage.collect(RecorderStatus, f"{NAMESPACE}/recorder/status", 10)
        self.count = 0
        self._task.publish(String(data="put it there"))

    def state(self, episode_id: str, state: int, outcome: int = 0) -> None:
        self._episode.publish(
            EpisodeState(episode_id=episode_id, state=state, robot="sim_r1", task="place", outcome=outcome)
        )

    def live(self) -> None:
        self._count.publish(Int32(data=self.count))
        self._image.publish(CompressedImage(format="jpeg", data=bytes([self.count % 256]) * 20_000))
        self.count += 1

    def start(self, episode_id: str):
        request = StartRecording.Request(episode_id=episode_id, robot="sim_r1", task="place")
        return self.stage.call(StartRecording, f"{NAMESPACE}/recorder/start", request)

    def stop(self):
        return self.stage.call(StopRecording, f"{NAMESPACE}/recorder/stop", StopRecording.Request())

    def live_until_written(self, messages: int) -> None:
        """Live until the recorder reports that many messages of `count`."""
        self.stage.until(lambda: self.written() >= messages, f"{messages} messages recorded", self.live)

    def written(self) -> int:
        last = self.status[-1] if self.status else None
        return last.messages[list(last.topics).index("count")] if last and last.episode_id else 0


@pytest.fixture
def robot(stage, tmp_path):
    return Robot(stage, tmp_path / "spool")


def pid(supervisor) -> int:
    return next(entry.pid for entry in supervisor.status() if entry.name.endswith("recorder"))


def counts(path: Path) -> list[int]:
    return [entry.message.data for entry in EpisodeReader(path).messages("count")]


def test_everything_published_between_start_and_stop_is_in_the_bag(stage, robot):
    stage.bring_up([robot.spec])
    for number in range(2):
        episode_id = mint_episode_id()
        robot.state(episode_id, EpisodeState.STATE_PREPARING)
        started = robot.start(episode_id)
        assert started.success, started.message
        first = robot.count
        robot.state(episode_id, EpisodeState.STATE_RUNNING)
        robot.live_until_written(20)
        robot.state(episode_id, EpisodeState.STATE_ENDED, EpisodeState.OUTCOME_SUCCESS)
        stopped = robot.stop()
        assert stopped.success, stopped.message
        reader = EpisodeReader(Path(stopped.path))
        assert counts(Path(stopped.path)) == list(range(first, robot.count))
        summary = reader.summary
        assert (summary.outcome, summary.robot, summary.truncated) == ("success", "sim_r1", "")
        assert summary.digest == stopped.digest
        tasks = [entry.message.data for entry in reader.messages("task")]
        assert tasks == ["put it there"]  # published once, before: latched
        for entry in reader.messages("count"):
            assert 0 <= entry.log_time_ns - entry.publish_time_ns < 60_000_000_000
        stage.until(lambda number=number: len(robot.sealed) > number, "the announcement")
        assert (robot.sealed[-1].episode_id, robot.sealed[-1].digest) == (episode_id, stopped.digest)


def test_a_start_waits_for_every_publisher_and_names_the_missing(stage, tmp_path):
    robot = Robot(
        stage, tmp_path / "spool", [*TOPICS, "wrench std_msgs/msg/String", "force std_msgs/msg/String"],
        match_timeout_s=1.0,
    )  # fmt: skip
    stage.bring_up([robot.spec])
    answer = robot.start("e1")
    assert not answer.success and answer.message == "nothing comes from wrench, force"
    assert list(robot.spool.iterdir()) == []
    publishers = [
        stage.node.create_publisher(String, f"{NAMESPACE}/{name}", 10) for name in ("wrench", "force")
    ]
    assert robot.start("e1").success and len(publishers) == 2


def test_a_stop_before_the_outcome_seals_a_recording_flagged_truncated(stage, robot):
    stage.bring_up([robot.spec])
    assert robot.start("e1").success
    robot.live_until_written(3)
    stopped = robot.stop()
    assert stopped.success
    summary = EpisodeReader(Path(stopped.path)).summary
    assert (summary.outcome, summary.truncated) == ("unlabelled", "stopped before the episode ended")
    again = robot.stop()
    assert not again.success and "nothing is being recorded" in again.message


def test_a_recording_whose_episode_node_died_is_sealed_when_the_next_begins(stage, robot):
    stage.bring_up([robot.spec])
    assert robot.start("e1").success and robot.start("e1").success  # sent twice: one recording
    robot.live_until_written(3)
    assert robot.start("e2").success
    assert "next episode began" in EpisodeReader(robot.spool / "e1").summary.truncated
    assert robot.stop().path == str(robot.spool / "e2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_seals_what_there_is(stage, robot, number):
    supervisor = stage.bring_up([robot.spec])
    assert robot.start("e1").success
    robot.live_until_written(5)
    os.kill(pid(supervisor), number)
    stage.until((robot.spool / "e1").exists, "the seal")
    summary = EpisodeReader(robot.spool / "e1").summary
    assert summary.message_counts["/sim_r1/count"] >= 5
    assert summary.truncated == "the recorder was stopped before the episode ended"


def test_a_killed_recorder_salvages_when_it_is_back(stage, robot):
    supervisor = stage.bring_up([robot.spec])
    assert robot.start("e1").success
    robot.live_until_written(10)
    written, reports = robot.written(), len(robot.status)
    stage.until(lambda: len(robot.status) > reports + 1, "a flush since", robot.live)
    os.kill(pid(supervisor), signal.SIGKILL)
    stage.until((robot.spool / "e1").exists, "the salvage")
    found = counts(robot.spool / "e1")
    assert len(found) >= written and found == list(range(found[0], found[0] + len(found)))
    assert "cut off" in EpisodeReader(robot.spool / "e1").summary.truncated
    client = stage.node.create_client(StartRecording, f"{NAMESPACE}/recorder/start")
    answers: list[StartRecording.Response] = []

    def ask() -> None:
        """Ask once: the request may go to the dead process, or to the new one before it is active."""
        client.call_async(StartRecording.Request(episode_id="e2")).add_done_callback(
            lambda future: answers.append(future.result())
        )
        stage.spin(1.0)

    stage.until(lambda: any(answer.success for answer in answers), "the recorder to record again", ask)
    refusals = {answer.message for answer in answers if not answer.success}
    assert refusals <= {"the recorder is not active", "the recorder is starting or stopping already"}
