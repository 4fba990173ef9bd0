# SPDX-License-Identifier: Apache-2.0
"""Images in the replay: encoded as recorded, seen with the contexts they belong to, decoded when drawn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import lwd_learner.replay
from lwd_fleet.data.episode import bag_messages
from lwd_fleet.robot.arbiter import ArbiterTiming
from lwd_fleet.sim import robot
from lwd_fleet.sim.headless import EpisodeRequest, HeadlessSetup, run_expert
from lwd_fleet.sim.presets import observation_spec, trunk_config
from lwd_learner.replay import Replay, ReplayReader
from lwd_learner.replay_episode import TRANSITION, Camera, ReplayEpisode, ReplayLayout, pack_images
from lwd_learner.transitions import episode_rows, read_trace
from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import ObservationError, decode_image
from lwd_policy.trunk import build_trunk

SIZE = 8
LAYOUT = ReplayLayout(
    feature_dim=1,
    horizon=1,
    action_dim=1,
    history=2,
    cameras=(Camera("left", SIZE, SIZE), Camera("right", SIZE, SIZE)),
    segment_bytes=300,  # two or three images: an episode needs several
)


def picture(brightness: int) -> bytes:
    """PNG, so that what comes back can be compared to the last bit; the replay asks no codec's name."""
    rgb = np.full((SIZE, SIZE, 3), brightness, np.uint8)
    rgb[0, :, 0] = 255  # a red line on top: neither channels nor rows may be exchanged
    return cv2.imencode(".png", rgb[:, :, ::-1])[1].tobytes()


def episode(name: str, start: int, points: int = 6) -> ReplayEpisode:
    """Left shows start + k at point k; right the same as at the point before where k is odd (a slower camera)."""
    table = np.zeros(points, TRANSITION)
    table["point"] = np.arange(points)
    table["next_point"] = np.arange(1, points + 1)
    table["next_point"][-1], table["done"][-1] = -1, True
    table["executed"] = table["planned"] = 1
    images = [[picture(start + k), picture(100 + start + k - k % 2)] for k in range(points)]
    return ReplayEpisode(
        name,
        "t",
        "offline",
        1,
        np.arange(start, start + points, dtype=np.float32)[:, None],
        np.maximum(np.arange(points) - 1, 0),
        np.zeros((points, 1, 1), np.float32),
        table,
        *pack_images(images),
    )


def brightness(images: torch.Tensor) -> list[list[list[int]]]:
    assert (images[..., 0, 0, :] == 255).all()
    assert (images[..., 1:, :] == images[..., :1, -1:, -1:]).all()
    return images[..., 2, -1, -1].tolist()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Replay]:
    def make(*episodes: ReplayEpisode) -> Replay:
        replay = Replay(tmp_path / "replay", LAYOUT)
        assert replay.extend(episodes) == len(episodes)
        return replay

    return make


def test_images_are_those_of_the_context_oldest_first(opened: Callable[..., Replay]) -> None:
    replay = opened(episode("a", 10), episode("b", 50))
    batch = replay.batch(np.array([0, 3, 8]), 0.9, images=True)
    assert batch.images is not None and batch.next_images is not None
    assert batch.images.shape == (3, 2, 2, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert brightness(batch.images) == [
        [[10, 110], [10, 110]],
        [[12, 112], [13, 112]],
        [[51, 150], [52, 152]],
    ]
    assert brightness(batch.next_images)[1] == [[13, 112], [14, 114]]
    features = batch.context.view(3, 2).tolist()
    assert features == [[left for left, _ in history] for history in brightness(batch.images)]
    windows = replay.batch(np.array([0, 3, 8]), 0.9, n_step=3, images=True)
    assert windows.next_images is not None
    assert brightness(windows.next_images)[0] == [[12, 112], [13, 112]]


def test_without_being_asked_for_nothing_is_decoded(
    opened: Callable[..., Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = opened(episode("a", 10))
    decode, decoded = lwd_learner.replay.decode_image, []

    def spy(stream: object, encoded: bytes) -> NDArray[np.uint8]:
        decoded.append(encoded)
        return decode(stream, encoded)  # type: ignore[arg-type]

    monkeypatch.setattr(lwd_learner.replay, "decode_image", spy)
    batch = replay.batch(np.arange(6), 0.9, n_step=3)
    assert batch.images is None and batch.next_images is None and not decoded
    replay.sample(64, torch.Generator().manual_seed(0), 0.9, images=True)
    assert len(decoded) == len(set(decoded)) == 6 + 3, "each once, however often a batch has it"


def test_a_batch_with_images_is_cut_and_moved_as_others_are(opened: Callable[..., Replay]) -> None:
    batch = opened(episode("a", 10)).batch(np.arange(6), 0.9, images=True)
    first = batch.first(2).to("cpu")
    assert first.images is not None and batch.images is not None
    assert torch.equal(first.images, batch.images[:2]) and len(first) == 2
    assert replace(batch, images=None).first(2).images is None


def test_images_come_back_after_opening_and_an_episode_as_it_was_given(
    opened: Callable[..., Replay], tmp_path: Path
) -> None:
    given = episode("b", 50)
    opened(episode("a", 10), given).close()
    with ReplayReader(tmp_path / "replay") as reader:
        assert reader.layout == LAYOUT
        images = reader.batch(np.arange(12), 0.9, images=True).images
        assert images is not None
        assert [history[1][0] for history in brightness(images)] == [*range(10, 16), *range(50, 56)]
        assert reader.episode(1).digest() == given.digest()
    assert len(given.images) == sum(len(picture(50 + k)) for k in range(6)) + sum(
        len(picture(150 + k)) for k in (0, 2, 4)
    ), "what a slower camera showed twice is kept once"


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros(0, np.uint8)},
        {"image_places": np.zeros((6, 1, 2), np.int64)},
        {"image_places": np.full((6, 2, 2), 400)},
    ],
)
def test_images_that_do_not_fit_are_refused(
    opened: Callable[..., Replay], change: dict[str, NDArray[np.int64]]
) -> None:
    replay = opened()
    with pytest.raises(ValueError, match="b: .*images"):
        replay.append(replace(episode("b", 1), **change))  # type: ignore[arg-type]


