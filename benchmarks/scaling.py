"""How the runner grows: with workers, with units, with what a root holds.

    python benchmarks/scaling.py [--only harvest|sleeping|status ...] [--workers N ...] [--quick] [--json FILE]

`harvest`: rows/s of real units by one worker and by two, on as many cores, interleaved.

`sleeping`: workers that only sleep, with all of a run around them: dispatch by Ray, objects, records and their commits,
events, log, TensorBoard. The overhead is the time over the ideal one, units x seconds / workers, without the start of
the workers, which is paid once. Beside it CPU time of the driver for each unit, which other programs on the machine
disturb less, and its resident size at the begin, in the middle and at the end.

`status`: `kilobasis status` as a process of its own, of a root with 100,000 unit records whose harvest goes on, and of
one whose harvest is committed; on this disk, and in a mock of S3 (moto). moto itself takes most of half a minute for
a list of very many, so what is judged there is the CPU time of `status`: no real store can make it faster than that.

Exit code 1 where a mark is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import many_units
import marks
import sleeping
from marks import Fact, Mark, fact, spread
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sleeping", "status", "harvest")
OVERHEAD, GROWTH_MIB, STATUS_SECONDS = 0.02, 200, 5.0


@dataclass(frozen=True)
class Case:
    """How much of each. `crowd` workers take `rounds` units each, fewer of them take `few`."""

    workers: tuple[int, ...]
    crowd: int
    seconds: float
    rounds: int
    few: int
    units: int
    looks: int
    unit_rows: int
    harvests: int


# 64 x 157 units are the first whole rounds beyond 10,000.
FULL = Case((1, 4, 16, 64), 64, 2.0, 157, 8, 100_000, 3, 2**16, 4)
QUICK = Case((1, 2), 2, 0.2, 10, 5, 2_000, 1, 2**13, 2)


def sleepers(case: Case, console: Console) -> tuple[list[Fact], list[Mark]]:
    """Workers that sleep."""
    table = Table(title=f"units that sleep {case.seconds:g} s")
    for heading in ("workers", "units", "ideal s", "overhead", "driver CPU ms/unit", "driver MiB", "grown MiB"):
        table.add_column(heading, justify="right")
    found, made = list[Fact](), list[Mark]()
    for workers in case.workers:
        units = workers * (case.rounds if workers == case.crowd else case.few)
        with tempfile.TemporaryDirectory() as scratch, sleeping.ray_pools(workers) as pool:
            driver = sleeping.slept(pool(workers), workers, units, case.seconds, Path(scratch))
        ideal = units * case.seconds / workers
        overhead, cpu = driver.wall / ideal - 1, 1e3 * driver.cpu / units
        sizes = [each / 2**20 for each in driver.resident]
        grown = max(sizes) - sizes[0]
        shown = " ".join(f"{each:.0f}" for each in sizes)
        table.add_row(
            str(workers), f"{units:,}", f"{ideal:.0f}", f"{overhead:+.2%}", f"{cpu:.2f}", shown, f"{grown:.0f}"
        )
        config = asdict(case) | {"workers": workers, "units": units}
        found += [
            fact(f"scaling/sleeping{workers}/time", [1 + overhead], "time / ideal", config),
            fact(f"scaling/sleeping{workers}/driver_cpu", [cpu], "ms of CPU per unit", config),
            fact(f"scaling/sleeping{workers}/driver_rss", sizes, "MiB at begin, middle, end", config),
        ]
        if workers == case.crowd:
            made.append(Mark(f"overhead, {workers} workers, {units:,} units", overhead, "at most", OVERHEAD))
            made.append(Mark(f"MiB that the driver grows over {units:,} units", grown, "at most", GROWTH_MIB))
    console.print(table)
    return found, made


def look(target: str, environment: dict[str, str]) -> tuple[float, float, tuple[str, int]]:
    """Seconds of `kilobasis status`, its CPU time, and the harvest's state and done units by its word."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    told = subprocess.run(
        [sys.executable, "-m", "jobs", "status", target, "--json"],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (harvest,) = [each for each in json.loads(told.stdout)["stages"] if each["stage"] == "harvest"]
    return seconds, cpu, (harvest["state"], harvest["done"])


