# SPDX-License-Identifier: Apache-2.0
"""A whole deployment on this machine, robots, fleet side and learner, in a ROS domain of its own.

ros2 launch lwd_fleet sim.launch.py run_dir:=/tmp/run
"""

from launch import LaunchDescription

from lwd_fleet.launch_description import deployment_launch


def generate_launch_description() -> LaunchDescription:
    return deployment_launch(("robots", "fleet", "learner"), private_domain=True)
