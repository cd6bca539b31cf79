"""`verify`, `repair` and `gc`: the three commands that look at a whole root. Only the last two ever delete."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, replace

from cluster.storage import probe
from cluster.storage.create import create, remove
from cluster.storage.listing import listing
from cluster.storage.objects import names, read_checked, require_within
from cluster.storage.path import StoragePath
from jobs import inventory, lease
from jobs.inventory import Finding, Inventory, Kind
from jobs.log import SlotLog
from jobs.workspace import OWNER, manifest_of, owner_of
from schemas.errors import BusyError, IntegrityError, ManifestError
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
    """Look through every stage folder of a root; with `full`, hash every object.

    Folders that are gone are found last, in an inventory without a label.
    """
    told, seen = inventory.told(root), []
    for label, path in inventory.folders(root):
        found = inventory.take(label, path, full, told)
        seen.append(replace(found, present={}, entries=[], units={}))
        yield found
    if lost := list(inventory.gone(root, told, seen)):
        yield Inventory(root, "", findings=lost)


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
        FencedError: another run took the lease over meanwhile.
    """
    if require_root(root):
        remove(root / OWNER)
        create(root / OWNER, RootRecord(name=_name_of(root), creates="unknown: written by repair").body())
        yield Repaired("root", root, (OWNER,), ())
    for label, path in inventory.folders(root):
        found = inventory.take(label, path, full=True)
        if found.findings or any(_bad_orphans(found)):
            yield _repair_stage(found, seconds, tell)


def _name_of(root: StoragePath) -> str:
    for run in reversed(names(root / RUNS)):
        name = (manifest_of(root / RUNS / run) or {}).get("name")
        if isinstance(name, str):
            return name
    raise ManifestError(f"{root / OWNER} is damaged, and no run below {root} says whose the root is", "restore a copy")


def _bad_orphans(found: Inventory) -> Iterator[str]:
    """Leftovers of units that no record vouches for. A later attempt would have to agree with them; it need not.

    In a committed stage it better does: what lost its record alone is adopted as it was committed. Where two have led
    the stage since, a repair and a run that could not make the unit of what it found, there is nothing to adopt.
    """
    stage = found.committed
    if stage is None or (set(stage.units) - set(found.units) and found.slots >= stage.slots + 2):
        yield from (key for key in found.unreferenced() if key not in found.superseded)


def _repair_stage(found: Inventory, seconds: float, tell: Callable[[str], None]) -> Repaired:
    deleted = [each.key for each in found.findings if each.kind is Kind.STRAY]
    for key in deleted:
        remove(found.path / key)
    deleted += _mend_log(found, seconds, tell)
    with _take(found, seconds, tell) as held:
        # Hashing took its time, and the stage was not ours then. Only what is still so under the lease is acted upon.
        suspects = {each.key for each in found.findings}
        found = inventory.take(found.label, found.path, full=True, suspects=suspects)
        log = held.read_log()
        units = {each.owner for each in found.findings if each.kind in (Kind.UNIT, Kind.UNIT_OBJECT)}
        doomed = {each.key for each in found.findings if each.kind not in (Kind.SLOT, Kind.STRAY)}
        counting = {slot.slot for slot in log.checkpoints}
        for slot in sorted({int(each.owner) for each in found.findings if each.kind is Kind.CHECKPOINT} & counting):
            if log.void(slot) is None:
                log.require_lease(held.record.nonce)
                raise BusyError(f"{found.label}: somebody wrote into its log beside this repair", "repair again")
        doomed |= {unit_key(unit) for unit in units} | set(_bad_orphans(found))
        # Objects first: a unit whose record is gone is made again, one whose object alone is gone is damaged.
        for key in sorted(doomed & set(found.present), key=lambda key: key.endswith(".json")):
            _delete(found.path / key, log, held)
            deleted.append(key)
    return Repaired(found.label, found.path, tuple(deleted), tuple(sorted(units)))


class _ReadableLog(SlotLog):
    """A log as far as it can be read."""

    def refresh(self, listed: bool = True) -> None:
        with contextlib.suppress(IntegrityError):
            super().refresh(listed=listed)


def _mend_log(found: Inventory, seconds: float, tell: Callable[[str], None]) -> list[str]:
    """Put a record into every slot that lost its own, so that those behind it can be read again."""
    log, readable = SlotLog(found.path), _ReadableLog(found.path)
    deleted: list[str] = []
    over: LeaseRecord | None = None
    damaged = {int(each.owner) for each in found.findings if each.kind is Kind.SLOT}
    while True:
        broken = False
        try:
            log.refresh(listed=True)
        except IntegrityError:
            broken, number = True, len(log.slots)
            if number not in damaged and number - 1 not in damaged:
                raise
        else:
            if len(log.slots) > max(damaged, default=-1):
                return deleted
            number = len(log.slots)
        readable.refresh()
        if readable.lease is not None and readable.lease is not over:
            over = readable.lease
            lease.is_over(readable, over, found.label, seconds, False, tell, lambda: False)
            # That may have taken its time, so the slot is looked at again before it is deleted.
            continue
        if broken and slot_key(number) in found.present:
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


