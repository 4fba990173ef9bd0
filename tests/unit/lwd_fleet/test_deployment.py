# SPDX-License-Identifier: Apache-2.0
"""A deployment file means exactly one list of nodes, or is refused with file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lwd_fleet.deployment import DeploymentError, load_deployment, node_specs

CONFIG = Path(__file__).parents[3] / "config"
SIM_TWO = CONFIG / "deployments" / "sim_two_robots.yaml"


@pytest.fixture
def edited(tmp_path):
    """Writes a valid one-robot deployment with `changes` applied to its sections and loads it."""

    def build(robot=None, top=None, rates=None, fleet=None):
        (tmp_path / "robot.yaml").write_text("name: any\n")
        content = {
            "name": "test",
            "run_dir": str(tmp_path / "run"),
            "rates": {"policy_step_hz": 10.0, "output_hz": 50.0, **(rates or {})},
            "robots": [
                {"name": "r1", "kind": "sim", "robot_file": "robot.yaml", "tasks": ["place"], **(robot or {})}
            ],
            "fleet": fleet or {},
            **(top or {}),
        }
        file = tmp_path / "deployment.yaml"
        file.write_text(yaml.safe_dump(content))
        return load_deployment(file)

    return build


@pytest.mark.parametrize("file", sorted((CONFIG / "deployments").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_deployment_expands(file, tmp_path):
    specs = node_specs(load_deployment(file, run_dir=tmp_path), hardware=True)
    names = [spec.full_name for spec in specs]
    assert len(set(names)) == len(names)


def test_one_of_the_shipped_deployments_learns_and_all_are_in_the_readme(tmp_path):
    files = sorted((CONFIG / "deployments").glob("*.yaml"))
    learning = [file.stem for file in files if load_deployment(file, run_dir=tmp_path).learner is not None]
    assert learning == ["sim_two_robots_learning"]
    readme = (CONFIG.parent / "README.md").read_text()
    assert all(f"`{file.name}`" in readme for file in files)


def test_two_simulated_robots_become_two_stacks_and_one_fleet_side(tmp_path):
    specs = node_specs(load_deployment(SIM_TWO, run_dir=tmp_path), parts=("robots", "fleet"))
    nodes = ("sim_robot", "recorder", "uploader", "policy", "arbiter", "episode")
    expected = [f"/sim_r{number}/{node}" for number in (1, 2) for node in nodes]
    assert [spec.full_name for spec in specs] == [
        *expected,
        "/fleet/coordinator",
        "/fleet/lifecycle_manager",
    ]
    manager = specs[-1]
    assert manager.parameters["nodes"] == [*expected, "/fleet/coordinator"]
    recorder = next(spec for spec in specs if spec.full_name == "/sim_r2/recorder")
    assert recorder.parameters["spool"] == str(tmp_path / "spool" / "sim_r2")
    assert recorder.stop_timeout_s == 30.0


def test_a_robot_started_alone_has_its_own_manager(tmp_path):
    specs = node_specs(load_deployment(SIM_TWO, run_dir=tmp_path), parts=("robots",), robot="r2")
    assert {spec.namespace for spec in specs} == {"/sim_r2"}
    assert specs[-1].full_name == "/sim_r2/lifecycle_manager"


def test_the_learner_section_is_passed_through(edited):
    deployment = edited(top={"learner": {"steps": 10, "critic": {"atoms": 51}}})
    (learner, manager) = node_specs(deployment, parts=("learner",))
    assert (learner.package, learner.executable) == ("lwd_learner", "learner_node")
    assert learner.parameters["steps"] == 10 and learner.parameters["critic.atoms"] == 51
    assert manager.full_name == "/fleet/learner_lifecycle_manager"


def test_a_learner_that_is_not_there_is_not_started_in_silence(edited):
    assert "learner" not in [spec.name for spec in node_specs(edited())]
    with pytest.raises(DeploymentError, match="learner: is missing; add `learner: {}`"):
        node_specs(edited(), parts=("learner",))


def test_simulated_robots_are_prefixed_whatever_they_are_called(edited):
    assert edited().robots[0].namespace == "/sim_r1"
    arbiter = next(spec for spec in node_specs(edited()) if spec.name == "arbiter")
    assert arbiter.parameters["auto_arm"] is True


def test_all_of_a_robot_works_at_the_rates_of_the_deployment(edited):
    specs = node_specs(edited(rates={"policy_step_hz": 30.0, "output_hz": 60.0}))
    rates = {
        spec.name: {
            key: value for key, value in spec.parameters.items() if key in ("policy_step_hz", "output_hz")
        }
        for spec in specs
        if spec.namespace == "/sim_r1"
    }
    both = {"policy_step_hz": 30.0, "output_hz": 60.0}
    assert rates["arbiter"] == rates["recorder"] == both
    assert rates["policy"] == {"policy_step_hz": 30.0}


def test_hardware_needs_an_explicit_permission_and_is_never_armed_by_itself(edited):
    deployment = edited(robot={"kind": "hardware"})
    with pytest.raises(DeploymentError, match="r1 would move for real"):
        node_specs(deployment)
    specs = node_specs(deployment, hardware=True, dry_run=True)
    arbiter = next(spec for spec in specs if spec.name == "arbiter")
    assert arbiter.namespace == "/r1"
    assert arbiter.parameters["auto_arm"] is False and arbiter.parameters["dry_run"] is True
    assert "sim_robot" not in [spec.name for spec in specs]
    assert node_specs(deployment, parts=("fleet",)), "the fleet side alone moves nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": {"robots": []}}, r"robots: is no list; name at least one"),
        ({"top": {"extra": 1}}, r"extra: is not known; known here are"),
        ({"rates": {"output_hz": 45.0}}, r"rates\.output_hz: 45 is no integer multiple"),
        ({"rates": {"policy_step_hz": "fast"}}, r"rates\.policy_step_hz: 'fast' is no number"),
        ({"rates": {"policy_step_hz": float("nan")}}, r"rates\.policy_step_hz: nan is out of range"),
        ({"robot": {"kind": "real"}}, r"robots\[0\]\.kind: is 'real'; write sim or hardware"),
        ({"robot": {"name": "r-1"}}, r"robots\[0\]\.name: 'r-1' cannot be a ROS namespace"),
        ({"robot": {"name": "sim_r1", "kind": "hardware"}}, r"would pass for a simulated robot"),
        ({"robot": {"robot_file": "gone.yaml"}}, r"robots\[0\]\.robot_file: .*gone\.yaml does not exist"),
        ({"robot": {"tasks": "place"}}, r"robots\[0\]\.tasks: 'place' is no list of names"),
        ({"robot": {"image_size": 9.5}}, r"robots\[0\]\.image_size: 9\.5 is no whole number"),
        ({"robot": {"camera": 3}}, r"robots\[0\]\.camera: is not known"),
        ({"fleet": {"store": "{home}/store"}}, r"fleet\.store: .* has a placeholder nobody fills"),
        ({"top": {"learner": 3}}, r"learner: is no mapping"),
    ],
)
def test_mistakes_are_refused_with_file_key_and_remedy(edited, changes, message):
    with pytest.raises(DeploymentError, match=r"deployment\.yaml: .*" + message) as caught:
        edited(**changes)
    assert ";" in str(caught.value), "a remedy follows the semicolon"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DeploymentError, match=r"nothing\.yaml: cannot be read"):
        load_deployment(tmp_path / "nothing.yaml")


def test_two_robots_of_one_name_or_one_spool_are_refused(edited, tmp_path):
    robot = {"kind": "sim", "robot_file": "robot.yaml", "tasks": ["place"]}
    both = [{"name": "r1", **robot}, {"name": "sim_r1", **robot}]
    with pytest.raises(DeploymentError, match="the name 'sim_r1' comes twice"):
        edited(top={"robots": both})
    both[1]["name"] = "r2"
    with pytest.raises(DeploymentError, match=r"fleet\.spool: all robots would write to one directory"):
        edited(top={"robots": both}, fleet={"spool": "/tmp/spool"})
