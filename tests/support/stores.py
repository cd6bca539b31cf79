"""Every store that the contract of storage is held against: places on this machine, and real servers."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cluster.storage.objects import forget
from cluster.storage.path import StoragePath
from tests.support.servers.endpoint import Endpoint

PLACES = ("file", "memory")
SERVERS = ("ceph", "moto", "azurite")
TRUSTED = (*PLACES, *SERVERS)


def reach(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    """Make this process reach an endpoint as a user would, by environment variables alone; its root."""
    for name, value in endpoint.environment.items():
        monkeypatch.setenv(name, value)
    forget()
    return StoragePath.parse(endpoint.root)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoragePath]:
    """A fresh root; parametrize it indirectly with a name from `TRUSTED`."""
    name = request.param
    if name == "file":
        yield StoragePath.parse(tmp_path / "root")
    elif name == "memory":
        yield StoragePath.parse(f"memory://{uuid.uuid4().hex}/root")
        fsspec.filesystem("memory").store.clear()
    else:
        yield reach(request.getfixturevalue(name).bucket(), monkeypatch) / "root"
        forget()
