"""What a training leaves of its checkpoints while it goes on: the two newest, and nothing else is touched."""

from pathlib import Path

import pytest

from cluster.storage import create as creating
from cluster.storage.path import StoragePath
from jobs import inventory
from jobs.log import LIVE_CHECKPOINTS, SlotLog, TrainingLog
from schemas.records import ObjectEntry


def log(folder: Path) -> TrainingLog:
    made = TrainingLog(StoragePath.parse(folder))
    made.latest()
    return made


def commit(of: TrainingLog, step: int) -> None:
    names = ("state-00000-of-00002", "state-00001-of-00002")
    of.commit(step, [of.write(step, name, f"{name} {step}".encode()) for name in names], {"step": step})


def there(folder: Path) -> list[int]:
    """Steps of which something lies in the folder, once for each object."""
    return sorted(int(path.parent.name.partition("-")[0]) for path in folder.glob("checkpoints/*/*"))


def test_training_keeps_its_two_newest_checkpoints(tmp_path: Path) -> None:
    of = log(tmp_path)
    for step in range(10, 60, 10):
        commit(of, step)
    assert there(tmp_path) == [40, 40, 50, 50]
    assert len(list(tmp_path.glob("log/*.json"))) == 5
    last = log(tmp_path).latest()
    assert last is not None
    assert [log(tmp_path).read(entry) for entry in last.objects] == [
        f"state-0000{part}-of-00002 50".encode() for part in (0, 1)
    ]


def test_checkpoints_left_by_a_crash_before_they_were_deleted_go_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("jobs.log.remove", lambda path: None)
        first = log(tmp_path)
        for step in (10, 20, 30, 40):
            commit(first, step)
    assert there(tmp_path) == [10, 10, 20, 20, 30, 30, 40, 40]
    commit(log(tmp_path), 50)
    assert there(tmp_path) == [40, 40, 50, 50]


def test_checkpoint_that_was_taken_back_counts_for_none(tmp_path: Path) -> None:
    """Its place is taken by the one before it, which stays."""
    of = log(tmp_path)
    for step in (10, 20, 30):
        commit(of, step)
    slots = SlotLog(StoragePath.parse(tmp_path))
    slots.refresh()
    assert slots.void(2) is not None
    after = log(tmp_path)
    assert (last := after.latest()) is not None
    assert last.step == 20
    commit(after, 25)
    assert set(there(tmp_path)) == {20, 25, 30}


def test_superseded_checkpoint_does_not_come_back_when_newer_ones_are_taken_back(tmp_path: Path) -> None:
    """Its objects are deleted: to count it again would be to promise what is gone."""
    of = log(tmp_path)
    for step in (10, 20, 30):
        commit(of, step)
    slots = SlotLog(StoragePath.parse(tmp_path))
    slots.refresh()
    for slot, before in ((2, 20), (1, None)):
        assert slots.void(slot) is not None
        last = log(tmp_path).latest()
        assert (last and last.step) == before
        found = inventory.take("train/tiny", slots.path, full=True)
        assert found.entries == [
            (inventory.Kind.CHECKPOINT, str(last.slot), entry) for entry in (last.objects if last else ())
        ]
        assert {finding.key for finding in found.findings} == {"SPEC.json"}


@pytest.mark.parametrize("key", ["COMMITTED.json", "units/000000.json", "checkpoints/000000010", "checkpoints/else/x"])
def test_log_that_names_other_objects_does_not_get_them_deleted(key: str, tmp_path: Path) -> None:
    """A root holds what anybody may have written."""
    root = StoragePath.parse(tmp_path)
    creating.create(root / key, b"not a checkpoint's")
    of = log(tmp_path)
    for step in range(LIVE_CHECKPOINTS + 2):
        of.commit(step, [ObjectEntry.of(key, b"not a checkpoint's")], {"step": step})
    assert (tmp_path / key).exists() == (key != "checkpoints/else/x")
