"""The servers, started by the first test that asks for one and ended with the tests.

Where a server is not installed the test is skipped with a line that says what to install. It fails in place of that
where KILOBASIS_REQUIRE_SERVERS names the server, or is 1. Machines in namespaces are no server, and not every root may
make them: they are asked for by the name `namespaces` alone.
"""

import os
from collections.abc import Iterator

import pytest

from tests.support.servers.azurite import AzuriteServer
from tests.support.servers.ceph import CephServer
from tests.support.servers.fault_proxy import FaultProxy
from tests.support.servers.gcs import GcsServer
from tests.support.servers.moto import MotoServer
from tests.support.servers.server import Server
from tests.support.servers.swift import SwiftServer

REQUIRED = "KILOBASIS_REQUIRE_SERVERS"


def require(kind: type[Server]) -> None:
    """Skip or fail where a server cannot be started."""
    missing = kind.missing()
    if missing is None:
        return
    required = os.environ.get(REQUIRED, "").split()
    if "1" in required or kind.name in required:
        pytest.fail(f"{missing}, but {REQUIRED} asks for it", pytrace=False)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephServer]:
    """Ceph RGW in memory: the real S3."""
    require(CephServer)
    with CephServer() as server:
        yield server


@pytest.fixture(scope="session")
def durable_ceph() -> Iterator[CephServer]:
    """Ceph RGW on disk, for tests that kill its daemons; they start again what they kill."""
    require(CephServer)
    with CephServer("bluestore") as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    """The mock of Amazon's S3."""
    require(MotoServer)
    with MotoServer() as server:
        yield server


@pytest.fixture(scope="session")
def azurite() -> Iterator[AzuriteServer]:
    """The emulator of Azure's blobs."""
    require(AzuriteServer)
    with AzuriteServer() as server:
        yield server


@pytest.fixture(scope="session")
def swift() -> Iterator[SwiftServer]:
    """OpenStack Swift: S3 whose create-if-absent can have several winners."""
    require(SwiftServer)
    with SwiftServer() as server:
        yield server


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsServer]:
    """The mock of Google's storage that ignores preconditions."""
    require(GcsServer)
    with GcsServer() as server:
        yield server


@pytest.fixture
def fault_proxy() -> Iterator[FaultProxy]:
    """A proxy without rules; `fault_proxy.endpoint(server.bucket())` is a bucket behind it."""
    with FaultProxy() as proxy:
        yield proxy
