"""What every implementation of an interface must do; subclassed once for each of them."""

import sys
import threading
from collections.abc import Iterator

import pytest

from cluster.storage.create import create, create_or_adopt
from cluster.storage.foreign import glob, open_read, signature
from cluster.storage.objects import (
    exists,
    names,
    read_bytes,
    read_json,
    read_range,
    read_recorded,
    size,
)
from cluster.storage.path import StoragePath
from schemas.errors import IntegrityError
from schemas.records import ObjectEntry

RACERS = 16
RACES = 25


class StorageContract:
    """A place for objects. Subclasses give the fixture `base`: an empty folder or prefix of the test's own."""

    @pytest.fixture
    def base(self) -> StoragePath:
        raise NotImplementedError

    @pytest.fixture
    def eager_threads(self) -> Iterator[None]:
        """Threads change places after every few bytecodes, so that a race which can be lost is lost."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

    def test_create_free_name_holds_the_body(self, base: StoragePath) -> None:
        assert create(base / "deep/er/a", b"first")
        assert read_bytes(base / "deep/er/a") == b"first"

    def test_create_taken_name_loses_and_leaves_the_first(self, base: StoragePath) -> None:
        create(base / "a", b"first")
        assert not create(base / "a", b"second, and longer")
        assert read_bytes(base / "a") == b"first"

    def test_create_same_body_twice_counts_as_success(self, base: StoragePath) -> None:
        create(base / "a", b"first")
        assert create(base / "a", b"first")
        assert read_bytes(base / "a") == b"first"

    def test_create_empty_body_is_refused(self, base: StoragePath) -> None:
        with pytest.raises(ValueError, match="empty object"):
            create(base / "a", b"")
        assert not exists(base / "a")

    def test_create_or_adopt_other_body_names_the_key(self, base: StoragePath) -> None:
        create_or_adopt(base / "a", b"first")
        create_or_adopt(base / "a", b"first")
        with pytest.raises(IntegrityError, match="/a exists with another content"):
            create_or_adopt(base / "a", b"other")
        assert read_bytes(base / "a") == b"first"

    def test_create_threads_race_for_one_name_one_wins(self, base: StoragePath, eager_threads: None) -> None:
        for race in range(RACES):
            winners = self._race(base / f"race{race}", [b"%02d" % racer * 4096 for racer in range(RACERS)])
            assert len(winners) == 1
            assert read_bytes(base / f"race{race}") == winners[0]

    def test_create_threads_race_with_one_body_all_succeed(self, base: StoragePath, eager_threads: None) -> None:
        assert len(self._race(base / "same", [b"same" * 4096] * RACERS)) == RACERS
        assert read_bytes(base / "same") == b"same" * 4096

    def _race(self, path: StoragePath, bodies: list[bytes]) -> list[bytes]:
        """The bodies whose creators were told that they won."""
        line = threading.Barrier(len(bodies))
        won: list[bytes] = []
        failed: list[BaseException] = []

        def run(body: bytes) -> None:
            try:
                line.wait()
                if create(path, body):
                    won.append(body)
            except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
                failed.append(error)

        racers = [threading.Thread(target=run, args=(body,)) for body in bodies]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        if failed:
            raise failed[0]
        return won

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (0, None, b"0123456789"),
            (0, 4, b"0123"),
            (2, 5, b"234"),
            (5, None, b"56789"),
            (-3, None, b"789"),
            (8, 100, b"89"),
            (9, 10, b"9"),
        ],
    )
    def test_read_range_gives_the_bytes_between(
        self, base: StoragePath, start: int, end: int | None, expected: bytes
    ) -> None:
        create(base / "digits", b"0123456789")
        assert read_range(base / "digits", start, end) == expected

    def test_read_absent_object_raises_file_not_found(self, base: StoragePath) -> None:
        create(base / "other", b"x")
        for read in (read_bytes, size, signature, read_json, lambda path: read_range(path, 0, 1)):
            with pytest.raises(FileNotFoundError):
                read(base / "absent")

    def test_open_read_streams_the_object(self, base: StoragePath) -> None:
        create(base / "a", b"line\nnext\n")
        with open_read(base / "a") as stream:
            assert stream.readline() == b"line\n"
            assert stream.read() == b"next\n"

    def test_size_and_signature_tell_contents_apart(self, base: StoragePath) -> None:
        create(base / "a", b"one")
        create(base / "b", b"two")
        create(base / "c", b"one")
        assert size(base / "a") == 3
        assert signature(base / "a") == signature(base / "c") != signature(base / "b")

    def test_read_json_other_content_names_the_object(self, base: StoragePath) -> None:
        create(base / "good.json", b'{"a": [1, null]}')
        create(base / "bad.json", b'{"a": [1, nul')
        assert read_json(base / "good.json") == {"a": [1, None]}
        with pytest.raises(IntegrityError, match=r"bad\.json should hold JSON"):
            read_json(base / "bad.json")

    def test_names_lists_sorted_without_hidden_files(self, base: StoragePath) -> None:
        for key in ("b", "a", "folder/x", "folder/y", ".a.0123.tmp", "folder/.y.0123.tmp"):
            create(base / key, b"x")
        assert names(base) == ["a", "b", "folder"]
        assert names(base / "folder") == ["x", "y"]

    def test_names_sees_what_was_created_since(self, base: StoragePath) -> None:
        create(base / "a", b"x")
        assert names(base) == ["a"]
        create(base / "b", b"x")
        assert names(base) == ["a", "b"]

    def test_names_nothing_there_is_empty(self, base: StoragePath) -> None:
        assert names(base / "absent") == []

    def test_names_after_creating_leaves_no_temporary_file(self, base: StoragePath) -> None:
        create(base / "a", b"one")
        create(base / "a", b"two")
        create(base / "a", b"one")
        assert [path.name for path in glob(base / "*")] == ["a"]
        assert names(base) == ["a"]

    def test_glob_pattern_finds_sorted_paths_that_can_be_read(self, base: StoragePath) -> None:
        for key in ("b.txt", "a.txt", "c.md", "deep/d.txt", ".hidden.txt"):
            create(base / key, key.encode())
        assert glob(base / "*.txt") == [base / "a.txt", base / "b.txt"]
        assert glob(base / "**/*.txt") == [base / "a.txt", base / "b.txt", base / "deep/d.txt"]
        assert [read_bytes(path) for path in glob(base / "[ab].txt")] == [b"a.txt", b"b.txt"]

    def test_glob_folder_stands_for_every_file_below(self, base: StoragePath) -> None:
        for key in ("folder/b", "folder/a", "folder/deep/c", "other"):
            create(base / key, b"x")
        assert glob(base / "folder") == [base / "folder/a", base / "folder/b", base / "folder/deep/c"]

    def test_glob_one_object_or_none(self, base: StoragePath) -> None:
        create(base / "a", b"x")
        assert glob(base / "a") == [base / "a"]
        assert glob(base / "absent") == []
        assert glob(base / "absent-*") == []

    def test_glob_results_are_the_paths_that_parse_gives(self, base: StoragePath) -> None:
        create(base / "folder/a.txt", b"x")
        for pattern in ("folder", "folder/*", "folder/a.txt"):
            (found,) = glob(base / pattern)
            assert StoragePath.parse(str(found)) == found == base / "folder/a.txt"

    def test_read_recorded_committed_object_is_returned(self, base: StoragePath) -> None:
        create(base / "unit/shard", b"committed")
        assert read_recorded(base, ObjectEntry.of("unit/shard", b"committed")) == b"committed"

    @pytest.mark.parametrize(
        ("there", "says"),
        [(None, "absent"), (b"commit", "6 bytes, committed were 9"), (b"committee", "sha256 differs")],
        ids=["absent", "short", "flipped"],
    )
    def test_read_recorded_damage_names_the_key(self, base: StoragePath, there: bytes | None, says: str) -> None:
        create(base / "neighbour", b"x")
        if there is not None:
            create(base / "unit/shard", there)
        with pytest.raises(IntegrityError, match=says) as caught:
            read_recorded(base, ObjectEntry.of("unit/shard", b"committed"))
        assert str(base / "unit/shard") in caught.value.what
