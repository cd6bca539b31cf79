"""`verify`, `repair` and `gc`: the three commands that look at a whole root. Only the last two ever delete."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.storage import probe
from cluster.storage.create import create, remove
from cluster.storage.objects import listing, names, read_checked, require_within
from cluster.storage.path import StoragePath
from jobs import inventory, lease
from jobs.inventory import Finding, Inventory, Kind
from jobs.log import SlotLog
from jobs.workspace import OWNER, manifest_of, owner_of
from schemas.errors import IntegrityError, ManifestError
from schemas.layouts import RUNS, slot_key, unit_key
from schemas.records import LeaseRecord, RootRecord, VoidRecord, parse_slot


def require_root(root: StoragePath) -> str:
    """Make sure that a path is a root; returns what is wrong with its own record, empty if nothing.

    Raises:
        ManifestError: nothing of ours is there.
    """
    there = names(root)
    if OWNER not in there and RUNS not in there:
        raise ManifestError(f"{root} is no Kilobasis root", "name a manifest, or the folder or URL of a root")
    try:
        owner_of(root, listed=OWNER in there)
    except FileNotFoundError:
        return "absent"
    except IntegrityError as error:
        return error.what
    return ""


def verify(root: StoragePath, full: bool) -> Iterator[Inventory]:
    """Look through every stage folder of a root; with `full`, hash every object."""
    told = inventory.told(root)
    for label, path in inventory.folders(root):
        yield inventory.take(label, path, full, told)


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was done to one folder: objects that were deleted, and units that `resume` makes again."""

    label: str
    path: StoragePath
    deleted: tuple[str, ...]
    units: tuple[str, ...]


def repair(root: StoragePath, seconds: float, tell: Callable[[str], None]) -> Iterator[Repaired]:
    """Delete what is damaged, so that `resume` makes it again. Everything else stays, and is not made again.

    Args:
        root: The root.
        seconds: Silence after which the owner of a lease counts as gone.
        tell: Called with a sentence when there is waiting.

    Raises:
        BusyError: a stage that has damage is being run.
    """
    if require_root(root):
        remove(root / OWNER)
        create(root / OWNER, RootRecord(name=_name_of(root), creates="unknown: written by repair").body())
        yield Repaired("root", root, (OWNER,), ())
    for label, path in inventory.folders(root):
        found = inventory.take(label, path, full=True)
        orphans = list(_bad_orphans(found))
        if found.findings or orphans:
            yield _repair_stage(found, orphans, seconds, tell)


def _name_of(root: StoragePath) -> str:
    for run in reversed(names(root / RUNS)):
        name = (manifest_of(root / RUNS / run) or {}).get("name")
        if isinstance(name, str):
            return name
    raise ManifestError(f"{root / OWNER} is damaged, and no run below {root} says whose the root is", "restore a copy")


def _bad_orphans(found: Inventory) -> Iterator[str]:
    """Leftovers of units that no record vouches for. A later attempt would have to agree with them; it need not."""
    if found.committed is None:
        yield from (key for key in found.unreferenced() if key not in found.superseded)


def _repair_stage(found: Inventory, orphans: list[str], seconds: float, tell: Callable[[str], None]) -> Repaired:
    log = SlotLog(found.path)
    strays = [each.key for each in found.findings if each.kind is Kind.STRAY]
    for key in strays:
        remove(found.path / key)
    deleted = strays + _mend_log(log, found, seconds, tell)
    held = lease.take(found.path, found.label, seconds, False, tell, lambda _: None, finished=lambda: False)
    assert held is not None
    with held:
        log = SlotLog(found.path)
        log.refresh()
        units = {each.owner for each in found.findings if each.kind in (Kind.UNIT, Kind.UNIT_OBJECT)}
        doomed = {each.key for each in found.findings if each.kind not in (Kind.SLOT, Kind.STRAY)}
        for each in found.findings:
            if each.kind is Kind.CHECKPOINT and int(each.owner) in {slot.slot for slot in log.checkpoints}:
                log.void(int(each.owner))
        # Objects first: a unit whose record is gone is made again, one whose object alone is gone is damaged.
        keys = sorted(doomed | {unit_key(unit) for unit in units} | set(orphans), key=lambda key: key.endswith(".json"))
        for key in keys:
            if key in found.present:
                remove(found.path / key)
                deleted.append(key)
    return Repaired(found.label, found.path, tuple(deleted), tuple(sorted(units)))


