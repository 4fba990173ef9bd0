# SPDX-License-Identifier: Apache-2.0
"""docs/episode_format.md, promise by promise, checked with independent readers of the same files."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import uuid
from collections import Counter
from pathlib import Path

import pytest
import yaml
from mcap.reader import make_reader
from mcap.writer import Writer
from mcap_ros2.decoder import DecoderFactory
from rosbags.highlevel import AnyReader

from lwd_fleet.data import messages
from lwd_fleet.data.episode import (
    EpisodeReader,
    EpisodeRejected,
    EpisodeWriter,
    bag_file,
    mint_episode_id,
    rebuild_episode_json,
    rebuild_metadata,
)
from lwd_fleet.data.salvage import QUARANTINE, REASON_FILE, salvage, salvage_spool
from lwd_fleet.data.summary import AUTHORS, OUTCOMES, STATES, PolicyInterval

SHARED = Path(os.environ.get("LWD_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture
def sealed(write_episode):
    return write_episode()


def test_ids_are_uuid_version_7_and_sort_by_time():
    ids = [mint_episode_id(now_ns=1_700_000_000_000_000_000 + i * 1_000_000) for i in range(50)]
    assert ids == sorted(ids) and len(set(ids)) == 50
    for text in ids:
        value = uuid.UUID(text)
        assert value.variant == uuid.RFC_4122 and (value.int >> 76) & 0xF == 7
    assert uuid.UUID(ids[0]).int >> 80 == 1_700_000_000_000


@pytest.mark.parametrize(
    ("type_name", "prefix", "names"),
    [
        ("lwd_msgs/msg/EpisodeState", "STATE_", STATES),
        ("lwd_msgs/msg/EpisodeState", "OUTCOME_", OUTCOMES),
        ("lwd_msgs/msg/ExecutedAction", "AUTHOR_", AUTHORS),
    ],
)
def test_numbers_are_named_as_in_the_interface(type_name, prefix, names):
    constants = messages.typestore().fielddefs[type_name][0]
    named = {name: value for name, _, value in constants if name.startswith(prefix)}
    assert named == {prefix + name.upper(): index for index, name in enumerate(names)}


def test_three_independent_readers_see_the_same_messages(sealed):
    ours = Counter(message.topic for message in EpisodeReader(sealed.path))
    with AnyReader([sealed.path], default_typestore=messages.typestore()) as reader:
        rosbags = Counter(connection.topic for connection, _, _ in reader.messages())
        assert reader.message_count == sum(rosbags.values())
    with (sealed.path / bag_file(sealed.episode_id)).open("rb") as stream:
        foxglove = Counter()
        decoded = make_reader(stream, validate_crcs=True, decoder_factories=[DecoderFactory()])
        for schema, channel, record, message in decoded.iter_decoded_messages():
            foxglove[channel.topic] += 1
            assert record.publish_time == record.log_time - 1_000_000
            if schema.name == "lwd_msgs/msg/EpisodeState" and message.state == 3:
                last = message
    assert last.outcome == 1 and list(last.sub_step_scores) == [1.0, 0.5]
    assert {f"/r1/{topic}": count for topic, count in ours.items()} == rosbags == foxglove
    assert rosbags == sealed.summary.message_counts
    assert rosbags["/r1/executed_action"] == 10


def test_the_directory_holds_a_rosbag2_bag_of_version_9(sealed):
    assert {path.name for path in sealed.path.iterdir()} == {
        f"{sealed.episode_id}_0.mcap",
        "metadata.yaml",
        "episode.json",
    }
    information = yaml.safe_load((sealed.path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert information["version"] == 9 and information["storage_identifier"] == "mcap"
    assert information["relative_file_paths"] == [f"{sealed.episode_id}_0.mcap"]
    topics = {
        entry["topic_metadata"]["name"]: entry["topic_metadata"]
        for entry in information["topics_with_message_count"]
    }
    assert topics["/r1/episode"]["offered_qos_profiles"][0]["durability"] == "transient_local"
    assert topics["/r1/joint_states"]["offered_qos_profiles"][0]["durability"] == "volatile"
    # The hash a real ROS 2 Jazzy robot announces for this type.
    assert topics["/r1/joint_states"]["type_description_hash"] == (
        "RIHS01_a13ee3a330e346c9d87b5aa18d24e11690752bd33a0350f11c5882bc9179260e"
    )
    with (sealed.path / bag_file(sealed.episode_id)).open("rb") as stream:
        reader = make_reader(stream)
        assert reader.get_header().profile == "ros2"
        for channel in reader.get_summary().channels.values():
            assert channel.metadata["topic_type_hash"] == topics[channel.topic]["type_description_hash"]
            qos = yaml.safe_load(channel.metadata["offered_qos_profiles"])
            assert qos == topics[channel.topic]["offered_qos_profiles"]
        inner = next(record for record in reader.iter_metadata() if record.name == "rosbag2")
        assert yaml.safe_load(inner.metadata["serialized_metadata"]) == information


def test_summary_says_what_the_messages_said(sealed):
    summary = EpisodeReader(sealed.path).summary
    assert summary == sealed.summary
    assert (summary.robot, summary.task, summary.outcome) == ("r1", "place", "success")
    assert summary.instruction == "put the cube into the bowl"
    assert summary.sub_step_scores == (1.0, 0.5) and summary.seed == 7
    assert summary.steps == 10 and summary.authors == {"human": 2, "policy": 8}
    assert summary.policy_intervals == (PolicyInterval(3, "ab", 0, 3), PolicyInterval(4, "ab", 4, 7))
    assert summary.policy_version == 4
    assert summary.truncated == ""


def test_a_state_of_the_episode_before_says_nothing(write_episode):
    summary = write_episode(outcome=0).summary
    assert summary.outcome == "unlabelled" and summary.message_counts["/r1/episode"] == 4


def test_digest_is_what_sha256sum_prints(sealed):
    listing = subprocess.run(
        ["sha256sum", bag_file(sealed.episode_id)], cwd=sealed.path, capture_output=True, check=True
    ).stdout
    assert hashlib.sha256(listing).hexdigest() == sealed.digest


def test_caches_can_be_rebuilt_from_the_bag_alone(sealed):
    before = {name: (sealed.path / name).read_text() for name in ("episode.json", "metadata.yaml")}
    for name in before:
        (sealed.path / name).unlink()
    with pytest.raises(EpisodeRejected, match=r"no metadata\.yaml"):
        EpisodeReader(sealed.path)
    rebuild_metadata(sealed.path)
    assert rebuild_episode_json(sealed.path) == sealed.summary
    assert {name: (sealed.path / name).read_text() for name in before} == before
    assert len(list(EpisodeReader(sealed.path))) == sealed.summary.message_count


def test_messages_come_in_log_order_and_by_topic(sealed):
    reader = EpisodeReader(sealed.path)
    times = [message.log_time_ns for message in reader]
    assert times == sorted(times)
    steps = [entry.message.step for entry in reader.messages("executed_action")]
    assert steps == list(range(10))
    assert reader.types["executed_action"] == "lwd_msgs/msg/ExecutedAction"


@pytest.mark.parametrize("with_cache", [True, False])
def test_any_flipped_bit_is_noticed(sealed, with_cache):
    file = sealed.path / bag_file(sealed.episode_id)
    if not with_cache:
        (sealed.path / "episode.json").unlink()
    good = file.read_bytes()
    generator = random.Random(1)
    for position in [8, len(good) // 2, len(good) - 20, *generator.sample(range(len(good)), 40)]:
        bad = bytearray(good)
        bad[position] ^= 1 << generator.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(EpisodeRejected, match=sealed.episode_id):
            EpisodeReader(sealed.path)
    file.write_bytes(good)
    EpisodeReader(sealed.path)


def test_a_bag_with_other_counts_than_its_metadata_is_rejected(sealed):
    path = sealed.path / "metadata.yaml"
    path.write_text(path.read_text().replace("message_count: 10", "message_count: 11"))
    with pytest.raises(EpisodeRejected, match="message counts of .*joint_states"):
        EpisodeReader(sealed.path)


def test_a_bag_with_another_topic_than_its_metadata_is_rejected(sealed):
    path = sealed.path / "metadata.yaml"
    path.write_text(path.read_text().replace("name: /r1/joint_states", "name: /r1/joint_stats"))
    with pytest.raises(EpisodeRejected, match="differ in topics /r1/joint_states, /r1/joint_stats"):
        EpisodeReader(sealed.path)


def test_another_file_under_the_same_name_is_rejected(write_episode):
    first, second = write_episode(steps=3), write_episode(steps=4)
    shutil.copy(second.path / bag_file(second.episode_id), first.path / bag_file(first.episode_id))
    with pytest.raises(EpisodeRejected, match=f"is of episode {second.episode_id}"):
        EpisodeReader(first.path)


def test_a_recording_that_is_not_sealed_is_rejected(tmp_path):
    EpisodeWriter(tmp_path, "x", "r1").abandon()
    with pytest.raises(EpisodeRejected, match="not sealed"):
        EpisodeReader(tmp_path / "x.partial")


def test_a_message_recorded_with_another_definition_is_rejected(tmp_path):
    directory = tmp_path / "e"
    directory.mkdir()
    with (directory / "e_0.mcap").open("wb") as stream:
        writer = Writer(stream)
        writer.start(profile="ros2")
        writer.add_metadata(
            "lwd_episode", {"format_version": "1", "episode_id": "e", "robot": "r1", "source": "robot"}
        )
        schema = writer.register_schema("lwd_msgs/msg/EpisodeState", "ros2msg", b"uint8 state")
        channel = writer.register_channel("/r1/episode", "cdr", schema, {"topic_type_hash": "RIHS01_old"})
        writer.add_message(channel, 1, b"\0\1\0\0\1", 1)
        writer.finish()
    with pytest.raises(EpisodeRejected, match="another definition of lwd_msgs/msg/EpisodeState"):
        EpisodeReader(directory)


def test_writer_refuses_to_overwrite_and_to_mix_types(tmp_path, sealed):
    with pytest.raises(FileExistsError):
        EpisodeWriter(sealed.path.parent, sealed.episode_id, "r1")
    writer = EpisodeWriter(tmp_path / "other", "x", "r1")
    text = messages.serialise(messages.create("std_msgs/msg/String", data="a"))
    writer.write("/r1/task", "std_msgs/msg/String", text, 1, 1)
    with pytest.raises(ValueError, match="was std_msgs/msg/String"):
        writer.write("/r1/task", "std_msgs/msg/Bool", text, 1, 1)


def _cut(path: Path, episode_id: str, fraction: float) -> Path:
    """What a killed recorder leaves: no caches, the file ends anywhere."""
    partial = path.with_name(f"{episode_id}.partial")
    path.rename(partial)
    for name in ("metadata.yaml", "episode.json"):
        (partial / name).unlink()
    file = partial / bag_file(episode_id)
    os.truncate(file, int(file.stat().st_size * fraction))
    return partial


def test_truncated_recording_is_salvaged_with_a_stated_count(write_episode):
    sealed = write_episode(steps=600)  # several chunks
    partial = _cut(sealed.path, sealed.episode_id, 0.6)
    result = salvage(partial)
    assert result.sealed is not None and not partial.exists()
    summary = EpisodeReader(sealed.path).summary
    assert summary == result.sealed.summary
    assert 0 < summary.message_count < sealed.summary.message_count
    assert f"{summary.message_count} messages salvaged" in summary.truncated
    assert summary.outcome == "unlabelled" and summary.task == "place"
    original = sealed.summary.message_counts
    assert all(count <= original[topic] for topic, count in summary.message_counts.items())


def test_a_recording_complete_but_for_the_seal_is_not_called_truncated(sealed):
    _cut(sealed.path, sealed.episode_id, 1.0)
    (result,) = salvage_spool(sealed.path.parent)
    assert result.sealed.summary.truncated == "" and result.sealed.summary.outcome == "success"
    assert result.sealed.summary.message_counts == sealed.summary.message_counts


def test_a_recording_without_a_readable_message_is_quarantined(sealed):
    partial = _cut(sealed.path, sealed.episode_id, 0.01)
    result = salvage(partial)
    assert result.sealed is None and not partial.exists()
    assert result.quarantined.parent.name == QUARANTINE
    assert "no message can be read" in (result.quarantined / REASON_FILE).read_text()


def test_salvage_can_be_interrupted_and_repeated(sealed):
    partial = _cut(sealed.path, sealed.episode_id, 1.0)
    leftover = partial.with_name(f"{sealed.episode_id}.salvage")
    leftover.mkdir()
    (leftover / "half").write_text("written")
    assert len(salvage_spool(sealed.path.parent)) == 1
    assert {path.name for path in sealed.path.parent.iterdir()} == {sealed.episode_id}
    assert salvage_spool(sealed.path.parent) == []


def test_a_leftover_beside_its_sealed_episode_is_set_aside(sealed):
    partial = sealed.path.with_name(f"{sealed.episode_id}.partial")
    partial.mkdir()
    assert "sealed under the same name" in salvage(partial).reason
    EpisodeReader(sealed.path)


def test_a_full_disk_is_an_error_and_leaves_what_was_flushed(tmp_path, monkeypatch):
    writer = EpisodeWriter(tmp_path, "x", "r1")
    text = messages.serialise(messages.create("std_msgs/msg/String", data="a" * 1000))
    writer.write("/r1/task", "std_msgs/msg/String", text, 1, 1)
    writer.flush()

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._writer, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    with pytest.raises(OSError, match="salvaged"):
        writer.write("/r1/task", "std_msgs/msg/String", text, 2, 2)
    with pytest.raises(OSError, match="salvaged"):
        writer.seal()
    writer.abandon()
    assert salvage(tmp_path / "x.partial").sealed.summary.message_count == 1


def test_missing_interfaces_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv("AMENT_PREFIX_PATH", "")
    messages.typestore.cache_clear()
    try:
        with pytest.raises(messages.InterfacesMissing, match="lwd_msgs is not installed.*make build"):
            messages.type_hash("std_msgs/msg/String")
    finally:
        messages.typestore.cache_clear()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no recordings of others here (LWD_SHARED_DATA)")
@pytest.mark.parametrize("name", ["talker", "convert_a", "wbag"])
def test_bags_of_others_are_refused_with_a_reason(name):
    path = SHARED / "rosbag2_official/rosbag2_py/test/resources/mcap" / name
    with pytest.raises(EpisodeRejected, match=name):
        EpisodeReader(path)


def test_episode_json_is_plain(sealed):
    content = json.loads((sealed.path / "episode.json").read_text())
    assert content["format_version"] == 1 and content["digest"] == sealed.digest
