# SPDX-License-Identifier: Apache-2.0
"""Configures and activates the managed nodes in order and keeps them so. Decisions are in `bring_up.py`.

Topic `~/ready` (latched): whether all of them are active.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.client import Client
from rclpy.clock import Clock, ClockType
from rclpy.task import Future
from std_msgs.msg import Bool

from lwd_fleet.bring_up import UNREACHABLE, BringUp
from lwd_policy.managed_node import OK, WARN, Check, ConfigurationError, ManagedNode, parameter, run_node
from lwd_policy.qos import LATCHED

_TRANSITIONS = {"configure": Transition.TRANSITION_CONFIGURE, "activate": Transition.TRANSITION_ACTIVATE}
_TICK_S = 0.1
# A node answers nothing while it configures. An answer to a question asked this much after a request for a
# transition therefore comes from a process that never got the request: the node has been started again.
_ANSWERS_COUNT_AFTER_S = 2.0


@dataclass(frozen=True)
class LifecycleManagerParameters:
    """Parameters of the lifecycle manager."""

    nodes: tuple[str, ...] = parameter((), "fully qualified names of the managed nodes, in order of bring-up")
    poll_s: float = parameter(
        1.0, "time between two questions for the state of a node", unit="s", low=0.1, high=60.0
    )
    answer_timeout_s: float = parameter(
        3.0, "a node that takes longer to tell its state is unreachable", unit="s", low=0.1, high=60.0
    )
    transition_timeout_s: float = parameter(
        120.0, "a transition that takes longer has failed", unit="s", low=1.0, high=3600.0
    )


@dataclass
class _Peer:
    """The two services of one managed node and the calls under way."""

    name: str
    get_state: Client
    change_state: Client
    question: Future | None = None
    asked_s: float = -1e9
    request: Future | None = None
    requested_s: float = 0.0


class LifecycleManagerNode(ManagedNode):
    """Brings itself up; nobody else would."""

    parameters_type = LifecycleManagerParameters

    def __init__(self) -> None:
        super().__init__("lifecycle_manager")
        self._bring_up = BringUp(())
        self._peers: list[_Peer] = []
        self._timer: Any = None
        self._ready: bool | None = None
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)

    def configure(self) -> None:
        names = self.parameters.nodes
        if not names:
            raise ConfigurationError("the parameter `nodes` is empty; name the nodes to bring up")
        wrong = [name for name in names if not name.startswith("/")]
        if wrong:
            raise ConfigurationError(
                f"nodes: {', '.join(wrong)}: give fully qualified names, starting with /"
            )
        self._bring_up = BringUp(names)
        self._peers = [
            _Peer(
                name,
                self.create_client(GetState, f"{name}/get_state"),
                self.create_client(ChangeState, f"{name}/change_state"),
            )
            for name in names
        ]
        self._publisher = self.create_publisher(Bool, "~/ready", LATCHED)

    def activate(self) -> None:
        self._timer = self.create_timer(_TICK_S, self._on_tick, clock=self._steady)

    def deactivate(self) -> None:
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None

    def cleanup(self) -> None:
        for peer in self._peers:
            self.destroy_client(peer.get_state)
            self.destroy_client(peer.change_state)
        self._peers = []

    def diagnose(self) -> list[Check]:
        return [
            Check(one.name, OK if one.active else WARN, f"{one.state}{f': {one.note}' if one.note else ''}")
            for one in self._bring_up.health()
        ]

    # Helpers -----------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        now_s = self._now_s()
        for peer in self._peers:
            self._collect_answer(peer, now_s)
            self._collect_result(peer, now_s)
            self._ask(peer, now_s)
        by_name = {peer.name: peer for peer in self._peers}
        for name, transition in self._bring_up.due(now_s):
            request = ChangeState.Request(transition=Transition(id=_TRANSITIONS[transition]))
            by_name[name].request = by_name[name].change_state.call_async(request)
            by_name[name].requested_s = now_s
        if self._bring_up.ready != self._ready:
            self._ready = self._bring_up.ready
            self._publisher.publish(Bool(data=self._ready))
            missing = [one.name for one in self._bring_up.health() if not one.active]
            self.get_logger().info(
                "all nodes are active" if self._ready else f"not active: {', '.join(missing)}"
            )

    def _ask(self, peer: _Peer, now_s: float) -> None:
        if peer.question is not None or now_s - peer.asked_s < self.parameters.poll_s:
            return
        if peer.get_state.service_is_ready():
            peer.question = peer.get_state.call_async(GetState.Request())
            peer.asked_s = now_s
        elif peer.request is None:
            self._observe(peer, UNREACHABLE)

    def _collect_answer(self, peer: _Peer, now_s: float) -> None:
        if peer.question is None:
            return
        answered = peer.question.done()
        if not answered and now_s - peer.asked_s < self.parameters.answer_timeout_s:
            return
        question, peer.question = peer.question, None
        if not answered:
            peer.get_state.remove_pending_request(question)
        if peer.request is None:
            self._observe(peer, question.result().current_state.label if answered else UNREACHABLE)
        elif (
            answered and peer.asked_s - peer.requested_s > _ANSWERS_COUNT_AFTER_S and not peer.request.done()
        ):
            self._end_request(peer, False, now_s, "the node was started again meanwhile")
            self._observe(peer, question.result().current_state.label)

    def _collect_result(self, peer: _Peer, now_s: float) -> None:
        if peer.request is None:
            return
        if peer.request.done():
            result = peer.request.result()
            self._end_request(peer, result is not None and result.success, now_s)
        elif now_s - peer.requested_s > self.parameters.transition_timeout_s:
            self._end_request(peer, False, now_s, f"no end after {self.parameters.transition_timeout_s:g} s")

    def _end_request(self, peer: _Peer, success: bool, now_s: float, why: str = "") -> None:
        request, peer.request = peer.request, None
        if request is not None and not request.done():
            peer.change_state.remove_pending_request(request)
        self._bring_up.finished(peer.name, success, now_s, why)
        peer.asked_s = -1e9  # look at once where it is now
        health = next(one for one in self._bring_up.health() if one.name == peer.name)
        if success:
            self.get_logger().info(f"{peer.name}: {health.state}")
        else:
            self.get_logger().warning(f"{peer.name}: {health.note}")

    def _observe(self, peer: _Peer, state: str) -> None:
        before = next(one for one in self._bring_up.health() if one.name == peer.name)
        if before.active and state != before.state:
            self.get_logger().warning(f"{peer.name}: was active, is {state}")
        self._bring_up.observe(peer.name, state)

    def _now_s(self) -> float:
        return float(self._steady.now().nanoseconds * 1e-9)


def _brought_up() -> LifecycleManagerNode:
    node = LifecycleManagerNode()
    node.trigger_configure()
    node.trigger_activate()
    return node


def main(args: list[str] | None = None) -> int:
    return run_node(_brought_up, args)


if __name__ == "__main__":
    sys.exit(main())
