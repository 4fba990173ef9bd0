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
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from lwd_fleet.deployment import NodeSpec, load_deployment, node_specs
from lwd_fleet.robot.recorder import standard_topics
from lwd_fleet.sim.robot import BASE_LINK
from lwd_fleet.sim.scene import CAMERAS
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
    cameras = [f"camera_{name}" for name in CAMERAS]
    published = {topic.name: topic.type for topic in standard_topics(cameras, 10.0, 50.0, 10.0)}
    types = {"Image": "sensor_msgs/msg/CompressedImage", "PoseArray": "geometry_msgs/msg/PoseArray"}
    topics = {one["Topic"]["Value"]: one["Class"].split("/")[1] for one in displays if "Topic" in one}
    assert {name: types[kind] for name, kind in topics.items()}.items() <= published.items()
    assert topics.keys() == {"keypoints", *(f"{camera}/image_raw/compressed" for camera in cameras)}
    assert config["Global Options"]["Fixed Frame"] == BASE_LINK


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
names += ("FASTDDS_BUILTIN_TRANSPORTS",)
record = {{"argv": sys.argv, "files": text, "environment": {{name: os.environ.get(name) for name in names}}}}
names = [word.split(":=")[1] for word in sys.argv if word.startswith(("__node", "__ns"))]
name = "-".join(names).replace("/", ".")
with open(os.path.join({directory!r}, name + ".tmp"), "w") as file:
    json.dump(record, file)
os.rename(file.name, file.name[:-4] + ".json")
"""


def install_recorders(programs: set[tuple[str, str]], prefix: Path) -> Path:
    """Packages whose executables only note how they were started. Returns the directory of the notes."""
    records, index = prefix / "records", prefix / "share/ament_index/resource_index/packages"
    for folder in (records, index):
        folder.mkdir(parents=True)
    for package, executable in programs:
        program = prefix / "lib" / package / executable
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RECORD.format(python=sys.executable, directory=str(records)))
        program.chmod(0o755)
        (index / package).touch()
        (prefix / "share" / package).mkdir(exist_ok=True)
    return records


@pytest.fixture
def recording_prefix(tmp_path, monkeypatch):
    """All nodes of all deployments as recorders. Gives the directory of the notes."""
    prefix = tmp_path / "prefix"
    records = install_recorders({(spec.package, spec.executable) for spec in all_specs(tmp_path)}, prefix)
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
    assert environment["FASTDDS_BUILTIN_TRANSPORTS"] == "UDPv4"
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


def test_the_learner_alone_is_brought_up_by_launch_and_ends_with_it(launch_ros, tmp_path):
    """On a machine that trains: no robot, no policy yet."""
    pytest.importorskip("lwd_msgs")
    (learning,) = [file for file in DEPLOYMENTS if load_deployment(file, tmp_path).learner is not None]
    words = [str(ROOT / "launch" / "learner.launch.py"), f"deployment:={learning}", f"run_dir:={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if "all nodes are active" in line:
                break
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to launch and all it started
        rest, _ = process.communicate(timeout=60)
    assert any("/fleet/learner: active" in line for line in said), "".join(said)
    assert process.returncode == 0 and "escalating" not in rest, rest


def test_the_default_of_the_learner_has_a_learner(launch_ros):
    (default,) = [
        one.default_value[0].text
        for one in described(ROOT / "launch" / "learner.launch.py").get_launch_arguments()
        if one.name == "deployment"
    ]
    (learning,) = [file.name for file in DEPLOYMENTS if load_deployment(file).learner is not None]
    assert Path(default).name == learning


def test_rviz_is_started_in_the_namespace_of_the_robot_and_its_end_ends_the_launch(
    launch_ros, tmp_path, monkeypatch
):
    records = install_recorders({("rviz2", "rviz2")}, tmp_path)
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{os.environ['AMENT_PREFIX_PATH']}{os.pathsep}{tmp_path}")
    words = [str(ROOT / "launch" / "rviz.launch.py"), "robot:=sim_r2", "domain_id:=37"]
    subprocess.run([sys.executable, "-c", LAUNCH, *words], check=True, timeout=100)
    record = json.loads((records / "rviz-.sim_r2.json").read_text())
    argv = record["argv"][1:]
    own, ros = argv[: argv.index("--ros-args")], argv[argv.index("--ros-args") + 1 :]
    assert own[0] == "-d" and len(own) == 2 and Path(own[1]).samefile(ROOT / "config" / "rviz" / "robot.rviz")
    assert set(ros[::2]) == {"-r"}
    assert set(ros[1::2]) == {"__node:=rviz", "__ns:=/sim_r2", "/tf:=tf", "/tf_static:=tf_static"}
    assert record["environment"]["ROS_DOMAIN_ID"] == "37"
