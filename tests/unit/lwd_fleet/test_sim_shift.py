# SPDX-License-Identifier: Apache-2.0
"""Each knob of a deployment shift moves what it names, and nothing else."""

import numpy as np
import pytest

from lwd_fleet.sim.parts import GROCERIES
from lwd_fleet.sim.shift import Randomisation, Shift
from lwd_fleet.sim.world import World


def _world(
    task: str = "place", seed: int = 0, randomisation: Randomisation | None = None, **shift: object
) -> World:
    world = World(task, Shift(**shift), randomisation=randomisation)
    world.reset(seed)
    return world


def _objects(world: World) -> np.ndarray:
    return np.stack([world.position(item.name) for item in GROCERIES])


def _nominal_tool(world: World, arm: str) -> np.ndarray:
    columns = world.embodiment.arm_columns(arm)[:-1]
    return world.embodiment.arm(arm).chain.forward(world.joint_positions[columns])[0]


def test_without_a_shift_kinematics_and_world_agree() -> None:
    world = _world()
    np.testing.assert_allclose(world.tool("left"), _nominal_tool(world, "left"), atol=1e-9)


def test_a_calibration_offset_moves_the_arms_and_not_what_they_believe() -> None:
    world = _world(calibration_offset_m=(0.01, -0.02, 0.03, 0.0))
    np.testing.assert_allclose(world.tool("left") - _nominal_tool(world, "left"), [0.01, -0.02, 0], atol=1e-9)
    np.testing.assert_allclose(world.tool("right") - _nominal_tool(world, "right"), [0.03, 0, 0], atol=1e-9)
    np.testing.assert_array_equal(_objects(world), _objects(_world()))


def test_a_calibration_sigma_draws_an_offset_per_arm_and_episode() -> None:
    world = World("place", Shift(calibration_sigma_m=0.01))
    errors = []
    for seed in range(40):
        world.reset(seed)
        errors.append([(world.tool(arm) - _nominal_tool(world, arm))[:2] for arm in ("left", "right")])
    spread = np.std(errors, axis=0)
    assert (spread > 0.005).all() and (spread < 0.016).all()
    assert abs(np.corrcoef(np.array(errors)[:, 0, 0], np.array(errors)[:, 1, 0])[0, 1]) < 0.6


def test_a_placement_range_spreads_the_items() -> None:
    near, far = World("place"), World("place", Shift(placement_range_scale=1.3))
    points: dict[str, list[np.ndarray]] = {"near": [], "far": []}
    for seed in range(60):
        for name, world in (("near", near), ("far", far)):
            world.reset(seed)
            points[name].append(_objects(world)[:, :2])
    assert np.abs(np.array(points["near"])[..., 0]).max() <= 0.13 + 1e-9
    assert np.abs(np.array(points["far"])[..., 0]).max() > 0.13


def test_a_camera_offset_moves_the_picture_of_the_top_camera_only() -> None:
    nominal, moved = _world(), _world(camera_offset_m=(0.03, 0.0, 0.0))
    assert (nominal.render("top") != moved.render("top")).any()
    np.testing.assert_array_equal(nominal.render("wrist_left"), moved.render("wrist_left"))
    np.testing.assert_array_equal(nominal.state(), moved.state())


@pytest.mark.parametrize("knob", [{"colour_jitter": 0.1}, {"light_jitter": 0.3}, {"camera_jitter_m": 0.02}])
def test_a_visual_shift_changes_pictures_and_not_physics(knob: dict[str, float]) -> None:
    nominal, shifted = _world(), _world(**knob)
    assert (nominal.render("top") != shifted.render("top")).any()
    for _ in range(20):
        nominal.step(nominal.embodiment.home)
        shifted.step(shifted.embodiment.home)
    np.testing.assert_array_equal(nominal.state(), shifted.state())


def test_latency_delays_a_command_by_its_ticks() -> None:
    prompt, late = _world(), _world(command_latency_ticks=3)
    target = prompt.embodiment.home + np.where(np.arange(14) == 0, 0.3, 0.0)
    history: dict[str, list[float]] = {"prompt": [], "late": []}
    for _ in range(20):
        for name, world in (("prompt", prompt), ("late", late)):
            world.step(target)
            history[name].append(world.joint_positions[0])
    np.testing.assert_allclose(history["late"][3:], history["prompt"][:-3], atol=1e-6)
    assert abs(history["late"][2]) < 1e-6


def test_larger_items_stand_on_the_table() -> None:
    world = _world(object_scale=1.2)
    for _ in range(50):
        world.step(world.embodiment.home)
    for item in GROCERIES:
        assert abs(world.position(item.name)[2] - 1.2 * item.rest_height) < 0.001


def test_friction_scales_every_contact() -> None:
    # A slippery cube pushed sideways slides further.
    distances = []
    for friction in (1.0, 0.2):
        world = _world(friction=friction)
        start = world.position("red_cube")
        address = int(world._model.joint("red_cube").dofadr[0])
        world._data.qvel[address] = 0.3
        for _ in range(30):
            world.step(world.embodiment.home)
        distances.append(world.position("red_cube")[0] - start[0])
    assert distances[1] > 2 * distances[0] > 0


def test_a_used_world_forgets_the_shift_of_its_last_episode() -> None:
    world = _world(seed=1, calibration_sigma_m=0.02, colour_jitter=0.2, camera_jitter_m=0.02)
    world.reset(2)
    fresh = _world(seed=2, calibration_sigma_m=0.02, colour_jitter=0.2, camera_jitter_m=0.02)
    np.testing.assert_array_equal(world.render("top"), fresh.render("top"))
    np.testing.assert_array_equal(world.tool("left"), fresh.tool("left"))


def test_randomisation_varies_everything_a_picture_shows_and_keeps_items_in_place() -> None:
    wild = World("place", randomisation=Randomisation())
    pictures, joints = [], []
    for seed in range(6):
        wild.reset(seed)
        pictures.append(wild.render("top").astype(float))
        joints.append(wild.joint_positions)
        np.testing.assert_array_equal(_objects(wild), _objects(_world(seed=seed)))
    corners = np.array(pictures)[:, 2, 48]
    assert corners.std(axis=0).min() > 8  # the table's colour
    assert np.std(joints, axis=0)[[0, 6, 7, 13]].min() > 0.005


def test_a_shift_survives_json_and_refuses_nonsense() -> None:
    shift = Shift(calibration_offset_m=(0.0, 0.01, 0.0, 0.0), command_latency_ticks=2)
    assert Shift.from_json(shift.to_json()) == shift
    assert Shift().to_json() == "{}" and Shift.from_json("") == Shift()
    for text, message in [
        ('{"gravity": 3}', "unknown shift: gravity"),
        ('{"object_scale": 0}', "object_scale must be positive"),
        ('{"calibration_offset_m": [1]}', "needs 4 numbers"),
        ('{"friction": NaN}', "not finite"),
        ("[1]", "JSON object"),
    ]:
        with pytest.raises(ValueError, match=message):
            Shift.from_json(text)
