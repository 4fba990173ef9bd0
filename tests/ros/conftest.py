# SPDX-License-Identifier: Apache-2.0
"""Real nodes in real processes, in a ROS domain of their own, watched by a node of the test."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("lwd_msgs")

import rclpy
from rclpy.executors import SingleThreadedExecutor
from std_msgs.msg import Bool

from lwd_fleet.deployment import NodeSpec, lifecycle_manager
from lwd_fleet.domain import PrivateDomain
from lwd_fleet.supervisor import Supervisor
from lwd_policy.qos import LATCHED

WAIT_S = 60.0  # for things that take a second; long, because the machine may be busy


class Stage:
    """Starts nodes, and lets a test publish, call and wait. `node` is the test's own node."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory, self._environment = directory, environment
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=int(environment["ROS_DOMAIN_ID"]))
        self._executor = SingleThreadedExecutor(context=self._context)
        self._nodes: list[Any] = []
        self.node = self.add_node("test", "/")
        self._supervisors: list[Supervisor] = []

    def start(self, specs: Sequence[NodeSpec]) -> Supervisor:
        """Start these nodes as processes; they end with the test."""
        supervisor = Supervisor(
            specs, self._directory / str(len(self._supervisors)), self._environment, back_off_s=(0.2,)
        )
        self._supervisors.append(supervisor)
        supervisor.start()
        return supervisor

    def bring_up(self, specs: Sequence[NodeSpec]) -> Supervisor:
        """Start these nodes with a lifecycle manager and wait until all are active."""
        manager = lifecycle_manager(specs, "/fleet", "lifecycle_manager")
        ready = self.collect(Bool, "/fleet/lifecycle_manager/ready", LATCHED)
        supervisor = self.start([*specs, manager])
        self.until(lambda: ready and ready[-1].data, "the nodes to become active")
        return supervisor

    def collect(self, kind: Any, topic: str, qos: Any) -> list[Any]:
        """A list that grows by every message of the topic."""
        messages: list[Any] = []
        self.node.create_subscription(kind, topic, messages.append, qos)
        return messages

    def add_node(self, name: str, namespace: str) -> Any:
        """One more node in the test's process."""
        node = rclpy.create_node(name, namespace=namespace, context=self._context)
        self._executor.add_node(node)
        self._nodes.append(node)
        return node

    def call(self, kind: Any, name: str, request: Any, again_s: float = math.inf) -> Any:
        """Call a service and return its response. again_s: ask again after so long, where it does no harm; a request
        may go to a process that is dead."""
        client = self.node.create_client(kind, name)
        self.until(client.service_is_ready, f"service {name}")
        futures: list[Any] = []
        ask_at = 0.0

        def ask() -> None:
            nonlocal ask_at
            if time.monotonic() >= ask_at:
                ask_at = time.monotonic() + again_s
                futures.append(client.call_async(request))

        def answered() -> list[Any]:
            return [future for future in futures if future.done()]

        self.until(answered, f"an answer of {name}", ask)
        return answered()[0].result()

    def until(
        self, condition: Callable[[], Any], what: str, meanwhile: Callable[[], Any] = lambda: None
    ) -> None:
        """Spin, and call `meanwhile` every 20 ms, until the condition holds."""
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, f"waited {WAIT_S:g} s for {what}{self._logs()}"
            meanwhile()
            for supervisor in self._supervisors:
                supervisor.poll()
            self.spin(0.02)

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # Always the same time-out: with another one the executor begins its round anew, and a coroutine that
            # waits would be all that it ever serves.
            self._executor.spin_once(timeout_sec=0.01)

    def close(self) -> None:
        for supervisor in self._supervisors:
            supervisor.stop()
        self._executor.shutdown()
        for node in self._nodes:
            node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def _logs(self) -> str:
        files = sorted(self._directory.glob("*/log/*.log"))
        return "".join(f"\n--- {file.name}\n{file.read_text()[-3000:]}" for file in files)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    with PrivateDomain() as domain:
        for name, value in domain.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        stage = Stage(tmp_path, dict(os.environ))
        try:
            yield stage
        finally:
            stage.close()
