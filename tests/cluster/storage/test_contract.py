"""What storage promises, held against every kind of store: a folder, memory, real servers."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from cluster.storage import create as creating
from cluster.storage.create import create, create_or_adopt, put_if_absent, remove, replace
from cluster.storage.foreign import signature
from cluster.storage.listing import count, listing, numbered
from cluster.storage.objects import (
    exists,
    forget,
    kept,
    names,
    read_bytes,
    read_json,
    read_range,
    read_recorded,
    read_text_object,
    size,
)
from cluster.storage.path import StoragePath
from cluster.storage.probe import probe, require_trusted
from schemas.errors import IntegrityError, ManifestError, StorageError
from schemas.records import ObjectEntry
from tests.support.stores import PLACES, TRUSTED, reach

BODY = bytes(range(256)) * 40


@pytest.mark.parametrize("store", TRUSTED, indirect=True)
class TestStore:
    """The contract."""

    def test_create_free_name_holds_the_whole_content(self, store: StoragePath) -> None:
        assert create(store / "a/b/c.bin", BODY)
        assert read_bytes(store / "a/b/c.bin") == BODY
        assert size(store / "a/b/c.bin") == len(BODY)

    def test_create_taken_name_leaves_what_is_there(self, store: StoragePath) -> None:
        assert create(store / "x", b"first")
        assert not create(store / "x", b"second")
        assert read_bytes(store / "x") == b"first"

    def test_create_same_content_again_is_ours(self, store: StoragePath) -> None:
        assert create(store / "x", b"same")
        assert create(store / "x", b"same")
        create_or_adopt(store / "x", b"same")
        with pytest.raises(IntegrityError, match="another content"):
            create_or_adopt(store / "x", b"other")

    def test_put_if_absent_does_not_overwrite(self, store: StoragePath) -> None:
        """The store itself refuses, whoever looks before."""
        put_if_absent(store / "x", b"first")
        with pytest.raises(OSError):  # noqa: PT011 - stores differ in how they say it
            put_if_absent(store / "x", b"second")
        assert read_bytes(store / "x") == b"first"

    def test_create_race_of_sixteen_writers_has_one_winner(self, store: StoragePath) -> None:
        for number in range(5):
            start = threading.Barrier(16)

            def write(writer: int, path: StoragePath, start: threading.Barrier = start) -> bool:
                start.wait()
                return create(path, f"writer {writer}".encode())

            with ThreadPoolExecutor(16) as executor:
                path = store / f"race-{number}"
                won = list(executor.map(write, range(16), [path] * 16))
            assert won.count(True) == 1
            assert read_bytes(path) == f"writer {won.index(True)}".encode()

    def test_create_empty_object_is_refused(self, store: StoragePath) -> None:
        with pytest.raises(ValueError, match="empty"):
            create(store / "x", b"")

    def test_create_large_object_is_one_request(self, store: StoragePath) -> None:
        """Only one request can be conditional; the libraries cut larger ones into parts."""
        body = os.urandom(1 << 20) * 12
        assert create(store / "large", body)
        assert not create(store / "large", body[:-1] + bytes([body[-1] ^ 1]))
        assert read_bytes(store / "large") == body
        assert read_range(store / "large", 5 << 20, (5 << 20) + 7) == body[5 << 20 : (5 << 20) + 7]

    def test_read_absent_object_says_so(self, store: StoragePath) -> None:
        create(store / "there", b"x")
        for read in (read_bytes, read_json, read_text_object, size, kept):
            with pytest.raises(FileNotFoundError):
                read(store / "absent")
        with pytest.raises(FileNotFoundError):
            read_range(store / "absent", 0, 4)
        assert not exists(store / "absent")
        assert names(store / "nowhere") == []
        assert listing(store / "nowhere") == {}

    def test_read_range_gives_just_these_bytes(self, store: StoragePath) -> None:
        create(store / "x", BODY)
        assert read_range(store / "x", 10, 300) == BODY[10:300]
        assert read_range(store / "x", len(BODY) - 5, len(BODY)) == BODY[-5:]

    def test_numbered_names_are_all_found_however_many_there_may_be(self, store: StoragePath) -> None:
        there = ["000000.json", "000999.json", "001000.json", "002345.json", "weights.json"]
        for name in there:
            create(store / "units" / name, BODY)
        create(store / "units" / "001" / "below.json", BODY)
        for limit in (0, 1000, 3000):
            found = numbered(store / "units", limit)
            assert [name for name in found if name.endswith(".json")] == there
            assert count(store / "units", limit, ".json") == len(there)
        with mock.patch("cluster.storage.listing._stems", side_effect=StorageError("only folders", "")):
            assert count(store / "units", 3000, ".json") == len(there)
        assert count(store / "nowhere", 3000, ".json") == 0
        assert numbered(store / "nowhere", 3000) == []

    def test_names_and_listing_show_what_was_just_created(self, store: StoragePath) -> None:
        for number in range(3):
            create(store / f"a/{number}", b"x" * (number + 1))
            assert names(store / "a") == [str(each) for each in range(number + 1)]
        create(store / "a/deep/er", b"x")
        assert names(store / "a") == ["0", "1", "2", "deep"]
        found = listing(store)
        assert {key: each.size for key, each in found.items()} == {"a/0": 1, "a/1": 2, "a/2": 3, "a/deep/er": 1}
        assert all(each.modified is not None and each.modified > 1.7e9 for each in found.values())

    def test_names_of_more_than_one_page_are_all_there(self, store: StoragePath) -> None:
        with ThreadPoolExecutor(16) as executor:
            list(executor.map(lambda number: replace(store / f"many/{number:04d}", b"x"), range(1100)))
        assert names(store / "many") == [f"{number:04d}" for number in range(1100)]
        assert len(listing(store)) == 1100

    def test_replace_overwrites_and_remove_removes(self, store: StoragePath) -> None:
        replace(store / "beat", b"1")
        replace(store / "beat", b"2")
        assert read_bytes(store / "beat") == b"2"
        remove(store / "beat")
        remove(store / "beat")
        assert not exists(store / "beat")

    def test_signature_tells_contents_apart(self, store: StoragePath) -> None:
        for name, body in (("a", b"one"), ("b", b"one"), ("c", b"two")):
            create(store / name, body)
        assert signature(store / "a") != signature(store / "c")

    def test_read_recorded_damaged_object_is_named(self, store: StoragePath) -> None:
        entry = ObjectEntry.of("x", b"right")
        with pytest.raises(IntegrityError, match="x is committed, but absent"):
            read_recorded(store, entry)
        create(store / "x", b"wrong")
        with pytest.raises(IntegrityError, match=r"x is not what was committed"):
            read_recorded(store, entry)

    def test_read_text_object_of_an_empty_object_is_empty(self, store: StoragePath) -> None:
        replace(store / "x", b"")
        assert read_text_object(store / "x") == b""

    def test_probe_trusts_it_and_leaves_nothing(self, store: StoragePath) -> None:
        assert probe(store) == ""
        assert listing(store) == {}
        assert require_trusted(store, single_writer=False) == "if-absent"

    def test_store_in_a_forked_process_works(self, store: StoragePath) -> None:
        create(store / "before", b"x")
        if store.scheme == "memory":
            pytest.skip("memory belongs to one process")
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_in_child, args=(store,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert read_bytes(store / "after") == b"y"

    def test_reading_json_of_absurd_size_is_refused(self, store: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cluster.storage.objects.LARGEST_JSON", 1000)
        create(store / "fits.json", b"[" + b" " * 998 + b"]")
        assert read_json(store / "fits.json") == []
        create(store / "x.json", b"[" + b" " * 999 + b"]")
        with pytest.raises(IntegrityError, match=r"x\.json has more than 1000 bytes"):
            read_json(store / "x.json")


def _in_child(store: StoragePath) -> None:
    assert read_bytes(store / "before") == b"x"
    assert create(store / "after", b"y")


@pytest.mark.parametrize("store", ["ceph", "moto", "azurite"], indirect=True)
def test_create_into_a_bucket_that_is_not_there_names_it(store: StoragePath) -> None:
    path = StoragePath(store.scheme, "kb-no-such-bucket-anywhere/x")
    with pytest.raises(StorageError, match="kb-no-such-bucket-anywhere/x"):
        create(path, b"x")


def test_weak_mock_of_google_is_refused_at_the_door(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = reach(request.getfixturevalue("gcs").bucket(), monkeypatch) / "root"
    with pytest.raises(ManifestError, match="overwrites an object that it was asked to create only") as caught:
        require_trusted(root, single_writer=False)
    assert "compute.single_writer" in caught.value.remedy
    assert require_trusted(root, single_writer=True).startswith("single-writer: it overwrites")
    # With one writer, looking first is enough.
    assert create(root / "x", b"first")
    assert not create(root / "x", b"second")
    assert read_bytes(root / "x") == b"first"


def test_swift_whose_races_have_several_winners_is_refused_at_the_door(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = reach(request.getfixturevalue("swift").bucket(), monkeypatch) / "root"
    verdicts = {probe(root) for _ in range(5)}
    assert any("writers at once were told" in verdict for verdict in verdicts)
    assert listing(root) == {}


def test_wrong_secret_is_told_in_one_line_without_it(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = reach(request.getfixturevalue("ceph").bucket(), monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
    forget()
    with pytest.raises(StorageError, match=r"cannot create .*/x: PermissionError") as caught:
        create(root / "x", b"x")
    assert "canary" not in str(caught.value)
    assert "credentials" in caught.value.remedy


@pytest.mark.parametrize("place", PLACES)
def test_finish_lets_the_object_in_work_end_and_no_other_begin(
    place: str, tmp_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creating, "_gate", creating._Gate())
    root = StoragePath.parse(tmp_path) if place == "file" else StoragePath.parse("memory://finish")
    inside, go = threading.Event(), threading.Event()
    real = creating._create_local if place == "file" else creating._create_remote

    def slow(*arguments: object) -> bool:
        inside.set()
        go.wait(10)
        return bool(real(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(creating, "_create_local" if place == "file" else "_create_remote", slow)
    with ThreadPoolExecutor(1) as executor:
        writing = executor.submit(create, root / "x", b"x")
        inside.wait(10)
        assert not creating.finish(0.05)
        with pytest.raises(creating.InterruptedRunError):
            create(root / "y", b"y")
        go.set()
        assert creating.finish(10)
        assert writing.result()
    assert read_bytes(root / "x") == b"x"
    assert not exists(root / "y")
