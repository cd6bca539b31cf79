"""Units that only sleep, so that as many workers as one likes fit on a few cores, and the runner is all that works.

A module of its own, because the workers import it: it must not bring torch along.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.pool import Pool, Resources
from cluster.ray_cluster import ray_session
from cluster.storage.create import create_or_adopt
from cluster.storage.objects import names
from cluster.storage.path import StoragePath
from jobs.out import StageOut
from jobs.progress import Watchers
from jobs.state import StageFolder
from pipeline.stage import Task
from schemas.compute import Compute
from schemas.events import Event, UnitCommitted
from schemas.records import ObjectEntry, Unit

# Of a unit: its rows, and as many facts as a harvest of two hook points leaves, so that records are of a real size.
ROWS = 2**16
HOOK_POINTS, SLABS = ("layers.2", "layers.2.mlp"), 16
MEET_SECONDS = 300.0


class Sleep(Task):
    """A unit of so many seconds."""

    seconds: float


class Meet(Task):
    """A unit that ends when so many workers have one."""

    workers: int


def sleep(task: Sleep, path: StoragePath) -> Unit:
    """Sleep, and leave a small object."""
    began = time.monotonic()
    body, key = f"{task.unit} has slept\n".encode(), f"slept/{task.unit}.txt"
    create_or_adopt(path / key, body)
    time.sleep(max(0.0, task.seconds - (time.monotonic() - began)))
    chunks = {name: [f"{number:016x}" for number in range(SLABS)] for name in HOOK_POINTS}
    facts = {"hashes": dict.fromkeys(HOOK_POINTS, "0" * 16), "chunks": chunks}
    return Unit(objects=(ObjectEntry.of(key, body),), rows=ROWS, content_hash="0" * 16, facts=facts)


def meet(task: Meet, path: StoragePath) -> Unit:
    """Wait for the others: from then on all workers are there."""
    create_or_adopt(path / "met" / task.unit, b"here\n")
    deadline = time.monotonic() + MEET_SECONDS
    while len(names(path / "met")) < task.workers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {task.workers} workers after {MEET_SECONDS:.0f} s")
        time.sleep(0.5)
    return Unit(objects=(), rows=ROWS)


@dataclass
class Driver:
    """What the process that runs the units needs: CPU seconds in all, resident bytes at the begin, middle and end."""

    wall: float = 0.0
    cpu: float = 0.0
    resident: list[int] = field(default_factory=list)


def slept(pool: Pool, workers: int, units: int, seconds: float, scratch: Path) -> Driver:
    """Let workers sleep, with the commits, the events and the watchers of a run.

    Args:
        pool: Whose workers.
        workers: How many it has.
        units: How many units, behind one for each worker in which they start.
        seconds: Of a unit.
        scratch: An empty folder.
    """
    folder = StoragePath.parse(scratch)
    driver, process, count = Driver(), psutil.Process(), 0
    with Watchers(folder / "runs") as watch:

        def emit(event: Event) -> None:
            nonlocal count
            watch(event)
            count += isinstance(event, UnitCommitted)
            if count == units // 2 and len(driver.resident) == 1:
                driver.resident.append(process.memory_info().rss)

        stage = StageFolder(folder / "harvest", "harvest", "0" * 64)
        StageOut(stage, pool, Compute(), watch).map(
            meet, [Meet(unit=f"meet-{index:03d}", workers=workers) for index in range(workers)], Resources()
        )
        out = StageOut(stage, pool, Compute(), emit)
        tasks = [Sleep(unit=f"{index:06d}", seconds=seconds) for index in range(units)]
        driver.resident.append(process.memory_info().rss)
        began, began_cpu = time.perf_counter(), time.process_time()
        out.map(sleep, tasks, Resources())
        driver.wall, driver.cpu = time.perf_counter() - began, time.process_time() - began_cpu
        driver.resident.append(process.memory_info().rss)
        pool.close()
    return driver


@contextmanager
def ray_pools(slots: int) -> Iterator[Callable[[int], Pool]]:
    """A Ray of so many CPU slots; yields what makes a pool of so many workers."""
    with ray_session(None, slots):
        # Imports ray, which must not happen before the session has set its environment.
        from cluster.ray_pool import RayPool

        yield RayPool
