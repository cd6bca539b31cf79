"""What a stage's folder holds, checked against what its records say: the eyes of `verify`, `repair` and `gc`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from cluster.storage.listing import Listed, absent, listing
from cluster.storage.objects import names, read_checked, read_recorded, require_within
from cluster.storage.parsing import parsing
from cluster.storage.path import StoragePath
from jobs.event_log import events_of
from jobs.log import standing
from schemas.errors import IntegrityError
from schemas.events import StageCommitted
from schemas.layouts import BEATS, COMMITTED, LOG, RUNS, SPEC, UNITS, slot_key, unit_key
from schemas.records import (
    CheckpointRecord,
    LeaseRecord,
    ObjectEntry,
    StageRecord,
    UnitRecord,
    VoidRecord,
    canonical_json,
    parse_record,
    parse_slot,
    sha256,
)

R = TypeVar("R")

READERS = 8
# A slot with a number so far beyond the one before it is no slot of the log: nobody looks for all those between.
WIDEST_GAP = 1000


class Kind(StrEnum):
    """What a damaged object was."""

    SPEC = "specification"
    STAGE = "stage record"
    FOLDER = "folder of a stage"
    INPUT = "input of a stage"
    UNIT = "unit record"
    SLOT = "slot of the log"
    STRAY = "stray slot"
    UNIT_OBJECT = "object of a unit"
    STAGE_OBJECT = "object of the stage"
    CHECKPOINT = "object of a checkpoint"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was committed. `owner` is the unit or the slot that it belongs to."""

    kind: Kind
    path: StoragePath
    key: str
    owner: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path / self.key}: {self.problem} ({self.kind.value}{f' {self.owner}' if self.owner else ''})"


