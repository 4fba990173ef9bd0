# SPDX-License-Identifier: Apache-2.0
"""A deployment: one YAML file that says which robots, tasks, store and learner there are; the nodes it means.

Two starters spawn these nodes (`launch_description.py`, `supervisor.py`); which ones is decided only here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FLEET_NAMESPACE = "/fleet"
PARTS = ("robots", "fleet", "learner")
SIM_PREFIX = "sim_"

_MODULES = {
    "sim_robot_node": "lwd_fleet.sim.sim_robot_node",
    "recorder_node": "lwd_fleet.robot.recorder_node",
    "uploader_node": "lwd_fleet.data.uploader_node",
    "policy_node": "lwd_policy.policy_node",
    "arbiter_node": "lwd_fleet.robot.arbiter_node",
    "episode_node": "lwd_fleet.robot.episode_node",
    "coordinator_node": "lwd_fleet.rollout.coordinator_node",
    "lifecycle_manager_node": "lwd_fleet.lifecycle_manager_node",
    "learner_node": "lwd_learner.learner_node",
}


class DeploymentError(Exception):
    """A deployment cannot be used; the text names the file, the key and the remedy."""


@dataclass(frozen=True)
class Robot:
    """One robot. `name` is its namespace without the slash; simulated ones always start with `sim_`."""

    name: str
    kind: str  # "sim" or "hardware"
    robot_file: Path
    tasks: tuple[str, ...]
    shift: str  # name of a domain shift of the simulator; empty: none
    image_size: int
    camera_hz: float

    @property
    def namespace(self) -> str:
        return f"/{self.name}"


@dataclass(frozen=True)
class Deployment:
    """The contents of a deployment file, checked, all paths absolute."""

    file: Path
    name: str
    run_dir: Path
    policy_step_hz: float
    output_hz: float
    robots: tuple[Robot, ...]
    store: str
    catalog: str
    spool: str  # holds "{robot}"
    episodes_per_robot: int
    learner: Mapping[str, Any] | None  # parameters of the learner node; None: no learner here

    @property
    def policies(self) -> Path:
        """Directory of the policy versions; robots take weights from nowhere else."""
        return self.run_dir / "policies"

    @property
    def simulated(self) -> bool:
        """Whether no real robot is part of it."""
        return all(robot.kind == "sim" for robot in self.robots)

    def robot(self, name: str) -> Robot:
        """The robot of that name, with or without `sim_`. Raises DeploymentError."""
        for robot in self.robots:
            if robot.name in (name, SIM_PREFIX + name):
                return robot
        known = ", ".join(robot.name for robot in self.robots)
        raise DeploymentError(f"{self.file}: robots: there is no {name!r}; it names {known}")


@dataclass(frozen=True)
class NodeSpec:
    """One process with one node, as both starters understand it."""

    package: str
    executable: str
    name: str
    namespace: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    remappings: tuple[tuple[str, str], ...] = (("diagnostics", "/diagnostics"),)
    respawn: bool = True
    stop_timeout_s: float = 5.0  # time to end by itself after SIGINT

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def module(self) -> str:
        """Python module that is the same program, for trees that are not installed."""
        return _MODULES[self.executable]


# From YAML to Deployment -----------------------------------------------------------------------------


def load_deployment(path: str | Path, run_dir: str | Path | None = None) -> Deployment:
    """Read and check a deployment file. `run_dir` overrides the file's. Raises DeploymentError."""
    file = Path(path).absolute()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentError(
            f"{file}: cannot be read ({error}); name an existing deployment file"
        ) from error
    except yaml.YAMLError as error:
        raise DeploymentError(f"{file}: is not YAML: {error}; correct it") from error
    top = _Section(file, "", content)
    name = top.text("name")
    default = top.text("run_dir", f"runs/{name}")
    written = Path(default if run_dir is None else run_dir)
    rates = top.section("rates")
    fleet = top.section("fleet", {})
    values = {"run_dir": str(written.expanduser().absolute())}
    deployment = Deployment(
        file=file,
        name=name,
        run_dir=Path(values["run_dir"]),
        policy_step_hz=rates.number("policy_step_hz", low=0.1, high=1000.0),
        output_hz=rates.number("output_hz", low=0.1, high=1000.0),
        robots=tuple(_robot(section) for section in top.sections("robots")),
        store=fleet.template("store", "{run_dir}/store", values),
        catalog=fleet.template("catalog", "{run_dir}/catalog.db", values),
        spool=fleet.template("spool", "{run_dir}/spool/{robot}", {**values, "robot": "{robot}"}),
        episodes_per_robot=round(fleet.number("episodes_per_robot", 0, low=0, high=1e9, whole=True)),
        learner=_learner(top),
    )
    for section in (top, rates, fleet):
        section.refuse_unknown()
    ratio = deployment.output_hz / deployment.policy_step_hz
    if ratio < 1 or abs(ratio - round(ratio)) > 1e-9:
        raise rates.error(
            "output_hz", f"{deployment.output_hz:g} is no integer multiple of policy_step_hz", "change one"
        )
    names = [robot.name for robot in deployment.robots]
    for double in {name for name in names if names.count(name) > 1}:
        raise top.error("robots", f"the name {double!r} comes twice", "every robot needs its own")
    if "{robot}" not in deployment.spool and len(names) > 1:
        raise fleet.error("spool", "all robots would write to one directory", "put {robot} into it")
    return deployment


