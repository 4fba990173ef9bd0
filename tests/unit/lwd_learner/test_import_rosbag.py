# SPDX-License-Identifier: Apache-2.0
"""Bags of other robots come in by a mapping; every bag that cannot is refused with its reason, and alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from mcap.reader import make_reader
from mcap.writer import CompressionType, Writer
from mcap_ros2.decoder import DecoderFactory
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Rosbag2Writer

from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.data.messages import create, schema_text, serialise, to_stamp, typestore
from lwd_learner.importers.container import open_container
from lwd_learner.importers.held_out import load_trace
from lwd_learner.importers.mapping import BagMapping, load_mapping, parse_mapping
from lwd_learner.importers.quarantine import Quarantine
from lwd_learner.importers.rosbag import BagSource, find_bags, import_bags, open_bag
from lwd_learner.importers.source import ImportRefused, Reason, Sample
from lwd_policy.observation import decode_message

START = 1_700_000_000_000_000_000
HALF_STEP = 50_000_000  # joints at 20 Hz, actions at 10 Hz
COUNT = 21  # joint states
REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("LWD_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))

MAPPING: dict[str, Any] = {
    "robot": "arm",
    "task": "pick",
    "instruction": "pick it up",
    "step_hz": 10,
    "joint_names": ["lift", "grip"],
    "joint_names_in_bag": {"lift": "joint_1"},
    "streams": {
        "joint_positions": {"topic": "/joint_states", "kind": "joints", "max_age_s": 0.2},
        "camera_top": {"topic": "/camera", "kind": "image", "shape": [96, 96, 3], "max_age_s": 0.5},
    },
    "action": {"source": "command_topic", "topic": "/command"},
}

Message = tuple[str, Any, int]  # topic, message, log time


def mapping(**changes: Any) -> BagMapping:
    return parse_mapping({**MAPPING, **changes})


def header(stamp: int) -> Any:
    return create("std_msgs/msg/Header", stamp=to_stamp(stamp))


def joint_state(stamp: int, lift: float) -> Any:
    # Other names, another order and one joint more than the mapping asks for.
    names, position = ["spare", "grip", "joint_1"], np.array([9.0, -lift, lift])
    return create("sensor_msgs/msg/JointState", header=header(stamp), name=names, position=position)


def command(stamp: int, lift: float) -> Any:
    point = create("trajectory_msgs/msg/JointTrajectoryPoint", positions=np.array([-lift, lift]))
    return create(
        "trajectory_msgs/msg/JointTrajectory",
        header=header(stamp),
        joint_names=["grip", "joint_1"],
        points=[point],
    )


def picture(stamp: int) -> Any:
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[:, :, 0] = 200  # red in rgb8
    return create(
        "sensor_msgs/msg/Image",
        header=header(stamp),
        height=8,
        width=10,
        step=30,
        encoding="rgb8",
        data=pixels.reshape(-1),
    )


def recording() -> list[Message]:
    """20 Hz joints k / 100, 10 Hz commands one step ahead of them, pictures at 5 Hz that arrive 40 ms
    late."""
    messages: list[Message] = []
    for index in range(COUNT):
        stamp = START + index * HALF_STEP
        messages.append(("/joint_states", joint_state(stamp, index / 100), stamp + 1_000_000))
        if index % 2 == 0:
            messages.append(("/command", command(stamp, (index + 2) / 100), stamp + 2_000_000))
        if index % 4 == 0:
            messages.append(("/camera", picture(stamp), stamp + 40_000_000))
    return sorted(messages, key=lambda message: message[2])


def write_mcap(
    file: Path, messages: Iterable[Message], crc: bool = True, encoding: str = "cdr", define: bool = True
) -> Path:
    """A bag file as a recorder would write it, message by message."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        writer = Writer(
            stream, chunk_size=4096, compression=CompressionType.NONE, enable_crcs=crc, enable_data_crcs=crc
        )
        writer.start(profile="ros2", library="test")
        channels: dict[str, int] = {}
        for topic, message, log_time in messages:
            if topic not in channels:
                kind = message.__msgtype__
                text = schema_text(kind).encode() if define else b""
                schema = writer.register_schema(kind, "ros2msg", text)
                channels[topic] = writer.register_channel(topic, encoding, schema)
            writer.add_message(channels[topic], log_time, serialise(message), log_time)
        writer.finish()
    return file


