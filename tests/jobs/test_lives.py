"""Lives of a gang under one lease: what an older one writes late is found, and training goes on from there."""

from pathlib import Path

import pytest

from cluster.storage.path import StoragePath
from jobs.log import SlotLog, TrainingLog
from schemas.errors import OutrunError
from schemas.layouts import slot_key
from schemas.records import CheckpointRecord


def log(folder: Path) -> TrainingLog:
    """A life's log, read as it is when it begins."""
    made = TrainingLog(StoragePath.parse(folder))
    made.latest()
    return made


def commit(of: TrainingLog, step: int) -> None:
    of.commit(step, [of.write(step, "state", b"bits")], {"step": step})


def steps(folder: Path) -> list[int]:
    """Of every checkpoint in the log, those that newer ones have superseded as well."""
    found = SlotLog(StoragePath.parse(folder))
    found.refresh()
    return [record.step for record in found.slots if isinstance(record, CheckpointRecord)]


def test_checkpoint_of_an_older_life_that_comes_late_is_where_the_next_one_begins(tmp_path: Path) -> None:
    first = log(tmp_path)
    commit(first, 10)
    second = log(tmp_path)
    commit(first, 20)
    with pytest.raises(OutrunError, match="another trainer under the same lease wrote a checkpoint of step 20"):
        commit(second, 15)
    third = log(tmp_path)
    last = third.latest()
    assert last is not None
    assert last.step == 20
    commit(third, 30)
    commit(third, 40)
    assert steps(tmp_path) == [10, 20, 30, 40]


def test_older_life_that_still_goes_on_ends_when_it_sees_the_newer_one(tmp_path: Path) -> None:
    first, second = log(tmp_path), log(tmp_path)
    commit(second, 10)
    with pytest.raises(OutrunError):
        commit(first, 10)
    assert steps(tmp_path) == [10]


def test_slot_that_is_taken_at_the_last_moment_is_the_other_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = log(tmp_path), log(tmp_path)
    entry = second.write(10, "state", b"bits")
    append = SlotLog.checkpoint

    def late(self: SlotLog, *args: object) -> object:
        monkeypatch.setattr(SlotLog, "checkpoint", append)
        commit(first, 10)
        return append(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SlotLog, "checkpoint", late)
    with pytest.raises(OutrunError, match="wrote a checkpoint of step 10"):
        second.commit(10, [entry], {})
    assert (tmp_path / slot_key(0)).exists()
    assert steps(tmp_path) == [10]
