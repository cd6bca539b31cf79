"""One Ray of two CPUs for all tests of pools and gangs."""

from collections.abc import Iterator

import pytest

from cluster.ray_cluster import ray_session


@pytest.fixture(scope="package")
def two_cpus() -> Iterator[None]:
    with ray_session(None, 2):
        yield
