"""Reading whole objects, ranges and listings. Nothing here writes: see `create`.

Listing caches are off everywhere: a stale listing would hide what another worker has just committed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec

from cluster.storage.path import StoragePath
from schemas.errors import IntegrityError, ManifestError
from schemas.records import ObjectEntry, sha256


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, _pid: int) -> fsspec.AbstractFileSystem:
    # The process id is part of the key because most remote file systems own a thread that does not
    # survive a fork.
    try:
        if scheme == "file":
            return fsspec.filesystem("file", auto_mkdir=True)
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=scheme != "memory")
    except (ImportError, ValueError) as error:
        raise ManifestError(
            f"URLs with {scheme}:// cannot be opened: {error}",
            "install the package that it names, for example with pip install 'kilobasis[s3]'",
        ) from error


def filesystem(path: StoragePath) -> fsspec.AbstractFileSystem:
    """The fsspec file system that serves `path` in this process."""
    return _filesystem(path.scheme, os.getpid())


def read_bytes(path: StoragePath) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: nothing is there.
    """
    return cast(bytes, filesystem(path).cat_file(path.key))


def read_range(path: StoragePath, start: int, end: int | None) -> bytes:
    """Bytes `[start, end)` of the object; a negative `start` counts from the end.

    Raises:
        FileNotFoundError: nothing is there.
    """
    return cast(bytes, filesystem(path).cat_file(path.key, start=start, end=end))


def read_json(path: StoragePath) -> Any:
    """The object, parsed as JSON.

    Raises:
        FileNotFoundError: nothing is there.
        IntegrityError: what is there is not JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise IntegrityError(
            f"{path} should hold JSON, but cannot be parsed ({error})", "restore the file from a copy"
        ) from error


def read_recorded(folder: StoragePath, entry: ObjectEntry) -> bytes:
    """An object below `folder` that a committed record vouches for, checked against the record.

    Raises:
        IntegrityError: it is absent, or not what was committed.
    """
    path = folder / entry.key
    remedy = f"delete {folder}, which makes it again, and resume"
    try:
        body = read_bytes(path)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is committed, but absent", remedy) from error
    if len(body) != entry.size:
        raise IntegrityError(f"{path} has {len(body)} bytes, committed were {entry.size}", remedy)
    if sha256(body) != entry.sha256:
        raise IntegrityError(f"{path} is not what was committed (sha256 differs)", remedy)
    return body


@contextmanager
def open_read(path: StoragePath) -> Iterator[BinaryIO]:
    """A buffered binary stream over the object."""
    with filesystem(path).open(path.key, "rb") as stream:
        yield cast(BinaryIO, stream)


def exists(path: StoragePath) -> bool:
    """Whether an object or a folder is there now."""
    return bool(filesystem(path).exists(path.key))


def names(path: StoragePath) -> list[str]:
    """Sorted names directly below `path`; empty where nothing is there."""
    try:
        listed = filesystem(path).ls(path.key, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in listed}
    return sorted(name for name in found if name and not name.startswith("."))


def glob(pattern: StoragePath) -> list[StoragePath]:
    """The objects that match a pattern, sorted; a folder stands for every file below it."""
    fs = filesystem(pattern)
    if any(character in pattern.key for character in "*?["):
        found = [str(entry) for entry in fs.glob(pattern.key)]
    elif fs.isdir(pattern.key):
        found = [str(entry) for entry in fs.find(pattern.key)]
    else:
        found = [pattern.key] if fs.exists(pattern.key) else []
    keep = [key for key in found if not fs.isdir(key) and not key.rsplit("/", 1)[-1].startswith(".")]
    # Some file systems answer with a slash in front that no parsed path has.
    return [StoragePath(pattern.scheme, key if pattern.is_local else key.lstrip("/")) for key in sorted(keep)]


def size(path: StoragePath) -> int:
    """Bytes of the object.

    Raises:
        FileNotFoundError: nothing is there.
    """
    return int(filesystem(path).size(path.key))


def signature(path: StoragePath) -> str:
    """What tells one content of an object from another: the store's own checksum, or sha256 where it has none."""
    info = filesystem(path).info(path.key)
    for field in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(field):
            return f"{field.lower()}:{info[field]}".replace('"', "")
    digest = hashlib.sha256()
    with open_read(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def free_bytes(path: StoragePath) -> int | None:
    """Free bytes on the local disk that holds `path`; None for a bucket."""
    if not path.is_local:
        return None
    folder = path.local
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_writable(path: StoragePath) -> None:
    """Fail early where nothing could be written. Leaves nothing behind.

    Raises:
        ManifestError: the folder, or its nearest parent that exists, is no folder or not writable.
    """
    if not path.is_local:
        return
    folder = path.local
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ManifestError(f"root {path} cannot be a folder: {folder} is a file", "choose another root")
    # As root, access() says yes to read-only mounts' owners but not to the mount itself, which is what
    # matters here.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ManifestError(f"root {path} is not writable: no permission on {folder}", "choose another root")
