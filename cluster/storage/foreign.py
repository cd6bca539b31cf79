"""Files that others wrote, of any size and in any store: found by a pattern, told apart, read as streams.

Everything is asked for through `attempts`, so a store that fails for a moment costs a moment, and one that fails for
long is told as such: nobody takes it for a damaged file.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from cluster.storage import traffic
from cluster.storage.attempts import attempt
from cluster.storage.objects import SECOND_LOOKS, filesystem, forget, once, request
from cluster.storage.path import StoragePath

# What one request asks for: memory is bounded by it, and a round trip is short beside it.
BLOCK = 4 * 2**20
# A listing of many pages is one call, and has time for them.
_LISTED = 2**30


def glob(pattern: StoragePath) -> list[StoragePath]:
    """The objects that match a pattern, sorted; a folder stands for every file below it.

    Raises:
        StorageError: the store does not say.
    """
    found: list[str] = []
    for _ in range(1 if pattern.is_local else SECOND_LOOKS):
        # A store that denies for a moment what it has is asked again.
        found = found or (_matching_local(pattern) if pattern.is_local else _matching(pattern))
    keep = [key for key in found if not key.rsplit("/", 1)[-1].startswith(".")]
    # Some file systems answer with a slash in front that no parsed path has.
    return [StoragePath(pattern.scheme, key if pattern.is_local else key.lstrip("/")) for key in sorted(keep)]


def _matching_local(pattern: StoragePath) -> list[str]:
    fs = filesystem(pattern)
    if _is_magic(pattern):
        found = fs.glob(pattern.key)
    elif fs.isdir(pattern.key):
        found = fs.find(pattern.key)
    else:
        found = [pattern.key] if fs.exists(pattern.key) else []
    return [str(key) for key in found if not fs.isdir(key)]


def _matching(pattern: StoragePath) -> list[str]:
    listed: dict[str, dict[str, Any]] = {}
    with suppress(FileNotFoundError):
        if _is_magic(pattern):
            listed = request(pattern, "list", "glob", pattern.key, size=_LISTED, detail=True)
        elif _is_folder(pattern, info := _described(pattern)):
            listed = request(pattern, "list", "find", pattern.key, size=_LISTED, detail=True)
        else:
            listed = {pattern.key: info}
    return [str(key) for key, info in listed.items() if info.get("type") != "directory" and not str(key).endswith("/")]


def _is_magic(pattern: StoragePath) -> bool:
    return any(character in pattern.key for character in "*?[")


def _is_folder(path: StoragePath, info: dict[str, Any]) -> bool:
    # On the web a page may be a list of links, and nothing else says so.
    return info.get("type") == "directory" or (path.is_web and bool(request(path, "look at", "isdir", path.key)))


def _described(path: StoragePath) -> dict[str, Any]:
    """What the store knows of an object.

    Raises:
        FileNotFoundError: nothing is there.
    """

    def look() -> dict[str, Any]:
        try:
            return cast(dict[str, Any], once(path, "info", path.key))
        except FileNotFoundError as error:
            # fsspec says so of every failure on the web.
            cause = error.__cause__
            if path.is_web and cause is not None and not isinstance(cause, FileNotFoundError):
                raise ConnectionError(f"{type(cause).__name__}: {cause}") from error
            raise

    return attempt(path, "look at", look, forget)


def signature(path: StoragePath) -> str:
    """What tells one content of an object from another: the store's own checksum, or sha256 where it has none.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store does not say.
    """
    info = _described(path)
    for field in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(field):
            return f"{field.lower()}:{info[field]}".replace('"', "")
    digest = hashlib.sha256()
    with open_read(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def open_read(path: StoragePath) -> Iterator[BinaryIO]:
    """A buffered binary stream over the object, of bounded memory. It can seek where the store knows the object's size.

    Reading it raises StorageError, with the object's name, once the store has failed for too long.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store does not say.
    """
    if path.is_local:
        with filesystem(path).open(path.key, "rb") as stream:
            yield cast(BinaryIO, stream)
        return
    info = _described(path)
    size = None if info.get("size") is None else int(info["size"])
    whole = size is None or (path.is_web and not info.get("partial"))
    raw = _FromTheFront(path, size) if whole else _Ranges(path, size)
    with io.BufferedReader(raw, BLOCK) as buffered:
        yield cast(BinaryIO, buffered)


class _Ranges(io.RawIOBase):
    """An object, range by range."""

    def __init__(self, path: StoragePath, size: int | None) -> None:
        self._path, self._size = path, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._size is None:
            raise io.UnsupportedOperation(f"{self._path} has no size that the server knows")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, target: Any) -> int:
        count = len(target) if self._size is None else min(len(target), self._size - self._at)
        if count <= 0:
            return 0
        body = attempt(self._path, "read", functools.partial(self._fetch, count), forget)
        target[: len(body)] = body
        self._at += len(body)
        return len(body)

    def _fetch(self, count: int) -> bytes:
        end = self._at + count
        try:
            body = once(self._path, "cat_file", self._path.key, size=count, start=self._at, end=end)
        except FileNotFoundError as error:
            raise _gone() from error
        return self._checked(body, count)

    def _checked(self, body: bytes, count: int) -> bytes:
        if len(body) != count and self._size is not None:
            raise OSError(errno.EIO, f"{len(body)} bytes came of the {count} from {self._at} on")
        return body


class _FromTheFront(_Ranges):
    """What a server gives only as a whole. After a failure, or a step back, it is begun anew and skipped through."""

    def __init__(self, path: StoragePath, size: int | None) -> None:
        super().__init__(path, size)
        self._stream: BinaryIO | None = None
        self._came = 0

    def close(self) -> None:
        self._end()
        super().close()

    def _end(self) -> None:
        stream, self._stream, self._came = self._stream, None, 0
        if stream is not None:
            stream.close()

    def _fetch(self, count: int) -> bytes:
        if self._came > self._at:
            self._end()
        try:
            if self._stream is None:
                self._stream = filesystem(self._path).open(self._path.key, "rb", block_size=0)
            while self._came < self._at:
                if not self._take(min(BLOCK, self._at - self._came)):
                    raise OSError(errno.EIO, f"it ends after {self._came} bytes, {self._at} were read before")
            return self._checked(self._take(count), count)
        except FileNotFoundError as error:
            self._end()
            raise _gone() from error
        except Exception:
            self._end()
            raise

    def _take(self, count: int) -> bytes:
        """So many bytes of the stream, or what is left of it."""
        parts: list[bytes] = []
        assert self._stream is not None
        while count and (part := self._stream.read(count)):
            parts.append(part)
            count -= len(part)
            traffic.read(len(part))
            self._came += len(part)
        return b"".join(parts)


def _gone() -> OSError:
    """A store may deny for a moment what it has; it is asked a few times."""
    return OSError(errno.ENXIO, "it was there, and now is not")
