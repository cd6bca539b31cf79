"""A Ray of two CPUs for each module that asks for one; the others have Rays of their own, or none."""

from collections.abc import Iterator

import pytest

from cluster.ray_cluster import ray_session


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    with ray_session(None, 2):
        yield
