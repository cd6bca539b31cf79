"""A manifest long enough to be killed in the middle of every stage, and runs of it that nothing happened to."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.fixtures import make_corpus, manifest_tree, write_manifest

UNITS = 24


@pytest.fixture(scope="session")
def long_tree(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest without a root; do not change it."""
    corpus = make_corpus(tmp_path_factory.mktemp("long") / "corpus", count=1500, files=6)
    made = manifest_tree(tiny_model, corpus, Path("unset"))
    made["harvest"] |= {"unit_rows": 1536, "chunk_rows": 256, "tokens": UNITS * 1536}
    made["dictionaries"][0]["features"] = 256
    made["dictionaries"][0]["train"] |= {"tokens": 140_000, "batch": 256}
    made["compute"] = {
        "pool": "ray", "workers": 2, "threads": 1, "rank_threads": 1, "checkpoint_seconds": 0.5, "lease_seconds": 15,
    }  # fmt: skip
    return made


def _run(tree: dict[str, Any], ranks: int, folder: Path) -> Path:
    manifest = write_manifest(folder / "m.yaml", {**tree, "root": str(folder / "root")})
    process = runs.start("run", str(manifest), "--set", f"compute.sharding.data={ranks}", log=folder / "log")
    assert process.wait(timeout=runs.PATIENCE) == 0, (folder / "log").read_text()
    return folder / "root"


@pytest.fixture(scope="session")
def one_rank(long_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a run on a Ray of its own, trained by one rank; do not change it."""
    return _run(long_tree, 1, tmp_path_factory.mktemp("one_rank"))


@pytest.fixture(scope="session")
def two_ranks(long_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, trained by a gang of two."""
    return _run(long_tree, 2, tmp_path_factory.mktemp("two_ranks"))