def statuses(case: Case, console: Console) -> tuple[list[Fact], list[Mark]]:
    """How long it takes to say how far a root is."""
    table = Table(title=f"kilobasis status, {case.units:,} unit records")
    for heading in ("where", "the harvest", "s (range)", "its CPU time"):
        table.add_column(heading)
    found, made = list[Fact](), list[Mark]()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        many_units.build(root, case.units)
        for state, done in (("running", case.units), ("committed", case.units + 1)):
            if state == "committed":
                many_units.commit(root, case.units)
            with many_units.served(root) as environment:
                for where, target, around in (
                    ("disk", str(root), {}),
                    ("moto", f"s3://{many_units.BUCKET}", environment),
                ):
                    seconds, own = list[float](), list[float]()
                    for _ in range(case.looks):
                        took, cpu, told = look(target, around)
                        if told != (state, done):
                            raise RuntimeError(f"status of {where} says {told}, expected {(state, done)}")
                        seconds.append(took)
                        own.append(cpu)
                    table.add_row(where, state, spread(seconds), spread(own))
                    found.append(fact(f"scaling/status/{where}/{state}", seconds, "s", asdict(case)))
                    judged, what = (seconds, "s") if where == "disk" else (own, "s of CPU")
                    made.append(
                        Mark(
                            f"{what} for status, {where}, {state}", statistics.median(judged), "at most", STATUS_SECONDS
                        )
                    )
    console.print(table)
    return found, made


def harvests(case: Case, console: Console) -> tuple[list[Fact], list[Mark]]:
    """Rows/s of one worker and of two."""
    import harvest

    from cluster.pool import Pool, Resources
    from cluster.storage.path import StoragePath
    from jobs.out import StageOut
    from jobs.state import StageFolder
    from pipeline.harvest import harvest_unit
    from schemas.compute import Compute

    units = 4
    prepared_case = harvest.Case("quickstart", harvest.CASES[0].hook_points, case.unit_rows, rounds=units - 1)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch, sleeping.ray_pools(3) as pool:
        model = harvest.QUICKSTART
        if not (model / "model.safetensors").is_file():
            model = Path(scratch) / "random"
            harvest.random_model(model)
        prepared = harvest.setup(prepared_case, model, Path(scratch))
        pools: dict[int, Pool] = {workers: pool(workers) for workers in rates}
        # The first one loads the model.
        for index in range(case.harvests + 1):
            for workers in sorted(rates, reverse=bool(index % 2)):
                out = Path(scratch) / "out"
                folder = StageFolder(StoragePath.parse(out), "harvest", "0" * 64)
                began = time.perf_counter()
                StageOut(folder, pools[workers], Compute(), lambda event: None).map(
                    harvest_unit, prepared.tasks, Resources()
                )
                if index:
                    rates[workers].append(units * case.unit_rows / (time.perf_counter() - began))
                shutil.rmtree(out)
        for each in pools.values():
            each.close()
    times = [two / one for one, two in zip(*rates.values(), strict=True)]
    table = Table(title=f"harvest of {units} units of {case.unit_rows:,} rows, {os.cpu_count()} cores")
    for heading in ("workers", "rows/s (range)", "times one worker's (range)"):
        table.add_column(heading)
    table.add_row("1", spread(rates[1], 0), "")
    table.add_row("2", spread(rates[2], 0), spread(times))
    console.print(table)
    config = asdict(case) | {"cores": os.cpu_count()}
    found = [fact(f"scaling/harvest{workers}/rows_per_s", each, "rows/s", config) for workers, each in rates.items()]
    return [*found, fact("scaling/harvest2/times", times, "two workers / one", config)], []


def main() -> int:
    """Measure; exit code 1 where a mark is missed."""
    parser = argparse.ArgumentParser(description="Growth of the runner with workers, units and records.")
    parser.add_argument("--only", action="append", choices=PARTS, help="what to measure; may be given several times")
    parser.add_argument("--workers", type=int, action="append", help="of those that sleep; may be given several times")
    parser.add_argument("--quick", action="store_true", help="few workers, units and records; without marks")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    case, console = QUICK if options.quick else FULL, Console(width=120)
    if options.workers:
        case = Case(**(asdict(case) | {"workers": tuple(options.workers)}))
    found, made = list[Fact](), list[Mark]()
    parts = {"sleeping": sleepers, "status": statuses, "harvest": harvests}
    # In this order: those that sleep are driven by a process that has not brought torch along.
    for part in PARTS:
        if part in (options.only or PARTS):
            facts, wanted = parts[part](case, console)
            found, made = found + facts, made + wanted
    marks.write(options.json, found)
    return marks.show([] if options.quick else made, console)


if __name__ == "__main__":
    sys.exit(main())