def _robot(section: _Section) -> Robot:
    kind = section.text("kind")
    name = section.text("name")
    if kind not in ("sim", "hardware"):
        raise section.error("kind", f"is {kind!r}", "write sim or hardware")
    if not name.replace("_", "").isalnum() or not name.isascii() or not name[0].isalpha():
        raise section.error("name", f"{name!r} cannot be a ROS namespace", "use letters, digits and _")
    if kind == "sim" and not name.startswith(SIM_PREFIX):
        name = SIM_PREFIX + name
    elif kind == "hardware" and name.startswith(SIM_PREFIX):
        raise section.error("name", f"{name!r} would pass for a simulated robot", "remove sim_ from the name")
    robot_file = (section.file.parent / Path(section.text("robot_file")).expanduser()).resolve()
    if not robot_file.is_file():
        raise section.error("robot_file", f"{robot_file} does not exist", "give a path relative to this file")
    robot = Robot(
        name=name,
        kind=kind,
        robot_file=robot_file,
        tasks=section.texts("tasks"),
        shift=section.text("shift", ""),
        image_size=round(section.number("image_size", 96, low=16, high=4096, whole=True)),
        camera_hz=section.number("camera_hz", 10.0, low=0.1, high=200.0),
    )
    section.refuse_unknown()
    return robot


def _learner(top: _Section) -> Mapping[str, Any] | None:
    learner = top.take("learner", None)
    if learner is None or isinstance(learner, dict):
        return learner
    raise top.error("learner", "is no mapping", "list the learner's parameters, or write {} for the defaults")


_REQUIRED = object()


class _Section:
    """Reads one mapping of the file, so that every complaint names file, key and remedy."""

    def __init__(self, file: Path, key: str, content: Any) -> None:
        self.file, self._key = file, key
        if not isinstance(content, dict):
            raise DeploymentError(f"{file}: {key or 'the file'} is no mapping; write `key: value` lines")
        self._content = content
        self._taken: set[str] = set()

    def error(self, key: str, what: str, remedy: str) -> DeploymentError:
        return DeploymentError(f"{self.file}: {self._key}{key}: {what}; {remedy}")

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        self._taken.add(key)
        value = self._content.get(key, default)
        if value is _REQUIRED:
            raise self.error(key, "is missing", "add it")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or (not value and default is _REQUIRED):
            raise self.error(key, f"{value!r} is no text", "put it in quotes")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise self.error(key, f"{value!r} is no list of names", "write [one, other]")
        return tuple(value)

    def number(
        self, key: str, default: Any = _REQUIRED, *, low: float, high: float, whole: bool = False
    ) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise self.error(key, f"{value!r} is no {'whole ' if whole else ''}number", "correct it")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.error(key, f"{value} is out of range", f"use {low:g} to {high:g}")
        return float(value)

    def template(self, key: str, default: str, values: Mapping[str, str]) -> str:
        text = self.text(key, default)
        try:
            return text.format(**values)
        except (KeyError, IndexError, ValueError) as error:
            known = ", ".join("{" + name + "}" for name in values)
            raise self.error(key, f"{text!r} has a placeholder nobody fills", f"known are {known}") from error

    def section(self, key: str, default: Any = _REQUIRED) -> _Section:
        return _Section(self.file, f"{self._key}{key}.", self.take(key, default))

    def sections(self, key: str) -> list[_Section]:
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, "is no list", "name at least one")
        return [_Section(self.file, f"{self._key}{key}[{index}].", one) for index, one in enumerate(value)]

    def refuse_unknown(self) -> None:
        for key in self._content:
            if key not in self._taken:
                raise self.error(str(key), "is not known", f"known here are {', '.join(sorted(self._taken))}")


# From Deployment to nodes ----------------------------------------------------------------------------


