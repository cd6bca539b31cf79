"""Finds out at the door whether a store can be trusted: whether it creates only where nothing is, also in a race.

And whether other machines see the same store: one of them leaves a mark, the others look for it.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.storage.attempts import may_pass, patience
from cluster.storage.create import create, put_if_absent, remove
from cluster.storage.objects import names, read_bytes
from cluster.storage.path import StoragePath
from schemas.errors import KilobasisError, ManifestError

TRUSTED = "if-absent"
WRITERS = 8
ROUNDS = 3
# A run that is killed in the middle of this leaves a folder of this name, which counts for nothing.
PREFIX = "probe-"
# Their libraries ask the store itself to create only. Others look, then write: a race that goes well proves nothing.
ATOMIC = frozenset({"file", "memory", "s3", "gs", "az", "abfs", "abfss"})
# A wrong URL or wrong credentials should be told soon.
DOOR_SECONDS = 20.0
# A shared disk may show a new file to another machine only after a moment.
LOOKS, LOOK_SECONDS = 4, 1.0


@dataclass(frozen=True, slots=True)
class Mark:
    """An object below a root, with a content that nobody could guess."""

    path: StoragePath
    body: bytes


@contextlib.contextmanager
def marked(root: StoragePath) -> Iterator[Mark]:
    """Leave a mark in a root for as long as the context is open.

    Raises:
        StorageError: it cannot be written or deleted.
    """
    mark = Mark(root / f"{PREFIX}{uuid.uuid4().hex[:12]}" / "mark", uuid.uuid4().hex.encode())
    with patience(DOOR_SECONDS):
        create(mark.path, mark.body)
        try:
            yield mark
        finally:
            _clear(mark.path.parent, [mark.path])


def wrong_with(mark: Mark, may_overwrite: bool) -> str:
    """Look for another machine's mark, and try beside it all that a run needs: read, list, create and delete.

    Args:
        mark: Whose.
        may_overwrite: Do not mind a store that overwrites what it was asked to create only.

    Returns:
        What is wrong with the root as it is seen from here, in a few words; empty if nothing is.
    """
    own = mark.path.parent / uuid.uuid4().hex
    try:
        with patience(DOOR_SECONDS):
            there = _read(mark.path)
            if there is None:
                return "is another place there: what this run has just written is absent"
            create(own, own.name.encode())
            try:
                if not may_overwrite:
                    _try(mark.path, own.name.encode())
                    there = read_bytes(mark.path)
                if there != mark.body:
                    return "overwrites there what it is asked to create only"
                return _seen(mark.path.parent, [mark.path, own])
            finally:
                remove(own)
    except KilobasisError as error:
        return f"cannot be used there: {error.what}"


def _read(path: StoragePath) -> bytes | None:
    for look in range(LOOKS):
        time.sleep(LOOK_SECONDS if look else 0.0)
        with contextlib.suppress(FileNotFoundError):
            return read_bytes(path)
    return None


def _clear(folder: StoragePath, made: list[StoragePath]) -> None:
    for path in made:
        remove(path)
    if folder.is_local:
        # Somebody else may have something in it.
        with contextlib.suppress(OSError):
            folder.local.rmdir()


def probe(root: StoragePath) -> str:
    """Try a store below `root`, and leave nothing there.

    Returns:
        What is wrong with it, in a few words; empty if it can be trusted.

    Raises:
        StorageError: it cannot be written, read, listed or deleted from.
    """
    folder = root / f"{PREFIX}{uuid.uuid4().hex[:12]}"
    with patience(DOOR_SECONDS):
        made: list[StoragePath] = []
        try:
            return _twice(folder, made) or _race(folder, made) or _seen(folder, made)
        finally:
            _clear(folder, made)


def _twice(folder: StoragePath, made: list[StoragePath]) -> str:
    path = folder / "twice"
    made.append(path)
    first, second = (f"{word} {uuid.uuid4().hex}".encode() for word in ("first", "second"))
    create(path, first)
    _try(path, second)
    return "" if read_bytes(path) == first else "it overwrites an object that it was asked to create only"


def _race(folder: StoragePath, made: list[StoragePath]) -> str:
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="probe") as executor:
        for number in range(ROUNDS):
            path = folder / f"race-{number}"
            made.append(path)
            bodies = [f"writer {writer} {uuid.uuid4().hex}".encode() for writer in range(WRITERS)]
            won = list(executor.map(_try, [path] * WRITERS, bodies))
            there = read_bytes(path)
            winners = [body for body, created in zip(bodies, won, strict=True) if created]
            if len(winners) > 1:
                return f"{len(winners)} of {WRITERS} writers at once were told that they had created the same object"
            if winners and winners[0] != there:
                return "an object has another content than that of the writer that was told to have created it"
    return ""


def _seen(folder: StoragePath, made: list[StoragePath]) -> str:
    listed = set(names(folder))
    missing = sorted({path.name for path in made} - listed)
    return f"a list of its objects leaves out {missing[0]!r}, which was just created" if missing else ""


def _try(path: StoragePath, body: bytes) -> bool:
    """Whether the store says that this call created the object."""
    try:
        put_if_absent(path, body)
    except FileExistsError:
        return False
    except Exception as error:
        if not may_pass(error):
            raise
        # A refusal looks like a failure in some stores; what counts is what is there.
        return False
    return True


def require_trusted(root: StoragePath, single_writer: bool) -> str:
    """Refuse a store that cannot create-if-absent, unless the user vouches for being its only writer.

    Returns:
        How the store creates, for the record: "if-absent", or "single-writer: ..." with what is wrong.

    Raises:
        ManifestError: it cannot be trusted.
    """
    if root.scheme in ATOMIC:
        wrong = probe(root)
    else:
        wrong = f"fsspec's {root.scheme}:// is not known to create only where nothing is"
    if not wrong:
        return TRUSTED
    if single_writer:
        return f"single-writer: {wrong}"
    raise ManifestError(
        f"the store of root {root} cannot be trusted with more than one writer: {wrong}",
        "use another store, or set compute.single_writer: true if nothing else ever writes below this root",
    )
