"""HTTP/1.1 messages as they stand on the wire, for a proxy that passes on every byte as it came."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Self

BLOCK = 64 * 1024


class Piece(NamedTuple):
    """Some bytes of a body: content, or the framing of the chunked coding around it."""

    bytes: bytes
    content: bool


@dataclass(frozen=True)
class Head:
    """The start line and the headers, verbatim, and what of them a proxy must understand."""

    raw: bytes
    start: tuple[str, str, str]
    headers: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Self | None:
        """The next head; None where the other side closed the connection between two messages."""
        try:
            raw = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        a, b, c = (*first.split(" ", 2), "", "")[:3]
        named = (line.partition(":") for line in lines)
        return cls(raw, (a, b, c), {name.strip().lower(): value.strip() for name, _, value in named})

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.start[1])

    @property
    def chunked(self) -> bool:
        """Whether the body says itself where it ends."""
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def length(self) -> int | None:
        """Bytes of the body, where the headers say so."""
        return int(self.headers["content-length"]) if "content-length" in self.headers else None

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        wish = self.headers.get("connection", "").lower()
        return "close" in wish or ("HTTP/1.0" in self.start and "keep-alive" not in wish)

    def with_length(self, length: int) -> bytes:
        """The head with another Content-Length."""
        lines = self.raw[:-4].split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith((b"content-length:", b"transfer-encoding:"))]
        return b"\r\n".join([*kept, b"Content-Length: %d" % length]) + b"\r\n\r\n"

    async def body(self, reader: asyncio.StreamReader, until_end: bool = False) -> AsyncIterator[Piece]:
        """The body, piece by piece as it comes.

        Args:
            reader: Where the head came from.
            until_end: Whether a body of unknown length goes on until the connection ends, as an answer's does.
        """
        if self.chunked:
            while size := await self._chunk_size(reader):
                line, left = size
                yield Piece(line, content=False)
                if not left:
                    break
                async for piece in exactly(reader, left):
                    yield piece
                yield Piece(await reader.readexactly(2), content=False)
            while line := await reader.readuntil(b"\r\n"):  # trailers, and the empty line behind them
                yield Piece(line, content=False)
                if line == b"\r\n":
                    return
        elif self.length is not None:
            async for piece in exactly(reader, self.length):
                yield piece
        elif until_end:
            while block := await reader.read(BLOCK):
                yield Piece(block, content=True)

    @staticmethod
    async def _chunk_size(reader: asyncio.StreamReader) -> tuple[bytes, int]:
        line = await reader.readuntil(b"\r\n")
        return line, int(line.split(b";")[0], 16)


async def exactly(reader: asyncio.StreamReader, count: int) -> AsyncIterator[Piece]:
    """The next `count` bytes."""
    while count:
        block = await reader.read(min(count, BLOCK))
        if not block:
            raise asyncio.IncompleteReadError(b"", count)
        count -= len(block)
        yield Piece(block, content=True)


def flipped(pieces: list[Piece]) -> list[Piece]:
    """The same pieces with one bit of the content changed, in the middle of its largest piece."""
    at = max(range(len(pieces)), key=lambda index: len(pieces[index].bytes) if pieces[index].content else -1, default=0)
    if not pieces or not pieces[at].content:
        return pieces
    block = bytearray(pieces[at].bytes)
    block[len(block) // 2] ^= 1
    return [*pieces[:at], Piece(bytes(block), content=True), *pieces[at + 1 :]]
