# SPDX-License-Identifier: Apache-2.0
"""A mapping file says what it means, and every mistake in it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lwd_learner.importers.mapping import ActionSource, MappingError, load_mapping, parse_mapping

REPOSITORY = Path(__file__).resolve().parents[3]
GOOD = yaml.safe_load((REPOSITORY / "config" / "mappings" / "command_topic.yaml").read_text())


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "config" / "mappings").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_mapping_that_we_ship_can_be_read(path: Path) -> None:
    assert load_mapping(path).topics


def test_the_specification_has_the_mapped_streams_under_their_lwd_topics() -> None:
    mapping = parse_mapping(GOOD)
    topics = {stream.name: stream.topic for stream in mapping.observation_spec().streams}
    assert topics == {
        "joint_positions": "joint_states",
        "camera_top": "camera_top/image_raw/compressed",
        "keypoints": "keypoints",
        "command": "executed_action",
        "instruction": "task",
    }
    assert mapping.joint_names_in_bag == ("joint_1", "joint_2", "joint_3", "gripper")
    assert mapping.action_source is ActionSource.COMMAND_TOPIC
    assert mapping.step_ns == 100_000_000
    assert set(mapping.topics) >= {"/task", "/joint_states", "/arm_controller/joint_trajectory"}


def test_the_digest_follows_the_content() -> None:
    assert parse_mapping(GOOD).digest == parse_mapping(dict(reversed(GOOD.items()))).digest
    assert parse_mapping(GOOD).digest != parse_mapping(GOOD | {"step_hz": 20}).digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"robot": "my-robot"}, "robot"),
        ({"robot": "9th"}, "robot"),
        ({"joint_names": ["a", "a"]}, "joint_names"),
        ({"joint_names_in_bag": {"nobody": "j1"}}, "nobody"),
        ({"step_hz": 0}, "step_hz"),
        ({"stpes_hz": 10}, "stpes_hz"),
        ({"streams": {}}, "joint_positions"),
        (
            {"streams": GOOD["streams"] | {"command": {"topic": "/c", "kind": "joints", "max_age_s": 1}}},
            "action",
        ),
        ({"streams": GOOD["streams"] | {"cam": {"topic": "/c", "kind": "image", "max_age_s": 1}}}, "shape"),
        ({"streams": GOOD["streams"] | {"cam": {"topic": "/c", "kind": "joints", "max_age_s": 1}}}, "cam"),
        (
            {
                "streams": GOOD["streams"]
                | {"cam": {"topic": "/c", "kind": "image", "shape": [1], "max_age": 1}}
            },
            "max_age",
        ),
        ({"action": {"source": "command_topic"}}, "topic"),
        ({"action": {"source": "next_joint_state", "topic": "/a"}}, "topic"),
        ({"action": {"source": "guess"}}, "guess"),
        ({"outcome": "maybe"}, "MAYBE"),
        ({"stamps": "arrival"}, "arrival"),
    ],
)
def test_a_mistake_is_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    file = tmp_path / "mapping.yaml"
    file.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(MappingError, match=named):
        load_mapping(file)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "streams: 3"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mapping.yaml"
    file.write_text(text)
    with pytest.raises(MappingError, match=r"mapping\.yaml"):
        load_mapping(file)
