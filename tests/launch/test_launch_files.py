# SPDX-License-Identifier: Apache-2.0
"""One description, two starters: both must start the same nodes with the same parameters.

The tests that need ROS `launch` run where it is installed; the others everywhere.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from lwd_fleet.deployment import NodeSpec, load_deployment, node_specs
from lwd_fleet.supervisor import Supervisor

ROOT = Path(__file__).parents[2]
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))
DEPLOYMENTS = sorted((ROOT / "config" / "deployments").glob("*.yaml"))
ARGUMENTS = {
    "robot": {
        "deployment",
        "run_dir",
        "domain_id",
        "use_respawn",
        "log_level",
        "robot",
        "hardware",
        "dry_run",
    },
    "sim": {"deployment", "run_dir", "domain_id", "use_respawn", "log_level", "robot", "hardware", "dry_run"},
    "fleet": {"deployment", "run_dir", "domain_id", "use_respawn", "log_level"},
    "learner": {"deployment", "run_dir", "domain_id", "use_respawn", "log_level"},
    "rviz": {"robot", "rviz_config", "domain_id"},
}


def specs_of(deployment: Path, run_dir: Path) -> list[NodeSpec]:
    return node_specs(load_deployment(deployment, run_dir=run_dir), hardware=True)


def all_specs(tmp: Path) -> list[NodeSpec]:
    return [spec for deployment in DEPLOYMENTS for spec in specs_of(deployment, tmp)]


# Without `launch` ------------------------------------------------------------------------------------


def test_every_launch_file_is_known_here():
    assert {file.name.removesuffix(".launch.py") for file in LAUNCH_FILES} == set(ARGUMENTS)


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.name)
def test_a_launch_file_names_no_node_of_ours_itself(file):
    """A second list of nodes would drift from the first; only RViz is not part of a deployment."""
    tree = ast.parse(file.read_text())
    packages = [
        keyword.value.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "package"
    ]
    assert packages == (["rviz2"] if file.name == "rviz.launch.py" else [])


def test_every_node_is_an_executable_of_its_package(tmp_path):
    for spec in all_specs(tmp_path):
        setup = (ROOT / "src" / spec.package / "setup.py").read_text()
        assert re.search(rf"{spec.executable} = {re.escape(spec.module)}:main", setup), spec


def test_every_parameter_is_declared_by_its_node_with_this_type(tmp_path):
    """ROS ignores a parameter that a node does not declare, without a word."""
    pytest.importorskip("rclpy")
    pytest.importorskip("lwd_msgs")
    from lwd_policy.managed_node import ManagedNode

    for spec in {(spec.package, spec.executable): spec for spec in all_specs(tmp_path)}.values():
        module = importlib.import_module(spec.module)
        (node,) = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, ManagedNode)
            and value.__module__ == module.__name__
        ]
        types = get_type_hints(node.parameters_type)
        declared = {
            field.metadata["name"] or field.name: types[field.name]
            for field in dataclasses.fields(node.parameters_type)
        }
        for name, value in spec.parameters.items():
            if spec.executable == "coordinator_node" and name.startswith("tasks."):
                continue  # one per robot, declared when the robots are known
            assert name in declared, f"{spec.full_name} does not declare {name}"
            kind = tuple[str, ...] if isinstance(value, list) else type(value)
            assert declared[name] == kind, f"{spec.full_name}: {name} is {declared[name]}, given {value!r}"


def test_rviz_shows_topics_that_robots_publish():
    shown = ["Axes", "Grid", "Image", "PoseArray", "Orbit", "TF"]
    tools = ["FocusCamera", "Measure", "MoveCamera", "Select"]
    known = {f"rviz_default_plugins/{name}" for name in [*shown, *tools]}
    config = yaml.safe_load((ROOT / "config" / "rviz" / "robot.rviz").read_text())["Visualization Manager"]
    displays = config["Displays"]
    views = [config["Views"]["Current"], config["Transformation"]["Current"]]
    assert {one["Class"] for one in [*displays, *config["Tools"], *views]} <= known
    topics = {one["Topic"]["Value"]: one["Class"] for one in displays if "Topic" in one}
    images = {f"camera_{name}/image_raw/compressed" for name in ("top", "wrist_left", "wrist_right")}
    assert set(topics) == {*images, "keypoints"}
    assert config["Global Options"]["Fixed Frame"] == "base_link"


# With `launch` ---------------------------------------------------------------------------------------


@pytest.fixture
def launch_ros():
    return pytest.importorskip("launch_ros.actions", reason="ROS launch is not installed")


def described(file: Path):
    """The launch description of a file, as `ros2 launch` would load it."""
    from launch import LaunchContext
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    return PythonLaunchDescriptionSource(str(file)).get_launch_description(LaunchContext())


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.name)
def test_every_argument_has_a_description_and_a_default(launch_ros, file):
    arguments = described(file).get_launch_arguments()
    assert {one.name for one in arguments} == ARGUMENTS[file.name.removesuffix(".launch.py")]
    assert all(one.description and one.default_value is not None for one in arguments)


RECORD = """#!{python} -S
import json, os, sys
text = {{path: open(path).read() for path, flag in zip(sys.argv[1:], sys.argv) if flag == "--params-file"}}
names = ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE", "RCUTILS_LOGGING_BUFFERED_STREAM")
record = {{"argv": sys.argv, "files": text, "environment": {{name: os.environ.get(name) for name in names}}}}
names = [word.split(":=")[1] for word in sys.argv if word.startswith(("__node", "__ns"))]
name = "-".join(names).replace("/", ".")
with open(os.path.join({directory!r}, name + ".tmp"), "w") as file:
    json.dump(record, file)
