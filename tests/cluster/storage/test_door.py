"""Which stores are trusted, and that a root remembers when one was not."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.storage import probe
from cluster.storage.objects import forget
from cluster.storage.path import StoragePath
from cluster.storage.probe import ATOMIC, require_trusted
from jobs.manifest import load
from jobs.workspace import OWNER, SINGLE_WRITER, Workspace
from schemas.errors import ManifestError
from schemas.manifest import Manifest
from schemas.records import RootRecord, parse_record
from tests.support.fixtures import write_manifest


class LooksFirst(MemoryFileSystem):
    """As sftp, smb and webhdfs create: is it there? Then write. A race is won by chance."""

    protocol = "looksfirst"
    store: Any = {}  # noqa: RUF012 - as fsspec has it
    pseudo_dirs: Any = [""]  # noqa: RUF012 - as fsspec has it

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("looksfirst://", "memory://")))


@pytest.fixture
def weak() -> Any:
    """A root in a store whose library looks first."""
    fsspec.register_implementation("looksfirst", LooksFirst, clobber=True)
    yield StoragePath.parse("looksfirst://root")
    LooksFirst.store.clear()
    forget()


def test_store_whose_library_is_not_known_to_create_only_is_refused(weak: StoragePath) -> None:
    with pytest.raises(ManifestError, match=r"looksfirst://root cannot be trusted with more") as caught:
        require_trusted(weak, single_writer=False)
    assert "looksfirst://" in str(caught.value)
    assert "compute.single_writer: true" in caught.value.remedy


def test_store_whose_library_is_not_known_is_used_by_a_single_writer(weak: StoragePath) -> None:
    assert require_trusted(weak, single_writer=True).startswith("single-writer: ")


def test_store_whose_library_is_not_known_is_not_even_asked(weak: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says would be chance."""
    monkeypatch.setattr(probe, "probe", lambda root: pytest.fail("it was asked"))
    with pytest.raises(ManifestError):
        require_trusted(weak, single_writer=False)


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "file", "local", "memory"])
def test_every_name_of_a_store_that_creates_only_is_known(scheme: str) -> None:
    assert StoragePath.parse(f"{scheme}:///box/root").scheme in ATOMIC


@pytest.mark.parametrize("scheme", ["sftp", "ssh", "smb", "webhdfs", "hdfs", "ftp", "adl", "https", "github"])
def test_no_other_store_is_known(scheme: str) -> None:
    assert StoragePath.parse(f"{scheme}://box/root").scheme not in ATOMIC


def claimed(manifest: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, single_writer: bool) -> Manifest:
    parsed = load(manifest, [])
    monkeypatch.setattr(probe, "probe", lambda root: wrong)
    Workspace.of(parsed).claim(single_writer)
    return parsed


class TestRecord:
    """A root says how objects were created below it, by the weakest store that was ever accepted."""

    @pytest.fixture
    def manifest(self, tiny_tree: dict[str, Any], tmp_path: Path) -> Path:
        return write_manifest(tmp_path / "m.yaml", tiny_tree)

    def creates(self, parsed: Manifest) -> list[str]:
        paths = [Path(parsed.root) / name for name in (OWNER, SINGLE_WRITER)]
        return [parse_record(RootRecord, path.read_bytes(), path.name).creates for path in paths if path.exists()]

    def test_root_that_was_always_trusted_says_so(self, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for single_writer in (False, True):
            parsed = claimed(manifest, monkeypatch, "", single_writer)
        assert self.creates(parsed) == ["if-absent"]

    def test_root_that_is_trusted_no_more_says_so(self, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for wrong in ("", "it overwrites", "it races", ""):
            parsed = claimed(manifest, monkeypatch, wrong, bool(wrong))
        assert self.creates(parsed) == ["if-absent", "single-writer: it overwrites"]

    def test_root_that_was_never_trusted_says_so_once(self, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for wrong in ("it overwrites", "", "it races"):
            parsed = claimed(manifest, monkeypatch, wrong, bool(wrong))
        assert self.creates(parsed) == ["single-writer: it overwrites"]