def garbage(
    root: StoragePath, older_than: float, tell: Callable[[str], None], seconds: float | None = None
) -> Iterator[Garbage]:
    """What nothing refers to: leftovers of crashes, and checkpoints that newer ones have superseded.

    A folder with damage in it is left alone: a record that cannot be read cannot say what it refers to.

    Args:
        root: The root.
        older_than: Seconds; younger leftovers may belong to somebody who is still at work.
        tell: Called with a sentence about each damage, about who is waited for, and about what is left alone.
        seconds: Delete what is yielded, each stage's under its lease, whose former owner counts as gone after so much
            silence. None only looks; what lies in a stage that is being run is spared then, too.

    Raises:
        IntegrityError: there is damage; raised after the last of what is whole. Or see `inventory.folders`.
        FencedError: another run took a lease over meanwhile.
    """
    yield from _left_by_probes(root, older_than, delete=seconds is not None)
    told, damaged = inventory.told(root), 0
    for label, path in inventory.folders(root):
        found = inventory.take(label, path, full=False, told_of=told)
        if not found.findings and seconds is None:
            led = found.committed is None and lease.is_held(path)
            yield from (each for each in _garbage(found, older_than) if each.superseded or not led)
        elif not found.findings and any(_garbage(found, older_than)) and seconds is not None:
            found = yield from _collect(found, told, older_than, seconds, tell)
        for finding in found.findings:
            tell(f"damaged: {finding}")
        damaged += bool(found.findings)
    if damaged:
        raise IntegrityError(
            f"{damaged} stage folder{'' if damaged == 1 else 's'} below {root} with damage, left as found",
            "run `kilobasis verify`, then `kilobasis repair`: what a damaged record refers to is not known before",
        )


def _left_by_probes(root: StoragePath, older_than: float, delete: bool) -> Iterator[Garbage]:
    now = time.time()
    for name in names(root):
        if name.startswith(probe.PREFIX):
            require_within(root, [name])
            for key, there in sorted(listing(root / name).items()):
                if there.modified is not None and now - there.modified >= older_than:
                    if delete:
                        remove(root / name / key)
                    yield Garbage("probe", root / name / key, there.size, False)


def _garbage(found: Inventory, older_than: float) -> Iterator[Garbage]:
    now = time.time()
    for key, there in sorted(found.unreferenced().items()):
        # The log vouches that a superseded checkpoint is no longer needed, however young it is.
        superseded = key in found.superseded
        if superseded or (there.modified is not None and now - there.modified >= older_than):
            yield Garbage(found.label, found.path / key, there.size, superseded)


def _collect(
    found: Inventory, told: Collection[str], older_than: float, seconds: float, tell: Callable[[str], None]
) -> Generator[Garbage, None, Inventory]:
    """Delete what is garbage under the stage's lease, by a look that was taken under it; returns that."""
    if found.committed is None and lease.is_held(found.path):
        # Nothing here is so urgent that a run which only seems to be gone should lose its lease for it.
        tell(f"left alone: {found.label} is being run, or its run has not given its lease back")
        return found
    try:
        held = _take(found, seconds, tell)
    except BusyError as error:
        tell(f"left alone: {error.what}")
        return found
    with held:
        found = inventory.take(found.label, found.path, full=False, told_of=told)
        log = held.read_log()
        for each in [] if found.findings else list(_garbage(found, older_than)):
            _delete(each.path, log, held)
            yield each
    return found


def _take(found: Inventory, seconds: float, tell: Callable[[str], None]) -> lease.Lease:
    held = lease.take(found.path, found.label, seconds, False, tell, lambda _: None, finished=lambda: False)
    assert held is not None
    return held


def _delete(path: StoragePath, log: SlotLog, held: lease.Lease) -> None:
    """Delete an object, if the stage is still ours: a run that has taken over may be relying on it by now.

    Raises:
        FencedError: it is not.
    """
    log.refresh()
    log.require_lease(held.record.nonce)
    remove(path)


def findings(root: StoragePath, full: bool) -> list[Finding]:
    """Everything that `verify` finds below a root."""
    return [finding for found in verify(root, full) for finding in found.findings]
