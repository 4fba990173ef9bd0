# SPDX-License-Identifier: Apache-2.0
"""For every test: a ROS domain that no other run of this machine has, and one thread per process."""

import os

import pytest

try:
    from lwd_fleet.domain import PrivateDomain
except ImportError as error:
    raise pytest.UsageError(f"{error}; build first, then start with scripts/run: `make test`") from error

_DOMAIN = pytest.StashKey[PrivateDomain]()


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    domain = PrivateDomain()
    os.environ.update(domain.environment)
    config.stash[_DOMAIN] = domain


def pytest_unconfigure(config: pytest.Config) -> None:
    if domain := config.stash.get(_DOMAIN, None):
        domain.release()
