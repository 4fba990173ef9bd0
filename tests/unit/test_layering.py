# SPDX-License-Identifier: Apache-2.0
"""Core modules run without ROS 2: only nodes and the few adapters named here may import it.

(That a package never imports a higher one is a contract of import-linter, in pyproject.toml.)
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PACKAGES = ("lwd_policy", "lwd_fleet", "lwd_learner")
ADAPTERS = {
    "lwd_policy.managed_node",
    "lwd_policy.qos",
    "lwd_fleet.launch_description",
}
ROS = {"rclpy", "lwd_msgs", "launch", "launch_ros", "rosidl_runtime_py", "ament_index_python"}


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for file in sorted((SOURCE / package / package).rglob("*.py")):
            parts = file.relative_to(SOURCE / package).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def may_use_ros(module: str) -> bool:
    return module.endswith("_node") or module in ADAPTERS


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file names in import statements, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def is_ros(name: str) -> bool:
    package = name.split(".")[0]
    return package in ROS or (package.endswith(("_msgs", "_interfaces", "_srvs")))


CORE = {name: file for name, file in modules() if not may_use_ros(name)}


@pytest.mark.parametrize("module", CORE)
def test_a_core_module_does_not_import_ros(module: str) -> None:
    assert not {name for name in imported(CORE[module]) if is_ros(name) or may_use_ros(name)}


def test_every_adapter_named_here_exists() -> None:
    assert {name for name, _ in modules()} >= ADAPTERS
