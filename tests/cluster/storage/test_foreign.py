"""Files that others wrote, in stores that fail for a moment or for long."""

import errno
import functools
import http.server
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import attempts, foreign
from cluster.storage.create import create
from cluster.storage.foreign import glob, open_read, signature
from cluster.storage.path import StoragePath
from schemas.errors import StorageError
from tests.support.stores import SERVERS

BODY = os.urandom(1000) * 30

Answer = Callable[[Callable[[], Any]], Any]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(foreign, "BLOCK", 1 << 12)


@pytest.fixture
def path() -> Iterator[StoragePath]:
    """An object in a store that is asked as a bucket is."""
    made = StoragePath.parse(f"memory://{uuid.uuid4().hex}/texts/a.txt")
    create(made, BODY)
    yield made
    fsspec.filesystem("memory").store.clear()


def busy(_: Callable[[], Any]) -> Any:
    raise OSError(errno.EBUSY, "please reduce your request rate")


def silent(_: Callable[[], Any]) -> Any:
    raise TimeoutError


def reset(_: Callable[[], Any]) -> Any:
    raise ConnectionResetError(errno.ECONNRESET, "connection reset by peer")


def denied(_: Callable[[], Any]) -> Any:
    raise FileNotFoundError(errno.ENOENT, "no such key")


def short(real: Callable[[], Any]) -> Any:
    return real()[:-1]


ALL = {each.__name__: each for each in (busy, silent, reset, denied)}


def answering(monkeypatch: pytest.MonkeyPatch, method: str, answer: Answer, where: range) -> list[str]:
    """These of the requests of a kind get another answer; what was asked comes into the list."""
    real, asked = foreign.once, []

    def once(path: StoragePath, verb: str, *args: Any, **options: Any) -> Any:
        if verb != method:
            return real(path, verb, *args, **options)
        asked.append(path.key)
        if len(asked) - 1 not in where:
            return real(path, verb, *args, **options)
        return answer(lambda: real(path, verb, *args, **options))

    monkeypatch.setattr(foreign, "once", once)
    return asked


@pytest.mark.parametrize("answer", [*ALL.values(), short], ids=lambda answer: answer.__name__)
@pytest.mark.parametrize("first", [0, 1, 5])
def test_read_whose_requests_fail_for_a_while_gives_every_byte(
    first: int, answer: Answer, path: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, "cat_file", answer, range(first, first + 2))
    with open_read(path) as stream:
        assert b"".join(iter(functools.partial(stream.read, 777), b"")) == BODY
    assert len(asked) >= 2 + len(BODY) // foreign.BLOCK


@pytest.mark.parametrize("answer", [*ALL.values(), short], ids=lambda answer: answer.__name__)
def test_read_whose_requests_fail_for_ever_names_the_file(
    answer: Answer, path: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, "cat_file", answer, range(2, 10**6))
    with open_read(path) as stream:
        assert stream.read(10) == BODY[:10]
        with pytest.raises(StorageError, match=f"cannot read {path}: "):
            stream.read()


@pytest.mark.parametrize("answer", [busy, silent, reset], ids=lambda answer: answer.__name__)
def test_look_whose_requests_fail_is_tried_again_and_names_the_file(
    answer: Answer, path: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = signature(path)
    answering(monkeypatch, "info", answer, range(2))
    assert signature(path) == told
    answering(monkeypatch, "info", answer, range(10**6))
    for look in (signature, glob, lambda each: open_read(each).__enter__()):
        with pytest.raises(StorageError, match=f"cannot look at {path}: "):
            look(path)


def test_read_takes_no_more_memory_than_a_block(path: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = foreign.once

    def once(where: StoragePath, verb: str, *args: Any, **options: Any) -> Any:
        found = real(where, verb, *args, **options)
        if verb == "cat_file":
            sizes.append(len(found))
        return found

    monkeypatch.setattr(foreign, "once", once)
    with open_read(path) as stream:
        assert stream.read(1) == BODY[:1]
        assert sizes == [foreign.BLOCK]
        while stream.read(100):
            pass
    assert max(sizes) == foreign.BLOCK


def test_read_seeks_as_a_file_does(path: StoragePath) -> None:
    with open_read(path) as stream:
        for offset, whence in ((10, 0), (-7, 2), (0, 0), (5, 1), (len(BODY) + 3, 0), (20_000, 0), (-100, 1)):
            twin = io.BytesIO(BODY)
            twin.seek(stream.tell())
            assert stream.seek(offset, whence) == twin.seek(offset, whence)
            assert stream.read(40) == twin.read(40)


@pytest.mark.parametrize("store", SERVERS, indirect=True)
def test_files_in_a_bucket_are_found_and_read(store: StoragePath) -> None:
    for key in ("texts/a.txt", "texts/deep/b.txt", "texts/deep/c.md", "texts/.hidden.txt", "other/d.txt"):
        create(store / key, key.encode() * 2000)

    def found(pattern: str) -> list[str]:
        return [each.relative_to(store) for each in glob(store / pattern)]

    assert found("texts") == ["texts/a.txt", "texts/deep/b.txt", "texts/deep/c.md"]
    assert found("texts/*.txt") == ["texts/a.txt"]
    assert found("texts/**/*.txt") == ["texts/a.txt", "texts/deep/b.txt"]
    assert found("texts/deep/c.md") == ["texts/deep/c.md"]
    assert found("nothing") == found("nothing/*") == []
    with open_read(store / "texts/a.txt") as stream:
        assert stream.read() == b"texts/a.txt" * 2000


class Weak(http.server.BaseHTTPRequestHandler):
    """Serves one body, whole; of the first answers, so many bytes."""

    body: ClassVar[bytes] = b""
    cuts: ClassVar[list[int]] = []

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        self._head()
        self.wfile.write(self.body[: self.cuts.pop(0)] if self.cuts else self.body)

    def _head(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(body: bytes) -> Iterator[str]:
    """The URL of a server that knows no ranges."""
    Weak.body, Weak.cuts = body, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Weak) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_read_from_a_server_without_ranges_begins_anew_after_a_failure() -> None:
    with serving(BODY) as place:
        path = StoragePath.parse(f"{place}/a.txt")
        with open_read(path) as stream:
            assert stream.read() == BODY
        Weak.cuts = [len(BODY) // 2, 100, len(BODY) - 1]
        with open_read(path) as stream:
            assert stream.read() == BODY
        assert Weak.cuts == []


def test_parquet_from_a_server_without_ranges_is_read(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {number}" for number in range(5000)]})
    pq.write_table(table, tmp_path / "a.parquet")
    with (
        serving((tmp_path / "a.parquet").read_bytes()) as place,
        open_read(StoragePath.parse(f"{place}/a.parquet")) as file,
    ):
        assert pq.read_table(file).equals(table)


def test_server_on_the_web_that_is_down_is_a_failure_of_storage() -> None:
    with serving(BODY) as place:
        path = StoragePath.parse(f"{place}/a.txt")
    for look in (signature, glob):
        with pytest.raises(StorageError, match=r"cannot look at http://127\.0\.0\.1"):
            look(path)
