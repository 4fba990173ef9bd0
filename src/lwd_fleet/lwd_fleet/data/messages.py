# SPDX-License-Identifier: Apache-2.0
"""ROS messages without ROS: definitions, CDR and type hashes, from the installed `.msg` files.

Bags are written and read by processes that never start a node (the learner, headless robots, tests). They
find the definition of a type where a node would: in `share/<package>/msg` below `AMENT_PREFIX_PATH`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from lwd_fleet.share import share_directory

OWN_PACKAGE = "lwd_msgs"
SCHEMA_ENCODING = "ros2msg"
NANOSECONDS = 1_000_000_000

_DTYPES: dict[str, Any] = {"bool": np.bool_, "octet": np.uint8, "byte": np.uint8, "char": np.uint8}
_ZERO = {"bool": False, "string": "", "float32": 0.0, "float64": 0.0}


class InterfacesMissing(Exception):
    """The definition of a message type is not installed; the text says how to get it."""


def serialise(message: Any) -> bytes:
    """CDR bytes (little endian, 4-byte header) of a message made by `create` or `deserialise`."""
    return bytes(typestore().serialize_cdr(message, message.__msgtype__, little_endian=True))


def deserialise(cdr: bytes, type_name: str) -> Any:
    """The message in `cdr`. Fields are named as in the `.msg` file; numeric arrays are numpy arrays."""
    _require(type_name)
    return typestore().deserialize_cdr(cdr, type_name)


def create(type_name: str, **fields: Any) -> Any:
    """A message of `type_name` with the given fields and everything else zero or empty, as ROS makes it.

    Raises `TypeError` for a field the type does not have.
    """
    _require(type_name)
    descriptions = dict(typestore().fielddefs[type_name][1])
    unknown = fields.keys() - descriptions.keys()
    if unknown:
        raise TypeError(
            f"{type_name} has no field {', '.join(sorted(unknown))}; it has {', '.join(descriptions)}"
        )
    values = {
        name: _field(description, fields[name]) if name in fields else _zero(description)
        for name, description in descriptions.items()
    }
    return typestore().types[type_name](**values)


def schema_text(type_name: str) -> str:
    """Definition of the type and of all it contains, concatenated (`ros2msg` schema encoding)."""
    _require(type_name)
    return typestore().generate_msgdef(type_name, ros_version=2)[0]


def type_hash(type_name: str) -> str:
    """RIHS01 hash of the type, the one ROS 2 nodes announce: it changes whenever the wire format does."""
    _require(type_name)
    return typestore().hash_rihs01(type_name)


def stamp_ns(stamp: Any) -> int:
    """Nanoseconds of a `builtin_interfaces/Time`, of rclpy or of this module."""
    return int(stamp.sec) * NANOSECONDS + int(stamp.nanosec)


def to_stamp(time_ns: int) -> Any:
    """`builtin_interfaces/Time` of an integer time in nanoseconds."""
    return create("builtin_interfaces/msg/Time", sec=time_ns // NANOSECONDS, nanosec=time_ns % NANOSECONDS)


@cache
def typestore() -> Typestore:
    """The standard types of ROS 2 Jazzy and everything in `lwd_msgs`."""
    store = get_typestore(Stores.ROS2_JAZZY)
    folder = _message_folder(OWN_PACKAGE)
    if folder is None:
        raise InterfacesMissing(
            f"{OWN_PACKAGE} is not installed: no share/{OWN_PACKAGE}/msg below AMENT_PREFIX_PATH "
            f"({os.environ.get('AMENT_PREFIX_PATH') or 'not set'}). Build the workspace (`make build`) and "
            "start with scripts/run, or source install/setup.bash"
        )
    types: dict[str, Any] = {}
    for path in sorted(folder.glob("*.msg")):
        types |= get_types_from_msg(path.read_text(encoding="utf-8"), f"{OWN_PACKAGE}/msg/{path.stem}")
    store.register(types)
    return store


def _require(type_name: str) -> None:
    """Make sure the store knows the type: a type of a third package is read from its installed definition."""
    store = typestore()
    missing = [type_name]
    types: dict[str, Any] = {}
    while missing:
        name = missing.pop()
        if name in store.fielddefs or name in types:
            continue
        package, _, short = name.partition("/msg/")
        folder = _message_folder(package)
        if folder is None or not (folder / f"{short}.msg").is_file():
            raise InterfacesMissing(f"no definition of {name} below AMENT_PREFIX_PATH; install its package")
        types |= get_types_from_msg((folder / f"{short}.msg").read_text(encoding="utf-8"), name)
        missing += [child for _, description in types[name][1] for child in _names(description)]
    if types:
        store.register(types)


def _message_folder(package: str) -> Path | None:
    share = share_directory(package)
    return None if share is None or not (share / "msg").is_dir() else share / "msg"


def _names(description: Any) -> Iterator[str]:
    kind, detail = description
    if kind == Nodetype.NAME:
        yield detail
    elif kind in (Nodetype.ARRAY, Nodetype.SEQUENCE):
        yield from _names(detail[0])


def _zero(description: Any) -> Any:
    kind, detail = description
    if kind == Nodetype.BASE:
        return _ZERO.get(detail[0], 0)
    if kind == Nodetype.NAME:
        return create(detail)
    element, length = detail
    count = length if kind == Nodetype.ARRAY else 0
    if element[0] == Nodetype.BASE and element[1][0] != "string":
        return np.zeros(count, dtype=_DTYPES.get(element[1][0], element[1][0]))
    return [_zero(element) for _ in range(count)]


def _field(description: Any, value: Any) -> Any:
    """`value`, with lists of numbers made the numpy array that serialisation expects."""
    kind, detail = description
    if kind in (Nodetype.ARRAY, Nodetype.SEQUENCE) and detail[0][0] == Nodetype.BASE:
        base = detail[0][1][0]
        if base != "string":
            return np.asarray(value, dtype=_DTYPES.get(base, base))
    return value
