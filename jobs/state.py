"""Stage folders: the records in them are the only state there is.

A worker commits its own unit, so a driver that dies loses nothing that was finished. Nothing here is
ever overwritten: who finds a record already there reads it.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from cluster.storage.attempts import shortage
from cluster.storage.create import create, create_or_adopt
from cluster.storage.objects import names, read_checked, size
from cluster.storage.path import StoragePath
from jobs.log import SlotLog
from pipeline.stage import Committed, Task
from schemas.errors import IntegrityError
from schemas.layouts import COMMITTED, SPEC, UNITS, unit_key
from schemas.records import (
    REPAIR,
    ObjectEntry,
    Outputs,
    StageRecord,
    Unit,
    UnitRecord,
    canonical_json,
    parse_record,
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

    def units(self) -> list[str]:
        """Names of the committed units."""
        return [name.removesuffix(".json") for name in names(self.path / UNITS) if name.endswith(".json")]

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

    def commit(
        self,
        outputs: Outputs,
        units: Mapping[str, UnitRecord],
        inputs: Mapping[str, str],
        seconds: float,
        peak_memory: int,
        log: SlotLog | None = None,
    ) -> Committed:
        """Commit the stage, whose log is as it was read last.

        Raises:
            IntegrityError: it is committed already, with another content.
        """
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
        absent = [] if SPEC in names(self.path) else [SPEC]
        absent += [unit_key(name) for name in sorted(set(committed.record.units) - set(self.units()))]
        return absent + [entry.key for entry in committed.record.outputs.objects if not _is_there(self.path, entry)]


def run_unit(fn: Callable[[T, StoragePath], Unit], folder: StageFolder, task: T) -> UnitRecord:
    """In a worker: make a unit and commit it. Whoever commits first wins; both made the same.

    Raises:
        IntegrityError: the other one made something else.
    """
    began = time.monotonic()
    with shortage(f"{folder.label} unit {task.unit}"):
        made = fn(task, folder.path)
    record = UnitRecord(
        fingerprint=folder.fingerprint,
        unit=task.unit,
        made=made,
        seconds=time.monotonic() - began,
        peak_memory=peak_memory(),
    )
    where = folder.path / unit_key(task.unit)
    if create(where, record.body()):
        return record
    there = folder.unit(task.unit)
    if there.digest != record.digest:
        raise IntegrityError(f"{where} was committed by another run with another content", "compare the runs")
    return there


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, str]:
    """What a result was made with, for the record."""
    packages = ("kilobasis", "torch", "transformers", "deepspeed", "ray", "zarr", "numpy", "pyarrow")
    found = {package: version(package) for package in packages}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _is_there(folder: StoragePath, entry: ObjectEntry) -> bool:
    try:
        return size(folder / entry.key) == entry.size
    except FileNotFoundError:
        return False
