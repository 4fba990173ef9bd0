# SPDX-License-Identifier: Apache-2.0
"""The rules of liquid: how fast it flows, where it lands, and that none is lost."""

import mujoco
import numpy as np
import pytest
from acting import act
from hypothesis import given, settings
from hypothesis import strategies as st

from lwd_fleet.sim import liquid
from lwd_fleet.sim.experts import Expert, Script
from lwd_fleet.sim.liquid import (
    FLOW_PER_S,
    FULL_FLOW_LEAN_RAD,
    POUR_LEAN_RAD,
    SPOUT_DIP_RAD,
    SPOUT_FULL_FLOW_RAD,
    UPRIGHT_RAD,
    Liquids,
    full_flow_lean,
)
from lwd_fleet.sim.parts import Parts, Thing, Vessel
from lwd_fleet.sim.robot import Shape
from lwd_fleet.sim.scene import TICK_S, build_model, liquid_name
from lwd_fleet.sim.tasks import TASKS
from lwd_fleet.sim.tasks.cocktail import BOTTLES, SHAKER
from lwd_fleet.sim.world import World

CAN = Shape("cylinder", (0.03, 0.05), colour="steel")


def _can(name: str, capacity: float, holds: str = "") -> Thing:
    """10 cm high, the frame in its middle, the lip 3 cm from the axis."""
    return Thing(name, (CAN,), 0.1, 0.05, 0.0, 0.02, vessel=Vessel(-0.05, 0.05, 0.03, 0.03, capacity, holds))


COVER = Thing(
    "cover", (Shape("cylinder", (0.04, 0.004), colour="pink"),), 0.05, 0.004, 0.0, 0.01, covers=True
)
SPOUT = (0.05, 0.0, 0.04)  # towards +x, under the mouth
POT = Thing(
    "pot", (CAN,), 0.1, 0.05, 0.0, 0.02, vessel=Vessel(-0.05, 0.05, 0.03, 0.03, 2.0, "tea", spout=SPOUT)
)
PARTS = Parts((_can("jug", 2.0, "water"), _can("cup", 1.0), _can("low", 1.0), COVER, POT))
ELSEWHERE = {
    "cup": (0.3, 0.0, 0.05),
    "low": (0.3, 0.2, 0.05),
    "cover": (-0.3, 0.0, 0.1),
    "pot": (-0.3, 0.2, 0.05),
}
FULL = FULL_FLOW_LEAN_RAD + 0.05


class Kitchen:
    """Cans that are where a test puts them."""

    def __init__(self) -> None:
        self.model = build_model(PARTS, "kitchen")
        self.data = mujoco.MjData(self.model)
        for name, point in ELSEWHERE.items():
            self.put(name, point)
        self.liquids = Liquids(self.model, self.data, PARTS)

    def put(self, name: str, point: tuple[float, float, float], tilt: float = 0.0) -> None:
        """tilt: towards +x, rad."""
        address = int(self.model.joint(name).qposadr[0])
        self.data.qpos[address : address + 7] = *point, np.cos(tilt / 2), 0.0, np.sin(tilt / 2), 0.0
        mujoco.mj_kinematics(self.model, self.data)

    def lean_jug(self, tilt: float, lip: tuple[float, float, float] = (0.3, 0.0, 0.14)) -> None:
        """The lip on its lower side at a point, by default 4 cm over the middle of the cup."""
        turned = [np.cos(tilt) * 0.03 + np.sin(tilt) * 0.05, 0.0, -np.sin(tilt) * 0.03 + np.cos(tilt) * 0.05]
        x, y, z = np.array(lip) - turned
        self.put("jug", (x, y, z), tilt)

    def lean_pot(self, tilt: float, tip: tuple[float, float, float] = (0.3, 0.0, 0.14)) -> None:
        """The tip of its spout at a point, by default 4 cm over the middle of the cup; the jug out of the way."""
        self.put("jug", (-0.3, -0.2, 0.05))
        out, _, up = SPOUT
        x, y, z = tip
        self.put(
            "pot",
            (
                x - np.cos(tilt) * out - np.sin(tilt) * up,
                y,
                z + np.sin(tilt) * out - np.cos(tilt) * up,
            ),
            tilt,
        )

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.liquids.step(TICK_S)

    def amount(self, name: str) -> float:
        return sum(self.liquids.content(name).values())

    def total(self) -> float:
        return sum(map(self.amount, PARTS.vessels)) + self.liquids.spilled


