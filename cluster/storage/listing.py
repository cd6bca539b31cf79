"""What lies below a folder, and whether what a record names is there.

Whatever is left out of a listing counts as absent, and what nothing refers to is deleted by the word of one. So a
folder that cannot be read is an error here, and never an empty folder.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cluster.storage.objects import SECOND_LOOKS, abreast, names, request, size
from cluster.storage.path import StoragePath
from schemas.errors import StorageError
from schemas.records import ObjectEntry

# Names that buckets give in one answer.
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing: its bytes, and when it was last written (seconds since 1970; None if not told)."""

    size: int
    modified: float | None


def listing(path: StoragePath) -> dict[str, Listed]:
    """Every object below `path`, by key below it, those with a dot in front included. A link counts as an object.

    Raises:
        StorageError: a folder in it cannot be read.
    """
    prefix = path.key.strip("/") + "/"
    if path.is_local:
        # fsspec's own walk leaves out, without a word, whatever it cannot list.
        return {key.strip("/").removeprefix(prefix): there for key, there in _walk(path.key)}
    try:
        listed = request(path, "list", "find", path.key, detail=True, withdirs=False)
    except FileNotFoundError:
        return {}
    found = {}
    for key, info in listed.items():
        below = str(key).strip("/")
        # Some stores list the folder itself as an object.
        if below.startswith(prefix) and info.get("type") != "directory":
            found[below.removeprefix(prefix)] = Listed(int(info["size"] or 0), _modified(info))
    return found


def numbered(path: StoragePath, limit: int) -> list[str]:
    """See `names`; of a folder in which most are numbers of six digits, in the order of their numbers.

    A bucket tells a thousand names at a time, each thousand after the one before. Here each thousand is asked for by
    what its numbers begin with, so that none waits for another. Other names begin with a small letter.

    Args:
        path: The folder.
        limit: The numbers are below this.
    """
    if path.is_local or limit <= _PAGE:
        return names(path)
    found = abreast(path, lambda prefix: _beginning(path, prefix), _beginnings(limit))
    return sorted({name for some in found for name in some})


def count(path: StoragePath, limit: int, suffix: str) -> int:
    """How many of `numbered` end with `suffix`, which begins with their only dot.

    S3 is asked for what comes before the dots, as it is asked for folders: such an answer has nothing but names in it,
    and reading it is what a long list costs.
    """
    if path.scheme == "s3" and limit > _PAGE:
        # A store that only knows folders says so.
        with suppress(StorageError):
            return sum(abreast(path, lambda prefix: _stems(path, prefix), _beginnings(limit)))
    return sum(name.endswith(suffix) for name in numbered(path, limit))


def _stems(path: StoragePath, prefix: str) -> int:
    try:
        listed = request(path, "list", "lsdir", path.key, prefix=prefix, delimiter=".")
    except FileNotFoundError:
        return 0
    # Without their last letter, which is the dot here.
    below = [str(entry["name"]).removeprefix(path.key + "/") for entry in listed if entry["type"] == "directory"]
    return sum("/" not in name for name in below)


def _beginnings(limit: int) -> list[str]:
    return [f"{thousand:03d}" for thousand in range(-(-limit // _PAGE))] + list(string.ascii_lowercase)


def _beginning(path: StoragePath, prefix: str) -> list[str]:
    try:
        listed = request(path, "list", "find", path.key, prefix=prefix)
    except FileNotFoundError:
        return []
    below = [str(key).strip("/").removeprefix(path.key.strip("/") + "/") for key in listed]
    return [name for name in below if name.startswith(prefix) and "/" not in name]


def absent(folder: StoragePath, entries: Iterable[ObjectEntry]) -> list[str]:
    """Keys of objects that are not there, or have another size than was committed. Each is asked for.

    Args:
        folder: What the keys are below.
        entries: The objects.
    """
    return [entry.key for entry in entries if not _is_there(folder, entry)]


def _is_there(folder: StoragePath, entry: ObjectEntry) -> bool:
    for _ in range(1 if folder.is_local else SECOND_LOOKS):
        try:
            return size(folder / entry.key) == entry.size
        except FileNotFoundError:
            continue
    return False


def _walk(folder: str) -> Iterator[tuple[str, Listed]]:
    try:
        with os.scandir(folder) as entries:
            every = sorted(entries, key=lambda entry: entry.name)
        for entry in every:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)
            elif (there := _seen(entry)) is not None:
                yield entry.path, there
    except (FileNotFoundError, NotADirectoryError):
        # Gone, or never there.
        return
    except OSError as error:
        raise StorageError(
            f"cannot list {folder}: {error.strerror or error}",
            "mend the file system or the permissions, then try again",
        ) from error


def _seen(entry: os.DirEntry[str]) -> Listed | None:
    try:
        found = entry.stat(follow_symlinks=False)
        if entry.is_symlink():
            return Listed(_size_behind(entry), found.st_mtime)
    except FileNotFoundError:
        return None
    return Listed(found.st_size, found.st_mtime)


def _size_behind(link: os.DirEntry[str]) -> int:
    try:
        return link.stat().st_size
    except OSError:
        # It leads nowhere. That is for whoever reads it to say.
        return 0


def _modified(info: dict[str, Any]) -> float | None:
    for field in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(field)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None
