"""One finished run, for every test that only looks at it or changes a copy."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.storage import attempts, objects, traffic
from cluster.storage.objects import forget
from cluster.storage.path import StoragePath
from tests.support.command import invoke
from tests.support.fixtures import manifest_tree, write_manifest
from tests.support.servers.ceph import CephServer
from tests.support.servers.fault_proxy import FaultProxy
from tests.support.stores import reach


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`manifest`, `tree`, `root` and the `result` of a whole run; do not change any of it."""
    folder = tmp_path_factory.mktemp("finished")
    tree = manifest_tree(tiny_model, tiny_corpus, folder / "root")
    manifest = write_manifest(folder / "tiny.yaml", tree)
    # By whatever this process did before; a run tells of its own.
    traffic.written(10**9)
    result = invoke("run", manifest)
    assert result.code == 0, result.err
    return SimpleNamespace(manifest=manifest, tree=tree, root=folder / "root", result=result)


@pytest.fixture
def copied(finished: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of the finished run, to be changed; its manifest names the copied root."""
    root = shutil.copytree(finished.root, tmp_path / "root")
    tree = finished.tree | {"root": str(root)}
    return SimpleNamespace(root=root, tree=tree, manifest=write_manifest(tmp_path / "tiny.yaml", tree))


@pytest.fixture
def bucket(ceph: CephServer, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoragePath]:
    """A bucket behind the proxy, with little patience for requests that nobody answers."""
    s3 = {**objects._OPTIONS["s3"]["config_kwargs"], "read_timeout": 1.0, "connect_timeout": 2}
    monkeypatch.setitem(objects._OPTIONS, "s3", {"config_kwargs": s3})
    monkeypatch.setattr(attempts, "FIRST_WAIT_SECONDS", 0.02)
    yield reach(fault_proxy.endpoint(ceph.bucket()), monkeypatch)
    forget()