def with_metadata(file: Path, count: int) -> Path:
    """The directory of the file, with the parts of metadata.yaml that rosbag2 always writes."""
    information = {
        "version": 9,
        "storage_identifier": "mcap",
        "message_count": count,
        "relative_file_paths": [file.name],
        "compression_mode": "",
    }
    (file.parent / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": information}))
    return file.parent


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    return with_metadata(write_mcap(tmp_path / "good" / "good_0.mcap", recording()), len(recording()))


def values(source: BagSource, stream: str) -> list[Sample]:
    return [sample for sample in source.samples() if sample.stream == stream]


def refusal(path: Path, wanted: BagMapping | None = None) -> ImportRefused:
    with pytest.raises(ImportRefused) as caught:
        source = open_bag(path, wanted or mapping())
        for _ in source.samples():
            pass
    return caught.value


# --- good bags ----------------------------------------------------------------------------------------------


def test_joints_are_reordered_and_renamed_by_the_mapping(bag: Path) -> None:
    source = open_bag(bag, mapping())
    joints = values(source, "joint_positions")
    assert [sample.stamp_ns for sample in joints] == [START + index * HALF_STEP for index in range(COUNT)]
    expected = [[index / 100, -index / 100] for index in range(COUNT)]
    np.testing.assert_allclose([sample.value for sample in joints], expected)


def test_a_commanded_action_is_the_last_command_sent_by_the_end_of_its_step(bag: Path) -> None:
    source = open_bag(bag, mapping())
    actions = values(source, "command")
    assert source.info.start_ns == START
    assert [sample.stamp_ns for sample in actions] == [
        START + (step + 1) * 2 * HALF_STEP for step in range(10)
    ]
    # The command sent exactly at the end of step k (joint index 2 (k + 1)) counts for step k.
    np.testing.assert_allclose(
        [sample.value[0] for sample in actions], [(2 * (k + 1) + 2) / 100 for k in range(10)]
    )


def test_without_a_recorded_command_the_joints_one_step_later_stand_in(bag: Path) -> None:
    source = open_bag(bag, mapping(action={"source": "next_joint_state"}))
    np.testing.assert_allclose(
        [sample.value[0] for sample in values(source, "command")], [2 * (k + 1) / 100 for k in range(10)]
    )


def test_stand_in_commands_are_interpolated_between_jittered_joints(tmp_path: Path) -> None:
    """The newest joints at the end of a step may be a whole step old where they come at the rate of the
    steps."""
    late = 7_000_000
    messages = [
        (
            "/joint_states",
            joint_state(START + index * 2 * HALF_STEP + late * (index > 0), index / 100),
            START + index,
        )
        for index in range(5)
    ]
    wanted = mapping(
        action={"source": "next_joint_state"},
        streams={"joint_positions": MAPPING["streams"]["joint_positions"]},
    )
    actions = values(open_bag(write_mcap(tmp_path / "jitter.mcap", messages), wanted), "command")
    np.testing.assert_allclose(
        [sample.value[0] for sample in actions], [0.01 * 100 / 107, 0.0193, 0.0293, 0.0393]
    )


def test_samples_come_in_order_of_their_stamps_though_images_arrive_late(bag: Path) -> None:
    stamps = [sample.stamp_ns for sample in open_bag(bag, mapping()).samples()]
    assert stamps == sorted(stamps)


def test_raw_images_become_jpeg_with_the_right_colours(bag: Path) -> None:
    image = values(open_bag(bag, mapping()), "camera_top")[0].value
    bgr = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    assert bgr.shape == (8, 10, 3)
    assert bgr[..., 2].mean() > 190 and bgr[..., :2].mean() < 10


def test_an_instruction_may_come_from_a_topic(tmp_path: Path) -> None:
    said = ("/task", create("std_msgs/msg/String", data="stack the cups"), START)
    source = open_bag(
        write_mcap(tmp_path / "a.mcap", [said, *recording()]), mapping(instruction={"topic": "/task"})
    )
    assert source.info.instruction == "stack the cups"
    assert [sample.value for sample in values(source, "instruction")] == ["stack the cups"]


def test_a_sqlite_bag_gives_the_same_as_an_mcap_bag(bag: Path, tmp_path: Path) -> None:
    store = typestore()
    with Rosbag2Writer(tmp_path / "sqlite", version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        connections = {}
        for topic, message, log_time in recording():
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=store)
            writer.write(connections[topic], log_time, serialise(message))
    one, other = (list(open_bag(path, mapping()).samples()) for path in (bag, tmp_path / "sqlite"))
    assert [(s.stream, s.stamp_ns, np.asarray(s.value).tolist()) for s in one] == [
        (s.stream, s.stamp_ns, np.asarray(s.value).tolist()) for s in other
    ]


def test_the_file_s_own_definition_of_a_type_wins_over_the_installed_one(tmp_path: Path) -> None:
    """A type of another distribution may have other fields; decoding it with ours would read the wrong
    bytes."""
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    text = schema_text("sensor_msgs/msg/JointState").replace(
        "string[] name", "string robot\nstring[] name", 1
    )
    store = get_typestore(Stores.EMPTY)
    store.register(get_types_from_msg(text, "sensor_msgs/msg/JointState"))
    file = tmp_path / "old.mcap"
    with file.open("wb") as stream:
        writer = Writer(stream)
        writer.start(profile="ros2")
        schema = writer.register_schema("sensor_msgs/msg/JointState", "ros2msg", text.encode())
        channel = writer.register_channel("/joint_states", "cdr", schema)
        types = store.types
        for index in range(5):
            stamp = START + index * 2 * HALF_STEP
            message = types["sensor_msgs/msg/JointState"](
                header=types["std_msgs/msg/Header"](
                    stamp=types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9),
                    frame_id="",
                ),
                robot="old one",
                name=["joint_1", "grip"],
                position=np.array([0.25, 0.5]),
                velocity=np.zeros(0),
                effort=np.zeros(0),
            )
            cdr = store.serialize_cdr(message, "sensor_msgs/msg/JointState")
            writer.add_message(channel, stamp, bytes(cdr), stamp)
        writer.finish()
    wanted = mapping(
        action={"source": "next_joint_state"},
        streams={"joint_positions": MAPPING["streams"]["joint_positions"]},
    )
    assert values(open_bag(file, wanted), "joint_positions")[0].value.tolist() == [0.25, 0.5]


