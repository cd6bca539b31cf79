"""Stage folders: the records in them are the only state there is.

A worker commits its own unit, so a driver that dies loses nothing that was finished. Nothing here is
ever overwritten: who finds a record already there reads it.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from cluster.storage.attempts import shortage
from cluster.storage.create import create, create_or_adopt
from cluster.storage.listing import absent, count, listing, numbered
from cluster.storage.objects import abreast, names, read_checked
from cluster.storage.path import StoragePath
from jobs.log import SlotLog
from pipeline.stage import Committed, Task
from schemas.errors import IntegrityError
from schemas.layouts import COMMITTED, LOG, SPEC, UNITS, slot_key, unit_key
from schemas.records import (
    REPAIR,
    Outputs,
    StageRecord,
    Unit,
    UnitRecord,
    canonical_json,
    parse_record,
    parse_slot,
)

T = TypeVar("T", bound=Task)


@dataclass(frozen=True, slots=True)
class StageFolder:
    """The folder of one stage with one fingerprint."""

    path: StoragePath
    label: str
    fingerprint: str

    def claim(self, specification: Mapping[str, Any]) -> None:
        """Write down what the folder is for.

        Raises:
            IntegrityError: it is for something else.
        """
        create_or_adopt(self.path / SPEC, canonical_json(specification) + b"\n")

    def committed(self) -> Committed | None:
        """The stage's record, if it is whole."""
        where = self.path / COMMITTED
        try:
            record = read_checked(where, lambda body: parse_record(StageRecord, body, str(where)))
        except FileNotFoundError:
            return None
        if (record.stage, record.fingerprint) != (self.label, self.fingerprint):
            raise IntegrityError(
                f"{self.path / COMMITTED} belongs to {record.stage} of fingerprint {record.fingerprint[:16]}", REPAIR
            )
        return Committed(self.path, record)

    def units(self, total: int = 0) -> list[str]:
        """Names of the committed units.

        Args:
            total: How many there may be. Of very many in a bucket, several parts of the list are asked for at once.
        """
        there = numbered(self.path / UNITS, total)
        return [name.removesuffix(".json") for name in there if name.endswith(".json")]

    def done(self, total: int) -> int:
        """How many units are committed, of at most `total`."""
        return count(self.path / UNITS, total, ".json")

    def unit(self, name: str) -> UnitRecord:
        """A committed unit's record.

        Raises:
            IntegrityError: it is damaged, or another's.
        """
        where = self.path / unit_key(name)
        try:
            record = read_checked(where, lambda body: parse_record(UnitRecord, body, str(where)), listed=True)
        except FileNotFoundError as error:
            raise IntegrityError(f"{where} is in a list of its folder, but absent", "resume") from error
        if (record.unit, record.fingerprint) != (name, self.fingerprint):
            raise IntegrityError(
                f"{where} is the record of unit {record.unit!r} of fingerprint {record.fingerprint[:16]}", REPAIR
            )
        return record

    def read(self, units: Iterable[str]) -> dict[str, UnitRecord]:
        """See `unit`; of many, by name."""
        return {record.unit: record for record in abreast(self.path, self.unit, units)}

    def lacking(self, records: Iterable[UnitRecord]) -> dict[str, list[str]]:
        """Units whose records name what is not there, with those keys.

        A worker that slept through a repair commits such a unit. So a record alone is not believed where others will
        build on it: one listing of the folder shows what all of them have.
        """
        wanted = list(records)
        there = listing(self.path) if wanted else {}
        lost: dict[str, list[str]] = {}
        for record in wanted:
            doubtful = [
                each for each in record.made.objects if each.key not in there or there[each.key].size != each.size
            ]
            # What came after the listing began may not be in it.
            if keys := absent(self.path, doubtful):
                lost[record.unit] = keys
        return lost

    def commit(
        self,
        outputs: Outputs,
        units: Mapping[str, UnitRecord],
        inputs: Mapping[str, str],
        seconds: float,
        peak_memory: int,
        read_log: Callable[[], SlotLog] | None = None,
    ) -> Committed:
        """Commit the stage.

        Args:
            outputs: What it leaves behind itself.
            units: Its units.
            inputs: Digests of what it was made from.
            seconds: How long it took.
            peak_memory: Of its driver.
            read_log: Gives its log as it is now; raises FencedError where another run leads the stage.

        Raises:
            IntegrityError: it is committed already, with another content; or an object of a unit is not there.
            FencedError: another run leads the stage.
        """
        for unit, keys in self.lacking(units.values()).items():
            raise IntegrityError(
                f"{self.path} cannot be committed: unit {unit} is recorded, but {keys[0]} is absent (a repair took "
                "this stage over while the unit was being made)",
                "resume: it makes the unit again",
            )
        # Only now: who took the lease after this saw all the records, and so deletes nothing that they name.
        log = read_log() if read_log else None
        record = StageRecord(
            stage=self.label,
            fingerprint=self.fingerprint,
            units={name: units[name].digest for name in sorted(units)},
            outputs=outputs,
            inputs=dict(inputs),
            rows=sum(unit.made.rows for unit in units.values()),
            seconds=seconds,
            peak_memory=max([peak_memory, *(unit.peak_memory for unit in units.values())]),
            slots=len(log.slots) if log else 0,
            tip=log.tip if log else "",
            environment=environment(),
        )
        if create(self.path / COMMITTED, record.body()):
            return Committed(self.path, record)
        there = self.committed()
        if there is None or there.record.digest != record.digest:
            raise IntegrityError(
                f"{self.path / COMMITTED} was committed by another run with another content",
                "compare the two runs' environments; the stage is not deterministic here",
            )
        return there

    def missing(self, committed: Committed) -> list[str]:
        """What a committed stage should have and has not: records of units, and objects of its own."""
        record = committed.record
        lost = [] if SPEC in names(self.path) else [SPEC]
        lost += [unit_key(name) for name in sorted(set(record.units) - set(self.units(len(record.units))))]
        lost += absent(self.path, record.outputs.objects)
        slots = len(names(self.path / LOG))
        lost += self._lost_tip(record, slots)
        if not lost and slots > record.slots:
            # Somebody led the stage after it was committed: a repair, perhaps, and a zombie after that.
            every = self.lacking(self.read(record.units).values())
            lost += [key for keys in every.values() for key in keys]
        return lost

    def _lost_tip(self, record: StageRecord, slots: int) -> list[str]:
        """The slot that was the log's last when the stage was committed, if it is no longer there.

        Raises:
            IntegrityError: it is another one, or damaged.
        """
        key = slot_key(record.slots - 1)
        if not record.slots or slots < record.slots:
            return [key] if record.slots else []
        where = self.path / key
        try:
            slot = read_checked(where, lambda body: parse_slot(body, str(where)), listed=True)
        except FileNotFoundError:
            return [key]
        if slot.nonce != record.tip:
            raise IntegrityError(f"{where} is another slot than the one that the stage was committed with", REPAIR)
        return []


