# SPDX-License-Identifier: Apache-2.0
"""Order of bring-up: in line within a robot, independent between robots, and again after a death."""

from __future__ import annotations

from lwd_fleet.bring_up import UNREACHABLE, BringUp

NODES = ("/sim_r1/driver", "/sim_r1/policy", "/sim_r2/driver")


def up(bring_up: BringUp, name: str, now: float = 0.0) -> None:
    bring_up.observe(name, "unconfigured")
    for transition in ("configure", "activate"):
        assert (name, transition) in bring_up.due(now)
        bring_up.finished(name, True, now)


def notes(bring_up: BringUp) -> dict[str, str]:
    return {one.name: one.note for one in bring_up.health()}


def test_a_node_waits_for_those_before_it_in_its_own_namespace_only():
    bring_up = BringUp(NODES)
    for name in NODES[1:]:
        bring_up.observe(name, "unconfigured")
    assert bring_up.due(0.0) == [("/sim_r2/driver", "configure")]
    assert notes(bring_up)["/sim_r1/policy"] == "waits for /sim_r1/driver"
    assert bring_up.due(0.0) == [], "a transition under way is not requested twice"
    up(bring_up, "/sim_r1/driver")
    assert bring_up.due(0.0) == [("/sim_r1/policy", "configure")]


def test_ready_means_that_every_node_is_active():
    bring_up = BringUp(NODES)
    for name in NODES:
        assert not bring_up.ready
        up(bring_up, name)
    assert bring_up.ready
    bring_up.observe("/sim_r1/policy", UNREACHABLE)
    assert not bring_up.ready


def test_a_node_that_starts_again_is_brought_up_though_another_is_dead():
    bring_up = BringUp(NODES)
    for name in NODES:
        up(bring_up, name)
    bring_up.observe("/sim_r1/driver", UNREACHABLE)
    up(bring_up, "/sim_r1/policy", now=9.0)


def test_a_refused_transition_is_tried_again_ever_more_rarely():
    bring_up = BringUp(["/sim_r1/policy"])
    bring_up.observe("/sim_r1/policy", "unconfigured")
    now, waits = 0.0, []
    for _ in range(8):
        assert bring_up.due(now) == [("/sim_r1/policy", "configure")]
        bring_up.finished("/sim_r1/policy", False, now, "no GPU")
        assert "configure failed (no GPU); see its log; again in" in notes(bring_up)["/sim_r1/policy"]
        begin = now
        while not bring_up.due(now):
            now += 0.5
        bring_up.finished("/sim_r1/policy", False, now)
        bring_up.observe("/sim_r1/policy", "unconfigured")
        waits.append(now - begin)
        now += 100.0
    assert waits[:3] == [1.0, 4.0, 16.0] and max(waits) == 30.0