def test_what_is_no_image_is_named_when_it_is_drawn(opened: Callable[..., Replay]) -> None:
    images, places = pack_images([[b"no image", picture(1)]] * 6)
    replay = opened(replace(episode("a", 1), images=images, image_places=places))
    with pytest.raises(ObservationError, match="left .*8 bytes that are no image"):
        replay.batch(np.arange(2), 0.9, images=True)


def test_a_replay_without_cameras_has_no_images_to_give(tmp_path: Path) -> None:
    with Replay(tmp_path, replace(LAYOUT, cameras=())) as replay:
        with pytest.raises(ValueError, match="images"):
            replay.append(episode("a", 1))
        images, places = pack_images([])
        replay.append(replace(episode("a", 1), images=images, image_places=places))
        with pytest.raises(ValueError, match="made without cameras"):
            replay.batch(np.arange(2), 0.9, images=True)
    assert not list(tmp_path.glob("image*"))
    with pytest.raises(ValueError, match="one size"):
        replace(LAYOUT, cameras=(Camera("left", 8, 8), Camera("right", 8, 9)))


def test_recorded_images_reach_the_batch_as_the_policy_saw_them(tmp_path: Path) -> None:
    """From a bag of the simulated robot; nothing is encoded anew on the way."""
    torch.set_num_threads(1)
    body, spec = robot.embodiment(), observation_spec("images")
    setup = HeadlessSetup(body, ArbiterTiming(), spec, spool=tmp_path / "spool")
    (result,) = run_expert(setup, [EpisodeRequest("place", 0)])
    assert result.path is not None
    (bag,) = result.path.glob("*.mcap")
    cameras = ("camera_top", "camera_wrist_left")
    messages = [(one.topic, one.log_time_ns, one.message) for one in bag_messages(bag)]
    trace = read_trace(result.episode_id, messages, spec, body.joint_names, 5, cameras)
    seen = {
        (camera, one.stamps[camera]): one.values[camera]
        for point in trace.points
        for one in point.context
        for camera in cameras
    }
    recorded = {bytes(message.data) for topic, _, message in messages if topic.startswith(cameras)}
    assert trace.images.keys() == seen.keys() and set(trace.images.values()) <= recorded
    for (camera, stamp), values in seen.items():
        assert np.array_equal(decode_image(spec.stream(camera), trace.images[camera, stamp]), values)
    torch.manual_seed(0)
    action = ActionSpec.unnormalised(body, "joint_relative", 10, 0.1, 5)
    policy = FlowPolicy(build_trunk(trunk_config("images"), body), spec, action)
    height, width, _ = spec.stream(cameras[0]).shape
    kept = tuple(Camera(camera, height, width) for camera in cameras)
    layout = ReplayLayout(policy.feature_dim, 10, action.dim, cameras=kept)
    with Replay(tmp_path / "replay", layout) as replay:
        assert replay.append(ReplayEpisode.from_rows(episode_rows(trace, policy), "offline"))
        batch = replay.batch(replay.rows(), 0.9, images=True)
    assert batch.images is not None
    for row, images in enumerate(batch.images.numpy()):
        shown = [[one.values[camera] for camera in cameras] for one in trace.points[row].context]
        assert np.array_equal(images.transpose(0, 1, 3, 4, 2), shown)
