"""Random schedules of the real commit protocol: the code of `cluster.storage` and `jobs`, on a store whose every
operation is a point where another runner goes on, dies, or loses a request or its answer.

Runners are greenlets. Whoever asks the store for something hands over to the scheduler, which picks who goes
on. A lease is judged to have expired at any moment, the worst included, so a runner that is merely slow is
always a zombie for somebody else. After every operation the invariants are checked.

In a third of the schedules keepers come by, too: `repair` and `gc --delete`, of leftovers of any age. A bit of a unit
or of its record may rot then. A keeper that lives is not taken over: nothing can fence a deletion that is on its way.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import greenlet
import tenacity

from cluster.pool import InlinePool, Resources
from cluster.storage import attempts
from cluster.storage.create import create
from cluster.storage.objects import forget, read_bytes
from cluster.storage.path import StoragePath
from jobs import inventory
from jobs import lease as leases
from jobs import repair as repairs
from jobs.log import SlotLog, TrainingLog
from jobs.out import StageOut
from jobs.state import StageFolder
from pipeline.stage import Task
from schemas.compute import Compute
from schemas.errors import BusyError, FencedError, IntegrityError, StageFailedError, StorageError
from schemas.records import (
    LeaseRecord,
    ObjectEntry,
    Outputs,
    Owner,
    RootRecord,
    Unit,
)
from tests.support.world import HARVEST, ROOT, SPECS, STEPS, TRAIN, UNITS, CrashError, ViolationError, World

RUNNERS = 4
MOST_OPERATIONS = 2500
# Chances of a crash and of a lost request or answer, for each operation.
WEATHER = ((0.0, 0.0), (0.01, 0.03), (0.03, 0.1), (0.005, 0.3))
CALM_AFTER = 900
# Of the schedules in which keepers come by: the chance that one comes instead of a runner, and that a bit rots.
KEEPERS, ROT = 0.4, 0.004
MOST_REPAIRS = 3


# What a runner does: a stage of units, then a stage of training.


def make(task: Task, path: StoragePath) -> Unit:
    """A unit of two objects. Every attempt would make other bytes; what stands in the store counts.

    Where bits rot, every attempt makes the same: else what has rotted in a committed stage could not be made again.
    """
    first, second = f"data/{task.unit}/0", f"data/{task.unit}/1"
    body = f"{World.now.who()} {World.now.random.random()}".encode()
    if World.now.deterministic:
        body = f"unit {task.unit}".encode()
    if not create(path / first, body):
        body, ours = read_bytes(path / first), body
        if World.now.deterministic and ours != body:
            raise IntegrityError("the first object is not what this makes")
    derived = b"from " + body
    if not create(path / second, derived):
        raise IntegrityError("the second object does not belong to the first")
    return Unit(objects=(ObjectEntry.of(first, body), ObjectEntry.of(second, derived)), rows=1)


def run() -> str:
    """One runner's whole life; returns how it ended."""
    try:
        if not whole(HARVEST):
            HARVEST.claim(SPECS["harvest"])
            lease = take(HARVEST)
            if lease is not None:
                out = StageOut(HARVEST, InlinePool(), COMPUTE, lambda _: None, lease.record.nonce)
                out.map(make, [Task(unit=name) for name in UNITS], RESOURCES)
                HARVEST.commit(Outputs(), out.records, {}, 0.0, 0, lease.read_log)
        if not whole(TRAIN):
            TRAIN.claim(SPECS["train/d"])
            lease = take(TRAIN)
            if lease is not None:
                train(TRAIN, lease)
        if TRAIN.committed() is None:
            raise ViolationError("a runner ended well, and the last stage is not committed")
    except (FencedError, StorageError, BusyError, StageFailedError) as error:
        return type(error).__name__
    return "done"


COMPUTE, RESOURCES = Compute(), Resources()


def whole(folder: StageFolder) -> bool:
    committed = folder.committed()
    return committed is not None and not folder.missing(committed)


def repair() -> str:
    """The command, but for what it prints."""
    try:
        list(repairs.repair(ROOT, 90.0, lambda _: None))
    except (FencedError, StorageError, BusyError) as error:
        return type(error).__name__
    return "repaired"


def gc() -> str:
    """The command with `--delete --older-than 0`, but for what it prints."""
    try:
        list(repairs.garbage(ROOT, 0.0, lambda _: None, 90.0))
    except (FencedError, StorageError, BusyError, IntegrityError) as error:
        return type(error).__name__
    return "collected"


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
        finished=lambda: whole(folder),
    )


def _this_runner() -> Owner:
    return Owner(host=World.now.who(), boot="", namespace="", pid=0, started=0.0)


def _is_over(_log: SlotLog, holder: LeaseRecord, stage: str, _seconds: float, wait: bool, *_: Any) -> bool:
    if holder.owner.host.startswith("runner") or not World.now.lives(holder.owner.host):
        return True
    if wait:
        return False
    raise BusyError(f"{stage} is being kept")


