"""Reading whole objects, ranges and listings. Nothing here writes: see `create`.

Listing caches are off everywhere: a stale listing would hide what another worker has just committed. Every
request to a remote store goes through `attempts`.
"""

from __future__ import annotations

import contextvars
import errno
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar, cast

import fsspec
from fsspec.asyn import sync

from cluster.storage import traffic
from cluster.storage.attempts import attempt
from cluster.storage.path import StoragePath
from schemas.errors import IntegrityError, ManifestError, StorageError
from schemas.records import REPAIR, ObjectEntry, sha256

R = TypeVar("R")
T = TypeVar("T")

# A request may take so long, and its bytes so much longer at the slowest pace that is worth waiting for.
REQUEST_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 2**20
# More than the record of a stage with a million units; nothing that is JSON here is larger.
LARGEST_JSON = 256 * 2**20
# Requests to a bucket at one time, where there are many to make: nearly all of their time is waiting.
AT_ONCE = 16
# A committed object that a store denies to have is asked for again: some do so for a moment.
SECOND_LOOKS = 3

_OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "s3": {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": REQUEST_SECONDS,
            "max_pool_connections": 32,
            # Attempts are counted in one place only.
            "retries": {"mode": "standard", "total_max_attempts": 1},
        }
    },
}


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, _pid: int) -> fsspec.AbstractFileSystem:
    # The process id is part of the key because most remote file systems own a thread that does not
    # survive a fork.
    options = dict(_OPTIONS.get(scheme, {}))
    if scheme != "file":
        options |= {"use_listings_cache": False, "skip_instance_cache": scheme != "memory"}
    try:
        if scheme == "s3":
            options["session"] = _session()
        made = fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise ManifestError(
            f"URLs with {scheme}:// cannot be opened: {error}",
            "install the package that it names, for example with pip install 'kilobasis[s3]'",
        ) from error
    if scheme == "s3":
        made.retries = 1
    return made


def _session() -> Any:
    """What s3fs makes for itself, but for how it reads times: half of what a long list costs otherwise."""
    from aiobotocore.session import AioSession
    from botocore.utils import parse_timestamp

    def moment(told: Any) -> datetime:
        # Lists have it like this; headers and credentials do not.
        return datetime.fromisoformat(told) if str(told).endswith("Z") else parse_timestamp(told)

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=moment)
    return session


def filesystem(path: StoragePath) -> fsspec.AbstractFileSystem:
    """The fsspec file system that serves `path` in this process."""
    return _filesystem(path.scheme, os.getpid())


def forget() -> None:
    """Make every client anew at its next use: its credentials may have expired."""
    _filesystem.cache_clear()


def request(path: StoragePath, verb: str, method: str, *args: Any, size: int = 0, **options: Any) -> Any:
    """One request to the store that serves `path`, tried again while its failure may pass.

    Args:
        path: What it is about.
        verb: What it does, for messages.
        method: Name of the fsspec method.
        args: Its arguments.
        size: Bytes that it moves, for the deadline.
        options: Its keyword arguments.

    Raises:
        FileNotFoundError, FileExistsError: the store's answer.
        StorageError: see `attempts.attempt`.
    """
    return attempt(path, verb, lambda: once(path, method, *args, size=size, **options), forget)


def once(path: StoragePath, method: str, *args: Any, size: int = 0, **options: Any) -> Any:
    """One request, with a deadline of its own, not tried again."""
    answer = _asked(path, method, *args, size=size, **options)
    if method == "cat_file":
        traffic.read(len(answer))
    elif method == "pipe_file":
        traffic.written(len(args[1]))
    return answer


def _asked(path: StoragePath, method: str, *args: Any, size: int, **options: Any) -> Any:
    fs = filesystem(path)
    if not getattr(fs, "async_impl", False):
        return getattr(fs, method)(*args, **options)
    deadline = REQUEST_SECONDS + size / SLOWEST_BYTES_PER_SECOND
    try:
        return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=deadline, **options)
    except OSError:
        raise
    except Exception as error:
        raise _translated(error) from error


def _translated(error: Exception) -> Exception:
    """An HTTP error that a library leaves as its own, as the error that Python has for it."""
    # aiohttp has a `code` as well, and warns whoever looks at it.
    status = getattr(error, "status_code", None) or vars(error).get("status") or vars(error).get("code")
    text = str(error)
    if status == 404:
        return FileNotFoundError(text)
    if status in (401, 403) or type(error).__name__ == "ClientAuthenticationError":
        return PermissionError(text)
    number = {400: errno.EINVAL, 409: errno.EBUSY, 411: errno.EINVAL, 412: errno.EINVAL, 416: errno.EINVAL}
    return OSError(number[status], text) if status in number else error


