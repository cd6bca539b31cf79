"""What this process has moved to and from stores, counted where requests are made: `objects`, `create`, `foreign`.

Objects only: listings are not counted, nor is a corpus on this machine's own disk, which is read as any file is.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of objects that were read and written, and requests that were made again because the one before failed."""

    read_bytes: int = 0
    written_bytes: int = 0
    retries: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.retries + other.retries,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return self + Traffic(-other.read_bytes, -other.written_bytes, -other.retries)


class _Counter:
    """Readers and writers of a process are in many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = self._told = Traffic()

    def add(self, more: Traffic) -> None:
        with self._lock:
            self._total += more

    def total(self) -> Traffic:
        with self._lock:
            return self._total

    def fresh(self) -> Traffic:
        with self._lock:
            fresh, self._told = self._total - self._told, self._total
            return fresh


_counter = _Counter()


def read(count: int) -> None:
    """So many bytes came from a store."""
    _counter.add(Traffic(read_bytes=count))


def written(count: int) -> None:
    """So many bytes went to a store."""
    _counter.add(Traffic(written_bytes=count))


def retried() -> None:
    """A request is made again."""
    _counter.add(Traffic(retries=1))


def total() -> Traffic:
    """All of this process."""
    return _counter.total()


def fresh() -> Traffic:
    """What was counted since the last call of this: who adds up its answers counts nothing twice."""
    return _counter.fresh()
