# SPDX-License-Identifier: Apache-2.0
"""LeRobot datasets come in as lwd episodes: small synthetic ones made here, and real ones where they are at
hand."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rosbags.highlevel import AnyReader

from lwd_fleet.data.episode import EpisodeReader
from lwd_fleet.data.messages import stamp_ns
from lwd_learner.importers.lerobot import EPOCH_NS, import_lerobot, open_episode
from lwd_learner.importers.lerobot_layout import find_dataset, open_dataset
from lwd_learner.importers.quarantine import Quarantine
from lwd_learner.importers.source import ImportRefused, Outcome, Reason
from lwd_learner.importers.write import write_episode

FPS = 10
FRAMES = (5, 7)  # per episode
NAMES = ["shoulder", "elbow", "gripper"]
CAMERA = "observation.images.wrist"
REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("LWD_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))


def rows(episode: int, **changes: object) -> dict[str, object]:
    count, first = FRAMES[episode], sum(FRAMES[:episode])
    index = np.arange(first, first + count)
    state = np.stack([0.01 * index, -0.02 * index, 0.001 * index], axis=1).astype(np.float32)
    columns: dict[str, object] = {
        "observation.state": list(state),
        "action": list(state + np.float32(0.5)),
        "timestamp": (np.arange(count) / FPS).astype(np.float32),
        "frame_index": np.arange(count),
        "episode_index": np.full(count, episode),
        "index": index,
        "task_index": np.zeros(count, np.int64),
    }
    return columns | changes


def grey(frame: int) -> int:
    """Brightness of a frame of the test video, by global frame index."""
    return 30 + 15 * frame


def write_video(file: Path, frames: range) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(
            "libsvtav1", rate=FPS, options={"g": "2", "preset": "12", "svtav1-params": "lp=1"}
        )
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), grey(frame), np.uint8), format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_info(root: Path, version: str, **places: str) -> None:
    joints = {"dtype": "float32", "shape": [3], "names": {"motors": NAMES} if version == "v3.0" else [NAMES]}
    info = {
        "codebase_version": version,
        "robot_type": "Test-Arm",
        "chunks_size": 1000,
        "fps": FPS,
        "features": {
            "observation.state": joints,
            "action": joints,
            CAMERA: {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channel"]},
        },
        **places,
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))


def write_v21(root: Path) -> Path:
    write_info(
        root,
        "v2.1",
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    lines = [{"episode_index": i, "tasks": ["Pick up the cup."], "length": n} for i, n in enumerate(FRAMES)]
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "meta" / "tasks.jsonl").write_text(
        json.dumps({"task_index": 0, "task": "Pick up the cup."}) + "\n"
    )
    (root / "data" / "chunk-000").mkdir(parents=True)
    for episode, count in enumerate(FRAMES):
        write_table(root, episode)
        first = sum(FRAMES[:episode])
        write_video(
            root / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4", range(first, first + count)
        )
    return root


def write_table(root: Path, episode: int, **changes: object) -> None:
    pq.write_table(pa.table(rows(episode, **changes)), root / f"data/chunk-000/episode_{episode:06d}.parquet")


def write_v30(root: Path) -> Path:
    write_info(
        root,
        "v3.0",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    tasks = pa.table({"task_index": [0], "__index_level_0__": ["Pick up the cup."]})
    pq.write_table(tasks, root / "meta" / "tasks.parquet")
    episodes = []
    for episode, count in enumerate(FRAMES):
        first = sum(FRAMES[:episode])
        episodes.append(
            {
                "episode_index": episode,
                "length": count,
                "data/chunk_index": 0,
                "data/file_index": 0,
                "dataset_from_index": first,
                f"videos/{CAMERA}/chunk_index": 0,
                f"videos/{CAMERA}/file_index": 0,
                f"videos/{CAMERA}/from_timestamp": first / FPS,
                f"videos/{CAMERA}/to_timestamp": (first + count) / FPS,
            }
        )
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    tables = [pa.table(rows(episode)) for episode in range(len(FRAMES))]
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
    write_video(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", range(sum(FRAMES)))
    return root


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lerobot")
    return {"v2.1": write_v21(folder / "v21"), "v3.0": write_v30(folder / "v30")}


@pytest.fixture(params=["v2.1", "v3.0"])
def dataset(request: pytest.FixtureRequest, pristine: dict[str, Path]) -> Path:
    return pristine[request.param]


@pytest.fixture
def spoilt(pristine: dict[str, Path], tmp_path: Path) -> Path:
    """A v2.1 dataset to damage."""
    return Path(shutil.copytree(pristine["v2.1"], tmp_path / "v21"))


def test_every_frame_becomes_joints_an_action_and_an_image(dataset: Path, tmp_path: Path) -> None:
    results = import_lerobot(dataset, tmp_path)
    assert [result.steps for result in results] == list(FRAMES)
    for episode, result in enumerate(results):
        assert result.path is not None
        recorded = EpisodeReader(result.path)
        count, first = FRAMES[episode], sum(FRAMES[:episode])
        assert recorded.summary.message_counts == {
            "/test_arm/task": 1,
            "/test_arm/episode": 2,
            "/test_arm/joint_states": count,
            "/test_arm/executed_action": count,
            "/test_arm/camera_wrist/image_raw/compressed": count,
        }
        assert recorded.summary.outcome == "unlabelled"
        assert recorded.summary.authors == {"human": count}
        assert (recorded.summary.task, recorded.summary.instruction) == (
            "pick_up_the_cup",
            "Pick up the cup.",
        )
        joints = [message.message for message in recorded.messages("joint_states")]
        assert joints[0].name == NAMES
        expected = np.array(rows(episode)["observation.state"])
        np.testing.assert_allclose([message.position for message in joints], expected, atol=1e-7)
        actions = [message.message for message in recorded.messages("executed_action")]
        assert [message.step for message in actions] == list(range(count))
        np.testing.assert_allclose([message.positions for message in actions], expected + 0.5, atol=1e-6)
        for frame, message in enumerate(recorded.messages("camera_wrist/image_raw/compressed")):
            image = cv2.imdecode(message.message.data, cv2.IMREAD_COLOR)
            assert image.shape == (64, 64, 3)
            assert abs(float(image.mean()) - grey(first + frame)) < 5  # neighbours differ by 15


def test_an_action_is_stamped_with_the_end_of_its_step_and_the_last_frame_has_one(
    dataset: Path, tmp_path: Path
) -> None:
    result = import_lerobot(dataset, tmp_path, episodes=[1])[0]
    assert result.path is not None
    recorded = EpisodeReader(result.path)
    start = EPOCH_NS + round(FRAMES[0] / FPS * 1e9)
    seen = [stamp_ns(message.message.header.stamp) for message in recorded.messages("joint_states")]
    commanded = [stamp_ns(message.message.header.stamp) for message in recorded.messages("executed_action")]
    assert seen[0] == start
    assert commanded[:-1] == seen[1:]
    assert commanded[-1] == seen[-1] + round(1e9 / FPS)


def test_at_one_stamp_the_observation_comes_before_the_action_that_ends_there(
    dataset: Path, tmp_path: Path
) -> None:
    """`read_trace` decides at an executed action: the frame of the same stamp has to be in its buffer by
    then."""
    result = import_lerobot(dataset, tmp_path, episodes=[0])[0]
    assert result.path is not None
    topics = [message.topic for message in EpisodeReader(result.path)]
    image = "camera_wrist/image_raw/compressed"
    assert topics[:4] == ["task", "joint_states", image, "episode"]
    assert topics[4:7] == ["joint_states", image, "executed_action"]
    assert topics[-2:] == ["executed_action", "episode"]


def test_both_layouts_of_the_same_content_give_the_same_joints(pristine: dict[str, Path]) -> None:
    sources = [open_episode(found, found.episodes[1]) for found in map(open_dataset, pristine.values())]
    series = [
        [
            (sample.stream, sample.stamp_ns, np.asarray(sample.value).tolist())
            for sample in source.samples()
            if sample.stream in ("joint_positions", "command")
        ]
        for source in sources
    ]
    assert series[0] == series[1]


def test_importing_twice_gives_the_same_episode_and_writes_it_once(dataset: Path, tmp_path: Path) -> None:
    first = import_lerobot(dataset, tmp_path / "a")
    again = import_lerobot(dataset, tmp_path / "a")
    elsewhere = import_lerobot(dataset, tmp_path / "b")
    assert [result.episode_id for result in first] == [result.episode_id for result in again]
    assert [result.messages for result in again] == [0, 0]
    assert len({result.episode_id for result in first}) == 2
    assert {uuid.UUID(result.episode_id).version for result in first} == {5}
    for one, other in zip(first, elsewhere, strict=True):
        assert one.path is not None and other.path is not None
        assert EpisodeReader(one.path).summary.digest == EpisodeReader(other.path).summary.digest


def test_another_robot_name_is_another_episode(dataset: Path, tmp_path: Path) -> None:
    one = import_lerobot(dataset, tmp_path, robot="r1", episodes=[0])[0]
    two = import_lerobot(dataset, tmp_path, robot="r2", episodes=[0])[0]
    assert one.episode_id != two.episode_id


def refused(folder: Path, tmp_path: Path, reason: Reason) -> str:
    """Episode 0 of the dataset is refused for this reason, episode 1 comes in. Returns the detail."""
    quarantine = Quarantine(tmp_path / "quarantine")
    bad, good = import_lerobot(folder, tmp_path / "out", quarantine=quarantine)
    assert good.imported, good
    assert bad.refusal is not None and bad.refusal.reason is reason, bad
    notes = [json.loads(file.read_text()) for file in quarantine.directory.glob("*.json")]
    assert [(note["reason"], note["part"]) for note in notes] == [(reason.value, "episode 0")]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [good.episode_id]
    return bad.refusal.detail


def test_an_episode_without_its_table_is_refused_alone(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "data/chunk-000/episode_000000.parquet").unlink()
    assert "episode_000000.parquet" in refused(spoilt, tmp_path, Reason.MISSING_FILE)


def test_an_episode_without_its_video_is_refused_alone(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / f"videos/chunk-000/{CAMERA}/episode_000000.mp4").unlink()
    assert "episode_000000.mp4" in refused(spoilt, tmp_path, Reason.MISSING_FILE)


def test_a_video_that_is_too_short_is_refused_and_leaves_nothing_behind(spoilt: Path, tmp_path: Path) -> None:
    write_video(spoilt / f"videos/chunk-000/{CAMERA}/episode_000000.mp4", range(FRAMES[0] - 1))
    assert "frame 4" in refused(spoilt, tmp_path, Reason.MISSING_FRAME)


def test_a_damaged_video_is_refused(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / f"videos/chunk-000/{CAMERA}/episode_000000.mp4").write_bytes(b"not a video" * 100)
    refused(spoilt, tmp_path, Reason.CORRUPT)


def test_a_damaged_table_is_refused(spoilt: Path, tmp_path: Path) -> None:
    table = spoilt / "data/chunk-000/episode_000000.parquet"
    table.write_bytes(table.read_bytes()[:-40])
    refused(spoilt, tmp_path, Reason.CORRUPT)


def test_a_joint_that_is_not_a_number_is_named(spoilt: Path, tmp_path: Path) -> None:
    action = np.array(rows(0)["action"])
    action[2, 1] = np.nan
    write_table(spoilt, 0, action=list(action))
    detail = refused(spoilt, tmp_path, Reason.NOT_FINITE)
    assert "action of frame 2" in detail and "elbow" in detail


def test_a_table_with_fewer_frames_than_declared_is_refused(spoilt: Path, tmp_path: Path) -> None:
    short = pa.table(rows(0)).slice(0, FRAMES[0] - 1)
    pq.write_table(short, spoilt / "data/chunk-000/episode_000000.parquet")
    refused(spoilt, tmp_path, Reason.COUNT_MISMATCH)


def test_a_gap_in_the_timestamps_is_refused(spoilt: Path, tmp_path: Path) -> None:
    write_table(spoilt, 0, timestamp=np.array([0.0, 0.1, 0.2, 0.9, 1.0], np.float32))
    assert "frame 2" in refused(spoilt, tmp_path, Reason.BAD_STAMPS)


def test_an_unknown_dataset_version_is_refused_as_a_whole(spoilt: Path, tmp_path: Path) -> None:
    info = spoilt / "meta" / "info.json"
    info.write_text(info.read_text().replace("v2.1", "v9.0"))
    with pytest.raises(ImportRefused, match=r"v9\.0") as refusal:
        import_lerobot(spoilt, tmp_path)
    assert refusal.value.reason is Reason.UNSUPPORTED


def test_a_dataset_that_judges_its_episodes_is_believed(spoilt: Path, tmp_path: Path) -> None:
    write_table(spoilt, 0, **{"next.success": [False] * 4 + [True]})
    write_table(spoilt, 1, **{"next.success": [False] * 7})
    found = open_dataset(spoilt)
    assert [open_episode(found, entry).info.outcome for entry in found.episodes] == [
        Outcome.SUCCESS,
        Outcome.FAILURE,
    ]
    result = write_episode(open_episode(found, found.episodes[0]), tmp_path / "out")
    assert result.path is not None
    assert EpisodeReader(result.path).summary.outcome == "success"


# --- real recordings ----------------------------------------------------------------------------------------

real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real recordings at {SHARED}")


def same_count_everywhere(path: Path) -> int:
    """Message count by our reader, by rosbags and by mcap with mcap-ros2-support, all decoded."""
    ours = sum(EpisodeReader(path).summary.message_counts.values())
    with AnyReader([path]) as reader:
        decoded = [reader.deserialize(data, connection.msgtype) for connection, _, data in reader.messages()]
    with next(path.glob("*.mcap")).open("rb") as stream:
        foxglove = list(make_reader(stream, decoder_factories=[DecoderFactory()]).iter_decoded_messages())
    assert ours == len(decoded) == len(foxglove)
    return ours


@real_data
def test_the_g1_recording_comes_in_and_absent_episodes_are_refused(tmp_path: Path) -> None:
    results = import_lerobot(SHARED / "g1_dual_arm_lerobot_v2", tmp_path)
    assert len(results) == 100
    assert {result.refusal.reason for result in results if result.refusal} == {Reason.MISSING_FILE}
    good = [result for result in results if result.imported]
    assert [result.steps for result in good] == [221, 277, 280]
    for result in good:
        assert result.path is not None
        assert same_count_everywhere(result.path) == 3 * result.steps + 3


@real_data
def test_two_short_episodes_of_the_so101_recording_come_in(tmp_path: Path) -> None:
    results = import_lerobot(
        find_dataset(SHARED / "so101_lerobot_v3"), tmp_path, robot="so101", episodes=[4, 5]
    )
    assert [result.steps for result in results] == [90, 162]
    for result in results:
        assert result.path is not None
        assert same_count_everywhere(result.path) == 3 * result.steps + 3


@real_data
def test_the_second_clip_of_a_shared_video_file_starts_at_its_own_frame(tmp_path: Path) -> None:
    found = open_dataset(find_dataset(SHARED / "so101_lerobot_v3"))
    entry = found.episodes[4]
    source = open_episode(found, entry)
    image = next(sample.value for sample in source.samples() if sample.stream == "camera_wrist")
    with av.open(str(entry.clips["observation.images.wrist"].file)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == entry.first_frame:
                expected = frame.to_ndarray(format="bgr24")
                break
    imported = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(imported.astype(int) - expected.astype(int)).mean() < 2.0