def test_a_bag_whose_two_copies_of_the_qos_text_differ_is_read_in_full(bag: Path, tmp_path: Path) -> None:
    """rosbags.Reader yields nothing from such a bag, without an error."""
    path = tmp_path / "talker"
    store = typestore()
    with Rosbag2Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection("/joint_states", "sensor_msgs/msg/JointState", typestore=store)
        for index in range(5):
            stamp = START + index * 2 * HALF_STEP
            writer.write(connection, stamp, serialise(joint_state(stamp, index / 100)))
    metadata = yaml.safe_load((path / "metadata.yaml").read_text())
    topic = metadata["rosbag2_bagfile_information"]["topics_with_message_count"][0]["topic_metadata"]
    topic["offered_qos_profiles"] = [{"depth": 77, "history": "keep_last", "reliability": "reliable"}]
    (path / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    assert open_container(path).message_count == 5
    wanted = mapping(
        action={"source": "next_joint_state"},
        streams={"joint_positions": MAPPING["streams"]["joint_positions"]},
    )
    assert len(values(open_bag(path, wanted), "joint_positions")) == 5


def test_a_bag_becomes_an_episode_that_independent_readers_agree_on(bag: Path, tmp_path: Path) -> None:
    results = import_bags([bag], mapping(outcome="success"), tmp_path / "out")
    again = import_bags([bag], mapping(outcome="success"), tmp_path / "out")
    assert [result.imported for result in results] == [True]
    assert again[0].episode_id == results[0].episode_id and again[0].messages == 0
    path = results[0].path
    assert path is not None
    episode = EpisodeReader(path)
    assert (episode.summary.steps, episode.summary.outcome, episode.summary.outcome_source) == (
        10,
        "success",
        "mapping",
    )
    assert set(episode.types) == {
        "task",
        "episode",
        "joint_states",
        "executed_action",
        "camera_top/image_raw/compressed",
    }
    count = sum(episode.summary.message_counts.values())
    with AnyReader([path]) as reader:
        assert len([reader.deserialize(data, c.msgtype) for c, _, data in reader.messages()]) == count
    with next(path.glob("*.mcap")).open("rb") as stream:
        assert (
            len(list(make_reader(stream, decoder_factories=[DecoderFactory()]).iter_decoded_messages()))
            == count
        )


def test_an_imported_bag_can_be_replayed_into_a_trace_like_any_episode(bag: Path, tmp_path: Path) -> None:
    path = import_bags([bag], mapping(), tmp_path / "out")[0].path
    assert path is not None
    trace = load_trace(path, mapping().observation_spec(), mapping().joint_names)
    assert (trace.robot, trace.task, trace.instruction) == ("arm", "pick", "pick it up")
    assert trace.positions.shape == (10, 2)
    assert [point.step for point in trace.points] == [-1, 1, 3, 5, 7, 9], "where there was a new image"
    for point in trace.points[1:]:
        # What is seen after step k was measured at its end; the command is the one that was sent then.
        seen = point.observation.values
        assert seen["joint_positions"][0] == pytest.approx(2 * (point.step + 1) / 100)
        np.testing.assert_array_equal(seen["command"], trace.positions[point.step])
        assert seen["camera_top"].shape == (96, 96, 3)


# --- refusals -----------------------------------------------------------------------------------------------


def test_another_serialization_format_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(write_mcap(tmp_path / "a.mcap", recording(), encoding="protobuf")).reason
        is Reason.WRONG_SERIALIZATION
    )


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_truncated_file_is_refused(bag: Path, share: float) -> None:
    file = bag / "good_0.mcap"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert refusal(bag).reason is Reason.TRUNCATED


