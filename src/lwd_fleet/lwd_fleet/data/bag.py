# SPDX-License-Identifier: Apache-2.0
"""What makes an MCAP file a rosbag2 bag: quality-of-service text and `metadata.yaml` version 9."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

METADATA_FILE = "metadata.yaml"
_VERSION = 9
_INFINITE = {"sec": 9223372036, "nsec": 854775807}


@dataclass(frozen=True)
class OfferedQos:
    """Quality of service of a recorded topic, as far as it differs between ours. Depth in messages."""

    reliable: bool = True
    latched: bool = False
    depth: int = 10

    def as_list(self) -> list[dict[str, Any]]:
        """The value of `offered_qos_profiles` in metadata version 9."""
        return [
            {
                "history": "keep_last",
                "depth": self.depth,
                "reliability": "reliable" if self.reliable else "best_effort",
                "durability": "transient_local" if self.latched else "volatile",
                "deadline": dict(_INFINITE),
                "lifespan": dict(_INFINITE),
                "liveliness": "automatic",
                "liveliness_lease_duration": dict(_INFINITE),
                "avoid_ros_namespace_conventions": False,
            }
        ]

    def as_text(self) -> str:
        """The same as YAML text, for the channel's metadata. Some readers yield no message at all, and no
        error, where this text and `metadata.yaml` differ: both must come from the same object."""
        return dump(self.as_list()).strip()


@dataclass(frozen=True)
class TopicInfo:
    """A topic of a bag: full name, type, RIHS01 hash, offered QoS (None where unknown) and message count."""

    name: str
    type: str
    type_hash: str
    qos: list[dict[str, Any]]
    messages: int


def bag_information(
    file_name: str, topics: Sequence[TopicInfo], start_ns: int, end_ns: int
) -> dict[str, Any]:
    """The content of `metadata.yaml` below its top-level key, for a bag of one MCAP file."""
    messages = sum(topic.messages for topic in topics)
    duration = {"nanoseconds": max(0, end_ns - start_ns)}
    start = {"nanoseconds_since_epoch": start_ns}
    return {
        "version": _VERSION,
        "storage_identifier": "mcap",
        "duration": duration,
        "starting_time": start,
        "message_count": messages,
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": topic.name,
                    "type": topic.type,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": topic.qos,
                    "type_description_hash": topic.type_hash,
                },
                "message_count": topic.messages,
            }
            for topic in topics
        ],
        "compression_format": "",
        "compression_mode": "",
        "relative_file_paths": [file_name],
        "files": [
            {
                "path": file_name,
                "starting_time": dict(start),
                "duration": dict(duration),
                "message_count": messages,
            }
        ],
        "custom_data": None,
        "ros_distro": os.environ.get("ROS_DISTRO", "jazzy"),
    }


def metadata_yaml(information: dict[str, Any]) -> str:
    """Text of `metadata.yaml`."""
    return dump({"rosbag2_bagfile_information": information})


def dump(value: Any) -> str:
    """YAML in the order given."""
    return str(yaml.safe_dump(value, sort_keys=False))
