"""A run's events in `<run>/events/`, as JSON lines: written as they come, and read again.

What is created stays as it is, also in a bucket. So what comes in is written in segments, `000012.jsonl`, one every few
seconds, and again, in volumes of many of them, `000000-000063.jsonl`: of a run of a day a reader asks for a hundred
objects, and not for 17,000. A volume says nothing that its segments do not; where it is missing they are read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.storage.create import create
from cluster.storage.objects import abreast, names, read_text_object
from cluster.storage.path import StoragePath
from schemas import events
from schemas.errors import IntegrityError
from schemas.events import Event, RunEnded, parse_lines

FLUSH_SECONDS = 5.0
# Segments of a volume. So many volumes are written again in one, or fewer that have so many bytes: they wait in memory.
VOLUME, LARGE_VOLUME, LARGE_BYTES = 64, 64, 8 * 2**20

_NAME = re.compile(r"([0-9]{6,12})(?:-([0-9]{6,12}))?\.jsonl", re.ASCII)


@dataclass(frozen=True, slots=True)
class Piece:
    """Segments `first` to `last` in one object: a segment, or a volume of several."""

    first: int
    last: int

    @classmethod
    def named(cls, name: str) -> Piece | None:
        """The piece of that name; None for what is none."""
        found = _NAME.fullmatch(name)
        piece = cls(int(found[1]), int(found[2] or found[1])) if found else None
        return piece if piece and piece.name == name and piece.first <= piece.last else None

    @property
    def is_segment(self) -> bool:
        """Whether it is a segment alone."""
        return self.first == self.last

    @property
    def name(self) -> str:
        """Its name in the folder.

        >>> Piece(0, 63).name, Piece(64, 64).name
        ('000000-000063.jsonl', '000064.jsonl')
        """
        first, last = f"{self.first:06d}", f"{self.last:06d}"
        return f"{first}.jsonl" if self.is_segment else f"{first}-{last}.jsonl"


class EventLog:
    """All events of a run.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: StoragePath) -> None:
        self._folder = run / "events"
        self._lines: list[str] = []
        self._segments = 0
        # What the next volume will hold, bodies of segments, and the next large one, bodies of volumes; and from where.
        self._volume, self._from = list[bytes](), 0
        self._large, self._large_from = list[bytes](), 0
        self._flushed = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Note an event.

        Raises:
            StorageError: it cannot be written.
        """
        self._lines.append(events.line(event, time.time()))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has come in since the last segment, and a volume where one is full.

        Raises:
            StorageError: it cannot be written.
        """
        self._flushed = time.monotonic()
        if not self._lines:
            return
        body = ("\n".join(self._lines) + "\n").encode()
        self._write(Piece(self._segments, self._segments), body)
        self._segments, self._lines = self._segments + 1, []
        self._volume.append(body)
        if len(self._volume) >= VOLUME:
            self._close_volume()

    def _close_volume(self) -> None:
        body, last = b"".join(self._volume), self._segments - 1
        self._write(Piece(self._from, last), body)
        self._volume, self._from = [], self._segments
        self._large.append(body)
        many = len(self._large) >= LARGE_VOLUME or sum(map(len, self._large)) >= LARGE_BYTES
        if many and len(self._large) > 1:
            self._write(Piece(self._large_from, last), b"".join(self._large))
            self._large, self._large_from = [], self._segments

    def _write(self, piece: Piece, body: bytes) -> None:
        create(self._folder / piece.name, body)


def fewest(present: Iterable[str], start: int = 0) -> Iterator[Piece]:
    """The fewest pieces that hold every segment from one on, in their order.

    Args:
        present: Names in the folder of a run's events.
        start: The first segment that is wanted.

    >>> [piece.name for piece in fewest(["000000.jsonl", "000001.jsonl", "000000-000001.jsonl", "000002.jsonl"])]
    ['000000-000001.jsonl', '000002.jsonl']
    """
    longest: dict[int, Piece] = {}
    for piece in filter(None, map(Piece.named, present)):
        if piece.first not in longest or piece.last > longest[piece.first].last:
            longest[piece.first] = piece
    for first in sorted(longest):
        if first >= start:
            yield longest[first]
            start = longest[first].last + 1


def pieces_of(run: StoragePath, start: int = 0) -> Iterator[tuple[Piece, list[tuple[float, Event]]]]:
    """What a run told from a segment on, piece by piece; what of it cannot be read is left out.

    Args:
        run: The run's folder.
        start: The first segment that is wanted.
    """
    folder = run / "events"
    present = names(folder)
    wanted = list(fewest(present, start))
    for piece, told in zip(wanted, abreast(folder, lambda piece: _told(folder, piece), wanted), strict=True):
        if not told and not piece.is_segment:
            # Segments say something, so a volume that says nothing is damaged: they speak for it.
            singles = (each for each in map(Piece.named, present) if each and each.is_segment)
            within = (each for each in singles if piece.first <= each.first <= piece.last)
            told = [event for each in within for event in _told(folder, each)]
        yield piece, told


def events_of(run: StoragePath) -> Iterator[tuple[float, Event]]:
    """What a run told; what of it cannot be read is left out.

    Args:
        run: The run's folder.
    """
    for _, told in pieces_of(run):
        yield from told


def ending_of(run: StoragePath) -> RunEnded | None:
    """The last word of a run, which is in the last segment of its events; None where it has none.

    Args:
        run: The run's folder.
    """
    found = [piece.last for piece in map(Piece.named, names(run / "events")) if piece is not None]
    told = _told(run / "events", Piece(max(found), max(found))) if found else []
    return next((event for _, event in reversed(told) if isinstance(event, RunEnded)), None)


def _told(folder: StoragePath, piece: Piece) -> list[tuple[float, Event]]:
    """What a piece has, with the times; nothing where it cannot be read."""
    try:
        return parse_lines(read_text_object(folder / piece.name))
    except (FileNotFoundError, IntegrityError):
        return []
