"""A run's events: nothing is lost or told twice, whatever of segments and volumes is there."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage.create import create
from cluster.storage.path import StoragePath
from jobs import event_log, tracking
from jobs.event_log import EventLog, Piece, ending_of, events_of, fewest, pieces_of
from jobs.mirror import Mirror
from jobs.screen import Tail
from jobs.tracking import Told
from schemas.errors import StorageError
from schemas.events import Event, Progress, RunEnded, UnitCommitted
from schemas.records import RootRecord

NOT_PIECES = ["", "x", "000000", "00000.jsonl", "0000000.jsonl", "000001-000000.jsonl", "000002-000002.jsonl", ".tmp"]


def told(count: int) -> list[Event]:
    return [UnitCommitted("harvest", f"{number:06d}", 1, 1.0, 0) for number in range(count)]


def write(run: StoragePath, events: list[Event], log: EventLog | None = None) -> EventLog:
    """Every event in a segment of its own."""
    log = log or EventLog(run)
    for event in events:
        log(event)
        log.flush()
    return log


def read(run: StoragePath, start: int = 0) -> list[Event]:
    return [event for _, events in pieces_of(run, start) for _, event in events]


def objects(run: StoragePath) -> list[str]:
    return sorted(path.name for path in (run / "events").local.iterdir())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    """A run's folder; four segments make a volume, and four volumes a large one."""
    monkeypatch.setattr(event_log, "VOLUME", 4)
    monkeypatch.setattr(event_log, "LARGE_VOLUME", 4)
    return StoragePath.parse(tmp_path) / "runs" / "20270101T000000.000000Z-aaaaaa"


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 15, 16, 17, 53])
def test_every_event_is_told_once_and_in_its_order(run: StoragePath, count: int) -> None:
    write(run, told(count))
    assert [event for _, event in events_of(run)] == told(count)
    for start in range(count + 1):
        assert read(run, start) == told(count)[start:]


def test_volumes_leave_few_objects_to_read(run: StoragePath) -> None:
    write(run, told(53))
    assert [piece.name for piece, _ in pieces_of(run)] == [
        *("000000-000015.jsonl", "000016-000031.jsonl", "000032-000047.jsonl"),
        *("000048-000051.jsonl", "000052.jsonl"),
    ]


def test_volumes_with_many_bytes_are_written_again_early(run: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "LARGE_BYTES", 1)
    write(run, told(16))
    assert [piece.name for piece, _ in pieces_of(run)] == ["000000-000007.jsonl", "000008-000015.jsonl"]


@pytest.mark.parametrize("lost", ["000000-000015.jsonl", "000004-000007.jsonl", "000016-000019.jsonl"])
@pytest.mark.parametrize("how", ["absent", "no text"])
def test_segments_speak_for_a_volume_that_cannot_be_read(run: StoragePath, lost: str, how: str) -> None:
    write(run, told(22))
    volume = (run / "events" / lost).local
    volume.unlink()
    if how == "no text":
        volume.write_bytes(b"\xff")
    assert [event for _, event in events_of(run)] == told(22)


def test_segment_that_is_gone_loses_only_its_own(run: StoragePath) -> None:
    write(run, told(7))
    (run / "events" / "000005.jsonl").local.unlink()
    assert [event for _, event in events_of(run)] == [each for at, each in enumerate(told(7)) if at != 5]


def test_reader_that_goes_along_sees_the_same_as_one_that_comes_late(run: StoragePath) -> None:
    (run / "events").local.mkdir(parents=True)
    root = StoragePath.parse(run.local.parent.parent)
    tail, log, seen = Tail(root), EventLog(run), list[Event]()
    events = told(40)
    for at in range(0, len(events), 3):
        write(run, events[at : at + 3], log)
        seen += [event for _, event in tail.look()]
    assert seen == events
    assert [event for _, event in Tail(root).look()] == events


def test_mirrors_number_events_alike_with_volumes_and_without(
    run: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number a tracker knows what it has."""
    root, brought = StoragePath.parse(run.local.parent.parent), list[list[tuple[int, float]]]()

    class Kept:
        def __init__(self, *about: object) -> None:
            pass

        def write(self, told: Sequence[Told]) -> int:
            brought[-1] += [(each.number, each.point.value) for each in told]
            return len(told)

        def close(self) -> None:
            pass

    monkeypatch.setattr(tracking, "require", lambda kind: None)
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Kept)
    create(root / "ROOT.json", RootRecord(name="told", creates="atomic").body())
    events = [Progress("train/a", step, step, 99, {"fvu": 1 / step}) for step in range(1, 23)]
    log = write(run, list(events[:3]))
    along = Mirror(root, "mlflow")
    brought.append([])
    for at in range(3, 22, 5):
        along.look()
        write(run, list(events[at : at + 5]), log)
    along.look()
    brought.append([])
    Mirror(root, "mlflow").look()
    assert brought[0] == brought[1] == [(number, 1 / (number + 1)) for number in range(22)]


@pytest.mark.parametrize("count", [1, 4, 16, 17])
def test_last_word_is_found_behind_volumes(run: StoragePath, count: int) -> None:
    word = RunEnded("run", 0, "")
    write(run, [*told(count - 1), word])
    assert ending_of(run) == word


def test_last_word_of_a_log_of_many_digits(run: StoragePath) -> None:
    write(run, [RunEnded("run", 0, "")])
    folder = (run / "events").local
    (folder / "000000.jsonl").rename(folder / "1000000.jsonl")
    (folder / "999999.jsonl").write_text("")
    assert ending_of(run) == RunEnded("run", 0, "")


def test_what_could_not_be_written_is_written_later(run: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an event nor a number is lost: who reads numbers on end stops at a gap."""
    events = told(24)
    # One failure at a segment, one at a volume, one at a large one.
    fail = {"000001.jsonl", "000004-000007.jsonl", "000000-000016.jsonl"}

    def fails(path: StoragePath, body: bytes) -> None:
        if path.name in fail:
            fail.remove(path.name)
            raise StorageError("no space left")
        create(path, body)

    monkeypatch.setattr(event_log, "create", fails)
    log = EventLog(run)
    for event in events:
        log(event)
        try:
            log.flush()
        except StorageError:
            log.flush()
    assert not fail
    assert [event for _, event in events_of(run)] == events
    pieces = [piece for piece, _ in pieces_of(run)]
    assert pieces[0].first == 0
    assert all(one.last + 1 == two.first for one, two in itertools.pairwise(pieces))


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda ends: tuple(sorted(ends)))))
def test_fewest_pieces_hold_every_segment_once(ranges: set[tuple[int, int]]) -> None:
    singles = {Piece(at, at) for first, last in ranges for at in range(first, last + 1)}
    present = [piece.name for piece in singles | {Piece(*ends) for ends in ranges}]
    found = [at for piece in fewest(present) for at in range(piece.first, piece.last + 1)]
    assert found == sorted(piece.first for piece in singles)


def test_other_files_are_no_pieces() -> None:
    assert list(fewest(NOT_PIECES)) == []


def test_volume_of_absurdly_many_segments_ends_nobody(run: StoragePath) -> None:
    write(run, told(2))
    (run / "events" / "000000-999999999999.jsonl").local.write_bytes(b"\xff")
    assert [event for _, event in events_of(run)] == told(2)
