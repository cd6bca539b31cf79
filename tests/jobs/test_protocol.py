"""The commit protocol under random schedules, and that weakening any part of it is noticed."""

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest

import cluster.storage.create as creating
import jobs.log as logs
import jobs.out as outs
import jobs.state as states
from cluster.storage.objects import read_bytes, request
from cluster.storage.path import StoragePath
from jobs import inventory
from jobs import repair as repairs
from jobs.inventory import Inventory
from jobs.log import SlotLog, TrainingLog
from pipeline.stage import Task
from schemas.errors import StorageError
from schemas.layouts import slot_key, unit_key
from schemas.records import LeaseRecord, ObjectEntry, Owner, Unit, UnitRecord
from tests.support import schedules
from tests.support.schedules import World

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "0"))
MUTANT_SCHEDULES = 400


def violations(seeds: range, atomic: bool = True, enough: int | None = None) -> tuple[Counter[str], int, int]:
    """What went wrong over schedules, how many of them somebody finished, and how many there were."""
    found: Counter[str] = Counter()
    finished = count = 0
    with schedules.simulated():
        for seed in seeds:
            wrong, done, _ = schedules.schedule(SEED + seed, atomic)
            count += 1
            finished += done
            if wrong:
                found[f"{wrong[0]} (seed {SEED + seed})"] += 1
            if enough and len(found) >= enough:
                break
    return found, finished, count


def in_two_processes(count: int) -> tuple[Counter[str], int, int]:
    """The same, on two cores."""
    block = 500
    total: Counter[str] = Counter()
    finished = ran = 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        for found, done, each in executor.map(violations, [range(at, at + block) for at in range(0, count, block)]):
            total, finished, ran = total + found, finished + done, ran + each
    return total, finished, ran


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(2_000, marks=pytest.mark.timeout(1200)),
        pytest.param(200_000, marks=[pytest.mark.chaos, pytest.mark.timeout(0)]),
    ],
)
def test_protocol_under_random_schedules_holds_every_invariant(count: int) -> None:
    found, finished, ran = in_two_processes(count)
    print(f"\n{ran} schedules from seed {SEED}: {finished} finished, {sum(found.values())} with violations")
    assert ran == count
    assert not found
    # Somebody finishes, nearly always: the weather calms down before the operations run out.
    assert finished >= 0.999 * count


# Mutants: each takes one safeguard away.


def blind_create(path: StoragePath, body: bytes) -> bool:
    """Tries again as a client library does, and never looks what is there."""
    for _ in range(4):
        try:
            creating.put_if_absent(path, body)
        except FileExistsError:
            return False
        except OSError:
            continue
        return True
    raise StorageError("no answer")


def hopeful_create(path: StoragePath, body: bytes) -> bool:
    """Takes an unknown outcome for success."""
    try:
        return REAL_CREATE(path, body)
    except StorageError:
        return True


REAL_CREATE = creating._create_remote


def overwriting_create(path: StoragePath, body: bytes) -> bool:
    """Writes data as if its name could not be taken."""
    if "/data/" not in path.key:
        return REAL_CREATE(path, body)
    request(path, "write", "pipe_file", path.key, body)
    return True


def early_record(fn: Callable[[Any, StoragePath], Unit], folder: Any, task: Task) -> UnitRecord:
    """Commits a unit, then writes it."""
    first, second = f"data/{task.unit}/0", f"data/{task.unit}/1"
    body = f"{World.now.who()} early".encode()
    made = Unit(objects=(ObjectEntry.of(first, body), ObjectEntry.of(second, b"from " + body)), rows=1)
    record = UnitRecord(fingerprint=folder.fingerprint, unit=task.unit, made=made, seconds=0.0, peak_memory=0)
    creating.create(folder.path / unit_key(task.unit), record.body())
    creating.create(folder.path / first, body)
    creating.create(folder.path / second, b"from " + body)
    return record


def stubborn_make(task: Task, path: StoragePath) -> Unit:
    """Records what it would have written, whatever stands in the store."""
    first, second = f"data/{task.unit}/0", f"data/{task.unit}/1"
    body = f"{World.now.who()} {World.now.random.random()}".encode()
    creating.create(path / first, body)
    creating.create(path / second, b"from " + body)
    return Unit(objects=(ObjectEntry.of(first, body), ObjectEntry.of(second, b"from " + body)), rows=1)


def unfenced_append(self: SlotLog, record: Any) -> bool:
    """Takes the next slot that is free, whoever leads."""
    while not creating.create(self.path / slot_key(record.slot), record.body()):
        self.refresh()
        record = record.model_copy(update={"slot": len(self.slots), "parent": self.tip, "epoch": self.epoch})
        if isinstance(record, LeaseRecord):
            record = record.model_copy(update={"epoch": self.epoch + 1})
    self.slots.append(record)
    return True


