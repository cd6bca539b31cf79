"""What `gc` and `repair` must never delete, and what `verify` must never overlook."""

import errno
import functools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import psutil
import pytest

import cluster.storage.objects as objects
import jobs.state as states
from cluster.processes import birth
from cluster.storage.path import StoragePath
from jobs import inventory, lease
from jobs import repair as repairs
from jobs.log import SlotLog
from jobs.state import StageFolder, run_unit
from pipeline.stage import Task
from schemas.errors import FencedError, IntegrityError
from schemas.records import ObjectEntry, Outputs, Unit, UnitRecord, parse_record
from tests.support import runs
from tests.support.command import Result, invoke, snapshot
from tests.support.fixtures import write_manifest

SWEEP = ("gc", "--delete", "--older-than", "0")
AGES = 8 * 86400


@pytest.fixture
def copied(finished: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of the finished run: `root` and `manifest`."""
    root = shutil.copytree(finished.root, tmp_path / "root")
    return SimpleNamespace(
        root=root, manifest=write_manifest(tmp_path / "tiny.yaml", finished.tree | {"root": str(root)})
    )


def only(root: Path, pattern: str) -> Path:
    (found,) = root.glob(pattern)
    return found


def data(root: Path) -> dict[str, str]:
    """Every object but the records of leases and beats, which a look under a lease adds."""
    return {key: sha for key, sha in snapshot(root).items() if "/log" not in key and "/beats" not in key}


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(bytes(body))


def from_the_future(path: Path) -> None:
    """As a later version may write it: whole, with a field that this one does not know."""

    class Later(UnitRecord):
        more: int = 1

    record = parse_record(UnitRecord, path.read_bytes(), "here")
    path.write_bytes(Later(**record.model_dump()).body())


# gc


UNREADABLE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "unit record": ("harvest/*/units/000000.json", flip),
    "unit record of a later version": ("harvest/*/units/000000.json", from_the_future),
    "stage record": ("dictionaries/tiny/evaluate/*/COMMITTED.json", flip),
    "absent stage record": ("dictionaries/tiny/evaluate/*/COMMITTED.json", Path.unlink),
    "specification": ("harvest/*/SPEC.json", flip),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_gc_deletes_nothing_where_a_record_cannot_be_read(case: str, copied: SimpleNamespace) -> None:
    pattern, damage = UNREADABLE[case]
    path = only(copied.root, pattern)
    damage(path)
    stage = next(parent for parent in path.parents if parent.parent.name in ("harvest", "evaluate"))
    before = snapshot(stage)
    result = invoke(*SWEEP[:1], copied.manifest, *SWEEP[1:])
    assert snapshot(stage) == before
    assert result.code == 4, result.out
    assert f"damaged: {path}" in result.out
    assert "kilobasis repair" in result.err


def test_gc_keeps_the_newest_checkpoint_when_its_slot_cannot_be_read(copied: SimpleNamespace) -> None:
    log = sorted(copied.root.glob("dictionaries/tiny/train/*/log/*.json"))
    flip(log[-1])
    before = data(copied.root)
    assert invoke(*SWEEP[:1], copied.manifest, *SWEEP[1:]).code == 4
    assert {key for key in before if "checkpoints" in key} <= set(data(copied.root))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_folder_that_cannot_be_listed_is_an_error_and_not_empty(
    number: int, copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("/units"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    before = data(copied.root)
    monkeypatch.setattr(os, "scandir", scandir)
    result = invoke(*SWEEP[:1], copied.manifest, *SWEEP[1:])
    monkeypatch.undo()
    assert {key for key in before if "harvest/" in key} <= set(data(copied.root))
    assert result.code == 75, result
    assert "/units" in result.err


def without_record(root: Path, unit: str) -> tuple[Path, bytes]:
    """A harvest that is not committed, one unit of which has its objects and not yet its record; that record."""
    stage = only(root, "harvest/*")
    (stage / "COMMITTED.json").unlink()
    shutil.rmtree(root / "runs")
    record = stage / "units" / f"{unit}.json"
    body = record.read_bytes()
    record.unlink()
    for path in stage.rglob("*"):
        os.utime(path, (time.time() - AGES,) * 2)
    return record, body


def shards(record: Path) -> list[Path]:
    """The objects that a unit's record names."""
    made = parse_record(UnitRecord, record.read_bytes(), "here").made
    return [record.parent.parent / entry.key for entry in made.objects]


def looked_once(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """`then` happens when the harvest was looked through for the first time."""
    real, done = inventory.take, []

    def take(label: str, *args: Any, **options: Any) -> Any:
        found = real(label, *args, **options)
        if label == "harvest" and not done:
            done.append(label)
            then()
        return found

    monkeypatch.setattr(inventory, "take", take)


def swept(root: Path) -> None:
    assert invoke("gc", root, "--delete").code == 0


def repaired(root: Path) -> None:
    list(repairs.repair(StoragePath.parse(root), 1.0, lambda _: None))


@pytest.mark.parametrize("command", [swept, repaired])
def test_shard_whose_record_comes_while_somebody_looks_is_not_deleted(
    command: Callable[[Path], None], copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, body = without_record(copied.root, "000001")
    looked_once(monkeypatch, functools.partial(record.write_bytes, body))
    command(copied.root)
    assert record.exists()
    assert [path for path in shards(record) if not path.exists()] == []


@pytest.mark.parametrize("command", [swept, repaired])
def test_shard_that_no_record_will_ever_name_is_deleted(
    command: Callable[[Path], None], copied: SimpleNamespace
) -> None:
    record, body = without_record(copied.root, "000001")
    command(copied.root)
    record.write_bytes(body)
    assert [path for path in shards(record) if path.exists()] == []


def led_by(pid: int, path: Path) -> None:
    """A lease of another process of this machine, which lives."""
    log = SlotLog(StoragePath.parse(path))
    log.refresh()
    owner = lease.this_process().model_copy(update={"pid": pid, "started": birth(psutil.Process(pid))})
    assert log.take(owner) is not None


def test_gc_leaves_a_stage_alone_that_is_being_run_and_says_so(copied: SimpleNamespace) -> None:
    record, _ = without_record(copied.root, "000001")
    stage = record.parent.parent
    led_by(os.getppid(), stage)
    before = snapshot(stage)
    result = invoke("gc", copied.root, "--delete")
    assert result.code == 0, result.err
    assert "left alone: harvest is being run" in result.out
    assert snapshot(stage) == before


@pytest.mark.parametrize("command", ["gc", "repair"])
def test_who_deletes_and_loses_its_lease_stops(
    command: str, copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, _ = without_record(copied.root, "000001")
    stage = record.parent.parent
    real, deleted = repairs.remove, []

    def remove(path: StoragePath) -> None:
        real(path)
        deleted.append(path)
        led_by(os.getppid(), stage)

    monkeypatch.setattr(repairs, "remove", remove)
    result: Result = invoke(command, copied.root, *(["--delete"] if command == "gc" else []))
    assert result.code == FencedError.exit_code, result
    assert len(deleted) == 1


def test_log_that_lost_a_slot_is_mended_whoever_led_it(copied: SimpleNamespace) -> None:
    """Another machine's lease, not given back: it takes a while to know that it is over, of a log with a hole."""
    stage = only(copied.root, "harvest/*")
    log = SlotLog(StoragePath.parse(stage))
    log.refresh()
    owner = lease.this_process().model_copy(update={"host": "elsewhere"})
    assert log.take(owner) is not None
    assert log.take(owner) is not None
    flip(stage / "log" / "000002.json")
    repaired(copied.root)
    assert repairs.findings(StoragePath.parse(copied.root), full=False) == []


# Units


def folder(tmp_path: Path) -> StageFolder:
    return StageFolder(StoragePath.parse(tmp_path / "stage"), "harvest", "0" * 64)


def made(path: StoragePath, body: bytes = b"a shard") -> Unit:
    (path.local / "data").mkdir(parents=True, exist_ok=True)
    (path.local / "data" / "0").write_bytes(body)
    return Unit(objects=(ObjectEntry.of("data/0", body),), rows=1)


def test_unit_whose_objects_were_deleted_while_it_was_made_is_not_committed(tmp_path: Path) -> None:
    def make(_task: Task, path: StoragePath) -> Unit:
        unit = made(path)
        (path.local / "data" / "0").unlink()
        return unit

    with pytest.raises(IntegrityError, match=r"data/0.*absent"):
        run_unit(make, folder(tmp_path), Task(unit="000000"))
    assert folder(tmp_path).units() == []


def test_worker_is_told_when_its_objects_are_deleted_while_it_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = states.create

    def create(path: StoragePath, body: bytes) -> bool:
        (tmp_path / "stage" / "data" / "0").unlink()
        return real(path, body)

    monkeypatch.setattr(states, "create", create)
    with pytest.raises(IntegrityError, match=r"data/0.*resume"):
        run_unit(lambda _, path: made(path), folder(tmp_path), Task(unit="000000"))


def test_stage_is_not_committed_over_a_unit_without_its_objects(tmp_path: Path) -> None:
    stage = folder(tmp_path)
    records = {"000000": run_unit(lambda _, path: made(path), stage, Task(unit="000000"))}
    (tmp_path / "stage" / "data" / "0").unlink()
    with pytest.raises(IntegrityError, match=r"000000.*data/0"):
        stage.commit(Outputs(), records, {}, 0.0, 0)
    assert stage.committed() is None


def test_stage_is_not_committed_by_a_run_whose_lease_was_taken(tmp_path: Path) -> None:
    """Who leads now may be deleting what this run has just seen."""
    stage = folder(tmp_path)
    records = {"000000": run_unit(lambda _, path: made(path), stage, Task(unit="000000"))}
    ours = lease.take(stage.path, "harvest", 1.0, False, lambda _: None, lambda _: None, lambda: False)
    assert ours is not None
    led_by(os.getppid(), stage.path.local)
    with pytest.raises(FencedError):
        stage.commit(Outputs(), records, {}, 0.0, 0, ours.read_log)
    assert stage.committed() is None


@pytest.mark.parametrize("committed", [False, True])
def test_resume_makes_a_unit_again_whose_record_names_what_is_not_there(
    committed: bool, copied: SimpleNamespace, finished: SimpleNamespace
) -> None:
    """As a zombie leaves it that commits after a repair."""
    expected = runs.contents(copied.root)
    record = only(copied.root, "harvest/*/units/000001.json")
    body, gone = record.read_bytes(), shards(record)
    for path in gone:
        flip(path)
    if not committed:
        (record.parent.parent / "COMMITTED.json").unlink()
    repaired(copied.root)
    assert not record.exists()
    record.write_bytes(body)
    assert not any(path.exists() for path in gone)
    assert runs.run_inline(copied.manifest) == runs.digests(finished.root)
    assert runs.contents(copied.root) == expected
    assert repairs.findings(StoragePath.parse(copied.root), full=True) == []


# verify


@pytest.mark.parametrize("events", [True, False])
@pytest.mark.parametrize("gone", ["tokenize/*", "harvest", "harvest/*", "dictionaries/tiny/train"])
def test_stage_that_is_gone_as_a_whole_is_found(gone: str, events: bool, copied: SimpleNamespace) -> None:
    path = only(copied.root, gone)
    shutil.rmtree(path)
    if not events:
        # The records alone must tell.
        shutil.rmtree(copied.root / "runs")
        (copied.root / "runs").mkdir()
    result = invoke("verify", copied.manifest, "--full")
    assert result.code == 4, result.out
    assert gone.split("/")[-2 if "*" in gone else -1] in result.err + result.out.partition("damaged")[2]


# Answers of a bucket that hold only for a moment


@pytest.fixture
def bucket(finished: SimpleNamespace) -> Any:
    """The finished root in memory, which is asked as a bucket is."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in sorted(finished.root.rglob("*")):
        if path.is_file():
            memory.pipe_file(f"bucket/root/{path.relative_to(finished.root).as_posix()}", path.read_bytes())
    yield StoragePath.parse("memory://bucket/root")
    memory.store.clear()


def absent_once(monkeypatch: pytest.MonkeyPatch, pattern: str) -> list[str]:
    """The first request for a matching object is told that there is none."""
    real, told = objects.once, []

    def once(path: StoragePath, method: str, *args: Any, **options: Any) -> Any:
        if method == "cat_file" and pattern in path.key and path.key not in told:
            told.append(path.key)
            raise FileNotFoundError(path.key)
        return real(path, method, *args, **options)

    monkeypatch.setattr(objects, "once", once)
    return told


@pytest.mark.parametrize("pattern", ["SPEC.json", "/units/", "/log/", "COMMITTED.json", "/c/"])
def test_object_that_a_bucket_denies_once_is_no_finding(
    pattern: str, bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = absent_once(monkeypatch, pattern)
    assert repairs.findings(bucket, full=True) == []
    assert told


@pytest.mark.parametrize("pattern", ["/SPEC.json", "/units/000000.json", "/log/000000.json", "/COMMITTED.json"])
def test_record_that_is_deleted_while_somebody_looks_is_a_finding(
    pattern: str, copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = only(copied.root, f"harvest/*{pattern}")
    real = inventory.listing

    def listing(where: StoragePath) -> Any:
        found = real(where)
        if where.key.endswith(path.relative_to(copied.root).parts[1]):
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(inventory, "listing", listing)
    found = repairs.findings(StoragePath.parse(copied.root), full=False)
    assert any(pattern.strip("/") == finding.key and "absent" in finding.problem for finding in found)


def test_object_that_is_committed_while_somebody_looks_is_no_finding(
    copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing of a live run is not one moment: the record may be in it, and its objects not yet."""
    stage = only(copied.root, "harvest/*")
    key = shards(stage / "units" / "000001.json")[0].relative_to(stage).as_posix()
    real = inventory.listing

    def listing(where: StoragePath) -> Any:
        found = real(where)
        found.pop(key, None)
        return found

    monkeypatch.setattr(inventory, "listing", listing)
    assert repairs.findings(StoragePath.parse(copied.root), full=False) == []
