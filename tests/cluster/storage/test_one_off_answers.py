"""Stores that deny once what they have, or give less of it once: nobody takes that for damage."""

import errno
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr

from cluster.storage import attempts, objects
from cluster.storage.create import create, remove
from cluster.storage.objects import SECOND_LOOKS, exists, read_bytes
from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import ArraySpec, RecordedStore, encode_shard, metadata
from schemas.errors import IntegrityError, StorageError
from schemas.records import ObjectEntry

Answer = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def root() -> Iterator[StoragePath]:
    """A store that is asked as a bucket is."""
    yield StoragePath.parse(f"memory://{uuid.uuid4().hex}/root")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 0.2)


def absent(_: Callable[[], Any]) -> Any:
    raise FileNotFoundError(errno.ENOENT, "an answer that is wrong")


def short(real: Callable[[], Any]) -> Any:
    return real()[:-1]


def answering(monkeypatch: pytest.MonkeyPatch, method: str, answer: Answer, times: int) -> list[str]:
    """The first `times` requests of a kind get another answer; what was asked comes into the list."""
    real, asked = objects.once, []

    def once(path: StoragePath, verb: str, *args: Any, **options: Any) -> Any:
        if verb != method:
            return real(path, verb, *args, **options)
        asked.append(path.key)
        if len(asked) > times:
            return real(path, verb, *args, **options)
        return answer(lambda: real(path, verb, *args, **options))

    monkeypatch.setattr(objects, "once", once)
    return asked


@pytest.mark.parametrize("method", ["info", "cat_file"])
def test_create_whose_object_is_denied_once_looks_again(
    method: str, root: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, method, absent, 1)
    assert create(root / "x", b"body")
    assert len(asked) >= 1
    assert read_bytes(root / "x") == b"body"


def test_create_whose_object_is_denied_for_ever_says_so(root: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "cat_file", absent, 10**6)
    with pytest.raises(StorageError, match=r"root/x: the store says that it is there, and then that it is not"):
        create(root / "x", b"body")


def test_remove_of_an_object_that_is_denied_once_removes_it(root: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    create(root / "x", b"body")
    answering(monkeypatch, "rm_file", absent, 1)
    remove(root / "x")
    assert not exists(root / "x")


@pytest.fixture
def array(root: StoragePath) -> zarr.Array[Any]:
    """Three chunks of a committed array, each read as a range."""
    spec = ArraySpec(1, 6, 2, (), "int64", -1, {})
    bodies = metadata({"row": spec}, {}) | {"row/c/0": encode_shard(spec, np.arange(6))}
    for key, body in bodies.items():
        create(root / f"store/{key}", body)
    entries = [ObjectEntry.of(f"store/{key}", body) for key, body in bodies.items()]
    return zarr.open_array(RecordedStore(root, "store", entries), path="row", mode="r")


@pytest.mark.parametrize("answer", [absent, short])
def test_range_of_a_committed_object_that_is_wrong_once_is_asked_for_again(
    answer: Answer, array: zarr.Array[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, "cat_file", answer, 1)
    assert array[2:4].tolist() == [2, 3]
    assert len(asked) >= 2


@pytest.mark.parametrize(("answer", "says"), [(absent, "is committed, but absent"), (short, "was cut short")])
def test_range_of_a_committed_object_that_is_always_wrong_is_an_integrity_error(
    answer: Answer, says: str, array: zarr.Array[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, "cat_file", answer, 10**6)
    with pytest.raises(IntegrityError, match=f"row/c/0 .*{says}|row/c/0 {says}"):
        array[2:4]
    assert len(asked) == SECOND_LOOKS


GARBLED = [json.JSONDecodeError("Expecting value", "<html>", 0), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text")]


@pytest.mark.parametrize("error", GARBLED, ids=lambda error: type(error).__name__)
def test_answer_that_the_library_cannot_parse_is_asked_for_again(
    error: Exception, root: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def garbled(_: Callable[[], Any]) -> Any:
        raise error

    create(root / "x", b"body")
    asked = answering(monkeypatch, "cat_file", garbled, 2)
    assert read_bytes(root / "x") == b"body"
    assert len(asked) == 3
    answering(monkeypatch, "cat_file", garbled, 10**6)
    with pytest.raises(StorageError, match=f"cannot read {root}/x: {type(error).__name__}"):
        read_bytes(root / "x")


def test_mistake_of_ours_is_raised_at_once(root: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(_: Callable[[], Any]) -> Any:
        raise ValueError("no such option")

    asked = answering(monkeypatch, "cat_file", mistaken, 10**6)
    with pytest.raises(ValueError, match="no such option"):
        read_bytes(root / "x")
    assert len(asked) == 1
