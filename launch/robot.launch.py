# SPDX-License-Identifier: Apache-2.0
"""The robots of a deployment, or one of them, each with its own lifecycle manager: what runs on a robot.

ros2 launch lwd_fleet robot.launch.py deployment:=my_robots.yaml robot:=r1 hardware:=true
"""

from launch import LaunchDescription

from lwd_fleet.launch_description import deployment_launch


def generate_launch_description() -> LaunchDescription:
    return deployment_launch(("robots",))
