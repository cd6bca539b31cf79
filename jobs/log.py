"""The create-once log of a stage: numbered slots, each naming the one before it.

Only the next free slot can be taken, and only once. So whoever has read the log knows, when its own record
gets the next slot, that nobody else has written in between; a lease in that slot ends the writer before it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.storage.create import create, create_or_adopt, remove
from cluster.storage.objects import names, read_checked, read_recorded
from cluster.storage.path import StoragePath
from schemas.errors import FencedError, IntegrityError, OutrunError
from schemas.layouts import CHECKPOINTS, LOG, slot_key
from schemas.records import (
    REPAIR,
    CheckpointRecord,
    LeaseRecord,
    ObjectEntry,
    Owner,
    VoidRecord,
    parse_slot,
)

# Of a log, newest first: should the newest turn out to be damaged, there is one to fall back on.
LIVE_CHECKPOINTS = 2

AnySlot = LeaseRecord | CheckpointRecord | VoidRecord


def standing(slots: Iterable[AnySlot]) -> tuple[list[CheckpointRecord], list[CheckpointRecord]]:
    """Checkpoints that count and checkpoints that newer ones have superseded, each oldest first.

    What is superseded stays superseded, whatever is voided later: its objects may be deleted from that moment on.

    Args:
        slots: A log from its beginning.
    """
    counting: list[CheckpointRecord] = []
    superseded: list[CheckpointRecord] = []
    for slot in slots:
        if isinstance(slot, CheckpointRecord):
            counting.append(slot)
            superseded += counting[:-LIVE_CHECKPOINTS]
            del counting[:-LIVE_CHECKPOINTS]
        elif isinstance(slot, VoidRecord):
            counting = [each for each in counting if each.slot != slot.voids]
    return counting, superseded


class SlotLog:
    """A stage's log, as far as it was read.

    Args:
        path: The stage's folder.
    """

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self.slots: list[AnySlot] = []
        self._listed = False

    def refresh(self, listed: bool = False) -> None:
        """Read what has come in.

        Args:
            listed: The log was listed already, by somebody who deals with missing slots.

        Raises:
            IntegrityError: a slot is missing or damaged, or does not follow the one before it.
        """
        if not (listed or self._listed):
            there = [name.removesuffix(".json") for name in names(self.path / LOG) if name.endswith(".json")]
            if there != [f"{number:06d}" for number in range(len(there))]:
                raise IntegrityError(f"{self.path / LOG} has slots {there[:8]}, one is missing", REPAIR)
            self._listed = True
            while len(self.slots) < len(there):
                slot = self._read(len(self.slots), listed=True)
                if slot is None:
                    raise IntegrityError(f"{self.path / slot_key(len(self.slots))} is listed, but absent", REPAIR)
                self._follow(slot)
        while (slot := self._read(len(self.slots))) is not None:
            self._follow(slot)

    def _read(self, number: int, listed: bool = False) -> AnySlot | None:
        where = self.path / slot_key(number)
        try:
            return read_checked(where, lambda body: parse_slot(body, str(where)), listed)
        except FileNotFoundError:
            return None

    def _follow(self, slot: AnySlot) -> None:
        expected = self.epoch + 1 if isinstance(slot, LeaseRecord) else self.epoch
        if (slot.slot, slot.parent, slot.epoch) != (len(self.slots), self.tip, expected):
            raise IntegrityError(
                f"{self.path / slot_key(len(self.slots))} does not follow the slot before it "
                f"(slot {slot.slot}, epoch {slot.epoch}, expected {len(self.slots)} and {expected})",
                REPAIR,
            )
        self.slots.append(slot)

    @property
    def tip(self) -> str:
        """Nonce of the newest slot; empty before the first."""
        return self.slots[-1].nonce if self.slots else ""

    @property
    def lease(self) -> LeaseRecord | None:
        """The newest lease."""
        return next((slot for slot in reversed(self.slots) if isinstance(slot, LeaseRecord)), None)

    @property
    def epoch(self) -> int:
        """Number of the newest lease; 0 before the first."""
        return self.lease.epoch if self.lease else 0

    @property
    def checkpoints(self) -> list[CheckpointRecord]:
        """The checkpoints that count, oldest first."""
        return standing(self.slots)[0]

    @property
    def superseded(self) -> list[CheckpointRecord]:
        """The checkpoints that nobody needs any more, oldest first."""
        return standing(self.slots)[1]

    def require_lease(self, nonce: str) -> None:
        """Make sure that a lease is the newest, as far as the log was read.

        Args:
            nonce: The lease's; empty where nobody may hold one.

        Raises:
            FencedError: another run leads this stage now.
        """
        lease = self.lease
        if (lease.nonce if lease else "") != nonce:
            by = f"{lease.owner.host}, process {lease.owner.pid}, lease {lease.epoch}" if lease else "nobody"
            raise FencedError(
                f"{self.path}: this run's lease was taken over by {by}",
                "leave it to that run; look with `kilobasis status`",
            )

    def take(self, owner: Owner) -> LeaseRecord | None:
        """Append a lease; None if somebody else was first with something."""
        record = LeaseRecord(slot=len(self.slots), parent=self.tip, epoch=self.epoch + 1, owner=owner)
        return record if self._append(record) else None

    def checkpoint(
        self, step: int, objects: tuple[ObjectEntry, ...], facts: dict[str, Any], nonce: str
    ) -> CheckpointRecord | None:
        """Append a checkpoint; None if somebody else was first with something."""
        record = CheckpointRecord(
            slot=len(self.slots),
            parent=self.tip,
            epoch=self.epoch,
            step=step,
            objects=objects,
            facts=facts,
            nonce=nonce,
        )
        return record if self._append(record) else None

    def void(self, slot: int) -> VoidRecord | None:
        """Append that a slot counts no longer; None if somebody else was first with something."""
        record = VoidRecord(slot=len(self.slots), parent=self.tip, epoch=self.epoch, voids=slot)
        return record if self._append(record) else None

    def _append(self, record: AnySlot) -> bool:
        if create(self.path / slot_key(record.slot), record.body()):
            self.slots.append(record)
            return True
        self.refresh()
        return False


class TrainingLog:
    """See `pipeline.stage.Checkpoints`.

    Args:
        path: The stage's folder.
        lease: Nonce of the lease under which checkpoints are written; empty where nobody holds one.
    """

    def __init__(self, path: StoragePath, lease: str = "") -> None:
        self._log, self._lease = SlotLog(path), lease
        # Newest checkpoint of which the trainer knows.
        self._known: CheckpointRecord | None = None
        self._forgotten: set[int] = set()

    def latest(self) -> CheckpointRecord | None:
        """The newest checkpoint that counts.

        Raises:
            IntegrityError: the log is damaged.
        """
        self._log.refresh()
        self._known = self._newest
        return self._known

    @property
    def _newest(self) -> CheckpointRecord | None:
        return self._log.checkpoints[-1] if self._log.checkpoints else None

    @property
    def lease(self) -> LeaseRecord | None:
        """The newest lease, as of the last look at the log."""
        return self._log.lease

    def read(self, entry: ObjectEntry) -> bytes:
        """An object of a checkpoint.

        Raises:
            IntegrityError: it is absent or not what was committed.
        """
        return read_recorded(self._log.path, entry)

    def write(self, step: int, name: str, body: bytes) -> ObjectEntry:
        """Write an object of a checkpoint; nothing refers to it yet.

        Raises:
            FencedError: another run leads this stage now.
        """
        self._log.refresh()
        self._require_ours()
        # A name of its own for every attempt: a crash before the record leaves bytes that nobody refers to.
        entry = ObjectEntry.of(f"{CHECKPOINTS}/{step:09d}-{uuid.uuid4().hex[:8]}/{name}", body)
        create_or_adopt(self._log.path / entry.key, body)
        return entry

    def commit(self, step: int, entries: Sequence[ObjectEntry], facts: dict[str, Any]) -> CheckpointRecord:
        """Commit objects that are written as a checkpoint, by a record in the next slot.

        Raises:
            FencedError: another run leads this stage now.
            OutrunError: there is a checkpoint of which this trainer does not know. An older life of its gang, under
                the same lease, was given up for dead: it lives, or its last words came late. Training has to begin
                again from there.
        """
        self._log.refresh()
        self._require_ours()
        self._require_known()
        record = self._log.checkpoint(step, tuple(entries), facts, uuid.uuid4().hex)
        if record is None:
            self._require_ours()
            self._require_known()
            raise IntegrityError(f"{self._log.path / LOG}: a slot was refused, and nobody has taken it", REPAIR)
        self._known = record
        self._forget()
        return record

    def _forget(self) -> None:
        """Delete checkpoints that newer ones have superseded, or a training of days would fill the store.

        Whoever it is that deletes, and however late: see `standing`.
        """
        older = [slot for slot in self._log.superseded if slot.slot not in self._forgotten]
        there = set(names(self._log.path / CHECKPOINTS)) if older else set()
        for slot in older:
            for folder, _, name in (entry.key.removeprefix(f"{CHECKPOINTS}/").partition("/") for entry in slot.objects):
                # Nothing but what `write` has named, whatever a log says.
                if name and folder in there:
                    remove(self._log.path / CHECKPOINTS / folder / name)
            self._forgotten.add(slot.slot)

    def _require_known(self) -> None:
        newest = self._newest
        if newest is not None and newest != self._known:
            raise OutrunError(
                f"{self._log.path / LOG}: another trainer under the same lease wrote a checkpoint of step "
                f"{newest.step}",
                "run only one trainer of a stage, and resume",
            )

    def _require_ours(self) -> None:
        self._log.require_lease(self._lease)
