# SPDX-License-Identifier: Apache-2.0
"""The choice of the OpenGL backend."""

import subprocess
import sys

import pytest

from lwd_fleet.sim import rendering


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    return monkeypatch


def test_egl_is_preferred_then_osmesa(unset: pytest.MonkeyPatch) -> None:
    unset.setattr(rendering, "_egl_problem", lambda: None)
    assert rendering.choose_backend() == "egl"
    unset.setattr(rendering, "_egl_problem", lambda: "no driver")
    unset.setattr(rendering, "_osmesa_problem", lambda: None)
    assert rendering.choose_backend() == "osmesa"


def test_the_environment_decides(unset: pytest.MonkeyPatch) -> None:
    unset.setenv("MUJOCO_GL", "osmesa")
    assert rendering.choose_backend() == "osmesa"
    unset.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(rendering.RenderingUnavailable, match="MUJOCO_GL='glfw'"):
        rendering.choose_backend()


def test_without_opengl_the_error_names_the_packages(unset: pytest.MonkeyPatch) -> None:
    unset.setattr(rendering, "_egl_problem", lambda: "libEGL.so.1: not found")
    unset.setattr(rendering, "_osmesa_problem", lambda: "libOSMesa.so.8 is not installed")
    with pytest.raises(rendering.RenderingUnavailable) as error:
        rendering.choose_backend()
    assert "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0" in str(error.value)
    assert "apt-get install libosmesa6" in str(error.value)


def test_one_process_renders_several_worlds_and_ends_silently() -> None:
    script = """
from lwd_fleet.sim.world import World
worlds = [World("place"), World("stow", image_size=48)]
for world in worlds:
    world.reset(0)
pictures = [world.render("top") for world in worlds + worlds]
assert (pictures[0] == pictures[2]).all() and (pictures[1] == pictures[3]).all()
assert pictures[0].std() > 10 and pictures[1].shape == (48, 48, 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_triton_can_be_loaded_in_a_process_that_renders() -> None:
    pytest.importorskip("triton", reason="only torch's builds for NVIDIA have it")
    script = "from lwd_fleet.sim.world import World; w = World('place'); w.reset(0); w.render('top'); import triton"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