def test_a_flipped_bit_is_refused_where_the_file_carries_a_crc(bag: Path) -> None:
    file = bag / "good_0.mcap"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    assert refusal(bag).reason is Reason.BAD_CRC


def test_a_file_without_crc_comes_in_with_a_note(tmp_path: Path) -> None:
    source = open_bag(write_mcap(tmp_path / "a.mcap", recording(), crc=False), mapping())
    assert any("no CRC" in note for note in source.info.notes)


def test_a_missing_topic_is_refused_and_those_present_are_named(tmp_path: Path) -> None:
    found = refusal(write_mcap(tmp_path / "a.mcap", [m for m in recording() if m[0] != "/camera"]))
    assert found.reason is Reason.MISSING_TOPIC
    assert "/camera" in found.detail and "/joint_states" in found.detail


def test_a_topic_without_messages_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.mcap"
    with file.open("wb") as stream:
        writer = Writer(stream)
        writer.start(profile="ros2")
        for topic, message, _ in recording()[:3]:
            schema = writer.register_schema(
                message.__msgtype__, "ros2msg", schema_text(message.__msgtype__).encode()
            )
            writer.register_channel(topic, "cdr", schema)
        writer.finish()
    only_joints = mapping(streams={"joint_positions": MAPPING["streams"]["joint_positions"]})
    assert refusal(file, only_joints).reason is Reason.NO_MESSAGES


@pytest.mark.parametrize(("define", "reason"), [(False, Reason.UNKNOWN_TYPE), (True, Reason.WRONG_TYPE)])
def test_a_type_of_another_package_needs_a_definition_in_the_file(
    tmp_path: Path, define: bool, reason: Reason
) -> None:
    message = create("lwd_msgs/msg/TeleopCommand", header=header(START))
    file = write_mcap(tmp_path / "a.mcap", [*recording(), ("/own", message, START)], define=define)
    streams = MAPPING["streams"] | {
        "own": {"topic": "/own", "kind": "vector", "shape": [2], "max_age_s": 1.0}
    }
    found = refusal(file, mapping(streams=streams))
    assert found.reason is reason and "lwd_msgs/msg/TeleopCommand" in found.detail