@dataclass(slots=True)
class Inventory:
    """One stage folder: what is there, what records vouch for, and what is wrong.

    `entries` are the vouched-for objects by kind and owner, `superseded` keys of checkpoints that nothing reads.
    """

    path: StoragePath
    label: str
    present: dict[str, Listed] = field(default_factory=dict)
    entries: list[tuple[Kind, str, ObjectEntry]] = field(default_factory=list)
    superseded: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    fingerprint: str = ""
    committed: StageRecord | None = None
    units: dict[str, UnitRecord] = field(default_factory=dict)
    slots: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the objects that records vouch for."""
        return sum(entry.size for _, _, entry in self.entries)

    def note(self, kind: Kind, key: str, owner: str, problem: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, self.path, key, owner, problem))

    def unreferenced(self) -> dict[str, Listed]:
        """What no record vouches for and is no record itself."""
        vouched = {entry.key for _, _, entry in self.entries}
        return {
            key: found
            for key, found in self.present.items()
            if key not in vouched and key not in (SPEC, COMMITTED) and not _is_record(key)
        }


def _is_record(key: str) -> bool:
    folder, _, name = key.rpartition("/")
    return folder in (UNITS, LOG, BEATS) and name.endswith(".json") and not name.startswith(".")


def folders(root: StoragePath) -> Iterator[tuple[str, StoragePath]]:
    """Every stage folder below a root with its label, in the order of the stages.

    Raises:
        IntegrityError: a symbolic link leads out of the root. What is behind it is not ours to judge, or to delete.
    """
    for label, place in _places(root):
        require_within(root, [place])
        for name in names(root / place):
            require_within(root / place, [name])
            if _is_folder(root / place / name):
                yield label, root / place / name


_SHARED = ("tokenize", "harvest")
_OF_A_DICTIONARY = ("train", "evaluate", "catalog", "export")


def _places(root: StoragePath) -> Iterator[tuple[str, str]]:
    yield from ((stage, stage) for stage in _SHARED)
    for dictionary in names(root / "dictionaries"):
        for stage in _OF_A_DICTIONARY:
            yield f"{stage}/{dictionary}", f"dictionaries/{dictionary}/{stage}"


def _place(label: str) -> str | None:
    """Where a stage's folders are, below the root; None for what is no stage's label."""
    stage, _, dictionary = label.partition("/")
    if label in _SHARED:
        return label
    known = stage in _OF_A_DICTIONARY and dictionary not in ("", ".", "..") and "/" not in dictionary
    return f"dictionaries/{dictionary}/{stage}" if known else None


def _is_folder(path: StoragePath) -> bool:
    return not path.is_local or path.local.is_dir()


def told(root: StoragePath) -> dict[str, str]:
    """Names of the stage folders that a run says it committed, with the stages: what is lost cannot say so itself."""
    return {
        event.folder.rstrip("/").rpartition("/")[2]: event.stage
        for run in names(root / RUNS)
        for _, event in events_of(root / RUNS / run)
        if isinstance(event, StageCommitted)
    }


def gone(root: StoragePath, told_of: Mapping[str, str], seen: Collection[Inventory]) -> Iterator[Finding]:
    """Stages that are gone with their whole folder: by what runs tell, and by what other stages were made from.

    Args:
        root: The root.
        told_of: See `told`.
        seen: Every folder that is there.
    """
    there = {found.path.name for found in seen}
    lost = {found.label.partition("/")[0] for found in seen if any(each.key == COMMITTED for each in found.findings)}
    for name, label in sorted(told_of.items()):
        place = _place(label)
        if place is not None and name not in (*there, "", ".", ".."):
            lost.add(label.partition("/")[0])
            yield Finding(Kind.FOLDER, root / place, name, label, "absent, though a run committed it")
    digests = {found.committed.digest for found in seen if found.committed}
    for found in seen:
        inputs = found.committed.inputs if found.committed else {}
        for need, digest in sorted(inputs.items()):
            # Where a stage's record is known to be lost, that was said already.
            if digest not in digests and need not in lost:
                problem = f"it was made from {need} of digest {digest[:16]}, which no committed stage here has"
                yield Finding(Kind.INPUT, found.path, COMMITTED, need, problem)


def take(
    label: str,
    path: StoragePath,
    full: bool,
    told_of: Collection[str] = (),
    suspects: Collection[str] | None = None,
) -> Inventory:
    """Look through a stage folder.

    Args:
        label: The stage's label.
        path: Its folder.
        full: Read every object and compare its sha256; otherwise presence and size alone.
        told_of: See `told`.
        suspects: Keys of the objects that are read with `full`; all if left out.

    Raises:
        StorageError: something in it cannot be listed or read.
    """
    found = Inventory(path, label, listing(path))
    if COMMITTED not in found.present and path.name in told_of:
        found.note(Kind.STAGE, COMMITTED, "", "absent, though a run committed it")
    _read_spec(found)
    _read_units(found)
    _read_log(found)
    with ThreadPoolExecutor(READERS, thread_name_prefix="verify") as executor:
        problems = executor.map(
            lambda each: _problem(found, each[2], full and (suspects is None or each[2].key in suspects)), found.entries
        )
        for (kind, owner, entry), problem in zip(found.entries, problems, strict=True):
            if problem:
                found.note(kind, entry.key, owner, problem)
    return found


def _read_spec(found: Inventory) -> None:
    if SPEC not in found.present:
        found.note(Kind.SPEC, SPEC, "", "absent")
        return
    try:
        canonical = _read(found, SPEC, _canonical)
    except IntegrityError as error:
        found.note(Kind.SPEC, SPEC, "", error.what)
        return
    found.fingerprint = sha256(canonical)
    if not found.fingerprint.startswith(found.path.name):
        found.note(Kind.SPEC, SPEC, "", f"it is that of fingerprint {found.fingerprint[:16]}")
        found.fingerprint = ""


def _canonical(body: bytes) -> bytes:
    """What the content of a specification is written as; raises IntegrityError where it is not written so."""
    with parsing("it", "specification"):
        canonical = canonical_json(json.loads(body))
    if body != canonical + b"\n":
        raise IntegrityError("it is not in its one canonical form")
    return canonical


def _read(found: Inventory, key: str, parse: Callable[[bytes], R]) -> R:
    """A record that was listed; raises IntegrityError where it is damaged, or has gone since."""
    try:
        return read_checked(found.path / key, parse, listed=True)
    except FileNotFoundError as error:
        raise IntegrityError("absent") from error


def _read_units(found: Inventory) -> None:
    """The records of units and of the stage, each for itself and against one another."""
    for name in sorted(key[len(UNITS) + 1 : -5] for key in found.present if key.startswith(UNITS + "/")):
        key = unit_key(name)
        if not _is_record(key):
            continue
        try:
            record = _read(found, key, lambda body: parse_record(UnitRecord, body, "it"))
        except IntegrityError as error:
            found.note(Kind.UNIT, key, name, error.what)
            continue
        if record.unit != name or found.fingerprint not in ("", record.fingerprint):
            found.note(Kind.UNIT, key, name, f"it is that of unit {record.unit} of {record.fingerprint[:16]}")
            continue
        found.units[name] = record
    if COMMITTED in found.present:
        try:
            stage = _read(found, COMMITTED, lambda body: parse_record(StageRecord, body, "it"))
            if stage.stage != found.label or found.fingerprint not in ("", stage.fingerprint):
                raise IntegrityError(f"it is that of {stage.stage} of {stage.fingerprint[:16]}")
            found.committed = stage
        except IntegrityError as error:
            found.note(Kind.STAGE, COMMITTED, "", error.what)
    if found.committed is not None:
        _compare(found, found.committed)
    found.entries += [
        (Kind.UNIT_OBJECT, name, entry) for name, unit in found.units.items() for entry in unit.made.objects
    ]


def _compare(found: Inventory, stage: StageRecord) -> None:
    """The stage's root over its units, and the conservation of rows."""
    known = {finding.key for finding in found.findings}
    for name, digest in stage.units.items():
        unit = found.units.get(name)
        if unit is None and unit_key(name) not in known:
            found.note(Kind.UNIT, unit_key(name), name, "absent")
        elif unit is not None and unit.digest != digest:
            found.note(Kind.UNIT, unit_key(name), name, "it is not the one that the stage committed")
            del found.units[name]
    for name in sorted(set(found.units) - set(stage.units)):
        found.note(Kind.UNIT, unit_key(name), name, "the committed stage has no such unit")
        del found.units[name]
    rows = sum(unit.made.rows for unit in found.units.values())
    if len(found.units) == len(stage.units) and rows != stage.rows:
        found.note(Kind.STAGE, COMMITTED, "", f"its units have {rows} rows, it says {stage.rows}")
    found.entries += [(Kind.STAGE_OBJECT, "", entry) for entry in stage.outputs.objects]


