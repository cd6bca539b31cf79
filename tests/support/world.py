"""The store of a simulated schedule, what has happened in it, and what must never be seen there."""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import fsspec
import greenlet

from cluster.storage.path import StoragePath
from jobs.state import StageFolder
from schemas.layouts import slot_key
from schemas.records import (
    CheckpointRecord,
    LeaseRecord,
    ObjectEntry,
    StageRecord,
    UnitRecord,
    canonical_json,
    parse_record,
    parse_slot,
    sha256,
)

UNITS = ("000000", "000001")
STEPS = 3
ROOT = StoragePath("sim", "root")
SPECS = {"harvest": {"stage": "harvest"}, "train/d": {"stage": "train"}}


def _folder(label: str) -> StageFolder:
    fingerprint = sha256(canonical_json(SPECS[label]))
    place = label if label == "harvest" else "dictionaries/d/train"
    return StageFolder(ROOT / place / fingerprint[:16], label, fingerprint)


HARVEST, TRAIN = _folder("harvest"), _folder("train/d")


class CrashError(BaseException):
    """The runner is dead."""


class ViolationError(AssertionError):
    """An invariant does not hold."""


class Store(fsspec.AbstractFileSystem):
    """The schedule's store, as fsspec sees it."""

    protocol = "sim"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        found = World.now.ask("get", path)
        if found is None:
            raise FileNotFoundError(path)
        return found[start:end]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = World.now.ask("get", path)
        if found is None:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(found), "type": "file", "ETag": World.now.md5(found)}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[str]:
        assert not detail
        return World.now.ask("list", path)

    def find(self, path: str, **_: Any) -> dict[str, dict[str, Any]]:
        return {key: {"size": size, "mtime": 0.0} for key, size in World.now.ask("find", path)}

    def rm_file(self, path: str) -> None:
        if not World.now.ask("delete", path):
            raise FileNotFoundError(path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        World.now.ask("create" if mode == "create" else "put", path, value)


fsspec.register_implementation("sim", Store, clobber=True)


@dataclass(slots=True)
class World:
    """One schedule."""

    random: random.Random
    atomic: bool = True
    objects: dict[str, bytes] = field(default_factory=dict)
    scheduler: greenlet.greenlet = field(default_factory=greenlet.getcurrent)
    runner: dict[greenlet.greenlet, str] = field(default_factory=dict)
    dead: set[greenlet.greenlet] = field(default_factory=set)
    leases: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    violations: list[str] = field(default_factory=list)
    sums: dict[bytes, str] = field(default_factory=dict)
    kept: bool = False
    rots: bool = False
    deterministic: bool = False
    deleted: set[str] = field(default_factory=set)
    rotten: set[str] = field(default_factory=set)
    # When each record of a unit was created and what it named, and when each keeper took its newest lease.
    named: dict[str, tuple[int, set[str]]] = field(default_factory=dict)
    led: dict[str, int] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict)
    asking: greenlet.greenlet = field(default_factory=greenlet.getcurrent)

    now = None  # type: ignore[assignment]

    def ask(self, verb: str, key: str, body: bytes | None = None) -> Any:
        """In a runner: hand over, and go on when the scheduler has done it."""
        if greenlet.getcurrent() in self.dead:
            raise CrashError
        return self.scheduler.switch((verb, key, body))

    def who(self) -> str:
        return self.runner[greenlet.getcurrent()]

    def md5(self, body: bytes) -> str:
        if body not in self.sums:
            self.sums[body] = hashlib.md5(body, usedforsecurity=False).hexdigest()
        return self.sums[body]

    def apply(self, verb: str, key: str, body: bytes | None) -> Any:
        if verb == "get":
            return self.objects.get(key)
        if verb == "list":
            below = key.rstrip("/") + "/"
            found = {name[len(below) :].split("/")[0] for name in self.objects if name.startswith(below)}
            return [below + name for name in sorted(found)]
        if verb == "find":
            return sorted((name, len(body)) for name, body in self.objects.items() if name.startswith(key + "/"))
        if verb == "delete":
            self._check_deletion(key)
            self.deleted.add(key)
            self.rotten.discard(key)
            self.named.pop(key, None)
            return self.objects.pop(key, None) is not None
        assert body is not None
        if verb == "create" and key in self.objects and self.atomic:
            raise FileExistsError(key)
        if key in self.objects and self.objects[key] != body and "/beats/" not in key:
            self.violations.append(f"{key} was overwritten")
        self.objects[key] = body
        self._check(key, body)
        return None

    def rot(self) -> None:
        """One bit of a unit, or of its record."""
        parts = (f"{HARVEST.path.key}/units/", f"{HARVEST.path.key}/data/")
        keys = sorted(key for key in self.objects if key.startswith(parts))
        if keys:
            key = self.random.choice(keys)
            body = bytearray(self.objects[key])
            body[self.random.randrange(len(body))] ^= 1
            self.objects[key] = bytes(body)
            self.rotten.add(key)

    def lives(self, name: str) -> bool:
        return any(who == name and not one.dead and one not in self.dead for one, who in self.runner.items())

    # Invariants

    def _check(self, key: str, body: bytes) -> None:
        if "/units/" in key:
            self._check_unit(key, parse_record(UnitRecord, body, key))
        elif key.endswith("COMMITTED.json"):
            record = parse_record(StageRecord, body, key)
            if record.stage == "harvest":
                if sorted(record.units) != sorted(UNITS):
                    self.violations.append("a stage was committed without all of its units")
                if not self.absent() <= self.rotten:
                    self.violations.append("a stage was committed without an object of a unit")
            elif self._steps() != list(range(1, STEPS + 1)):
                self.violations.append("a stage was committed without all of its checkpoints")
        elif "/log/" in key:
            slot = _slot(body)
            if isinstance(slot, LeaseRecord):
                self.led[slot.owner.host] = self.operations
            self._check_log(key)

    def _check_unit(self, key: str, record: UnitRecord) -> None:
        for entry in record.made.objects:
            where = f"{HARVEST.path.key}/{entry.key}"
            there = self.objects.get(where)
            # A zombie may commit what a keeper has deleted: that must be noticed by whoever builds on it.
            if there is None and where not in self.deleted:
                self.violations.append("a unit was committed before its objects")
            differs = there is not None and ObjectEntry.of(entry.key, there) != entry
            if differs and where not in self.deleted | self.rotten:
                self.violations.append("a unit was committed with other objects than are there")
        names = {f"{HARVEST.path.key}/{entry.key}" for entry in record.made.objects}
        self.named[key] = (self.operations, names)

    def absent(self) -> set[str]:
        """Objects that a unit's record names and that are not there."""
        return {key for _, names in self.named.values() for key in names if key not in self.objects}

    def wrong(self) -> set[str]:
        """Objects that are not what a unit's record says, and records that are not what they were."""
        found = {key for key in self.named if self.objects[key] and key in self.rotten}
        for key in self.named.keys() - found:
            for entry in parse_record(UnitRecord, self.objects[key], key).made.objects:
                where = f"{HARVEST.path.key}/{entry.key}"
                if where not in self.objects or ObjectEntry.of(entry.key, self.objects[where]) != entry:
                    found.add(where)
        return found

    def _check_deletion(self, key: str) -> None:
        """What a record named when the lease was taken stays, if both are well; gc deletes nothing that one names."""
        who = self.runner[self.asking]
        since = self.led.get(who, self.operations)
        for record, (when, names) in self.named.items():
            well = record not in self.rotten and not any(each in self.rotten or each in self.deleted for each in names)
            if key in names and when < since and (well or who.startswith("gc")):
                self.violations.append("what a record names was deleted")
        for slot in [slot for slot in self._slots(TRAIN) if isinstance(slot, CheckpointRecord)][-2:]:
            if any(key == f"{TRAIN.path.key}/{entry.key}" for entry in slot.objects):
                self.violations.append("one of the newest checkpoints was deleted")

    def _slots(self, stage: StageFolder) -> list[Any]:
        keys = sorted(key for key in self.objects if key.startswith(f"{stage.path.key}/log/"))
        return [_slot(self.objects[key]) for key in keys]

    def _steps(self) -> list[int]:
        return [slot.step for slot in self._slots(TRAIN) if isinstance(slot, CheckpointRecord)]

    def _check_log(self, key: str) -> None:
        writer, tip, epoch = "", "", 0
        for index, slot in enumerate(self._slots(TRAIN)):
            if slot.slot != index or slot.parent != tip:
                self.violations.append("the log's chain is broken")
            tip = slot.nonce
            if isinstance(slot, LeaseRecord):
                if slot.epoch <= epoch:
                    self.violations.append("epochs do not rise")
                writer, epoch = slot.owner.host, slot.epoch
            elif isinstance(slot, CheckpointRecord):
                if slot.facts["writer"] != writer:
                    self.violations.append("a runner whose lease was gone wrote a checkpoint")
                for entry in slot.objects if key == f"{TRAIN.path.key}/{slot_key(index)}" else ():
                    if f"{TRAIN.path.key}/{entry.key}" not in self.objects:
                        self.violations.append("a checkpoint was committed before its objects")
        if self._steps() != list(range(1, len(self._steps()) + 1)):
            self.violations.append("a checkpoint was lost or doubled")


@functools.lru_cache(maxsize=4096)
def _slot(body: bytes) -> Any:
    return parse_slot(body, "a slot")
