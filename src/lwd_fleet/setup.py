# SPDX-License-Identifier: Apache-2.0
"""Package `lwd_fleet`; it installs the top-level `config` tree and the launch files of the robot side.

`launch` and `config` beside this file are links to the folders at the top of the repository.
"""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "lwd_fleet"
LAUNCH_FILES = ("robot", "sim", "rviz")


def config_files() -> list[tuple[str, list[str]]]:
    """Entries of `data_files` for every file below `config`, one per folder."""
    folders: dict[Path, list[str]] = {}
    for file in sorted(path for path in Path("config").rglob("*") if path.is_file()):
        folders.setdefault(file.parent, []).append(str(file))
    if not folders:  # a checkout without symbolic links would install nothing, and say nothing
        raise SystemExit(f"{NAME}: config/ is empty or no folder; check it out with symbolic links")
    return [(f"share/{NAME}/{folder}", files) for folder, files in folders.items()]


setup(
    name=NAME,
    version="0.1.0",
    description="The robot side and the fleet side of lwd.",
    maintainer="lwd maintainers",
    maintainer_email="maintainers@lwd.example",
    license="Apache-2.0",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={"": ["py.typed", "*.json", "*.safetensors", "*.xml", "*.html"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", [f"launch/{name}.launch.py" for name in LAUNCH_FILES]),
        *config_files(),
    ],
    zip_safe=False,
    extras_require={"test": ["pytest"]},  # `colcon test` runs pytest only if it is named here
    entry_points={
        "console_scripts": [
            "sim_robot_node = lwd_fleet.sim.sim_robot_node:main",
            "arbiter_node = lwd_fleet.robot.arbiter_node:main",
            "episode_node = lwd_fleet.robot.episode_node:main",
            "recorder_node = lwd_fleet.robot.recorder_node:main",
            "uploader_node = lwd_fleet.data.uploader_node:main",
            "coordinator_node = lwd_fleet.rollout.coordinator_node:main",
            "lifecycle_manager_node = lwd_fleet.lifecycle_manager_node:main",
        ]
    },
)