def _mend_log(log: SlotLog, found: Inventory, seconds: float, tell: Callable[[str], None]) -> list[str]:
    """Put a record into every slot that lost its own, so that those behind it can be read again."""
    deleted: list[str] = []
    damaged = {int(each.owner) for each in found.findings if each.kind is Kind.SLOT}
    while True:
        try:
            log.refresh(listed=True)
        except IntegrityError:
            number = len(log.slots)
            if number not in damaged and number - 1 not in damaged:
                raise
        else:
            if len(log.slots) > max(damaged, default=-1):
                return deleted
            number = len(log.slots)
        if log.lease is not None:
            lease.is_over(log, log.lease, found.label, seconds, False, tell, lambda: False)
        if slot_key(number) in found.present:
            remove(found.path / slot_key(number))
            deleted.append(slot_key(number))
        tip = found.committed.tip if found.committed and found.committed.slots == number + 1 else None
        create(found.path / slot_key(number), _stand_in(log, number, tip).body())


def _stand_in(log: SlotLog, number: int, tip: str | None) -> LeaseRecord | VoidRecord:
    """A record for a slot that lost its own: a lease where the slots behind it say that there was one.

    Args:
        log: The slots before it.
        number: The slot.
        tip: Nonce that the stage's record says the slot had, if it was the last one then.
    """
    parent = log.slots[-1].nonce if log.slots else ""
    try:
        behind = read_checked(log.path / slot_key(number + 1), lambda body: parse_slot(body, "it"))
        epoch, nonce = behind.epoch - isinstance(behind, LeaseRecord), behind.parent
    except (FileNotFoundError, IntegrityError):
        # Whatever it was, a lease of ours in its place ends its writer.
        epoch, nonce = log.epoch + 1, tip or uuid.uuid4().hex
    if epoch > log.epoch:
        return LeaseRecord(slot=number, parent=parent, epoch=epoch, owner=lease.this_process(), nonce=nonce)
    return VoidRecord(slot=number, parent=parent, epoch=epoch, voids=number, nonce=nonce)


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object that nothing refers to."""

    label: str
    path: StoragePath
    size: int
    superseded: bool


def garbage(root: StoragePath, older_than: float) -> Iterator[Garbage]:
    """What nothing refers to: leftovers of crashes, and checkpoints that newer ones have superseded.

    Args:
        root: The root.
        older_than: Seconds; younger leftovers may belong to somebody who is still at work. What lies in a stage
            that is being run is spared however old it seems: clocks differ.

    Raises:
        IntegrityError: see `inventory.folders`.
    """
    now = time.time()
    for name in names(root):
        if name.startswith(probe.PREFIX):
            require_within(root, [name])
            for key, there in sorted(listing(root / name).items()):
                if there.modified is not None and now - there.modified >= older_than:
                    yield Garbage("probe", root / name / key, there.size, False)
    for label, path in inventory.folders(root):
        found = inventory.take(label, path, full=False)
        led = found.committed is None and lease.is_held(path)
        for key, there in sorted(found.unreferenced().items()):
            superseded = key in found.superseded
            old = there.modified is not None and now - there.modified >= older_than
            # The log vouches that a superseded checkpoint is no longer needed, however young it is.
            if superseded or (old and not led):
                yield Garbage(label, path / key, there.size, superseded)


def findings(root: StoragePath, full: bool) -> list[Finding]:
    """Everything that `verify` finds below a root."""
    return [finding for found in verify(root, full) for finding in found.findings]
