# SPDX-License-Identifier: Apache-2.0
"""The learner of a deployment, for the machine that trains.

ros2 launch lwd_learner learner.launch.py deployment:=my_robots.yaml
"""

from launch import LaunchDescription

from lwd_fleet.launch_description import deployment_launch


def generate_launch_description() -> LaunchDescription:
    return deployment_launch(("learner",))
