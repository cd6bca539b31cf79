"""What a process moves to and from a store is counted, whatever store it is, and so is what has to be asked again."""

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.storage import attempts, objects, traffic
from cluster.storage.create import create, replace
from cluster.storage.foreign import open_read
from cluster.storage.objects import read_bytes, read_range
from cluster.storage.path import StoragePath
from cluster.storage.traffic import Traffic
from tests.support.stores import TRUSTED

BODY = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def from_now_on() -> None:
    traffic.fresh()


@pytest.mark.parametrize("store", [*TRUSTED, "gcs"], indirect=True)
def test_bytes_are_counted_both_ways(store: StoragePath) -> None:
    replace(store / "note", BODY)
    assert traffic.fresh() == Traffic(written_bytes=len(BODY))
    assert create(store / "data", BODY)
    # Some stores are asked for what they now have, to be sure.
    assert traffic.fresh().written_bytes == len(BODY)
    assert read_bytes(store / "data") == BODY
    assert traffic.fresh() == Traffic(read_bytes=len(BODY))
    assert read_range(store / "data", 100, 350) == BODY[100:350]
    assert traffic.fresh() == Traffic(read_bytes=250)


def test_stream_over_an_object_is_counted() -> None:
    path = StoragePath.parse(f"memory://{uuid.uuid4().hex}/data")
    replace(path, BODY)
    traffic.fresh()
    with open_read(path) as stream:
        assert stream.read() == BODY
    assert traffic.fresh() == Traffic(read_bytes=len(BODY))
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[StoragePath]:
    """An object in a store whose next three answers are none."""
    path, left, real = StoragePath.parse(f"memory://{uuid.uuid4().hex}/data"), [3], objects.once
    replace(path, BODY)
    traffic.fresh()

    def once(*args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise ConnectionError("reset")
        return real(*args, **options)

    monkeypatch.setattr(attempts, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(objects, "once", once)
    yield path
    fsspec.filesystem("memory").store.clear()


def test_requests_that_are_repeated_are_counted(failing: StoragePath) -> None:
    assert read_bytes(failing) == BODY
    assert traffic.fresh() == Traffic(read_bytes=len(BODY), retries=3)


def test_nothing_is_lost_between_threads(tmp_path: Path) -> None:
    path = StoragePath.parse(tmp_path / "data")
    replace(path, BODY)
    before = traffic.total()

    def read() -> None:
        for _ in range(200):
            read_range(path, 0, 10)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert traffic.total() - before == Traffic(read_bytes=4 * 200 * 10)
