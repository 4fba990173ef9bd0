# SPDX-License-Identifier: Apache-2.0
"""What is recorded, when a recording may start, and what the health figures mean."""

import pytest

from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.data.messages import create, serialise
from lwd_fleet.data.salvage import salvage_spool
from lwd_fleet.robot.recorder import (
    Matching,
    Meter,
    Recorder,
    RecordingFailed,
    TopicSpec,
    parse_topics,
)

MS = 1_000_000


def test_topics_are_read_from_text():
    specs = parse_topics(
        ["standard", "wrench_left geometry_msgs/msg/WrenchStamped rate=100 optional best_effort", "",
         "mood std_msgs/msg/String latched"],
        cameras=["camera_top", ""],
        camera_hz=30.0,
    )  # fmt: skip
    named = {spec.name: spec for spec in specs}
    assert {"episode", "executed_action", "camera_top/image_raw/compressed", "keypoints"} <= named.keys()
    assert not any(name.startswith("/") for name in named)
    wrench = named["wrench_left"]
    assert (wrench.rate_hz, wrench.required, wrench.reliable) == (100.0, False, False)
    assert wrench.qos.depth == 200  # two seconds
    assert named["camera_top/image_raw/compressed"].qos.depth == 60
    assert named["mood"].latched and named["episode"].qos.latched


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("joint_states", "expected 'name package/msg/Type"),
        ("a std_msgs/msg/String slow", "unknown option 'slow'"),
        ("episode lwd_msgs/msg/EpisodeState", "listed twice: episode"),
    ],
)
def test_a_topic_line_that_makes_no_sense_is_named(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_topics(["standard", line], cameras=[])


def test_an_episode_waits_for_required_publishers_and_for_matches_to_settle():
    specs = [TopicSpec("a", "t"), TopicSpec("b", "t", required=False)]
    matching = Matching(specs, settle_s=0.7)
    assert matching.missing({}, {}, now_s=0.0) == ["a"]
    assert matching.missing({"a": 1}, {}, now_s=1.0) == ["a"]  # matched, but silent and young
    assert matching.missing({"a": 1}, {}, now_s=1.6) == ["a"]
    assert matching.missing({"a": 1}, {}, now_s=1.7) == []
    assert matching.missing({"a": 1, "b": 1}, {"a": 3}, now_s=2.0) == ["b"]  # it exists: then it has to flow
    assert matching.missing({"a": 1, "b": 1}, {"b": 1}, now_s=2.1) == []
    matching.missing({}, {}, now_s=3.0)
    assert matching.missing({"a": 1}, {}, now_s=3.1) == ["a"]  # a restarted publisher settles anew


def test_gaps_are_intervals_of_more_than_twice_the_expected_period():
    meter = Meter(rate_hz=10.0)
    meter.begin()
    for time_ms in [0, 100, 300, 501, 600, 1000]:
        meter.arrived(time_ms * MS, recording=True)
    assert (meter.gaps, meter.written) == (2, 6)
    assert meter.measured_hz(1050 * MS) == 5.0 and meter.measured_hz(5000 * MS) == 0.0
    meter.begin()
    meter.arrived(9000 * MS, recording=True)
    assert meter.gaps == 0  # the pause between episodes is none


@pytest.fixture
def recorder(tmp_path):
    specs = [
        TopicSpec("episode", "lwd_msgs/msg/EpisodeState", latched=True),
        TopicSpec("task", "std_msgs/msg/String", latched=True),
        TopicSpec("note", "std_msgs/msg/String"),
    ]
    return Recorder(tmp_path, "r1", specs)


def text(data):
    return serialise(create("std_msgs/msg/String", data=data))


def test_latched_messages_are_written_again_at_the_start_of_every_episode(recorder):
    recorder.receive("task", text("old"), 1, 1, 1)
    recorder.receive("task", text("new"), 5, 4, 5)
    recorder.receive("note", text("between episodes"), 6, 6, 6)
    for episode_id in ("e1", "e2"):
        recorder.start(episode_id, now_ns=10)
        recorder.receive("note", text("during"), 11, 11, 11)
        reader = EpisodeReader(recorder.stop().path)
        found = [
            (entry.topic, entry.message.data, entry.log_time_ns, entry.publish_time_ns) for entry in reader
        ]
        assert found == [("task", "new", 10, 4), ("note", "during", 11, 11)]


def test_the_outcome_is_noticed_when_it_is_in_the_bag(recorder):
    recorder.start("e1", 10)
    for state, expected in [(2, False), (3, True)]:
        message = create("lwd_msgs/msg/EpisodeState", episode_id="e1", state=state, outcome=1)
        recorder.receive("episode", serialise(message), 11, 11, 11)
        assert recorder.outcome_recorded is expected
    assert recorder.stop().summary.outcome == "success"


def test_one_recording_at_a_time(recorder):
    recorder.start("e1", 10)
    with pytest.raises(RecordingFailed, match="e1 is still being recorded"):
        recorder.start("e2", 11)
    recorder.stop()
    with pytest.raises(RecordingFailed, match="nothing"):
        recorder.stop()
    with pytest.raises(RecordingFailed, match="sealed already"):
        recorder.start("e1", 12)
    recorder.start("e2", 13)


def test_a_failing_disk_ends_the_recording_and_not_the_recorder(recorder, tmp_path, monkeypatch):
    recorder.start("e1", 10)
    recorder.receive("note", text("kept"), 11, 11, 11)
    recorder.flush()
    monkeypatch.setattr(recorder._writer._writer, "add_message", _full)
    recorder.receive("note", text("lost"), 12, 12, 12)
    assert "No space left" in recorder.failure and recorder.recording
    recorder.receive("note", text("lost too"), 13, 13, 13)
    with pytest.raises(RecordingFailed, match="No space left"):
        recorder.stop()
    recorder.start("e2", 20)  # space was made
    assert recorder.failure == ""
    recorder.stop()
    (result,) = salvage_spool(tmp_path)
    assert result.sealed.summary.message_count == 1


def _full(*arguments, **keywords):
    raise OSError(28, "No space left on device")