def test_a_type_that_cannot_be_the_stream_is_refused(bag: Path) -> None:
    streams = {
        **MAPPING["streams"],
        "camera_top": {**MAPPING["streams"]["camera_top"], "topic": "/joint_states"},
    }
    assert refusal(bag, mapping(streams=streams)).reason is Reason.WRONG_TYPE


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_joint_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    messages = [
        *recording(),
        ("/joint_states", joint_state(START + COUNT * HALF_STEP, bad), START + COUNT * HALF_STEP),
    ]
    found = refusal(write_mcap(tmp_path / "a.mcap", messages))
    assert found.reason is Reason.NOT_FINITE
    assert "/joint_states" in found.detail and "joint_1" in found.detail


def test_a_joint_that_the_bag_does_not_have_is_refused_by_name(bag: Path) -> None:
    found = refusal(bag, mapping(joint_names_in_bag={"lift": "elevator"}))
    assert found.reason is Reason.BAD_JOINTS and "elevator" in found.detail


def points(stamp: int, count: int) -> Any:
    poses = [create("geometry_msgs/msg/Pose", position=create("geometry_msgs/msg/Point", x=0.5))] * count
    return create("geometry_msgs/msg/PoseArray", header=header(stamp), poses=poses)


def test_points_and_vectors_come_through_to_the_episode(tmp_path: Path) -> None:
    force = create("std_msgs/msg/Float64MultiArray", data=np.array([1.0, 2.0]))
    messages = [("/points", points(START, 3), START), ("/force", force, START), *recording()]
    streams = MAPPING["streams"] | {
        "keypoints": {"topic": "/points", "kind": "points", "shape": [3, 3], "max_age_s": 9},
        "force": {"topic": "/force", "kind": "vector", "shape": [2], "max_age_s": 9},
    }
    wanted = mapping(streams=streams)
    result = import_bags([write_mcap(tmp_path / "a.mcap", messages)], wanted, tmp_path / "out")[0]
    assert result.path is not None
    episode, spec = EpisodeReader(result.path), wanted.observation_spec()
    for name in ("keypoints", "force"):
        message = next(iter(episode.messages(name))).message
        value = decode_message(spec.stream(name), message, wanted.joint_names)
        assert value.ravel().tolist() == ([0.5, 0.0, 0.0] * 3 if name == "keypoints" else [1.0, 2.0])


def test_a_detector_with_another_number_of_points_is_refused(tmp_path: Path) -> None:
    file = write_mcap(tmp_path / "a.mcap", [("/points", points(START, 2), START), *recording()])
    streams = MAPPING["streams"] | {
        "keypoints": {"topic": "/points", "kind": "points", "shape": [3, 3], "max_age_s": 9}
    }
    assert refusal(file, mapping(streams=streams)).reason is Reason.WRONG_SHAPE


def test_bytes_that_are_no_such_message_are_refused(tmp_path: Path) -> None:
    class Short:
        __msgtype__ = "sensor_msgs/msg/JointState"

    file = tmp_path / "a.mcap"
    with file.open("wb") as stream:
        writer = Writer(stream)
        writer.start(profile="ros2")
        schema = writer.register_schema(Short.__msgtype__, "ros2msg", schema_text(Short.__msgtype__).encode())
        channel = writer.register_channel("/joint_states", "cdr", schema)
        writer.add_message(channel, START, b"\x00\x01\x00\x00\x01", START)
        writer.finish()
    wanted = mapping(
        action={"source": "next_joint_state"},
        streams={"joint_positions": MAPPING["streams"]["joint_positions"]},
    )
    assert refusal(file, wanted).reason is Reason.CORRUPT


def test_a_stream_on_another_clock_is_refused_unless_arrival_times_are_used(tmp_path: Path) -> None:
    offset = 30_000_000_000
    messages = [
        (topic, picture(time - offset) if topic == "/camera" else message, time)
        for topic, message, time in recording()
    ]
    file = write_mcap(tmp_path / "a.mcap", messages)
    found = refusal(file)
    assert found.reason is Reason.BAD_STAMPS and "stamps: log" in found.detail
    assert open_bag(file, mapping(stamps="log")).info.steps == 9


def test_unset_stamps_are_refused(tmp_path: Path) -> None:
    messages = [
        (topic, picture(0) if topic == "/camera" else message, time) for topic, message, time in recording()
    ]
    assert refusal(write_mcap(tmp_path / "a.mcap", messages)).reason is Reason.BAD_STAMPS


