"""Create-if-absent: the one way in which Kilobasis writes what counts.

An object is created once, never overwritten and never renamed. Locally that is a temporary file in the
same folder, fsync, a hard link (which fails where the name is taken) and an fsync of the folder, so that
a name is either absent or names the whole content, also after a power cut. A bucket is asked to create
only (S3: If-None-Match, Google: ifGenerationMatch=0, Azure: overwrite=False).

Whatever an answer was, the object itself decides. A request whose answer was lost is tried again and then
finds its own object: that is success, not a conflict. So bodies differ wherever writers must be told
apart (records carry a nonce), and are equal wherever they may not differ (data).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import itertools
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import interruption
from cluster.storage import traffic
from cluster.storage.attempts import attempt, disk, may_pass
from cluster.storage.objects import SECOND_LOOKS, forget, kept, once, read_at_most, request
from cluster.storage.path import StoragePath
from schemas.errors import IntegrityError, InterruptedRunError, StorageError

# The most that every bucket takes in one request, and only one request can be conditional.
LARGEST_OBJECT = 5 * 10**9

# How often to believe a store that contradicts itself.
LOOKS = 5

# fsspec's memory store first looks whether a name is free and then takes it.
_ONE_AT_A_TIME = threading.Lock()


class _Gate:
    """Counts the objects that are being written; closed, it lets no other begin."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._closed = 0, False

    def __enter__(self) -> None:
        interruption.check()
        with self._changed:
            if self._closed:
                raise InterruptedRunError("this process is stopping, nothing more is written", "resume")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not self._inside, timeout)


_gate = _Gate()


def finish(timeout: float) -> bool:
    """Let the objects be finished that this process is writing, and begin no other: it is about to end.

    Args:
        timeout: Seconds to wait.

    Returns:
        Whether everything was finished.
    """
    return _gate.close(timeout)


def create(path: StoragePath, body: bytes) -> bool:
    """Create the object if its name is free.

    Args:
        path: Where.
        body: The whole content. Never empty, because some stores treat an empty conditional write as
            unconditional.

    Returns:
        True when the object there has exactly this content, whoever created it; False when another
        content holds the name.

    Raises:
        StorageError: the store does not say. Nothing is known then: nobody may guess.
        IntegrityError: the store keeps another content than it was sent.
    """
    if not body:
        raise ValueError(f"refusing to create the empty object {path}")
    if len(body) > LARGEST_OBJECT and not path.is_local:
        raise StorageError(
            f"cannot create {path}: {len(body)} bytes in one object, buckets take at most {LARGEST_OBJECT}",
            "use smaller units, or a local root",
        )
    with _gate:
        if path.is_local:
            with disk(path, "create"):
                return _create_local(path.local, body) or read_at_most(path, len(body) + 1) == body
        return _create_remote(path, body)


def create_or_adopt(path: StoragePath, body: bytes) -> None:
    """Create an object whose name decides its content, or check that the one there is the same.

    Raises:
        IntegrityError: another content holds the name.
    """
    if not create(path, body):
        raise IntegrityError(
            f"{path} exists with another content than this stage makes (an earlier crash or a foreign writer)",
            "`kilobasis repair` removes it; then resume",
        )


def replace(path: StoragePath, body: bytes) -> None:
    """Write an object whether its name is taken or not. For heartbeats alone, which have one writer each."""
    if not path.is_local:
        write = functools.partial(once, path, "pipe_file", path.key, body, size=len(body))
        attempt(path, "write", functools.partial(_placed, write), forget)
        return
    with disk(path, "write"):
        _make_folder(path.local)
        temporary = path.local.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        temporary.write_bytes(body)
        temporary.replace(path.local)
        traffic.written(len(body))


def remove(path: StoragePath) -> None:
    """Delete an object; an absent one is no error. For repair, gc, the probe, and checkpoints that are superseded."""
    for _ in range(1 if path.is_local else SECOND_LOOKS):
        # What a bucket denies for a moment would stay.
        with contextlib.suppress(FileNotFoundError):
            request(path, "delete", "rm_file", path.key)
            return


def _create_local(target: Path, body: bytes) -> bool:
    _make_folder(target)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as stream:
            stream.write(body)
            stream.flush()
            os.fsync(stream.fileno())
        traffic.written(len(body))
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        _settle(target.parent)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _settle(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(target: Path) -> None:
    try:
        missing = list(itertools.takewhile(lambda folder: not folder.is_dir(), target.parents))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name that lasts is worth nothing in a folder whose own name does not.
        for folder in reversed(missing):
            _settle(folder.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"cannot create {target}: {error.filename} is a file, or below one, where a folder should be",
            "move that file away, then resume",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise StorageError(f"cannot create {target}: {os.strerror(error.errno)}", "choose another root") from error
        raise


class _NotThereError(OSError):
    """A write failed and left nothing: it may be tried again."""


def _create_remote(path: StoragePath, body: bytes) -> bool:
    for _ in range(LOOKS):
        ours = attempt(path, "create", functools.partial(_put, path, body), forget)
        # A store that denies what it has just taken is asked again.
        with contextlib.suppress(FileNotFoundError):
            if ours and kept(path) == (len(body), hashlib.md5(body, usedforsecurity=False).hexdigest()):
                return True
            there = read_at_most(path, len(body) + 1)
            if ours and there != body:
                raise IntegrityError(
                    f"{path} holds other bytes than the {len(body)} that were sent to create it",
                    "`kilobasis repair` removes it; then resume, over a better network",
                )
            return there == body
    raise StorageError(
        f"cannot create {path}: the store says that it is there, and then that it is not", "resume later"
    )


def _put(path: StoragePath, body: bytes) -> bool:
    """One try; whether the object is certainly ours. If not, the object itself tells."""
    # Asking first spares sending what is there already, and protects it in a store with a single writer.
    if _present(path):
        return False
    try:
        _placed(functools.partial(put_if_absent, path, body))
    except FileExistsError:
        return False
    except Exception as error:
        if not may_pass(error):
            raise
        # Refused, or done and the answer lost. A name that is taken comes as a plain OSError from some stores.
        if _present(path):
            return False
        raise _NotThereError(getattr(error, "errno", None), str(error)) from error
    return True


def _placed(write: Callable[[], object]) -> None:
    """One write. A store that knows no such place may mean it, or only say so for a moment."""
    try:
        write()
    except FileNotFoundError as error:
        raise OSError(errno.ENXIO, "there is no such bucket or container") from error


def put_if_absent(path: StoragePath, body: bytes) -> None:
    """One conditional request, as the store takes it: no look before, no look after.

    Raises:
        FileExistsError, OSError: refused, or not known.
    """
    if path.is_local:
        if not _create_local(path.local, body):
            raise FileExistsError(path.key)
    elif path.scheme == "memory":
        with _ONE_AT_A_TIME:
            once(path, "pipe_file", path.key, body, mode="create")
    else:
        once(path, "pipe_file", path.key, body, mode="create", size=len(body), **_put_options(path, body))


def _put_options(path: StoragePath, body: bytes) -> dict[str, Any]:
    """What makes it a single request, and makes the store check what arrives, where it can."""
    if path.scheme == "s3":
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        return {"chunksize": LARGEST_OBJECT, "ContentMD5": md5}
    return {}


def _present(path: StoragePath) -> bool:
    try:
        return bool(once(path, "info", path.key).get("type") != "directory")
    except FileNotFoundError:
        return False