class Here:
    """Does at once what a pool of threads would do: greenlets stay in their thread."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.map = map

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def simulated() -> Iterator[None]:
    """The clock stands still, leases expire at any moment, and a store is given up after four attempts."""
    give_up = tenacity.stop_after_attempt(4)
    with (
        mock.patch.object(leases, "is_over", _is_over),
        mock.patch.object(leases, "is_held", return_value=False),
        mock.patch.object(leases.Lease, "_keep"),
        mock.patch.object(inventory, "ThreadPoolExecutor", Here),
        mock.patch("cluster.storage.objects.ThreadPoolExecutor", Here),
        mock.patch.object(leases, "this_process", _this_runner),
        mock.patch.object(attempts.time, "sleep"),
        mock.patch.object(attempts.tenacity, "stop_after_delay", return_value=give_up),
        mock.patch.object(attempts._LOG, "disabled", True),
        mock.patch("jobs.state.environment", dict),
    ):
        forget()
        yield
        forget()


class Schedule:
    """One schedule: `violations`, and the `endings` of runners and keepers."""

    def __init__(self, seed: int, atomic: bool) -> None:
        self.world = World.now = World(random.Random(seed), atomic)
        self.rng = self.world.random
        self.crash, self.lose = self.rng.choice(WEATHER)
        self.world.kept = self.rng.random() < 0.3
        self.world.rots = self.world.kept and self.rng.random() < 0.5
        self.world.deterministic = self.world.rots or (self.world.kept and self.rng.random() < 0.5)
        if self.world.kept:
            self.world.objects[f"{ROOT.key}/ROOT.json"] = RootRecord(name="d", creates="here").body()
        # Keepers sleep then between their look and what they do by it.
        self.sleepy = self.rng.random() < 0.5
        self.waiting: dict[greenlet.greenlet, Any] = {}
        self.endings: Counter[str] = Counter()
        self.hurt = False
        self.count = 0

    def step(self, one: greenlet.greenlet, resume: Callable[[], Any]) -> None:
        """Let one go on until it asks for something, or ends."""
        world = self.world
        try:
            asked = resume()
        except CrashError:
            asked = None
        except IntegrityError as error:
            asked, self.hurt = None, True
            if not (world.deleted or world.rots):
                world.violations.append(f"a runner met damage: {error.what.partition('root/')[2][:60]}")
        except ViolationError as error:
            world.violations.append(str(error))
            asked = None
        if one.dead:
            self.endings[asked if isinstance(asked, str) else "crashed"] += 1
            if asked == "repaired":
                self.hurt = False
            self.waiting.pop(one, None)
        else:
            self.waiting[one] = asked

    def begin(self) -> None:
        """A new runner comes, or a keeper."""
        work: Callable[[], str] = run
        if self.world.kept and self.rng.random() < (0.8 if self.hurt else KEEPERS):
            work = repair if self.hurt or self.rng.random() < 0.5 else gc
        self.start(work)

    def start(self, work: Callable[[], str]) -> None:
        self.count += 1
        fresh = greenlet.greenlet(work)
        self.world.runner[fresh] = f"{'runner' if work is run else work.__name__}-{self.count}"
        self.step(fresh, fresh.switch)

    def go(self, stormy: bool) -> None:
        """One operation of one of them, and what becomes of it."""
        # The oldest is preferred a little, so that somebody gets on.
        every = list(self.waiting)
        one = self.rng.choice(every) if self.rng.random() < 0.8 else every[0]
        if self.sleepy and not self.world.runner[one].startswith("runner") and self.rng.random() < 0.9:
            one = self.rng.choice(every)
        self.world.operations += 1
        if stormy and self.rng.random() < self.crash:
            self.world.dead.add(one)
            self.step(one, lambda: one.throw(CrashError))
            return
        if stormy and self.world.rots and self.rng.random() < ROT:
            self.world.rot()
        verb, key, body = self.waiting[one]
        lost = stormy and self.rng.random() < self.lose
        error: Exception | None = ConnectionResetError("lost") if lost else None
        answer = None
        if not lost or self.rng.random() < 0.5:
            self.world.asking = one
            try:
                answer = self.world.apply(verb, key, body)
            except FileExistsError as taken:
                error = error or taken
        if error is not None:
            self.step(one, lambda: one.throw(error))
        else:
            self.step(one, lambda: one.switch(answer))

    def run(self) -> None:
        """Until somebody has finished and all the others have ended."""
        while self.world.operations < MOST_OPERATIONS and not self.world.violations:
            if (len(self.waiting) < RUNNERS and self.rng.random() < 0.03) or not self.waiting:
                if self.endings["done"] and not self.waiting:
                    break
                self.begin()
            else:
                self.go(self.world.operations < CALM_AFTER)
        self.end()

    def end(self) -> None:
        """Whoever is left dies."""
        for one in self.waiting:
            self.world.dead.add(one)
            with contextlib.suppress(CrashError):
                one.throw(CrashError)
        self.waiting.clear()

    def recover(self) -> None:
        """Whatever has happened: repair and run bring everything to its commit, and nothing is wrong then."""
        for _ in range(MOST_REPAIRS):
            self.hurt = False
            done = self.endings["done"]
            for work in (repair, run):
                self.start(work)
                while self.waiting and not self.world.violations:
                    self.go(stormy=False)
            if self.world.violations or (self.endings["done"] > done and not self.world.wrong()):
                return
        self.world.violations.append("repair and run did not bring everything back")


def schedule(seed: int, atomic: bool = True) -> tuple[list[str], bool, int]:
    """Run one schedule.

    Returns:
        Violations, whether somebody finished, and the number of operations.
    """
    made = Schedule(seed, atomic)
    made.run()
    done, operations = bool(made.endings["done"]), made.world.operations
    if made.world.deterministic and not made.world.violations:
        made.recover()
    return made.world.violations, done, operations
