# SPDX-License-Identifier: Apache-2.0
"""Package `lwd_learner`; it installs the launch files of the fleet side and the `lwd` command.

`launch` beside this file is a link to the folder at the top of the repository.
"""

from setuptools import find_packages, setup

NAME = "lwd_learner"
LAUNCH_FILES = ("fleet", "learner")

setup(
    name=NAME,
    version="0.1.0",
    description="Transitions, replay, the learning algorithms, evaluation, and the lwd command.",
    maintainer="lwd maintainers",
    maintainer_email="maintainers@lwd.example",
    license="Apache-2.0",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={"": ["py.typed", "*.html", "*.css", "*.js", "*.svg", "*.j2", "*.json", "*.yaml"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", [f"launch/{name}.launch.py" for name in LAUNCH_FILES]),
    ],
    zip_safe=False,
    extras_require={"test": ["pytest"]},  # `colcon test` runs pytest only if it is named here
    entry_points={
        "console_scripts": [
            "learner_node = lwd_learner.learner_node:main",
            "lwd = lwd_learner.cli:main",
        ]
    },
)
