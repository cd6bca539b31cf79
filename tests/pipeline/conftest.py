"""One finished run of the tiny manifest, shared by the tests of every stage; do not change it."""

from pathlib import Path

import pytest

from jobs import runner
from tests.support.fixtures import manifest_tree
from tests.support.stages import Run, by_name, manifest_of


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_corpus: Path) -> Run:
    manifest = manifest_of(manifest_tree(tiny_model, tiny_corpus, tmp_path_factory.mktemp("run") / "root"))
    return Run(manifest, tiny_model, tiny_corpus, by_name(runner.run(manifest)))
