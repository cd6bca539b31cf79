"""One finished run, for every test that only looks at it or changes a copy."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.command import invoke
from tests.support.fixtures import manifest_tree, write_manifest


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`manifest`, `tree`, `root` and the `result` of a whole run; do not change any of it."""
    folder = tmp_path_factory.mktemp("finished")
    tree = manifest_tree(tiny_model, tiny_corpus, folder / "root")
    manifest = write_manifest(folder / "tiny.yaml", tree)
    result = invoke("run", manifest)
    assert result.code == 0, result.err
    return SimpleNamespace(manifest=manifest, tree=tree, root=folder / "root", result=result)


@pytest.fixture
def copied(finished: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of the finished run, to be changed; its manifest names the copied root."""
    root = shutil.copytree(finished.root, tmp_path / "root")
    tree = finished.tree | {"root": str(root)}
    return SimpleNamespace(root=root, tree=tree, manifest=write_manifest(tmp_path / "tiny.yaml", tree))