def run_unit(fn: Callable[[T, StoragePath], Unit], folder: StageFolder, task: T) -> UnitRecord:
    """In a worker: make a unit and commit it. Whoever commits first wins; both made the same.

    Its objects are looked at before the record is created, so that a worker that slept while a repair deleted them
    commits nothing, and after it, so that none goes on believing what a deletion in just that moment made untrue.

    Raises:
        IntegrityError: the other one made something else, or what was made was deleted meanwhile.
    """
    began = time.monotonic()
    with shortage(f"{folder.label} unit {task.unit}"):
        made = fn(task, folder.path)
    _require_there(folder, task.unit, made)
    record = UnitRecord(
        fingerprint=folder.fingerprint,
        unit=task.unit,
        made=made,
        seconds=time.monotonic() - began,
        peak_memory=peak_memory(),
    )
    where = folder.path / unit_key(task.unit)
    if not create(where, record.body()):
        ours, record = record, folder.unit(task.unit)
        if ours.digest != record.digest:
            raise IntegrityError(
                f"{where} was committed by another run with another content", f"compare the runs, or {REPAIR}"
            )
    _require_there(folder, task.unit, record.made)
    return record


def _require_there(folder: StageFolder, unit: str, made: Unit) -> None:
    for key in absent(folder.path, made.objects):
        raise IntegrityError(
            f"{folder.path / key} of unit {unit} is absent, or cut short, since it was written: a repair or gc took "
            "this stage over meanwhile",
            "resume: it makes the unit again",
        )


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, str]:
    """What a result was made with, for the record."""
    packages = ("kilobasis", "torch", "transformers", "deepspeed", "ray", "zarr", "numpy", "pyarrow")
    found = {package: version(package) for package in packages}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