@pytest.fixture(scope="module")
def _shared() -> Kitchen:
    return Kitchen()


@pytest.fixture
def kitchen(_shared: Kitchen) -> Kitchen:
    for name, point in ELSEWHERE.items():
        _shared.put(name, point)
    _shared.lean_jug(0.0)
    _shared.liquids.reset()
    return _shared


# How much -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tilt", "share"),
    [
        (0.0, 0.0),
        (POUR_LEAN_RAD - 0.01, 0.0),
        ((POUR_LEAN_RAD + FULL_FLOW_LEAN_RAD) / 2, 0.5),
        (FULL_FLOW_LEAN_RAD, 1.0),
        (FULL_FLOW_LEAN_RAD + 0.3, 1.0),
    ],
)
@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_what_flows_is_the_rate_of_the_lean_times_the_time(
    kitchen: Kitchen, tilt: float, share: float, seconds: float
) -> None:
    kitchen.lean_jug(tilt)
    kitchen.wait(seconds)
    assert kitchen.amount("cup") == pytest.approx(FLOW_PER_S * share * seconds, abs=1e-9)
    assert kitchen.amount("jug") == pytest.approx(2.0 - kitchen.amount("cup"), abs=1e-9)
    assert kitchen.liquids.spilled == pytest.approx(0.0, abs=1e-12)


def test_no_more_flows_than_there_is_and_the_vessel_is_empty_then(kitchen: Kitchen) -> None:
    kitchen.liquids.add("jug", "water", -1.5)
    kitchen.lean_jug(FULL)
    kitchen.wait(2.0)
    assert kitchen.amount("jug") == 0.0
    assert kitchen.amount("cup") == pytest.approx(0.5)


def test_what_does_not_fit_is_spilled_in_the_proportions_of_the_mixture(kitchen: Kitchen) -> None:
    kitchen.liquids.add("jug", "water", -0.5)
    kitchen.liquids.add("jug", "syrup", 0.5)
    kitchen.lean_jug(FULL)
    kitchen.wait(3.0)
    cup = kitchen.liquids.content("cup")
    assert kitchen.amount("cup") == pytest.approx(1.0)
    assert kitchen.liquids.spilled == pytest.approx(1.0)
    assert cup["water"] == pytest.approx(0.75) and cup["syrup"] == pytest.approx(0.25)


def test_adding_and_taking_out(kitchen: Kitchen) -> None:
    kitchen.liquids.add("cup", "foam", 0.4)
    kitchen.liquids.add("cup", "foam", -0.1)
    assert kitchen.liquids.content("cup")["foam"] == pytest.approx(0.3)
    kitchen.liquids.add("cup", "foam", -5.0)  # no more than there is
    assert kitchen.amount("cup") == 0.0 and kitchen.liquids.spilled == 0.0
    kitchen.liquids.add("cup", "foam", 1.6)
    assert kitchen.amount("cup") == pytest.approx(1.0) and kitchen.liquids.spilled == pytest.approx(0.6)


# Where to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lip", "hits"),
    [
        ((0.3, 0.0, 0.14), True),
        ((0.328, 0.0, 0.14), True),  # just inside the rim
        ((0.332, 0.0, 0.14), False),  # just outside
        ((0.3, -0.032, 0.14), False),
        ((0.3, 0.0, 0.095), True),  # dips in a little
        ((0.3, 0.0, 0.085), False),  # under the rim
        ((0.3, 0.0, 0.245), True),
        ((0.3, 0.0, 0.255), False),  # from too high
    ],
)
def test_the_stream_lands_below_the_lip_or_is_spilled(
    kitchen: Kitchen, lip: tuple[float, float, float], hits: bool
) -> None:
    kitchen.lean_jug(FULL, lip)
    kitchen.wait(0.5)
    poured = FLOW_PER_S * 0.5
    assert kitchen.amount("cup") == pytest.approx(poured * hits, abs=1e-9)
    assert kitchen.liquids.spilled == pytest.approx(poured * (not hits), abs=1e-9)


