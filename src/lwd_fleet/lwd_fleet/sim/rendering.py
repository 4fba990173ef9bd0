# SPDX-License-Identifier: Apache-2.0
"""Offscreen rendering: one OpenGL context per process serves every simulated robot in it.

This works because the scenes have no meshes and all name the same textures in the same order, so that a
context made for one model draws any of them. The backend is EGL where it works, else OSMesa; MUJOCO_GL
overrides the choice.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import threading
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

_MAX_GEOMS = 400
_LARGEST_IMAGE_PX = 640
_EGL_PACKAGES = "libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0"
_OSMESA_PACKAGES = "libosmesa6"
_EGL_EXTENSION_DEVICE = 0x313F  # EGL_PLATFORM_DEVICE_EXT


class RenderingUnavailable(RuntimeError):
    """No OpenGL backend works here; the text names the packages to install."""


class Renderer:
    """Draws a camera of any model of this simulator. Get the process's one from `shared_renderer`."""

    def __init__(self, model: mujoco.MjModel) -> None:
        """Open the context. Raises RenderingUnavailable."""
        _load_triton_first()
        self.backend = choose_backend()
        os.environ["MUJOCO_GL"] = self.backend  # read by the library when it loads OpenGL
        self._gl: Any = _open_context(self.backend)
        self._gl.make_current()
        self._thread = threading.get_ident()
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._options = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_resizeOffscreen(_LARGEST_IMAGE_PX, _LARGEST_IMAGE_PX, self._context)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera_id: int, height: int, width: int
    ) -> NDArray[np.uint8]:
        """Picture of one camera: [height, width, 3] RGB. Poses in `data` must be current (mj_kinematics)."""
        if threading.get_ident() != self._thread:  # a context is current in one thread at a time
            self._gl.make_current()
            self._thread = threading.get_ident()
        self._camera.fixedcamid = camera_id
        mujoco.mjv_updateScene(
            model, data, self._options, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        rectangle = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        upside_down = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(upside_down, None, rectangle, self._context)
        return np.ascontiguousarray(upside_down[::-1])

    def close(self) -> None:
        """Free the context. Left to the interpreter's end, the order of destruction gives noisy errors."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


_shared: tuple[int, Renderer] | None = (
    None  # (process id, renderer): a fork must not use its parent's context
)


def shared_renderer(model: mujoco.MjModel) -> Renderer:
    """The process's renderer, opened on first use; any model does. Raises RenderingUnavailable."""
    global _shared
    if _shared is None or _shared[0] != os.getpid():
        _shared = (os.getpid(), Renderer(model))
        atexit.register(_close, _shared)
    return _shared[1]


def _close(owned: tuple[int, Renderer]) -> None:
    if owned[0] == os.getpid():
        owned[1].close()


def choose_backend() -> str:
    """The backend that works here, egl or osmesa; what MUJOCO_GL says if set. Raises RenderingUnavailable."""
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen in ("egl", "osmesa"):
        return chosen
    if chosen:
        raise RenderingUnavailable(
            f"MUJOCO_GL={chosen!r}: only egl and osmesa render without a display; unset it"
        )
    egl = _egl_problem()
    if egl is None:
        return "egl"
    osmesa = _osmesa_problem()
    if osmesa is None:
        return "osmesa"
    raise RenderingUnavailable(
        f"no OpenGL for rendering the cameras. EGL: {egl}. OSMesa: {osmesa}. "
        f"Install one of them: apt-get install {_EGL_PACKAGES}   or: apt-get install {_OSMESA_PACKAGES}"
    )


def _load_triton_first() -> None:
    """Triton comes with torch's builds for NVIDIA and has an LLVM in it, as Mesa's software drivers have one.

    A process that loads Triton after Mesa has drawn ends in a segmentation fault; the other way round both work.
    """
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")


def _open_context(backend: str) -> Any:
    packages = _EGL_PACKAGES if backend == "egl" else _OSMESA_PACKAGES
    try:
        if backend == "egl":
            from mujoco.egl import GLContext  # loads OpenGL for this platform: only after the choice
        else:
            from mujoco.osmesa import GLContext
        return GLContext(_LARGEST_IMAGE_PX, _LARGEST_IMAGE_PX)
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
    ) as error:  # what its loaders raise when a library lacks
        raise RenderingUnavailable(
            f"OpenGL backend {backend!r} does not start ({error}); apt-get install {packages}"
        ) from error


def _egl_problem() -> str | None:
    """Why EGL cannot draw here, None if it can: asks the libraries, as the bindings fail only when in use."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        ctypes.CDLL("libOpenGL.so.0")
    except OSError as error:
        return str(error)
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    get_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not get_display:
        return "the driver cannot list devices"
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)
    if not query_devices(16, ctypes.byref(devices), ctypes.byref(count)) or count.value == 0:
        return "no device (is a driver such as libgl1-mesa-dri installed?)"
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(
        get_display
    )
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    for device in devices[: count.value]:
        display = display_of(_EGL_EXTENSION_DEVICE, device, None)
        if display and egl.eglInitialize(display, None, None):
            return None
    return (
        f"none of {count.value} devices can be initialised (is a driver such as libgl1-mesa-dri installed?)"
    )


def _osmesa_problem() -> str | None:
    for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return None
    return "libOSMesa.so.8 is not installed"
