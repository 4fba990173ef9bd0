# SPDX-License-Identifier: Apache-2.0
"""RViz on one robot: its cameras and what its detector sees. Closing the window ends the launch.

Needs the package rviz2 and, for the cameras, compressed_image_transport.

ros2 launch lwd_fleet rviz.launch.py robot:=sim_r1 domain_id:=37
"""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare


def _join_domain(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    number = context.launch_configurations["domain_id"]
    return [SetEnvironmentVariable("ROS_DOMAIN_ID", number)] if number else []


def generate_launch_description() -> LaunchDescription:
    config = PathJoinSubstitution([FindPackageShare("lwd_fleet"), "config", "rviz", "robot.rviz"])
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "robot", default_value="sim_r1", description="robot to look at (its namespace)"
            ),
            DeclareLaunchArgument("rviz_config", default_value=config, description="RViz configuration file"),
            DeclareLaunchArgument(
                "domain_id",
                default_value="",
                description="ROS_DOMAIN_ID to join, as told by sim.launch.py; empty: as in the environment",
            ),
            OpaqueFunction(function=_join_domain),
            Node(
                package="rviz2",
                executable="rviz2",
                name="rviz",
                namespace=LaunchConfiguration("robot"),
                arguments=["-d", LaunchConfiguration("rviz_config")],
                remappings=[("/tf", "tf"), ("/tf_static", "tf_static")],
                output="both",
                on_exit=Shutdown(reason="RViz was closed"),
            ),
        ]
    )