def test_the_highest_of_two_vessels_below_the_lip_gets_it(kitchen: Kitchen) -> None:
    kitchen.put("low", (0.3, 0.0, 0.01))
    kitchen.lean_jug(FULL)
    kitchen.wait(0.5)
    assert kitchen.amount("cup") == pytest.approx(FLOW_PER_S * 0.5) and kitchen.amount("low") == 0.0


def test_into_a_vessel_that_leans_nothing_can_be_poured(kitchen: Kitchen) -> None:
    kitchen.put("cup", (0.3, 0.0, 0.05), UPRIGHT_RAD + 0.05)
    kitchen.lean_jug(FULL, tuple(kitchen.liquids.mouth("cup") + [0, 0, 0.03]))
    kitchen.wait(0.5)
    assert kitchen.amount("cup") == 0.0 and kitchen.liquids.spilled == pytest.approx(FLOW_PER_S * 0.5)


def test_nothing_flows_into_a_covered_vessel(kitchen: Kitchen) -> None:
    kitchen.put("cover", (0.305, 0.0, 0.104))
    kitchen.lean_jug(FULL)
    kitchen.wait(0.5)
    assert kitchen.amount("cup") == 0.0 and kitchen.liquids.spilled == pytest.approx(FLOW_PER_S * 0.5)


def test_nothing_flows_out_of_a_covered_vessel(kitchen: Kitchen) -> None:
    kitchen.lean_jug(FULL)
    kitchen.put("cover", tuple(kitchen.liquids.mouth("jug")), FULL)
    kitchen.wait(0.5)
    assert kitchen.amount("jug") == 2.0 and kitchen.liquids.spilled == 0.0


def test_a_stream_from_a_point_lands_below_it(kitchen: Kitchen) -> None:
    kitchen.liquids.fall(np.array([0.31, 0.0, 0.15]), "juice", 0.7)
    kitchen.liquids.fall(np.array([0.2, 0.0, 0.15]), "juice", 0.2)
    assert kitchen.liquids.content("cup")["juice"] == pytest.approx(0.7)
    assert kitchen.liquids.spilled == pytest.approx(0.2)
    kitchen.liquids.fall(np.array([0.31, 0.0, 0.15]), "juice", 0.7)  # 0.3 fit
    assert kitchen.amount("cup") == pytest.approx(1.0) and kitchen.liquids.spilled == pytest.approx(0.6)


# Through a spout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tilt", "share"),
    [
        (0.0, 0.0),
        (SPOUT_DIP_RAD - 0.01, 0.0),
        ((SPOUT_DIP_RAD + SPOUT_FULL_FLOW_RAD) / 2, 0.5),
        (SPOUT_FULL_FLOW_RAD, 1.0),
        (SPOUT_FULL_FLOW_RAD + 0.3, 1.0),
    ],
)
@pytest.mark.parametrize("covered", [False, True])
def test_through_a_spout_it_flows_as_that_dips_covered_or_not(
    kitchen: Kitchen, tilt: float, share: float, covered: bool
) -> None:
    kitchen.lean_pot(tilt)
    if covered:
        kitchen.put("cover", tuple(kitchen.liquids.mouth("pot")), tilt)
    kitchen.wait(0.5)
    assert kitchen.amount("cup") == pytest.approx(FLOW_PER_S * share * 0.5, abs=1e-9)
    assert kitchen.amount("pot") == pytest.approx(2.0 - kitchen.amount("cup"), abs=1e-9)
    assert kitchen.liquids.spilled == pytest.approx(0.0, abs=1e-12)


def test_the_stream_of_a_spout_falls_from_its_tip(kitchen: Kitchen) -> None:
    tip = (0.332, 0.0, 0.14)  # just outside the cup; the lip of the pot is over it
    kitchen.lean_pot(SPOUT_FULL_FLOW_RAD, tip)
    np.testing.assert_allclose(kitchen.liquids.spout("pot"), tip, atol=1e-12)
    kitchen.wait(0.5)
    assert kitchen.amount("cup") == 0.0
    assert kitchen.liquids.spilled == pytest.approx(FLOW_PER_S * 0.5)


