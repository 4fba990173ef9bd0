# SPDX-License-Identifier: Apache-2.0
"""Makes `launch` descriptions from a deployment. Only for launch files: needs ROS `launch` and `launch_ros`.

Bring-up is the lifecycle manager's work, so plain `Node` actions do, whatever the version of launch_ros.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, SetEnvironmentVariable
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from lwd_fleet.deployment import Deployment, NodeSpec, load_deployment, node_specs
from lwd_fleet.domain import PrivateDomain, transport

_LOG_LEVELS = ["debug", "info", "warn", "error", "fatal"]
_YES_NO = ["true", "false"]
_domains: list[PrivateDomain] = []  # held until this launch process ends


def deployment_launch(parts: Sequence[str], private_domain: bool = False) -> LaunchDescription:
    """Starts these parts (`deployment.PARTS`) of the deployment that the launch arguments name.

    `private_domain`: take a ROS domain of its own unless `domain_id` says otherwise.
    """
    name = "sim_two_robots_learning" if tuple(parts) == ("learner",) else "sim_two_robots"  # has a learner
    default = Path(get_package_share_directory("lwd_fleet")) / "config" / "deployments" / f"{name}.yaml"
    domain = "a free one of this machine" if private_domain else "as in the environment"
    arguments = [
        DeclareLaunchArgument(
            "deployment", default_value=str(default), description="deployment file to start"
        ),
        DeclareLaunchArgument(
            "run_dir",
            default_value="",
            description="directory for all that is written; empty: the deployment's",
        ),
        DeclareLaunchArgument(
            "domain_id", default_value="", description=f"ROS_DOMAIN_ID of the nodes; empty: {domain}"
        ),
        DeclareLaunchArgument(
            "use_respawn", default_value="true", choices=_YES_NO, description="start nodes that died again"
        ),
        DeclareLaunchArgument(
            "log_level", default_value="info", choices=_LOG_LEVELS, description="log level of the nodes"
        ),
    ]
    if "robots" in parts:
        arguments += [
            DeclareLaunchArgument(
                "robot", default_value="", description="only this robot of the deployment; empty: all"
            ),
            DeclareLaunchArgument(
                "hardware", default_value="false", choices=_YES_NO, description="real robots may move"
            ),
            DeclareLaunchArgument(
                "dry_run",
                default_value="false",
                choices=_YES_NO,
                description="decide and record, but send nothing to the drivers",
            ),
        ]
    start = OpaqueFunction(function=_start, args=[tuple(parts), private_domain])
    return LaunchDescription([*arguments, start])


def node_action(spec: NodeSpec, use_respawn: bool = True, log_level: str = "info") -> Node:
    """The `launch_ros` action that starts this node."""
    parameters = {key: _typed(value) for key, value in spec.parameters.items() if value not in ([], ())}
    return Node(
        package=spec.package,
        executable=spec.executable,
        name=spec.name,
        namespace=spec.namespace,
        parameters=[parameters] if parameters else [],
        remappings=list(spec.remappings),
        arguments=["--ros-args", "--log-level", log_level],
        respawn=spec.respawn and use_respawn,
        respawn_delay=2.0,
        sigterm_timeout=str(spec.stop_timeout_s),
        output="both",
    )


def _start(
    context: LaunchContext, parts: Sequence[str], private_domain: bool
) -> list[LaunchDescriptionEntity]:
    given = context.launch_configurations
    deployment = load_deployment(given["deployment"], given["run_dir"] or None)
    specs = node_specs(
        deployment,
        parts,
        robot=given.get("robot") or None,
        hardware=given.get("hardware") == "true",
        dry_run=given.get("dry_run") == "true",
    )
    nodes = [node_action(spec, given["use_respawn"] == "true", given["log_level"]) for spec in specs]
    return [*_environment(deployment, given["domain_id"], private_domain), *nodes]


def _environment(
    deployment: Deployment, domain_id: str, private_domain: bool
) -> list[LaunchDescriptionEntity]:
    """Simulated robots are never heard beyond this machine."""
    values = {"RCUTILS_LOGGING_BUFFERED_STREAM": "1", **transport()}
    if deployment.simulated:
        values["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        if private_domain and not domain_id:
            _domains.append(PrivateDomain())
            domain_id = str(_domains[-1].number)
    if domain_id:
        values["ROS_DOMAIN_ID"] = domain_id
    told = [LogInfo(msg=f"ROS_DOMAIN_ID={domain_id}")] if domain_id else []
    return [*(SetEnvironmentVariable(name, value) for name, value in values.items()), *told]


def _typed(value: Any) -> Any:
    """Text stays text: launch_ros would read it as YAML and make a number of a robot called `1e3`."""
    if isinstance(value, str):
        return ParameterValue(value, value_type=str)
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, str) for one in value):
        return ParameterValue(list(value), value_type=list[str])
    return list(value) if isinstance(value, tuple) else value
