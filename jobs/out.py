"""The door that a stage gets: fans out what is not committed yet, and commits it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from cluster.backlog import Occasion
from cluster.pool import Pool, Rank, Resources
from cluster.storage import traffic
from cluster.storage.attempts import shortage
from cluster.storage.create import create_or_adopt
from cluster.storage.path import StoragePath
from cluster.storage.traffic import Traffic
from jobs.log import TrainingLog
from jobs.state import StageFolder, peak_memory, run_unit
from pipeline.stage import Gang, Member, Out, Task
from schemas.compute import Compute
from schemas.events import Event, Note, StageStarted, StoreUsed, UnitCommitted
from schemas.records import ObjectEntry, Unit, UnitRecord

T = TypeVar("T", bound=Task)


class StageOut:
    """See `pipeline.stage.Out`.

    Args:
        folder: Where the stage's output goes.
        pool: Who does the work.
        compute: The manifest's `compute`.
        emit: Who watches.
        lease: Nonce of the lease under which checkpoints are written; empty without one.
    """

    def __init__(
        self, folder: StageFolder, pool: Pool, compute: Compute, emit: Callable[[Event], None], lease: str = ""
    ) -> None:
        self._folder, self._pool, self._compute, self._emit, self._lease = folder, pool, compute, emit, lease
        self.records: dict[str, UnitRecord] = {}
        self.peak_memory = 0
        self._moved, self._occasion = Traffic(), Occasion()

    @property
    def path(self) -> StoragePath:
        """The stage's folder."""
        return self._folder.path

    @property
    def stage(self) -> str:
        """The stage's label."""
        return self._folder.label

    @property
    def compute(self) -> Compute:
        """The manifest's `compute`."""
        return self._compute

    def map(
        self, fn: Callable[[T, StoragePath], Unit], tasks: Sequence[T], resources: Resources
    ) -> dict[str, UnitRecord]:
        """Run what is not committed; returns the records of all tasks."""
        wanted = {task.unit for task in tasks}
        there = [name for name in self._folder.units() if name in wanted and name not in self.records]
        found = {name: self._folder.unit(name) for name in there}
        lost = self._folder.lacking(found.values())
        for name, keys in lost.items():
            self.emit(Note(self.stage, f"unit {name} is recorded, but {keys[0]} is absent: it is made again"))
        self.records |= {name: record for name, record in found.items() if name not in lost}
        open_tasks = [task for task in tasks if task.unit not in self.records]
        self.emit(StageStarted(self.stage, len(tasks) - len(open_tasks), len(tasks), str(self.path)))
        if open_tasks:
            work = functools.partial(_make, fn, self._folder)
            finished = self._pool.map(work, open_tasks, resources, self.emit, self.stage, lambda task: task.unit)
            for index, (record, moved) in finished:
                self._moved += moved
                self.records[open_tasks[index].unit] = record
                made = record.made
                self.emit(UnitCommitted(self.stage, record.unit, made.rows, record.seconds, record.peak_memory))
            self._tell(forced=True)
        return {task.unit: self.records[task.unit] for task in tasks}

    def gang(
        self,
        fn: Callable[[Sequence[Member[T]], Gang], Any],
        task: T,
        world_size: int,
        resources: Resources,
        others: Sequence[tuple[Out, T]] = (),
    ) -> Any:
        """Run a gang that keeps the checkpoints of each of its stages in that stage's folder."""
        outs, tasks = [self], [task]
        for out, each in others:
            assert isinstance(out, StageOut)
            outs.append(out)
            tasks.append(each)
        seats = [_Seat(each, out.path, out._lease) for out, each in zip(outs, tasks, strict=True)]
        work = functools.partial(_run_rank, fn, seats)
        result, peak = self._pool.gang(work, world_size, resources, self.emit, self.stage)
        for out in outs:
            out.peak_memory = peak
        self._tell(forced=True)
        return result

    def write(self, key: str, body: bytes) -> ObjectEntry:
        """Create an object of the stage itself."""
        create_or_adopt(self.path / key, body)
        return ObjectEntry.of(key, body)

    def emit(self, event: Event) -> None:
        """Pass an event on; what was moved meanwhile is added up, and told now and then."""
        if isinstance(event, StoreUsed):
            self._moved += Traffic(event.read_bytes, event.written_bytes, event.retries)
        else:
            self._emit(event)
        self._tell()

    def _tell(self, forced: bool = False) -> None:
        """Say what workers and ranks have moved, and what this process has: records, or all of an inline pool."""
        if not self._occasion.due(forced):
            return
        moved, self._moved = self._moved + traffic.fresh(), Traffic()
        if moved != Traffic():
            self._emit(StoreUsed(self.stage, *dataclasses.astuple(moved)))


def _make(fn: Callable[[T, StoragePath], Unit], folder: StageFolder, task: T) -> tuple[UnitRecord, Traffic]:
    """In a worker: make a unit and commit it; and what the process has moved since the unit before."""
    return run_unit(fn, folder, task), traffic.fresh()


class _Seat(NamedTuple):
    """What a rank has to know of a stage to be its member."""

    task: Any
    path: StoragePath
    lease: str


def _run_rank(fn: Callable[[Sequence[Member[T]], Gang], Any], seats: Sequence[_Seat], rank: Rank) -> tuple[Any, int]:
    members = [Member(seat.task, seat.path, TrainingLog(seat.path, seat.lease)) for seat in seats]
    gang = Gang(rank.rank, rank.world_size, rank.init_method, rank.emit, rank.beat)
    with shortage(f"rank {rank.rank} of {rank.world_size}"):
        return fn(members, gang), peak_memory()
