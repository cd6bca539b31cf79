import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.storage.attempts import attempt, patience
from cluster.storage.create import create
from cluster.storage.objects import AT_ONCE, abreast, filesystem, free_bytes, names, require_writable
from cluster.storage.path import StoragePath
from schemas.errors import ManifestError, StorageError
from tests.support.contracts import StorageContract


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def base(self, tmp_path: Path) -> StoragePath:
        return StoragePath.parse(tmp_path / "base")

    def test_create_interrupted_leaves_the_name_free(self, base: StoragePath) -> None:
        # What a crash before the link leaves: a temporary file, and nothing under the name.
        base.local.mkdir()
        (base.local / ".a.0123456789abcdef.tmp").write_bytes(b"half a bo")
        assert names(base) == []
        assert create(base / "a", b"whole body")
        assert names(base) == ["a"]

    def test_create_in_new_folders_makes_their_names_durable(
        self, base: StoragePath, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A name in a folder is kept through a power cut only if the folder's own name is."""
        base.local.mkdir()
        synced: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        assert create(base / "stage/units/000000.json", b"x")
        folders = [each for each in synced if not each.endswith(".tmp")]
        assert folders == [str(base.local), str(base.local / "stage"), str(base.local / "stage/units")]
        synced.clear()
        assert create(base / "stage/units/000001.json", b"x")
        assert [each for each in synced if not each.endswith(".tmp")] == [str(base.local / "stage/units")]


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def base(self) -> Iterator[StoragePath]:
        base = StoragePath.parse(f"memory://{uuid.uuid4().hex}/base")
        yield base
        filesystem(base).store.clear()
        filesystem(base).pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data//runs///a/", "/data/runs/a"),
        ("/data/./runs/../other", "/data/other"),
        ("file:///data//a", "/data/a"),
        ("local:///data/a", "/data/a"),
        ("s3://bucket//prefix///a/", "s3://bucket/prefix/a"),
        ("s3://bucket/./a", "s3://bucket/a"),
        ("S3://Bucket/A", "s3://Bucket/A"),
        ("memory:///a//b", "memory://a/b"),
    ],
)
def test_path_parse_is_normalised(text: str, expected: str) -> None:
    assert str(StoragePath.parse(text)) == expected


@pytest.mark.parametrize("text", ["s3://bucket/../other", "gs://bucket/a/../../b", "memory://.."])
def test_path_url_that_climbs_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match=r"climbs with '\.\.'"):
        StoragePath.parse(text)


@pytest.mark.parametrize("text", ["", "   "])
def test_path_empty_text_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="empty path"):
        StoragePath.parse(text)


def test_path_relative_starts_at_the_base(tmp_path: Path) -> None:
    assert StoragePath.parse("runs/a", tmp_path) == StoragePath.parse(tmp_path / "runs/a")
    assert StoragePath.parse("../a", tmp_path / "b") == StoragePath.parse(tmp_path / "a")
    assert StoragePath.parse("/runs/a", tmp_path) == StoragePath.parse("/runs/a")
    assert StoragePath.parse("s3://bucket/a", tmp_path) == StoragePath("s3", "bucket/a")


def test_path_relative_without_base_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert StoragePath.parse("a") == StoragePath.parse(tmp_path / "a")


@pytest.mark.parametrize("root", ["/data", "s3://bucket", "memory://a/b"])
def test_path_join_and_relative_are_inverse(root: str) -> None:
    base = StoragePath.parse(root)
    joined = base / "x//y/./z/"
    assert str(joined) == f"{root}/x/y/z"
    assert joined.relative_to(base) == "x/y/z"
    assert (joined.name, str(joined.parent)) == ("z", f"{root}/x/y")
    with pytest.raises(ValueError, match="climbs out"):
        base / "x/../../y"


@pytest.mark.parametrize(("path", "root"), [("/data2/a", "/data"), ("s3://b/a", "/b"), ("/data", "/data")])
def test_path_relative_to_a_stranger_is_refused(path: str, root: str) -> None:
    with pytest.raises(ValueError, match="is not below"):
        StoragePath.parse(path).relative_to(StoragePath.parse(root))


def test_path_local_of_a_url_is_refused() -> None:
    with pytest.raises(ValueError, match="not on this machine"):
        _ = StoragePath.parse("s3://bucket/a").local


def test_abreast_in_a_bucket_asks_for_several_at_one_time_and_keeps_their_order() -> None:
    together = threading.Barrier(AT_ONCE, timeout=10)

    def ask(number: int) -> int:
        together.wait()
        return number * number

    numbers = range(20 * AT_ONCE)
    assert list(abreast(StoragePath.parse("memory://a"), ask, numbers)) == [number * number for number in numbers]


def test_abreast_error_of_one_is_raised_and_ends_it() -> None:
    asked = []

    def ask(number: int) -> int:
        asked.append(number)
        return 1 // (number - 3)

    with pytest.raises(ZeroDivisionError):
        list(abreast(StoragePath.parse("memory://a"), ask, range(10**6)))
    assert len(asked) < 10**3


def test_abreast_threads_keep_the_patience_of_who_asks() -> None:
    began = time.monotonic()
    with patience(0.05), pytest.raises(StorageError):
        list(abreast(StoragePath.parse("memory://a"), failing, ["x"]))
    assert time.monotonic() - began < 10


def failing(key: str) -> None:
    def never() -> None:
        raise ConnectionResetError(key)

    attempt(StoragePath.parse("memory://a") / key, "read", never)


def test_filesystem_unknown_scheme_says_what_to_install() -> None:
    with pytest.raises(ManifestError, match="nosuch://"):
        filesystem(StoragePath.parse("nosuch://bucket/a"))


def test_require_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    require_writable(StoragePath.parse(tmp_path / "new/root"))
    assert list(tmp_path.iterdir()) == []


def test_require_writable_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ManifestError, match="taken is a file"):
        require_writable(StoragePath.parse(tmp_path / "taken/root"))


def test_free_bytes_is_known_of_disks_only(tmp_path: Path) -> None:
    free = free_bytes(StoragePath.parse(tmp_path / "not/there/yet"))
    assert free is not None
    assert free > 0
    assert free_bytes(StoragePath.parse("s3://bucket/a")) is None


@pytest.mark.parametrize("url", ["s3://key:canary@bucket/x", "https://me:canary@host/x", "abfs://a:canary@host/x"])
def test_url_with_a_password_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ManifestError, match="holds a credential") as caught:
        StoragePath.parse(url)
    assert "canary" not in str(caught.value)


def test_url_of_an_azure_container_may_name_its_account() -> None:
    assert StoragePath.parse("abfs://box@account.dfs.core.windows.net/x").key == "box@account.dfs.core.windows.net/x"
