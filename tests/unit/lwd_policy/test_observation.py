# SPDX-License-Identifier: Apache-2.0
"""Observations: messages to values, the sample of each stream at a time, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwd_policy.observation import (
    COMMAND,
    JOINT_POSITIONS,
    Observation,
    ObservationBuffer,
    ObservationError,
    ObservationSpec,
    ObservationStale,
    Stream,
    decode_message,
    reference_position,
)

S = 1_000_000_000
NAMES = ("a", "b")
JOINTS = Stream(JOINT_POSITIONS, "joint_states", "joints", (2,), 0.2)
IMAGE = Stream("camera_top", "camera_top/image_raw/compressed", "image", (8, 12, 3), 0.3)
TEXT = Stream("instruction", "task", "text", (), 0.0)
OPTIONAL = Stream(COMMAND, "executed_action", "command", (2,), 0.0, required=False)
SPEC = ObservationSpec((JOINTS, IMAGE, TEXT, OPTIONAL))


def joint_state(names: Any = NAMES, positions: Any = (1.0, 2.0)) -> SimpleNamespace:
    return SimpleNamespace(name=list(names), position=list(positions))


def jpeg(value: int, size: tuple[int, int] = (8, 12)) -> bytes:
    """An image that is all red of this brightness."""
    image = np.zeros((*size, 3), np.uint8)
    image[..., 2] = value
    return cv2.imencode(".png", image)[1].tobytes()


def filled() -> ObservationBuffer:
    buffer = ObservationBuffer(SPEC)
    for i in range(5):
        buffer.add(JOINT_POSITIONS, i * S // 10, np.array([i, -i], float))
        buffer.add("camera_top", i * S // 10 + 1, jpeg(50 * i))
    buffer.add("instruction", 7, "go")
    return buffer


def test_a_spec_survives_json() -> None:
    assert ObservationSpec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"streams": [{}], "history": 2}', "nonsense", '{"streams": 3}']
)
def test_a_spec_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        ObservationSpec.from_json(text)


def test_a_stream_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="'sound' is none of image"):
        Stream("x", "x", "sound", (), 0.0)
    with pytest.raises(ValueError, match=r"\(height, width, 3\)"):
        Stream("x", "x", "image", (8, 8), 0.0)
    with pytest.raises(ValueError, match="unique"):
        ObservationSpec((JOINTS, JOINTS))
    with pytest.raises(KeyError, match="there are joint_positions, camera_top"):
        SPEC.stream("depth")


def test_joints_come_by_name_whatever_their_order() -> None:
    message = joint_state(("b", "other", "a"), (2.0, 9.0, 1.0))
    np.testing.assert_array_equal(decode_message(JOINTS, message, NAMES), [1.0, 2.0])
    executed = SimpleNamespace(joint_names=["b", "a"], positions=[2.0, 1.0])
    np.testing.assert_array_equal(decode_message(OPTIONAL, executed, NAMES), [1.0, 2.0])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (joint_state(("a",), (1.0,)), r"lacks \['b'\]"),
        (joint_state(NAMES, (1.0,)), "1 positions for 2 joints"),
        (joint_state(("a", "b", "b"), (1.0, 2.0, 3.0)), "3 positions for 2 joints"),
        (joint_state(NAMES, (1.0, float("nan"))), "not finite"),
        (joint_state(NAMES, (1.0, float("inf"))), "not finite"),
    ],
)
def test_joints_that_cannot_be_used_are_refused(message: Any, reason: str) -> None:
    with pytest.raises(ObservationError, match=f"joint_positions .joint_states.*{reason}"):
        decode_message(JOINTS, message, NAMES)


def test_points_are_counted() -> None:
    stream = Stream("keypoints", "keypoints", "points", (2, 3), 0.3)
    point = SimpleNamespace(position=SimpleNamespace(x=1.0, y=2.0, z=3.0))
    value = decode_message(stream, SimpleNamespace(poses=[point, point]), NAMES)
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, [[1, 2, 3], [1, 2, 3]])
    for poses in ([point], []):
        with pytest.raises(ObservationError, match=r"expected \(2, 3\)"):
            decode_message(stream, SimpleNamespace(poses=poses), NAMES)


def test_the_newest_sample_that_is_not_from_the_future_is_taken() -> None:
    observation = filled().at(3 * S // 10 + 5)
    assert observation.stamps == {
        JOINT_POSITIONS: 3 * S // 10,
        "camera_top": 3 * S // 10 + 1,
        "instruction": 7,
    }
    np.testing.assert_array_equal(observation.values[JOINT_POSITIONS], [3, -3])
    assert observation.values["camera_top"][0, 0].tolist() == [150, 0, 0], "RGB"
    assert observation.values["instruction"] == "go"
    assert COMMAND not in observation.values


def test_at_stamps_gives_exactly_these_samples_again() -> None:
    buffer = filled()
    seen = buffer.at(3 * S // 10 + 5)
    again = buffer.at_stamps(seen.time_ns, seen.stamps)
    assert again.stamps == seen.stamps
    for name, value in seen.values.items():
        np.testing.assert_array_equal(again.values[name], value)
    with pytest.raises(ObservationStale, match="joint_positions: the sample of 100000001 ns is not there"):
        buffer.at_stamps(S, {JOINT_POSITIONS: S // 10 + 1})


def test_text_of_a_recording_is_found_though_its_stamp_is_another() -> None:
    """Text has no stamp of its own: live it is the time of receipt, in a recording the time of writing."""
    assert filled().at_stamps(S, {"instruction": 123}).values["instruction"] == "go"


def test_a_stale_stream_is_named_with_its_age() -> None:
    buffer = filled()
    with pytest.raises(
        ObservationStale, match=r"joint_positions \(joint_states\) is 0.600 s old; at most 0.2 s"
    ):
        buffer.at(S)
    buffer.add(JOINT_POSITIONS, S, np.zeros(2))
    with pytest.raises(
        ObservationStale, match=r"camera_top \(camera_top/image_raw/compressed\) is 0.600 s old"
    ):
        buffer.at(S)
    with pytest.raises(ObservationStale, match="joint_positions .* has no sample"):
        ObservationBuffer(SPEC).at(S)


def test_an_optional_stream_is_left_out_when_it_is_missing_and_never_too_old_without_a_limit() -> None:
    buffer = filled()
    buffer.add(COMMAND, 1, np.ones(2))
    observation = buffer.at(4 * S // 10 + 1)
    np.testing.assert_array_equal(observation.values[COMMAND], [1, 1])


def test_actions_refer_to_the_last_command_and_before_the_first_to_the_measured_joints() -> None:
    measured, command = np.zeros(2), np.ones(2)
    assert reference_position(Observation(0, {JOINT_POSITIONS: measured}, {})) is measured
    assert reference_position(Observation(0, {JOINT_POSITIONS: measured, COMMAND: command}, {})) is command


def test_images_are_resized_to_the_streams_shape() -> None:
    buffer = filled()
    buffer.add("camera_top", 4 * S // 10 + 2, jpeg(200, (16, 24)))
    image = buffer.at(4 * S // 10 + 3).values["camera_top"]
    assert image.shape == (8, 12, 3) and image.dtype == np.uint8 and image[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("data", [b"", b"\xff\xd8 no image"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    buffer = filled()
    buffer.add("camera_top", 4 * S // 10 + 2, data)
    with pytest.raises(ObservationError, match=f"camera_top .*{len(data)} bytes that are no image"):
        buffer.at(4 * S // 10 + 3)


def test_forgetting_one_stream_leaves_the_others() -> None:
    buffer = filled()
    buffer.add(COMMAND, 1, np.ones(2))
    buffer.clear(COMMAND)
    observation = buffer.at(4 * S // 10 + 1)
    assert COMMAND not in observation.values and "instruction" in observation.values
    buffer.clear()
    with pytest.raises(ObservationStale):
        buffer.at(4 * S // 10 + 1)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(0, 120))
def test_the_order_of_arrival_does_not_matter(stamps: list[int], time: int) -> None:
    buffer = ObservationBuffer(ObservationSpec((Stream("x", "x", "vector", (1,), 0.0),)))
    for stamp in stamps:
        buffer.add("x", stamp, stamp)
    due = [stamp for stamp in stamps if stamp <= time]
    if due:
        assert buffer.at(time).values["x"] == max(due)
    else:
        with pytest.raises(ObservationStale):
            buffer.at(time)


def test_memory_is_bounded_and_the_newest_sample_is_never_forgotten() -> None:
    buffer = ObservationBuffer(ObservationSpec((Stream("x", "x", "vector", (1,), 0.0),)))
    for i in range(10_000):
        buffer.add("x", i * S // 100, i)
    assert len(buffer._values["x"]) <= 502
    buffer.add("x", 10_000 * S, "late")
    assert buffer.at(20_000 * S).values["x"] == "late" and len(buffer._values["x"]) == 1


def of_two_cameras() -> ObservationBuffer:
    cameras = [
        Stream(name, f"{name}/image_raw/compressed", "image", (2, 2, 3), 0.3) for name in ("top", "wrist")
    ]
    return ObservationBuffer(ObservationSpec((JOINTS, *cameras, OPTIONAL)))


def test_images_set_the_moment_that_is_observed() -> None:
    buffer = of_two_cameras()
    assert buffer.moment(1000) == 1000
    for name, stamp in (("top", 900), ("wrist", 880), ("top", 1100)):
        buffer.add(name, stamp, b"")
    assert buffer.moment(1000) == 880
    assert buffer.moment(890) == 880
    assert buffer.moment(800) == 800, "nothing was seen before"
    assert buffer.moment(895, latest_ns=1000) == 880, "looking back, the nearest: 900 and 880"


def test_what_was_commanded_bounds_the_moment() -> None:
    """Behind the newest command it is not known where the arm was sent to."""
    buffer = of_two_cameras()
    for stamp in (800, 900, 1000):
        buffer.add("top", stamp, b"")
        buffer.add("wrist", stamp, b"")
    buffer.add(COMMAND, 950, np.zeros(2))
    assert buffer.moment(1050) == 900


def test_looking_back_the_first_images_from_a_time_on_are_found() -> None:
    buffer = of_two_cameras()
    assert buffer.next_moment(50) == 50
    for name, stamp in (("top", 90), ("wrist", 70), ("wrist", 95), ("top", S)):
        buffer.add(name, stamp, b"")
    assert [buffer.next_moment(time) for time in (50, 70, 80, 90)] == [90, 90, 95, 95]
    assert buffer.next_moment(96) == 96, "too long after it to be what was seen then"


def test_a_command_is_where_the_arbiter_was_between_two_steps() -> None:
    buffer = ObservationBuffer(ObservationSpec((JOINTS, OPTIONAL)))
    buffer.add(JOINT_POSITIONS, 1000, np.zeros(2))
    for stamp, value in ((1000, 0.0), (1100, 1.0)):
        buffer.add(COMMAND, stamp, np.array([value, 2 * value]))
    observation = buffer.at(1025)
    np.testing.assert_allclose(observation.values[COMMAND], [0.25, 0.5])
    np.testing.assert_allclose(buffer.at_stamps(1025, observation.stamps).values[COMMAND], [0.25, 0.5])
    np.testing.assert_allclose(buffer.at(1200).values[COMMAND], [1.0, 2.0])
    buffer.clear(COMMAND)
    buffer.add(COMMAND, 1000, np.zeros(2))
    with pytest.raises(ObservationStale, match="after 1000 ns"):
        buffer.at_stamps(1025, observation.stamps)


def test_a_context_looks_back_by_time_and_never_beyond_the_first_observation() -> None:
    spec = ObservationSpec((JOINTS,), history=3, spacing_s=0.4)
    buffer = ObservationBuffer(spec)
    for tenth in range(20):
        buffer.add(JOINT_POSITIONS, tenth * S // 10, np.array([tenth, 0.0]))

    def seen(time: int, since: int) -> list[float]:
        return [o.values[JOINT_POSITIONS][0] for o in buffer.context(time * S // 10, since * S // 10)]

    assert seen(15, 0) == [7, 11, 15]
    assert seen(15, 9) == [9, 11, 15]
    assert seen(15, 15) == [15, 15, 15]


def test_the_past_is_seen_where_images_are_and_not_between_them() -> None:
    buffer = of_two_cameras()
    for time in range(0, 1000, 20):
        buffer.add(JOINT_POSITIONS, time * S // 1000, np.array([time, 0.0]))
    for time in range(7, 1000, 100):  # free-running cameras, one with jitter
        buffer.add("top", time * S // 1000, jpeg(time % 200, (2, 2)))
        buffer.add("wrist", (time + 3) * S // 1000, jpeg(time % 200, (2, 2)))
    past, now = buffer.context(buffer.moment(990 * S // 1000), 0)
    assert (now.time_ns, past.time_ns) == (907 * S // 1000, 407 * S // 1000)
    assert past.values[JOINT_POSITIONS][0] == 400


def test_a_spacing_that_cannot_be_remembered_is_refused() -> None:
    with pytest.raises(ValueError, match="lie within 5 s"):
        ObservationSpec((JOINTS,), history=4, spacing_s=2.0)


def test_what_froze_is_stale_though_all_froze_together() -> None:
    buffer = filled()
    with pytest.raises(ObservationStale, match="is 4.600 s old"):
        buffer.require_fresh(5 * S)
    buffer.require_fresh(S // 2)
