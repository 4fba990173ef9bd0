# SPDX-License-Identifier: Apache-2.0
"""The simulated dual-arm robot: MuJoCo scenes, tasks, scripted experts and the node that runs them as a robot."""