def _read_log(found: Inventory) -> None:
    slots: list[LeaseRecord | CheckpointRecord | VoidRecord] = []
    tip: str | None = ""
    found.slots = _count_slots(found)
    for index in range(found.slots):
        key = slot_key(index)
        try:
            if key not in found.present:
                raise IntegrityError("absent")
            slot = _read(found, key, lambda body: parse_slot(body, "it"))
            if slot.slot != index or (tip is not None and slot.parent != tip):
                raise IntegrityError("it does not follow the slot before it")
        except IntegrityError as error:
            found.note(Kind.SLOT, key, str(index), error.what)
            tip = None
            continue
        slots.append(slot)
        tip = slot.nonce
    stage = found.committed
    if stage is not None and stage.slots:
        tip = next((slot.nonce for slot in slots if slot.slot == stage.slots - 1), None)
        key = slot_key(stage.slots - 1)
        if tip != stage.tip and key not in {finding.key for finding in found.findings}:
            found.note(Kind.SLOT, key, str(stage.slots - 1), "absent" if tip is None else "it is another one")
    counting, _ = standing(slots)
    for slot in (slot for slot in slots if isinstance(slot, CheckpointRecord)):
        if slot in counting:
            found.entries += [(Kind.CHECKPOINT, str(slot.slot), entry) for entry in slot.objects]
        else:
            found.superseded |= {entry.key for entry in slot.objects}


def _count_slots(found: Inventory) -> int:
    """How many slots the log has, or had; notes what lies among them and is none."""
    count = 0
    keys = [key for key in found.present if key.startswith(LOG + "/") and _is_record(key)]
    for key in sorted(keys, key=lambda key: (len(key), key)):
        name = key[len(LOG) + 1 : -5]
        if name.isascii() and name.isdigit() and slot_key(int(name)) == key and int(name) < count + WIDEST_GAP:
            count = int(name) + 1
        else:
            found.note(Kind.STRAY, key, "", f"no slot of this log, which has {count}")
    return count


def _problem(found: Inventory, entry: ObjectEntry, full: bool) -> str:
    there = found.present.get(entry.key)
    # Records and objects were not listed in one moment: what came in between is asked for.
    if there is None and absent(found.path, [entry]):
        return "absent"
    if there is not None and there.size != entry.size:
        return f"it has {there.size} bytes, committed were {entry.size}"
    if full:
        try:
            read_recorded(found.path, entry)
        except IntegrityError as error:
            return error.what.removeprefix(f"{found.path / entry.key} ")
    return ""
