"""Create-if-absent: the one way in which Kilobasis writes.

An object is created once, never overwritten and never renamed. Locally that is a temporary file in the
same folder, fsync, a hard link (which fails where the name is taken) and an fsync of the folder, so that
a name is either absent or names the whole content, also after a power cut.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from pathlib import Path

from cluster.storage.objects import filesystem, read_bytes
from cluster.storage.path import StoragePath
from schemas.errors import IntegrityError

# fsspec's memory store first looks whether a name is free and then takes it.
_ONE_AT_A_TIME = threading.Lock()


def create(path: StoragePath, body: bytes) -> bool:
    """Create the object if its name is free.

    Args:
        path: Where.
        body: The whole content. Never empty, because some stores treat an empty conditional write as
            unconditional.

    Returns:
        True when this call created it, or when the object that is there has exactly this content (a
        retry after a lost answer looks so); False when another content holds the name.
    """
    if not body:
        raise ValueError(f"refusing to create the empty object {path}")
    created = _create_local(path.local, body) if path.is_local else _create_remote(path, body)
    return created or read_bytes(path) == body


def create_or_adopt(path: StoragePath, body: bytes) -> None:
    """Create an object whose name decides its content, or check that the one there is the same.

    Raises:
        IntegrityError: another content holds the name.
    """
    if not create(path, body):
        raise IntegrityError(
            f"{path} exists with another content than this stage makes (an earlier crash or a foreign writer)",
            "delete that object and resume",
        )


def _create_local(target: Path, body: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as stream:
            stream.write(body)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _create_remote(path: StoragePath, body: bytes) -> bool:
    try:
        with _ONE_AT_A_TIME if path.scheme == "memory" else contextlib.nullcontext():
            filesystem(path).pipe_file(path.key, body, mode="create")
    except FileExistsError:
        return False
    except OSError:
        # Some stores report a taken name as a plain error. Whoever reads the name back knows more.
        if filesystem(path).exists(path.key):
            return False
        raise
    return True