def test_a_plan_is_not_taken_for_a_command(tmp_path: Path) -> None:
    plan = command(START, 0.0)
    plan.points.append(plan.points[0])
    found = refusal(write_mcap(tmp_path / "a.mcap", [("/command", plan, START), *recording()]))
    assert found.reason is Reason.UNSUPPORTED and "next_joint_state" in found.detail


def test_fewer_messages_than_metadata_declares_are_refused(bag: Path) -> None:
    with_metadata(bag / "good_0.mcap", len(recording()) + 1)
    assert refusal(bag).reason is Reason.COUNT_MISMATCH


def test_a_split_that_is_absent_is_refused(bag: Path) -> None:
    (bag / "metadata.yaml").unlink()
    shutil.copy(bag / "good_0.mcap", bag / "good_2.mcap")
    assert refusal(bag).reason is Reason.MISSING_FILE


def test_a_recording_shorter_than_a_step_is_refused(tmp_path: Path) -> None:
    found = refusal(write_mcap(tmp_path / "a.mcap", recording()[:4]))
    assert found.reason is Reason.TOO_SHORT


def test_a_refused_bag_is_noted_in_the_quarantine_and_the_next_one_comes_in(
    bag: Path, tmp_path: Path
) -> None:
    broken = write_mcap(tmp_path / "broken.mcap", recording())
    broken.write_bytes(broken.read_bytes()[:-100])
    quarantine = Quarantine(tmp_path / "quarantine")
    for _ in range(2):
        results = import_bags([broken, bag, tmp_path / "nowhere"], mapping(), tmp_path / "out", quarantine)
        assert [result.imported for result in results] == [False, True, False]
    notes = {
        json.loads(file.read_text())["reason"]: json.loads(file.read_text())
        for file in quarantine.directory.iterdir()
    }
    assert set(notes) == {"truncated", "missing_file"}
    assert notes["truncated"]["source"] == str(broken.resolve())
    assert len(notes["truncated"]["sha256"]) == 64 and "footer" in notes["truncated"]["detail"]


# --- real recordings ----------------------------------------------------------------------------------------

real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real recordings at {SHARED}")
REAL_MAPPING = REPOSITORY / "config" / "mappings" / "rosbag2_cpp_mcap.yaml"


@real_data
def test_a_bag_of_the_cpp_recorder_comes_in(tmp_path: Path) -> None:
    results = import_bags(find_bags(SHARED / "rosbag2_cpp_mcap"), load_mapping(REAL_MAPPING), tmp_path)
    assert [(result.imported, result.steps) for result in results] == [(True, 14)]
    path = results[0].path
    assert path is not None
    with AnyReader([path]) as reader:
        assert (
            len([reader.deserialize(data, c.msgtype) for c, _, data in reader.messages()])
            == results[0].messages
        )


@real_data
def test_rosbag2_s_own_test_bags_are_read_in_full_or_refused() -> None:
    """Counts of the `message_count` in their metadata.yaml; several of them give 0 messages in
    rosbags.Reader."""
    counts: dict[str, list[int]] = {}
    for path in find_bags(SHARED / "rosbag2_official"):
        if path.name == "wrong_rmw_test":
            assert refusal(path).reason is Reason.WRONG_SERIALIZATION
            continue
        counts.setdefault(path.stem, []).append(open_container(path).message_count)
    assert counts["talker"] == [20, 20]
    assert counts["convert_a"] == [150, 150]
    assert counts["convert_b"] == [75, 75]
    assert counts["wbag"] == [6074, 6074]
    assert counts["multiple_files"] == [3177, 3177]
    assert counts["cdr_test"] == [7]


@real_data
def test_no_official_bag_stops_the_others(tmp_path: Path) -> None:
    bags = find_bags(SHARED / "rosbag2_official") + find_bags(SHARED / "rosbag2_cpp_mcap")
    quarantine = Quarantine(tmp_path / "quarantine")
    results = import_bags(bags, load_mapping(REAL_MAPPING), tmp_path / "out", quarantine)
    assert [result.name for result in results if result.imported] == ["rosbag2_2025_09_10-13_03_56_0.mcap"]
    assert len(list(quarantine.directory.iterdir())) == len(bags) - 1
