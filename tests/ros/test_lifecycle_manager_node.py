# SPDX-License-Identifier: Apache-2.0
"""The lifecycle manager as a process: brings nodes up, and up again after kill -9, and names what is missing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from std_msgs.msg import Bool

from lwd_fleet.deployment import NodeSpec, lifecycle_manager
from lwd_policy.qos import LATCHED

ROBOT_FILE = Path(__file__).parents[2] / "config" / "robots" / "sim_dual_arm.yaml"


def arbiter(namespace: str, robot_file: Path = ROBOT_FILE) -> NodeSpec:
    return NodeSpec("lwd_fleet", "arbiter_node", "arbiter", namespace, {"robot_file": str(robot_file)})


def test_a_node_killed_with_sigkill_becomes_active_again(stage):
    ready = stage.collect(Bool, "/fleet/lifecycle_manager/ready", LATCHED)
    supervisor = stage.bring_up([arbiter("/sim_r1"), arbiter("/sim_r2")])
    stage.until(lambda: ready and ready[-1].data, "readiness")
    os.kill(supervisor.status()[0].pid, signal.SIGKILL)
    stage.until(lambda: not ready[-1].data, "the death to be noticed")
    stage.until(lambda: ready[-1].data, "readiness again")
    assert supervisor.status()[0].starts == 2 and supervisor.status()[1].starts == 1


def test_one_broken_robot_keeps_no_other_one_down_and_is_named(stage):
    broken = arbiter("/sim_r1", robot_file=Path("/nowhere/robot.yaml"))
    specs = [broken, arbiter("/sim_r2")]
    diagnostics = stage.collect(DiagnosticArray, "/diagnostics", 100)
    stage.start([*specs, lifecycle_manager(specs, "/fleet", "lifecycle_manager")])

    def told(name: str) -> DiagnosticStatus | None:
        for message in reversed(diagnostics):
            for status in message.status:
                if status.name == f"/fleet/lifecycle_manager: {name}":
                    return status
        return None

    stage.until(lambda: told("/sim_r2/arbiter") and told("/sim_r2/arbiter").message == "active", "robot 2")
    stage.until(lambda: "configure failed" in told("/sim_r1/arbiter").message, "the failure of robot 1")
    assert told("/sim_r1/arbiter").level == DiagnosticStatus.WARN
