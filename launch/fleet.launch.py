# SPDX-License-Identifier: Apache-2.0
"""The fleet side of a deployment: coordinator and lifecycle manager.

ros2 launch lwd_learner fleet.launch.py deployment:=my_robots.yaml
"""

from launch import LaunchDescription

from lwd_fleet.launch_description import deployment_launch


def generate_launch_description() -> LaunchDescription:
    return deployment_launch(("fleet",))