def file_take(self: SlotLog, owner: Owner) -> LeaseRecord:
    """Keeps the lease in one file that is overwritten."""
    record = LeaseRecord(slot=0, parent="", epoch=1, owner=owner)
    request(self.path, "write", "pipe_file", (self.path / "beats/lease").key, record.nonce.encode())
    return record


def file_check(self: SlotLog, nonce: str) -> None:
    """Looks into the file, and then writes."""
    if read_bytes(self.path / "beats/lease").decode() != nonce:
        raise logs.FencedError("not ours")


def pointer_commit(self: TrainingLog, step: int, entries: Any, facts: Any) -> None:
    """Moves a pointer to the newest checkpoint."""
    request(self._log.path, "write", "pipe_file", (self._log.path / "latest").key, f"{step} {uuid.uuid4()}".encode())


def unchained_follow(self: SlotLog, slot: Any) -> None:
    self.slots.append(slot)


def unverified_latest(self: TrainingLog) -> Any:
    """Looks at the log without reading what has come in, and trusts its own count."""
    return self._log.checkpoints[-1] if self._log.checkpoints else None


def eager_commit(self: Any, outputs: Any, units: Any, *rest: Any) -> Any:
    """Commits a stage as far as it is."""
    return REAL_COMMIT(self, outputs, dict(list(units.items())[:1]), *rest)


REAL_COMMIT = states.StageFolder.commit


def careless_collect(found: Inventory, _told: Any, older_than: float, *_: Any) -> Any:
    """Deletes what it saw without a lease, and without a second look."""
    for each in list(repairs._garbage(found, older_than)):
        repairs.remove(each.path)
        yield each
    return found


def blind_take(label: str, path: StoragePath, full: bool, *rest: Any, **options: Any) -> Inventory:
    """Takes a record that cannot be read for none."""
    found = REAL_TAKE(label, path, full, *rest, **options)
    if not full:
        found.findings.clear()
    return found


def early_take(label: str, path: StoragePath, full: bool, *rest: Any, **options: Any) -> Inventory:
    """Believes under the lease what was seen before it."""
    if not full:
        return REAL_TAKE(label, path, full, *rest, **options)
    memory = World.now.memory
    key = (World.now.who(), str(path))
    if key not in memory:
        memory[key] = REAL_TAKE(label, path, full, *rest, **options)
    return memory[key]


REAL_TAKE = inventory.take

patch = mock.patch.object

MUTANTS: dict[str, Callable[[], Any]] = {
    "create does not look what is there": lambda: patch(creating, "_create_remote", blind_create),
    "an unknown outcome counts as success": lambda: patch(creating, "_create_remote", hopeful_create),
    "data is overwritten": lambda: patch(creating, "_create_remote", overwriting_create),
    "a unit is committed before its data": lambda: patch(outs, "run_unit", early_record),
    "a unit records what it would have written": lambda: patch(schedules, "make", stubborn_make),
    "a writer takes any free slot": lambda: _both(
        patch(SlotLog, "_append", unfenced_append), patch(SlotLog, "require_lease", lambda self, nonce: None)
    ),
    "the lease is a file that is overwritten": lambda: _both(
        patch(SlotLog, "take", file_take), patch(SlotLog, "require_lease", file_check)
    ),
    "the newest checkpoint is a pointer": lambda: patch(TrainingLog, "commit", pointer_commit),
    "training begins without reading the log": lambda: patch(TrainingLog, "latest", unverified_latest),
    "a stage is committed as far as it is": lambda: patch(states.StageFolder, "commit", eager_commit),
    "a unit counts without a look at its objects": lambda: patch(states.StageFolder, "lacking", lambda self, _: {}),
    "gc deletes without the lease": lambda: patch(repairs, "_collect", careless_collect),
    "gc deletes where a record cannot be read": lambda: patch(inventory, "take", blind_take),
    "repair believes what it saw before its lease": lambda: patch(inventory, "take", early_take),
}


@contextlib.contextmanager
def _both(*patches: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


@pytest.mark.parametrize("name", MUTANTS)
def test_protocol_without_a_safeguard_is_caught(name: str) -> None:
    with MUTANTS[name]():
        found, _, count = violations(range(MUTANT_SCHEDULES), enough=1)
    print(f"\n{name}: caught after {count} schedules: {next(iter(found), 'never')}")
    assert found


def test_protocol_on_a_store_that_overwrites_is_caught() -> None:
    """Why such a store is refused at the door."""
    found, _, _ = violations(range(MUTANT_SCHEDULES), atomic=False, enough=1)
    assert found


def test_schedules_are_repeatable() -> None:
    with schedules.simulated():
        assert schedules.schedule(7)[1:] == schedules.schedule(7)[1:]
