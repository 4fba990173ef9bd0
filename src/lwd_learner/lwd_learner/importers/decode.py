# SPDX-License-Identifier: Apache-2.0
"""Foreign ROS messages to the values of lwd streams. One function per (kind of stream, message type)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.typesys import Stores, TypesysError, get_types_from_msg, get_typestore

from lwd_learner.importers.source import ImportRefused, Reason

JPEG_QUALITY = 90

Decoder = Callable[[Any, Sequence[str]], Any]
Deserialiser = Callable[[bytes], Any]


def deserialiser(type_name: str, definition: str) -> Deserialiser:
    """CDR to message. The definition in the file wins over ours: an older distribution's type may differ.

    Raises ImportRefused (unknown_type) where neither the file nor ROS 2 Jazzy defines the type.
    """
    store = get_typestore(Stores.EMPTY if definition else Stores.ROS2_JAZZY)
    if definition:
        try:
            store.register(get_types_from_msg(definition, type_name))
        except TypesysError as error:
            raise ImportRefused(
                Reason.UNKNOWN_TYPE, f"the file's definition of {type_name}: {error}"
            ) from error
    elif type_name not in store.fielddefs:
        raise ImportRefused(
            Reason.UNKNOWN_TYPE, f"{type_name} is no standard type and the file does not define it"
        )
    return lambda cdr: store.deserialize_cdr(cdr, type_name)


def decoder(kind: str, type_name: str) -> Decoder:
    """Raises ImportRefused (wrong_type) where a stream of that kind cannot be made from the type."""
    try:
        return _DECODERS[kind, type_name]
    except KeyError:
        usable = sorted(known for of_kind, known in _DECODERS if of_kind == kind)
        raise ImportRefused(
            Reason.WRONG_TYPE, f"{type_name} cannot be a stream of kind {kind}; usable: {', '.join(usable)}"
        ) from None


def header_stamp_ns(message: Any) -> int | None:
    """Stamp of the header; None for a type without one."""
    header = getattr(message, "header", None)
    return None if header is None else int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def encode_jpeg(bgr: NDArray[np.uint8]) -> bytes:
    """[H, W, 3] BGR or [H, W] grey to JPEG, quality 90: 43 dB on camera frames at a twentieth of the size."""
    good, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not good:
        raise ImportRefused(Reason.CORRUPT, f"an image of shape {bgr.shape} cannot be encoded as JPEG")
    return data.tobytes()


def finite(values: NDArray[np.float64], names: Sequence[str], what: str) -> NDArray[np.float64]:
    """The values, all finite. Raises ImportRefused naming the joint that is not."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ImportRefused(Reason.NOT_FINITE, f"{what}: {names[bad[0]]} is {values[bad[0]]}")
    return values


def _by_name(names: Sequence[str], values: Any, wanted: Sequence[str], what: str) -> NDArray[np.float64]:
    column = {name: index for index, name in enumerate(names)}
    absent = [name for name in wanted if name not in column]
    if absent or len(values) != len(names):
        raise ImportRefused(
            Reason.BAD_JOINTS,
            f"{what} has {len(values)} positions for {', '.join(names) or 'no joints'}; "
            f"missing: {', '.join(absent)}",
        )
    return finite(np.asarray(values, np.float64)[[column[name] for name in wanted]], wanted, what)


def _joint_state(message: Any, names: Sequence[str]) -> NDArray[np.float64]:
    return _by_name(message.name, message.position, names, "JointState")


def _trajectory(message: Any, names: Sequence[str]) -> NDArray[np.float64]:
    if len(message.points) != 1:
        # A plan says nothing about which of its points was in force at a given time.
        raise ImportRefused(
            Reason.UNSUPPORTED,
            f"JointTrajectory with {len(message.points)} points is a plan, not a command; "
            "use `action: {source: next_joint_state}`",
        )
    return _by_name(message.joint_names, message.points[0].positions, names, "JointTrajectory")


def _float_array(message: Any, names: Sequence[str]) -> NDArray[np.float64]:
    values = np.asarray(message.data, np.float64)
    if len(values) != len(names):
        raise ImportRefused(Reason.BAD_JOINTS, f"an array of {len(values)} numbers for {len(names)} joints")
    return finite(values, names, "the command array")


def _vector(message: Any, names: Sequence[str]) -> NDArray[np.float64]:
    values = np.asarray(message.data, np.float64)
    return finite(values, [f"element {index}" for index in range(len(values))], "the vector")


def _compressed_image(message: Any, names: Sequence[str]) -> bytes:
    data = bytes(message.data)
    if not data.startswith((b"\xff\xd8", b"\x89PNG")):
        raise ImportRefused(
            Reason.UNSUPPORTED, f"CompressedImage of format {message.format!r} is neither JPEG nor PNG"
        )
    return data


_TO_BGR = {
    "rgb8": (3, cv2.COLOR_RGB2BGR),
    "bgr8": (3, None),
    "rgba8": (4, cv2.COLOR_RGBA2BGR),
    "bgra8": (4, cv2.COLOR_BGRA2BGR),
    "mono8": (1, None),
}


def _raw_image(message: Any, names: Sequence[str]) -> bytes:
    if message.encoding not in _TO_BGR:
        raise ImportRefused(
            Reason.UNSUPPORTED, f"Image encoding {message.encoding!r}; usable: {', '.join(_TO_BGR)}"
        )
    channels, conversion = _TO_BGR[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.asarray(message.data, np.uint8)
    if data.size != height * step or step < width * channels or not data.size:
        raise ImportRefused(Reason.CORRUPT, f"Image {width}x{height}, step {step}, holds {data.size} bytes")
    pixels = data.reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    return encode_jpeg(
        np.ascontiguousarray(pixels if conversion is None else cv2.cvtColor(pixels, conversion))
    )


def _pose_array(message: Any, names: Sequence[str]) -> NDArray[np.float32]:
    points = np.array(
        [[p.position.x, p.position.y, p.position.z] for p in message.poses], np.float32
    ).reshape(-1, 3)
    if not np.isfinite(points).all():
        raise ImportRefused(Reason.NOT_FINITE, "PoseArray with a position that is not finite")
    return points


def _text(message: Any, names: Sequence[str]) -> str:
    return str(message.data)


_DECODERS: dict[tuple[str, str], Decoder] = {
    ("joints", "sensor_msgs/msg/JointState"): _joint_state,
    ("command", "sensor_msgs/msg/JointState"): _joint_state,
    ("command", "trajectory_msgs/msg/JointTrajectory"): _trajectory,
    ("command", "std_msgs/msg/Float64MultiArray"): _float_array,
    ("command", "std_msgs/msg/Float32MultiArray"): _float_array,
    ("image", "sensor_msgs/msg/CompressedImage"): _compressed_image,
    ("image", "sensor_msgs/msg/Image"): _raw_image,
    ("points", "geometry_msgs/msg/PoseArray"): _pose_array,
    ("vector", "std_msgs/msg/Float64MultiArray"): _vector,
    ("vector", "std_msgs/msg/Float32MultiArray"): _vector,
    ("text", "std_msgs/msg/String"): _text,
}