def node_specs(
    deployment: Deployment,
    parts: Sequence[str] = PARTS,
    robot: str | None = None,
    hardware: bool = False,
    dry_run: bool = False,
) -> list[NodeSpec]:
    """The nodes to start, in order of bring-up, with the lifecycle managers that bring them up.

    `parts`: any of `PARTS`; `robot`: only this one of the robots; `hardware`: permission to move real robots;
    `dry_run`: arbiters publish nothing to the drivers. Raises DeploymentError.

    One manager serves all that is started together with the fleet side; a robot started alone has its own, so
    that it comes up, and comes back, while it is cut off.
    """
    for part in parts:
        if part not in PARTS:
            raise DeploymentError(f"there is no part {part!r}; choose from {', '.join(PARTS)}")
    robots = deployment.robots if robot is None else (deployment.robot(robot),)
    real = [one.name for one in robots if one.kind == "hardware"] if "robots" in parts else []
    if real and not hardware:
        raise DeploymentError(
            f"{deployment.file}: {', '.join(real)} would move for real; "
            "say hardware:=true (--hardware) if that is meant"
        )
    per_robot = [robot_nodes(deployment, one, dry_run) for one in robots] if "robots" in parts else []
    learner = learner_nodes(deployment) if "learner" in parts else []
    if "fleet" in parts:
        nodes = [*(spec for specs in per_robot for spec in specs), coordinator_node(deployment), *learner]
        return [*nodes, lifecycle_manager(nodes, FLEET_NAMESPACE, "lifecycle_manager")]
    managed = [
        [*specs, lifecycle_manager(specs, specs[0].namespace, "lifecycle_manager")] for specs in per_robot
    ]
    if learner:
        managed.append([*learner, lifecycle_manager(learner, FLEET_NAMESPACE, "learner_lifecycle_manager")])
    if not managed:
        raise DeploymentError(f"{deployment.file}: learner: is missing; add `learner: {{}}` to have one")
    return [spec for specs in managed for spec in specs]


def robot_nodes(deployment: Deployment, robot: Robot, dry_run: bool = False) -> list[NodeSpec]:
    """The managed nodes of one robot in order of bring-up: what others wait for comes first."""
    spool = deployment.spool.format(robot=robot.name)
    robot_file = str(robot.robot_file)
    simulated = robot.kind == "sim"
    rates = {"policy_step_hz": deployment.policy_step_hz, "output_hz": deployment.output_hz}

    def spec(package: str, name: str, parameters: Mapping[str, Any], stop_timeout_s: float = 5.0) -> NodeSpec:
        return NodeSpec(
            package, f"{name}_node", name, robot.namespace, parameters, stop_timeout_s=stop_timeout_s
        )

    simulator = {
        "robot_file": robot_file,
        "task": robot.tasks[0],
        "shift": robot.shift,
        "image_size": robot.image_size,
        "camera_hz": robot.camera_hz,
    }
    policy = {
        "robot_file": robot_file,
        "uri_allow": policy_roots(deployment),
        "policy_step_hz": deployment.policy_step_hz,
    }
    arbiter = {"robot_file": robot_file, **rates, "auto_arm": simulated, "dry_run": dry_run}
    episode = {
        "tasks": list(robot.tasks),
        "catalog": deployment.catalog,
        "reset_scene": simulated,  # a cell that resets or judges itself is not known to a deployment yet
        "detector": simulated,
    }
    return [
        *([spec("lwd_fleet", "sim_robot", simulator)] if simulated else []),
        spec(
            "lwd_fleet",
            "recorder",
            {"spool": spool, "camera_hz": robot.camera_hz, **rates},
            stop_timeout_s=30.0,
        ),
        spec(
            "lwd_fleet",
            "uploader",
            {"spool": spool, "store": deployment.store, "catalog": deployment.catalog},
        ),
        spec("lwd_policy", "policy", policy),
        spec("lwd_fleet", "arbiter", arbiter),
        spec("lwd_fleet", "episode", episode),
    ]


def policy_roots(deployment: Deployment) -> list[str]:
    """Directories from which a robot loads policies: those that this deployment writes."""
    return list(dict.fromkeys([str(deployment.run_dir), deployment.store.removeprefix("file://")]))


def coordinator_node(deployment: Deployment) -> NodeSpec:
    """The node that assigns tasks and rolls out policies."""
    parameters: dict[str, Any] = {
        "robots": [robot.name for robot in deployment.robots],
        "catalog": deployment.catalog,
        "episodes_per_robot": deployment.episodes_per_robot,
    }
    for robot in deployment.robots:
        parameters[f"tasks.{robot.name}"] = list(robot.tasks)
    return NodeSpec("lwd_fleet", "coordinator_node", "coordinator", FLEET_NAMESPACE, parameters)


def learner_nodes(deployment: Deployment) -> list[NodeSpec]:
    """The learner, where the deployment has one."""
    if deployment.learner is None:
        return []
    parameters = {
        "store": deployment.store,
        "catalog": deployment.catalog,
        "run_dir": str(deployment.run_dir / "learner"),
        **_dotted(deployment.learner),
    }
    return [
        NodeSpec("lwd_learner", "learner_node", "learner", FLEET_NAMESPACE, parameters, stop_timeout_s=30.0)
    ]


def lifecycle_manager(managed: Sequence[NodeSpec], namespace: str, name: str) -> NodeSpec:
    """The node that configures and activates `managed`, in this order."""
    parameters = {"nodes": [spec.full_name for spec in managed]}
    return NodeSpec("lwd_fleet", "lifecycle_manager_node", name, namespace, parameters)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ROS parameter names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_dotted(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