def read_bytes(path: StoragePath) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store does not give it.
    """
    # One request for the whole: s3fs would first ask for the size, and then for parts.
    options = {"max_concurrency": 1} if path.scheme == "s3" else {}
    return cast(bytes, request(path, "read", "cat_file", path.key, size=2**30, **options))


def read_range(path: StoragePath, start: int, end: int | None) -> bytes:
    """Bytes `[start, end)` of the object; a negative `start` counts from the end.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store does not give it.
    """
    return cast(bytes, request(path, "read", "cat_file", path.key, size=2**30, start=start, end=end))


def read_at_most(path: StoragePath, count: int) -> bytes:
    """The object, or as many bytes of it: whatever its size is now, that much is read and no more.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store does not give it.
    """
    try:
        return read_range(path, 0, count)
    except StorageError:
        # An empty object has no range that a bucket could give.
        if size(path):
            raise
        return b""


def read_text_object(path: StoragePath, largest: int | None = None) -> bytes:
    """An object of a limited size, such as a record.

    Raises:
        FileNotFoundError: nothing is there.
        IntegrityError: it is far larger than anything of its kind.
    """
    largest = LARGEST_JSON if largest is None else largest
    body = read_at_most(path, largest + 1)
    if len(body) > largest:
        raise IntegrityError(
            f"{path} has more than {largest} bytes, which nothing of its kind has", "restore the file from a copy"
        )
    return body


def read_checked(path: StoragePath, parse: Callable[[bytes], R], listed: bool = False, largest: int | None = None) -> R:
    """An object that can tell whether it is whole, parsed.

    Args:
        path: Where.
        parse: Reads it; raises IntegrityError where it is damaged. What was garbled on the way from a bucket
            is right the next time.
        listed: A listing has it, so a bucket that denies to have it is asked again.
        largest: The most bytes that one of its kind has; those of JSON if left out.

    Raises:
        FileNotFoundError: nothing is there.
        IntegrityError: it is damaged.
    """
    for _ in range(0 if path.is_local else SECOND_LOOKS - 1):
        try:
            return parse(read_text_object(path, largest))
        except IntegrityError:
            continue
        except FileNotFoundError:
            if not listed:
                raise
    return parse(read_text_object(path, largest))


def abreast(place: StoragePath, ask: Callable[[T], R], of: Iterable[T]) -> Iterator[R]:
    """What `ask` says of each, in their order; of what lies in a bucket several are asked for at one time.

    Args:
        place: Where everything lies that is asked for.
        ask: Makes a request or a few. In a bucket it is called by threads, within the caller's `patience`.
        of: What it is called with, one by one.
    """
    if place.is_local:
        # There is nothing to wait for.
        yield from map(ask, of)
        return
    rest, context = iter(of), contextvars.copy_context()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reader") as readers:
        # Not all at once: who breaks off waits for what is under way, and what waits takes memory.
        while some := list(itertools.islice(rest, 16 * AT_ONCE)):
            yield from readers.map(lambda each: context.copy().run(ask, each), some)


def read_json(path: StoragePath) -> Any:
    """The object, parsed as JSON.

    Raises:
        FileNotFoundError: nothing is there.
        IntegrityError: what is there is not JSON, or far too large.
    """

    def parse(body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise IntegrityError(
                f"{path} should hold JSON, but cannot be parsed ({error})", "restore the file from a copy"
            ) from error

    return read_checked(path, parse)


def read_recorded(folder: StoragePath, entry: ObjectEntry) -> bytes:
    """An object below `folder` that a committed record vouches for, checked against the record.

    Raises:
        IntegrityError: it is absent, or not what was committed.
    """
    path = locate(folder, entry.key)
    for look in range(SECOND_LOOKS):
        try:
            body = read_at_most(path, entry.size + 1)
        except FileNotFoundError as error:
            if look + 1 < SECOND_LOOKS and not path.is_local:
                continue
            raise IntegrityError(f"{path} is committed, but absent", REPAIR) from error
        # What was garbled on the way is right the second time.
        if sha256(body) == entry.sha256 or path.is_local:
            break
    if len(body) > entry.size:
        raise IntegrityError(f"{path} has more bytes than the {entry.size} that were committed", REPAIR)
    if len(body) < entry.size:
        raise IntegrityError(f"{path} has {len(body)} bytes, committed were {entry.size}", REPAIR)
    if sha256(body) != entry.sha256:
        raise IntegrityError(f"{path} is not what was committed (sha256 differs)", REPAIR)
    return body


def locate(folder: StoragePath, key: str) -> StoragePath:
    """`folder / key`, where that really is below the folder.

    Raises:
        IntegrityError: a symbolic link leads elsewhere.
    """
    path = folder / key
    if path.is_local:
        real = os.path.realpath(path.local)
        if real != os.path.join(os.path.realpath(folder.local), *key.split("/")):  # noqa: PTH118
            raise IntegrityError(f"{path} is a symbolic link to {real}", "put the file itself there")
    return path


def require_within(folder: StoragePath, keys: Iterable[str]) -> None:
    """Make sure that what has these keys really is below the folder.

    Raises:
        IntegrityError: a symbolic link leads elsewhere.
    """
    if folder.is_local:
        for key in keys:
            locate(folder, key)


def exists(path: StoragePath) -> bool:
    """Whether an object or a folder is there now."""
    return bool(request(path, "look for", "exists", path.key))


def names(path: StoragePath) -> list[str]:
    """Sorted names directly below `path`; empty where nothing is there."""
    try:
        listed = request(path, "list", "ls", path.key, detail=False)
    except FileNotFoundError:
        return []
    # A file is listed as itself, and some stores list the folder, too.
    below = [str(entry) for entry in listed if str(entry).strip("/") != path.key.strip("/")]
    found = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in below}
    return sorted(name for name in found if name and not name.startswith("."))


def size(path: StoragePath) -> int:
    """Bytes of the object.

    Raises:
        FileNotFoundError: nothing is there.
    """
    return kept(path)[0]


def kept(path: StoragePath) -> tuple[int, str | None]:
    """Bytes of an object, and the md5 that the store keeps of it as hex; None where it keeps none, or another sum.

    Raises:
        FileNotFoundError: nothing is there.
    """
    info = request(path, "look at", "info", path.key)
    for field in ("ETag", "etag", "md5Hash", "content_md5"):
        value = info.get(field)
        text = value.hex() if isinstance(value, (bytes, bytearray)) else str(value or "").strip('"').lower()
        if len(text) == 32 and all(character in "0123456789abcdef" for character in text):
            return int(info["size"]), text
    return int(info["size"] or 0), None


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
