"""Which stores are trusted, and that a root remembers when one was not."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.storage import probe
from cluster.storage.objects import forget, names
from cluster.storage.path import StoragePath
from cluster.storage.probe import ATOMIC, Mark, marked, require_trusted, wrong_with
from jobs.manifest import load
from jobs.workspace import OWNER, SINGLE_WRITER, Workspace
from schemas.errors import ManifestError, StorageError
from schemas.manifest import Manifest
from schemas.records import RootRecord, parse_record
from tests.support.fixtures import write_manifest
from tests.support.stores import TRUSTED


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


class TestMark:
    """A root as another machine sees it; here the other machine is another place, or a store that has changed."""

    def test_root_that_is_the_same_is_trusted_and_nothing_stays(self, tmp_path: Path) -> None:
        root = StoragePath.parse(tmp_path / "root")
        with marked(root) as mark:
            assert wrong_with(mark, may_overwrite=False) == ""
        assert list(root.local.iterdir()) == []

    def test_root_that_is_another_place_is_told_and_not_touched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(probe, "LOOK_SECONDS", 0.01)
        (tmp_path / "other").mkdir()
        with marked(StoragePath.parse(tmp_path / "root")) as mark:
            there = Mark(StoragePath.parse(tmp_path / "other" / mark.path.parent.name / "mark"), mark.body)
            assert wrong_with(there, may_overwrite=False).startswith("is another place there")
        assert list((tmp_path / "other").iterdir()) == []

    def test_mark_that_is_seen_late_is_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = iter([None, None])
        inner = probe.read_bytes

        def late(path: StoragePath) -> bytes:
            if next(looks, "there") is None:
                raise FileNotFoundError(path)
            return inner(path)

        monkeypatch.setattr(probe, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(probe, "read_bytes", late)
        with marked(StoragePath.parse(tmp_path / "root")) as mark:
            assert wrong_with(mark, may_overwrite=False) == ""

    @pytest.mark.parametrize("may_overwrite", [True, False])
    def test_store_that_overwrites_another_machines_object_is_told_unless_it_may(
        self, may_overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(probe, "put_if_absent", lambda path, body: path.local.write_bytes(body))
        with marked(StoragePath.parse(tmp_path / "root")) as mark:
            assert wrong_with(mark, may_overwrite) == (
                "" if may_overwrite else "overwrites there what it is asked to create only"
            )

    @pytest.mark.parametrize("verb", ["read_bytes", "create", "names", "remove"])
    def test_whatever_is_refused_there_is_told(
        self, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: object) -> None:
            raise StorageError(f"cannot {verb}: PermissionError", "check the credentials")

        with marked(StoragePath.parse(tmp_path / "root")) as mark, monkeypatch.context() as there:
            there.setattr(probe, verb, refused)
            assert wrong_with(mark, may_overwrite=False) == f"cannot be used there: cannot {verb}: PermissionError"

    @pytest.mark.parametrize("store", TRUSTED, indirect=True)
    def test_every_store_takes_a_mark(self, store: StoragePath) -> None:
        with marked(store) as mark:
            assert wrong_with(mark, may_overwrite=False) == ""
        assert names(store) == []
