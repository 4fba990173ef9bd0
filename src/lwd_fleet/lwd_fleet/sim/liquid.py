# SPDX-License-Identifier: Apache-2.0
"""Liquid as amounts in vessels: it flows out of a vessel that leans, into the one below its lip or spout, or is
spilled. No portion is lost: what is in no vessel any more is in `spilled`.

There are no particles. The level is shown by a disc in the vessel, so that cameras see it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import mujoco
import numpy as np
from numpy.typing import NDArray

from lwd_fleet.sim.parts import Parts, Vessel
from lwd_fleet.sim.scene import liquid_name

Array = NDArray[np.float64]

POUR_LEAN_RAD = 0.8  # from which on it flows over the lip
FULL_FLOW_LEAN_RAD = 1.15  # and from which on at its fastest
SPOUT_DIP_RAD = 0.4  # the same of a spout, whose side is so far under the horizontal
SPOUT_FULL_FLOW_RAD = 0.75
FLOW_PER_S = 0.8  # portions, at the fastest
UPRIGHT_RAD = 0.35  # a vessel that leans less can be poured into
_FALL_M = 0.15  # from higher above the mouth, the stream misses
_BELOW_M = 0.01  # that the lip may dip into the mouth
_COVER_XY_M, _COVER_Z_M = 0.026, 0.02


def full_flow_lean(vessel: Vessel) -> float:
    """How far a vessel has to lean until it flows at its fastest, rad."""
    return FULL_FLOW_LEAN_RAD if vessel.spout is None else SPOUT_FULL_FLOW_RAD


class Liquids:
    """What is in the vessels of one world."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, parts: Parts) -> None:
        self._model, self._data = model, data
        self._vessels = parts.vessels
        self._covers = [model.body(thing.name).id for thing in parts.things if thing.covers]
        self._bodies = {name: model.body(name).id for name in self._vessels}
        self._surfaces = {name: model.geom(liquid_name(name)).id for name in self._vessels}
        self._contents: dict[str, defaultdict[str, float]] = {}
        self.spilled = 0.0
        self.reset()

    def reset(self) -> None:
        """Every vessel holds what it holds at the beginning of an episode."""
        self.spilled = 0.0
        for name, vessel in self._vessels.items():
            self._contents[name] = defaultdict(float)
            if vessel.holds:
                self._contents[name][vessel.holds] = vessel.capacity
            self._show(name)

    def content(self, name: str) -> Mapping[str, float]:
        """Portions of each ingredient in a vessel."""
        return self._contents[name]

    def add(self, name: str, ingredient: str, portions: float) -> None:
        """Put an ingredient in (take it out, as far as there is any, if negative). What does not fit is spilled."""
        if portions < 0.0:
            content = self._contents[name]
            content[ingredient] = max(0.0, content[ingredient] + portions)
        else:
            self._receive(name, {ingredient: portions})
        self._show(name)

    def fall(self, point: Array, ingredient: str, portions: float) -> None:
        """A stream from a point, [3] m in base_link: into the vessel below it, or spilled."""
        self._land(self._below(None, point), {ingredient: portions})

    def surface(self, name: str) -> Array:
        """Centre of the liquid's surface, of the floor where there is none: [3] m in base_link."""
        return np.array(self._in_base(name, (0.0, 0.0, self._surface_height(name))))

    def mouth(self, name: str) -> Array:
        """Centre of a vessel's opening, [3] m in base_link."""
        return self._in_base(name, (0.0, 0.0, self._vessels[name].mouth))

    def spout(self, name: str) -> Array | None:
        """Tip of a vessel's spout, if it has one, [3] m in base_link."""
        spout = self._vessels[name].spout
        return None if spout is None else self._in_base(name, spout)

    def lean(self, name: str) -> float:
        """Angle between the vessel's axis and the vertical, rad."""
        return lean(self._data, self._bodies[name])

    def step(self, seconds: float) -> None:
        """Let everything flow for a time. Call after the physics."""
        for name, vessel in self._vessels.items():
            outlet = self._outlet(name, vessel) if any(self._contents[name].values()) else None
            if outlet is not None:
                share, point = outlet
                self._pour(name, self._below(name, point), FLOW_PER_S * share * seconds)

    def _outlet(self, name: str, vessel: Vessel) -> tuple[float, Array] | None:
        """How fast it flows out of a vessel, as a share of the fastest, and from where; None if it does not."""
        if vessel.spout is not None:
            share = _share(self._dip(name, vessel.spout), SPOUT_DIP_RAD, SPOUT_FULL_FLOW_RAD)
            if share > 0.0:
                return share, self._in_base(name, vessel.spout)
        share = _share(self.lean(name), POUR_LEAN_RAD, FULL_FLOW_LEAN_RAD)
        return None if share == 0.0 or self._covered(name) else (share, self._lip(name, vessel))

    def _dip(self, name: str, spout: tuple[float, float, float]) -> float:
        """How far the side with the spout is under the horizontal, rad."""
        up = self._data.xmat[self._bodies[name]].reshape(3, 3)[2]  # in the body's frame
        sine = -(spout[0] * up[0] + spout[1] * up[1]) / float(np.hypot(spout[0], spout[1]))
        return float(np.arcsin(np.clip(sine, -1.0, 1.0)))

    def _pour(self, source: str, receiver: str | None, portions: float) -> None:
        content = self._contents[source]
        share = min(1.0, portions / sum(content.values()))
        stream = {ingredient: amount * share for ingredient, amount in content.items()}
        for ingredient, amount in stream.items():
            content[ingredient] -= amount
        self._show(source)
        self._land(receiver, stream)

    def _land(self, receiver: str | None, stream: Mapping[str, float]) -> None:
        if receiver is None:
            self.spilled += sum(stream.values())
        else:
            self._receive(receiver, stream)
            self._show(receiver)

    def _receive(self, name: str, mixture: Mapping[str, float]) -> None:
        """Add as much of a mixture as there is room for; the rest is spilled."""
        content, total = self._contents[name], sum(mixture.values())
        room = max(0.0, self._vessels[name].capacity - sum(content.values()))
        fits = min(1.0, room / total) if total > 0.0 else 1.0
        for ingredient, portions in mixture.items():
            content[ingredient] += portions * fits
        self.spilled += total * (1.0 - fits)

    def _lip(self, name: str, vessel: Vessel) -> Array:
        """Where liquid leaves a leaning vessel: on the lowest side of its mouth."""
        down = self._data.xmat[self._bodies[name]].reshape(3, 3)[2]  # the vertical in the body's frame
        sideways = -down[:2] / max(float(np.hypot(down[0], down[1])), 1e-9)
        return self._in_base(name, (vessel.lip * sideways[0], vessel.lip * sideways[1], vessel.mouth))

    def _below(self, source: str | None, outlet: Array) -> str | None:
        """The vessel into which a stream from `outlet` falls: of several, the highest."""
        found, highest = None, -np.inf
        for name, vessel in self._vessels.items():
            if name == source or self.lean(name) > UPRIGHT_RAD or self._covered(name):
                continue
            mouth = self.mouth(name)
            offset = outlet - mouth
            inside = np.hypot(offset[0], offset[1]) < vessel.radius and -_BELOW_M < offset[2] < _FALL_M
            if inside and mouth[2] > highest:
                found, highest = name, float(mouth[2])
        return found

    def _covered(self, name: str) -> bool:
        mouth = self.mouth(name)
        for body in self._covers:
            offset = self._data.xpos[body] - mouth
            if np.hypot(offset[0], offset[1]) < _COVER_XY_M and abs(offset[2]) < _COVER_Z_M:
                return True
        return False

    def _surface_height(self, name: str) -> float:
        vessel = self._vessels[name]
        share = min(1.0, sum(self._contents[name].values()) / vessel.capacity)
        return vessel.floor + share * (vessel.mouth - vessel.floor) * 0.9

    def _show(self, name: str) -> None:
        geom = self._surfaces[name]
        self._model.geom_pos[geom, 2] = self._surface_height(name)
        self._model.geom_rgba[geom, 3] = 1.0 if sum(self._contents[name].values()) > 1e-6 else 0.0

    def _in_base(self, name: str, point: tuple[float, float, float]) -> Array:
        body = self._bodies[name]
        position: Array = self._data.xpos[body] + self._data.xmat[body].reshape(3, 3) @ point
        return position


def _share(angle: float, start: float, full: float) -> float:
    """0 up to `start`, 1 from `full` on."""
    return min(1.0, max(0.0, (angle - start) / (full - start)))


def lean(data: mujoco.MjData, body: int) -> float:
    """Angle between a body's z axis and the vertical, rad."""
    return float(np.arccos(np.clip(data.xmat[body, 8], -1.0, 1.0)))
