# SPDX-License-Identifier: Apache-2.0
"""Package `lwd_policy`."""

from setuptools import find_packages, setup

NAME = "lwd_policy"

setup(
    name=NAME,
    version="0.1.0",
    description="What an observation and an action are, the flow policy, its checkpoints and the node that runs it.",
    maintainer="lwd maintainers",
    maintainer_email="maintainers@lwd.example",
    license="Apache-2.0",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={"": ["py.typed", "*.json", "*.safetensors", "*.md"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
    ],
    zip_safe=False,
    extras_require={"test": ["pytest"]},  # `colcon test` runs pytest only if it is named here
    entry_points={"console_scripts": ["policy_node = lwd_policy.policy_node:main"]},
)