@pytest.mark.parametrize(("tilt", "flows"), [(-0.7, False), (-FULL, True)])
@pytest.mark.parametrize("covered", [False, True])
def test_away_from_its_spout_a_vessel_pours_over_its_lip_unless_it_is_covered(
    kitchen: Kitchen, tilt: float, flows: bool, covered: bool
) -> None:
    kitchen.put("pot", (-0.3, 0.2, 0.2), tilt)
    if covered:
        kitchen.put("cover", tuple(kitchen.liquids.mouth("pot")), tilt)
    kitchen.wait(0.5)
    assert kitchen.liquids.spilled == pytest.approx(FLOW_PER_S * 0.5 * (flows and not covered), abs=1e-9)


def test_how_far_a_vessel_has_to_lean_depends_on_whether_it_has_a_spout(kitchen: Kitchen) -> None:
    assert kitchen.liquids.spout("jug") is None
    assert full_flow_lean(PARTS.vessels["jug"]) == FULL_FLOW_LEAN_RAD
    assert full_flow_lean(PARTS.vessels["pot"]) == SPOUT_FULL_FLOW_RAD


# None is lost -------------------------------------------------------------------------------------------

_POSES = st.lists(
    st.tuples(
        st.sampled_from(["jug", "cup", "low", "cover", "pot"]),
        st.floats(0.2, 0.4),  # x
        st.floats(0.0, 0.3),  # z
        st.floats(-3.1, 3.1),  # tilt
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(poses=_POSES)
def test_none_is_lost_whatever_is_leaned_where(
    _shared: Kitchen, poses: list[tuple[str, float, float, float]]
) -> None:
    kitchen = _shared
    kitchen.liquids.reset()
    spilled = 0.0
    for name, x, z, tilt in poses:
        kitchen.put(name, (x, 0.0, z), tilt)
        kitchen.wait(0.3)
        assert kitchen.total() == pytest.approx(4.0, abs=1e-9)
        assert kitchen.liquids.spilled >= spilled  # what is spilled stays spilled
        spilled = kitchen.liquids.spilled
        for vessel, part in PARTS.vessels.items():
            assert all(portions >= 0.0 for portions in kitchen.liquids.content(vessel).values())
            assert kitchen.amount(vessel) <= part.capacity + 1e-9


# What is seen, and how arms pour ------------------------------------------------------------------------


def test_the_surface_rises_with_what_is_poured_and_is_seen_only_where_there_is_any(kitchen: Kitchen) -> None:
    surface = kitchen.model.geom(liquid_name("cup"))
    heights = [kitchen.liquids.surface("cup")[2]]
    assert surface.rgba[3] == 0.0 and heights[0] == pytest.approx(0.0)
    for _ in range(4):
        kitchen.liquids.add("cup", "water", 0.25)
        heights.append(kitchen.liquids.surface("cup")[2])
    np.testing.assert_allclose(np.diff(heights), 0.9 * 0.1 / 4)
    assert surface.rgba[3] == 1.0 and surface.pos[2] == pytest.approx(heights[-1] - 0.05)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_arm_pours_what_it_is_asked_for_over_the_lip_and_into_the_vessel(side: str) -> None:
    world = World("cocktail")
    for seed in range(4):
        world.reset(seed)
        bottle = next(each.name for each in BOTTLES if (world.position(each.name)[0] < 0) == (side == "left"))
        full = sum(world.content(bottle).values())

        def work(expert: Expert, bottle: str = bottle) -> Script:
            yield from expert.pick(side, bottle, 0.19)
            yield from expert.pour(side, bottle, "shaker", 0.6)
            yield from expert.wait(side, lambda: True)

        act(world, 15.0, **{side: work})
        poured = world.content("shaker")[bottle]
        assert 0.6 <= poured < 0.6 + 0.2  # some flows while the bottle is turned up again
        assert world.spilled < 0.02
        assert poured + world.spilled + sum(world.content(bottle).values()) == pytest.approx(full)
        assert world.lean(bottle) < 0.1 and world.lean(SHAKER.name) < 0.1


def test_tasks_say_how_much_each_vessel_holds() -> None:
    for task in TASKS.values():
        for vessel in task.parts.vessels.values():
            assert vessel.floor < vessel.mouth and vessel.capacity > 0 and vessel.radius > 0
    assert liquid.POUR_LEAN_RAD > UPRIGHT_RAD  # what is poured from is not poured into
