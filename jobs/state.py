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

from cluster.storage.create import create, create_or_adopt
from cluster.storage.objects import names, read_bytes, read_recorded
from cluster.storage.path import StoragePath
from pipeline.stage import Committed, Task
from schemas.errors import IntegrityError
from schemas.layouts import CHECKPOINTS, COMMITTED, LOG, SPEC, UNITS, slot_key, unit_key
from schemas.records import (
    CheckpointRecord,
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
        body = _read(self.path / COMMITTED)
        if body is None:
            return None
        record = parse_record(StageRecord, body, str(self.path / COMMITTED))
        if record.fingerprint != self.fingerprint:
            raise IntegrityError(
                f"{self.path / COMMITTED} belongs to fingerprint {record.fingerprint[:16]}", "restore the folder"
            )
        return Committed(self.path, record)

    def units(self) -> list[str]:
        """Names of the committed units."""
        return [name.removesuffix(".json") for name in names(self.path / UNITS) if name.endswith(".json")]

    def unit(self, name: str) -> UnitRecord:
        """A committed unit's record."""
        where = self.path / unit_key(name)
        record = parse_record(UnitRecord, read_bytes(where), str(where))
        if record.unit != name:
            raise IntegrityError(f"{where} is the record of unit {record.unit!r}", "restore the file from a copy")
        return record

    def commit(
        self,
        outputs: Outputs,
        units: Mapping[str, UnitRecord],
        inputs: Mapping[str, str],
        seconds: float,
        peak_memory: int,
    ) -> Committed:
        """Commit the stage.

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


def run_unit(fn: Callable[[T, StoragePath], Unit], path: StoragePath, task: T) -> UnitRecord:
    """In a worker: make a unit and commit it. Whoever commits first wins; both made the same.

    Raises:
        IntegrityError: the other one made something else.
    """
    began = time.monotonic()
    made = fn(task, path)
    record = UnitRecord(unit=task.unit, made=made, seconds=time.monotonic() - began, peak_memory=peak_memory())
    where = path / unit_key(task.unit)
    if create(where, record.body()):
        return record
    there = parse_record(UnitRecord, read_bytes(where), str(where))
    if there.digest != record.digest:
        raise IntegrityError(f"{where} was committed by another run with another content", "compare the runs")
    return there


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """See `pipeline.stage.Checkpoints`. Slots are numbered, contiguous and created once."""

    path: StoragePath

    def _slots(self) -> list[int]:
        return [int(name.removesuffix(".json")) for name in names(self.path / LOG) if name.endswith(".json")]

    def latest(self) -> CheckpointRecord | None:
        """The newest checkpoint.

        Raises:
            IntegrityError: a slot is missing.
        """
        slots = self._slots()
        if slots != list(range(len(slots))):
            raise IntegrityError(f"{self.path / LOG} has slots {slots[:8]}, one is missing", "restore it from a copy")
        return self.slot(slots[-1]) if slots else None

    def slot(self, number: int) -> CheckpointRecord:
        """One slot's record."""
        where = self.path / slot_key(number)
        return parse_record(CheckpointRecord, read_bytes(where), str(where))

    def read(self, entry: ObjectEntry) -> bytes:
        """An object of a checkpoint.

        Raises:
            IntegrityError: it is absent or not what was committed.
        """
        return read_recorded(self.path, entry)

    def commit(self, step: int, bodies: Mapping[str, bytes], facts: dict[str, Any]) -> CheckpointRecord:
        """Write a checkpoint.

        Raises:
            IntegrityError: somebody else took the slot.
        """
        slots = self._slots()
        number = len(slots)
        # A name of its own for every attempt: a crash before the record leaves bytes that nobody refers to.
        record = CheckpointRecord(
            slot=number, parent=number - 1 if number else None, step=step, objects=(), facts=facts
        )
        folder = f"{CHECKPOINTS}/{step:09d}-{record.nonce[:8]}"
        entries = []
        for name, body in bodies.items():
            entry = ObjectEntry.of(f"{folder}/{name}", body)
            create_or_adopt(self.path / entry.key, body)
            entries.append(entry)
        record = record.model_copy(update={"objects": tuple(entries)})
        if not create(self.path / slot_key(number), record.body()):
            raise IntegrityError(
                f"{self.path / slot_key(number)} was taken by another trainer", "run only one at a time"
            )
        return record


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, str]:
    """What a result was made with, for the record."""
    packages = ("kilobasis", "torch", "transformers", "deepspeed", "ray", "zarr", "numpy", "pyarrow")
    found = {package: version(package) for package in packages}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _read(path: StoragePath) -> bytes | None:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None
