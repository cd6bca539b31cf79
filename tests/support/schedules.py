"""Random schedules of the real commit protocol: the code of `cluster.storage` and `jobs`, on a store whose every
operation is a point where another runner goes on, dies, or loses a request or its answer.

Runners are greenlets. Whoever asks the store for something hands over to the scheduler, which picks who goes
on. A lease is judged to have expired at any moment, the worst included, so a runner that is merely slow is
always a zombie for somebody else. After every operation the invariants are checked.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import fsspec
import greenlet
import tenacity

from cluster.storage import attempts
from cluster.storage.create import create
from cluster.storage.objects import forget, read_bytes
from cluster.storage.path import StoragePath
from jobs import lease as leases
from jobs.log import TrainingLog
from jobs.state import StageFolder, run_unit
from pipeline.stage import Task
from schemas.errors import BusyError, FencedError, IntegrityError, StorageError
from schemas.records import (
    CheckpointRecord,
    LeaseRecord,
    ObjectEntry,
    Outputs,
    Owner,
    StageRecord,
    Unit,
    UnitRecord,
    parse_record,
    parse_slot,
)

UNITS = ("000000", "000001")
STEPS = 3
RUNNERS = 4
MOST_OPERATIONS = 1500
ROOT = StoragePath("sim", "root")
FINGERPRINT = "f" * 64
# Chances of a crash and of a lost request or answer, for each operation.
WEATHER = ((0.0, 0.0), (0.01, 0.03), (0.03, 0.1), (0.005, 0.3))
CALM_AFTER = 0.6


class CrashError(BaseException):
    """The runner is dead."""


class ViolationError(AssertionError):
    """An invariant does not hold."""


class Store(fsspec.AbstractFileSystem):
    """The schedule's store, as fsspec sees it."""

    protocol = "sim"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        found = World.now.ask("get", path)
        if found is None:
            raise FileNotFoundError(path)
        return found[start:end]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = World.now.ask("get", path)
        if found is None:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(found), "type": "file", "ETag": World.now.md5(found)}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[str]:
        assert not detail
        return World.now.ask("list", path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        World.now.ask("create" if mode == "create" else "put", path, value)


fsspec.register_implementation("sim", Store, clobber=True)


@dataclass(slots=True)
class World:
    """One schedule."""

    random: random.Random
    atomic: bool = True
    objects: dict[str, bytes] = field(default_factory=dict)
    scheduler: greenlet.greenlet = field(default_factory=greenlet.getcurrent)
    runner: dict[greenlet.greenlet, str] = field(default_factory=dict)
    dead: set[greenlet.greenlet] = field(default_factory=set)
    leases: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    violations: list[str] = field(default_factory=list)
    sums: dict[bytes, str] = field(default_factory=dict)

    now = None  # type: ignore[assignment]

    def ask(self, verb: str, key: str, body: bytes | None = None) -> Any:
        """In a runner: hand over, and go on when the scheduler has done it."""
        if greenlet.getcurrent() in self.dead:
            raise CrashError
        return self.scheduler.switch((verb, key, body))

    def who(self) -> str:
        return self.runner[greenlet.getcurrent()]

    def md5(self, body: bytes) -> str:
        if body not in self.sums:
            self.sums[body] = hashlib.md5(body, usedforsecurity=False).hexdigest()
        return self.sums[body]

    def apply(self, verb: str, key: str, body: bytes | None) -> Any:
        if verb == "get":
            return self.objects.get(key)
        if verb == "list":
            below = key.rstrip("/") + "/"
            found = {name[len(below) :].split("/")[0] for name in self.objects if name.startswith(below)}
            return [below + name for name in sorted(found)]
        assert body is not None
        if verb == "create" and key in self.objects and self.atomic:
            raise FileExistsError(key)
        if key in self.objects and self.objects[key] != body and "/beats/" not in key:
            self.violations.append(f"{key} was overwritten")
        self.objects[key] = body
        self._check(key, body)
        return None

    # Invariants

    def _check(self, key: str, body: bytes) -> None:
        if "/units/" in key:
            for entry in parse_record(UnitRecord, body, key).made.objects:
                there = self.objects.get(f"{ROOT.key}/harvest/{entry.key}")
                if there is None:
                    self.violations.append("a unit was committed before its objects")
                elif ObjectEntry.of(entry.key, there) != entry:
                    self.violations.append("a unit was committed with other objects than are there")
        elif key.endswith("COMMITTED.json"):
            record = parse_record(StageRecord, body, key)
            if record.stage == "harvest" and sorted(record.units) != sorted(UNITS):
                self.violations.append("a stage was committed without all of its units")
            if record.stage == "train" and self._steps() != list(range(1, STEPS + 1)):
                self.violations.append("a stage was committed without all of its checkpoints")
        elif "/log/" in key:
            self._check_log()

    def _slots(self, stage: str) -> list[Any]:
        keys = sorted(key for key in self.objects if key.startswith(f"{ROOT.key}/{stage}/log/"))
        return [_slot(self.objects[key]) for key in keys]

    def _steps(self) -> list[int]:
        return [slot.step for slot in self._slots("train") if isinstance(slot, CheckpointRecord)]

    def _check_log(self) -> None:
        writer, tip, epoch = "", "", 0
        for index, slot in enumerate(self._slots("train")):
            if slot.slot != index or slot.parent != tip:
                self.violations.append("the log's chain is broken")
            tip = slot.nonce
            if isinstance(slot, LeaseRecord):
                if slot.epoch <= epoch:
                    self.violations.append("epochs do not rise")
                writer, epoch = slot.owner.host, slot.epoch
            elif isinstance(slot, CheckpointRecord):
                if slot.facts["writer"] != writer:
                    self.violations.append("a runner whose lease was gone wrote a checkpoint")
                for entry in slot.objects:
                    if f"{ROOT.key}/train/{entry.key}" not in self.objects:
                        self.violations.append("a checkpoint was committed before its objects")
        if self._steps() != list(range(1, len(self._steps()) + 1)):
            self.violations.append("a checkpoint was lost or doubled")


@functools.lru_cache(maxsize=4096)
def _slot(body: bytes) -> Any:
    return parse_slot(body, "a slot")


# What a runner does: a stage of units, then a stage of training.


def make(task: Task, path: StoragePath) -> Unit:
    """A unit of two objects. Every attempt would make other bytes; what stands in the store counts."""
    first, second = f"data/{task.unit}/0", f"data/{task.unit}/1"
    body = f"{World.now.who()} {World.now.random.random()}".encode()
    if not create(path / first, body):
        body = read_bytes(path / first)
    derived = b"from " + body
    if not create(path / second, derived):
        raise IntegrityError("the second object does not belong to the first")
    return Unit(objects=(ObjectEntry.of(first, body), ObjectEntry.of(second, derived)), rows=1)


def run() -> str:
    """One runner's whole life; returns how it ended."""
    try:
        units = StageFolder(ROOT / "harvest", "harvest", FINGERPRINT)
        if units.committed() is None:
            units.claim({"stage": "harvest"})
            lease = take(units)
            if lease is not None:
                done = {name: units.unit(name) for name in units.units()}
                for name in UNITS:
                    if name not in done:
                        done[name] = run_unit(make, units, Task(unit=name))
                units.commit(Outputs(), done, {}, 0.0, 0, lease.read_log)
        training = StageFolder(ROOT / "train", "train", FINGERPRINT)
        if training.committed() is None:
            training.claim({"stage": "train"})
            lease = take(training)
            if lease is not None:
                train(training, lease)
        if training.committed() is None:
            raise ViolationError("a runner ended well, and the last stage is not committed")
    except (FencedError, StorageError, BusyError) as error:
        return type(error).__name__
    return "done"


def train(folder: StageFolder, lease: leases.Lease) -> None:
    log = TrainingLog(folder.path, lease.record.nonce)
    last = log.latest()
    for step in range(last.step if last else 0, STEPS):
        state = log.write(step + 1, "state", f"{World.now.who()} {step}".encode())
        log.commit(step + 1, [state], {"writer": World.now.who()})
    folder.commit(Outputs(), {}, {}, 0.0, 0, lease.read_log)


def take(folder: StageFolder) -> leases.Lease | None:
    return leases.take(
        folder.path,
        folder.label,
        90.0,
        wait=True,
        tell=lambda _: None,
        lost=lambda _: None,
        finished=lambda: folder.committed() is not None,
    )


def _this_runner() -> Owner:
    return Owner(host=World.now.who(), boot="", namespace="", pid=0, started=0.0)


@contextmanager
def simulated() -> Iterator[None]:
    """The clock stands still, leases expire at any moment, and a store is given up after four attempts."""
    give_up = tenacity.stop_after_attempt(4)
    with (
        mock.patch.object(leases, "is_over", return_value=True),
        mock.patch.object(leases, "this_process", _this_runner),
        mock.patch.object(attempts.time, "sleep"),
        mock.patch.object(attempts.tenacity, "stop_after_delay", return_value=give_up),
        mock.patch.object(attempts._LOG, "disabled", True),
        mock.patch("jobs.state.environment", dict),
    ):
        forget()
        yield
        forget()


def schedule(seed: int, atomic: bool = True) -> tuple[list[str], bool, int]:
    """Run one schedule.

    Returns:
        Violations, whether somebody finished, and the number of operations.
    """
    world = World.now = World(random.Random(seed), atomic)
    rng = world.random
    crash, lose = rng.choice(WEATHER)
    waiting: dict[greenlet.greenlet, Any] = {}
    endings: Counter[str] = Counter()
    count = 0

    def step(runner: greenlet.greenlet, resume: Callable[[], Any]) -> None:
        try:
            asked = resume()
        except CrashError:
            asked = None
        except IntegrityError as error:
            world.violations.append(f"a runner met damage: {error.what.partition('root/')[2][:60]}")
            asked = None
        except ViolationError as error:
            world.violations.append(str(error))
            asked = None
        if runner.dead:
            endings[asked if isinstance(asked, str) else "crashed"] += 1
            waiting.pop(runner, None)
        else:
            waiting[runner] = asked

    while world.operations < MOST_OPERATIONS and not world.violations:
        if (len(waiting) < RUNNERS and rng.random() < 0.03) or not waiting:
            if endings["done"] and not waiting:
                break
            count += 1
            fresh = greenlet.greenlet(run)
            world.runner[fresh] = f"runner-{count}"
            step(fresh, fresh.switch)
            continue
        # The oldest is preferred a little, so that somebody gets on.
        every = list(waiting)
        runner = rng.choice(every) if rng.random() < 0.8 else every[0]
        world.operations += 1
        stormy = world.operations < CALM_AFTER * MOST_OPERATIONS
        if stormy and rng.random() < crash:
            world.dead.add(runner)
            step(runner, lambda: runner.throw(CrashError))  # noqa: B023 - called at once
            continue
        verb, key, body = waiting[runner]
        lost = stormy and rng.random() < lose
        error: Exception | None = ConnectionResetError("lost") if lost else None
        answer = None
        if not lost or rng.random() < 0.5:
            try:
                answer = world.apply(verb, key, body)
            except FileExistsError as taken:
                error = error or taken
        if error is not None:
            step(runner, lambda: runner.throw(error))  # noqa: B023
        else:
            step(runner, lambda: runner.switch(answer))  # noqa: B023
    for runner in waiting:
        world.dead.add(runner)
        with contextlib.suppress(CrashError):
            runner.throw(CrashError)
    return world.violations, bool(endings["done"]), world.operations
