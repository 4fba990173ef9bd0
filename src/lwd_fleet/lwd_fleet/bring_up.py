# SPDX-License-Identifier: Apache-2.0
"""Which lifecycle transition is due for which node: the decisions of the lifecycle manager, without ROS.

The nodes of one namespace come up in the order given; namespaces do not wait for each other: a dead robot
holds up nobody. A node that had been active once and starts again is brought up without waiting for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

UNREACHABLE = "unreachable"
ACTIVE = "active"
NEXT = {"unconfigured": "configure", "inactive": "activate"}
_BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


@dataclass
class _Node:
    name: str
    state: str = UNREACHABLE
    seen_active: bool = False
    transition: str | None = None  # under way
    failures: int = 0  # in a row
    retry_at_s: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class NodeHealth:
    """What to tell a person of one node."""

    name: str
    state: str
    note: str

    @property
    def active(self) -> bool:
        return self.state == ACTIVE


class BringUp:
    """Call `observe` with every state heard, start what `due` returns, report its end to `finished`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._nodes = {name: _Node(name) for name in names}

    @property
    def ready(self) -> bool:
        """Whether every node is active."""
        return all(node.state == ACTIVE for node in self._nodes.values())

    def health(self) -> list[NodeHealth]:
        """One entry per node, in order."""
        return [NodeHealth(node.name, node.state, node.note) for node in self._nodes.values()]

    def observe(self, name: str, state: str) -> None:
        """The node said that it is in `state`, or did not answer (`UNREACHABLE`)."""
        node = self._nodes[name]
        node.state = state
        if state == ACTIVE:
            node.seen_active, node.failures, node.note = True, 0, ""

    def due(self, now_s: float) -> list[tuple[str, str]]:
        """(node, transition) to request now; each counts as under way until `finished`."""
        requests = []
        for node in self._nodes.values():
            transition = NEXT.get(node.state)
            if transition is None or node.transition is not None or now_s < node.retry_at_s:
                continue
            waits_for = None if node.seen_active else self._first_missing_before(node)
            if waits_for is not None:
                node.note = f"waits for {waits_for}"
                continue
            node.transition = transition
            node.note = f"{transition} under way"
            requests.append((node.name, transition))
        return requests

    def finished(self, name: str, success: bool, now_s: float, why: str = "") -> None:
        """The transition under way ended. After a failure the next attempt waits, longer each time."""
        node = self._nodes[name]
        transition, node.transition = node.transition, None
        if success:
            node.note = ""
            node.state = {"configure": "inactive", "activate": ACTIVE}[transition or "configure"]
            self.observe(name, node.state)
        else:
            delay_s = _BACK_OFF_S[min(node.failures, len(_BACK_OFF_S) - 1)]
            node.failures += 1
            node.retry_at_s = now_s + delay_s
            node.note = (
                f"{transition} failed{f' ({why})' if why else ''}; see its log; again in {delay_s:g} s"
            )

    def _first_missing_before(self, node: _Node) -> str | None:
        group = node.name.rpartition("/")[0]
        for other in self._nodes.values():
            if other is node:
                return None
            if other.name.rpartition("/")[0] == group and not other.seen_active:
                return other.name
        return None