os.rename(file.name, file.name[:-4] + ".json")
"""


@pytest.fixture
def recording_prefix(tmp_path, monkeypatch):
    """Packages whose executables only note how they were started. Gives the directory of the notes."""
    prefix, records = tmp_path / "prefix", tmp_path / "records"
    records.mkdir()
    for spec in all_specs(tmp_path):
        program = prefix / "lib" / spec.package / spec.executable
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RECORD.format(python=sys.executable, directory=str(records)))
        program.chmod(0o755)
        index = prefix / "share/ament_index/resource_index/packages"
        index.mkdir(parents=True, exist_ok=True)
        (index / spec.package).touch()
        (prefix / "share" / spec.package).mkdir(exist_ok=True)
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{prefix}{os.pathsep}{os.environ['AMENT_PREFIX_PATH']}")
    return records


def starts(records: Path, count: int) -> dict[str, tuple]:
    """How each node was started, once `count` have been: executable, remappings, parameters, environment."""
    end = time.monotonic() + 60.0
    while len(files := sorted(records.glob("*.json"))) < count:
        assert time.monotonic() < end, f"{len(files)} of {count} nodes were started"
        time.sleep(0.05)
    result = {}
    for file in files:
        record = json.loads(file.read_text())
        file.unlink()
        program, *words = record["argv"]
        parameters = {}
        for text in record["files"].values():
            (content,) = yaml.safe_load(text).values()
            parameters.update(content["ros__parameters"])
        remappings = sorted(word for word in words if ":=" in word)
        kind = "/".join(Path(program).parts[-2:])
        result[file.stem] = (kind, remappings, parameters, record["environment"])
    return result


LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
arguments = [word.split(":=") for word in sys.argv[2:]]
service = LaunchService()
service.include_launch_description(
    LaunchDescription([
        IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments=arguments)
    ])
)
sys.exit(service.run())
"""


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda file: file.stem)
def test_launch_starts_what_the_supervisor_starts(launch_ros, recording_prefix, deployment, tmp_path):
    specs = specs_of(deployment, tmp_path)
    arguments = [f"deployment:={deployment}", f"run_dir:={tmp_path}", "hardware:=true", "use_respawn:=false"]
    sim = str(ROOT / "launch" / "sim.launch.py")
    subprocess.run([sys.executable, "-c", LAUNCH, sim, *arguments, "domain_id:=17"], check=True, timeout=100)
    by_launch = starts(recording_prefix, len(specs))
    environment = {"ROS_DOMAIN_ID": "17", "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    with Supervisor(specs, tmp_path, environment, report=lambda line: None, back_off_s=(1e9,)):
        by_supervisor = starts(recording_prefix, len(specs))
    assert by_launch == by_supervisor


def test_each_simulation_gets_a_domain_of_its_own_and_hardware_needs_permission(
    launch_ros, recording_prefix, tmp_path
):
    sim = str(ROOT / "launch" / "sim.launch.py")
    run = [sys.executable, "-c", LAUNCH, sim, f"run_dir:={tmp_path}", "use_respawn:=false"]
    one = DEPLOYMENTS[0]
    subprocess.run([*run, f"deployment:={one}"], check=True, timeout=100)
    ((*_, environment), *_) = starts(recording_prefix, len(specs_of(one, tmp_path))).values()
    assert 1 <= int(environment["ROS_DOMAIN_ID"]) <= 101
    content = yaml.safe_load(one.read_text())
    content["robots"][0].update(
        name="r1", kind="hardware", robot_file=str(ROOT / "config/robots/sim_dual_arm.yaml")
    )
    hardware = tmp_path / "hardware.yaml"
    hardware.write_text(yaml.safe_dump(content))
    refused = subprocess.run(
        [*run, f"deployment:={hardware}"], check=False, timeout=100, capture_output=True, text=True
    )
    assert refused.returncode != 0 and "r1 would move for real" in refused.stdout + refused.stderr
    assert not list(recording_prefix.glob("*.json"))
