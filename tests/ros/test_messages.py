# SPDX-License-Identifier: Apache-2.0
"""Every interface of lwd_msgs means the same to ROS 2 and to processes that read and write bags without it."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from lwd_fleet.data.messages import deserialise, serialise, type_hash

pytest.importorskip("rclpy")

from ament_index_python import get_package_share_directory
from rclpy.serialization import deserialize_message, serialize_message
from rosbags.typesys import get_types_from_msg
from rosidl_parser.definition import (
    AbstractNestedType,
    AbstractString,
    Array,
    BasicType,
    NamespacedType,
)

INTERFACES = Path(__file__).parents[2] / "src" / "lwd_msgs"
MESSAGES = sorted(file.stem for file in INTERFACES.glob("msg/*.msg"))
SERVICES = sorted(file.stem for file in INTERFACES.glob("srv/*.srv"))
ACTIONS = sorted(file.stem for file in INTERFACES.glob("action/*.action"))


def load(name: str) -> Any:
    """Python class of `lwd_msgs/<kind>/<name>`."""
    package, kind, short = name.split("/")
    return getattr(importlib.import_module(f"{package}.{kind}"), short)


def example(kind: Any, number: int = 1) -> Any:
    """A value of a field's type in which nothing is zero or empty, different for each `number`."""
    if isinstance(kind, BasicType):
        if kind.typename == "boolean":
            return True
        return number + 0.5 if kind.typename in ("float", "double") else number % 100 + 1
    if isinstance(kind, AbstractString):
        return f"text {number} ä"
    if isinstance(kind, NamespacedType):
        return filled(load("/".join([kind.namespaces[0], kind.namespaces[1], kind.name])), number)
    if isinstance(kind, AbstractNestedType):
        length = kind.size if isinstance(kind, Array) else 3
        return [example(kind.value_type, number + i) for i in range(length)]
    raise AssertionError(f"no example of {kind}")


def filled(message_type: Any, number: int = 1) -> Any:
    message = message_type()
    fields = message.get_fields_and_field_types()
    for i, (name, kind) in enumerate(zip(fields, message_type.SLOT_TYPES, strict=True)):
        setattr(message, name, example(kind, number + i))
    return message


def installed_hash(kind: str, name: str, suffix: str = "") -> str:
    """Hash that ROS 2 announces for a type: from the description installed beside it."""
    share = Path(get_package_share_directory("lwd_msgs"))
    description = json.loads((share / kind / f"{name}.json").read_text())
    hashes = {entry["type_name"]: entry["hash_string"] for entry in description["type_hashes"]}
    return str(hashes[f"lwd_msgs/{kind}/{name}{suffix}"])


def assert_survives_ros(message: Any) -> bytes:
    cdr = serialize_message(message)
    assert deserialize_message(cdr, type(message)) == message
    return cdr


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_survives_ros_and_bags(name: str) -> None:
    full_name = f"lwd_msgs/msg/{name}"
    message = filled(load(full_name))
    cdr = assert_survives_ros(message)
    rewritten = serialise(
        deserialise(cdr, full_name)
    )  # not the same bytes: ROS leaves padding as it finds it
    assert deserialize_message(rewritten, type(message)) == message


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_the_same_type_hash_with_and_without_ros(name: str) -> None:
    assert type_hash(f"lwd_msgs/msg/{name}") == installed_hash("msg", name)


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name in SERVICES for part in ("Request", "Response")]
)
def test_both_parts_of_a_service_survive_ros(name: str, part: str) -> None:
    assert_survives_ros(filled(getattr(load(f"lwd_msgs/srv/{name}"), part)))
    assert installed_hash("srv", name, f"_{part}").startswith("RIHS01_")


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name in ACTIONS for part in ("Goal", "Result", "Feedback")]
)
def test_all_parts_of_an_action_survive_ros(name: str, part: str) -> None:
    assert_survives_ros(filled(getattr(load(f"lwd_msgs/action/{name}"), part)))


def test_the_installed_definitions_are_those_of_this_tree() -> None:
    share = Path(get_package_share_directory("lwd_msgs"))
    for name in MESSAGES:
        ours, installed = (
            get_types_from_msg((folder / "msg" / f"{name}.msg").read_text(), f"lwd_msgs/msg/{name}")
            for folder in (INTERFACES, share)
        )
        assert ours == installed
