"""An HTTP proxy in front of a store, which breaks what its rules say and passes on everything else byte by byte.

Host and all other headers stay as the client sent them, so its signature holds. Bodies stream in both directions,
whatever their framing. A client's connection has one connection to the store behind it, as with a balancer.
"""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self

from tests.support.servers.endpoint import Endpoint
from tests.support.servers.error_answers import error_answer
from tests.support.servers.faults import ERRORS, Exchange, Fault, Request, Rule, Rules
from tests.support.servers.http_messages import Head, Piece, flipped

HEAD_LIMIT = 1 << 20
# Stores close idle connections after 5 s and more. One that has been idle for this long is not used again.
IDLE_SECONDS = 1.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class FaultProxy:
    """A proxy for any number of stores, with one set of rules and one log. Use it as a context manager.

    Attributes:
        log: Every request, in the order in which they came.
    """

    def __init__(self, *rules: Rule) -> None:
        self.log: list[Exchange] = []
        self._rules = Rules()
        self._rules.add(rules)
        self._ports: dict[int, int] = {}
        self._servers: list[asyncio.Server] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()

    def endpoint(self, upstream: Endpoint) -> Endpoint:
        """The same bucket, seen through the proxy."""
        if upstream.port not in self._ports:
            self._ports[upstream.port] = self._call(self._listen(upstream))
        through = replace(upstream, port=self._ports[upstream.port])
        environment = {
            name: value.replace(upstream.address, through.address) for name, value in upstream.environment.items()
        }
        return replace(through, environment=environment)

    def inject(self, *rules: Rule) -> None:
        """Add rules, behind those that are there."""
        self._rules.add(rules)

    @contextlib.contextmanager
    def injecting(self, *rules: Rule) -> Iterator[None]:
        """Rules for the length of a with block."""
        self._rules.add(rules)
        try:
            yield
        finally:
            self._rules.remove(rules)

    def seen(self, method: str = "*", key: str = "*", fault: Fault | None = None) -> list[Exchange]:
        """The requests in the log that fit these shell patterns; with a fault, those that it happened to."""
        return [
            exchange
            for exchange in list(self.log)
            if fnmatchcase(exchange.method, method)
            and fnmatchcase(exchange.key, key)
            and (fault is None or exchange.fault is fault)
        ]

    def close(self) -> None:
        """Break every connection and stop listening."""
        if self._loop.is_closed():
            return
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    async def _listen(self, upstream: Endpoint) -> int:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._serving.add(task)
            try:
                await _Connection(reader, writer, upstream, self._decide).serve()
            except asyncio.CancelledError:
                # Only by `_stop`. The server would report a task of its own that was cancelled as an error.
                pass
            finally:
                self._serving.discard(task)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=HEAD_LIMIT, backlog=256)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
        while self._serving:
            for task in list(self._serving):
                task.cancel()
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.005)  # transports close their sockets some turns later

    def _decide(self, request: Request) -> tuple[Exchange, Rule | None]:
        rule = self._rules.decide(request)
        exchange = Exchange(request.method, request.key, request.query, rule.fault if rule else None)
        self.log.append(exchange)
        return exchange, rule


class _Broken(Exception):  # noqa: N818 - it is how a connection ends, not an error of the proxy
    """The client's connection ends here: with a reset, or orderly where `orderly` is set."""

    def __init__(self, orderly: bool = False) -> None:
        super().__init__()
        self.orderly = orderly


class _Link:
    """A connection to the store."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.used = reader, writer, time.monotonic()

    @property
    def fresh(self) -> bool:
        idle = time.monotonic() - self.used
        return idle < IDLE_SECONDS and not self.reader.at_eof() and not self.writer.is_closing()


class _Connection:
    """A client's connection: one request after the other."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: Endpoint,
        decide: Callable[[Request], tuple[Exchange, Rule | None]],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._upstream, self._decide = upstream, decide
        self._link: _Link | None = None

    async def serve(self) -> None:
        """Serve until either side ends the connection."""
        orderly = True
        try:
            while head := await Head.read(self._reader):
                if not await self._exchange(head):
                    break
        except _Broken as broken:
            orderly = broken.orderly
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            # The store broke off, or is not there: so does the proxy.
            orderly = False
        except asyncio.CancelledError:
            orderly = False
            raise
        finally:
            self._drop_link()
            if not orderly:
                # With this option closing sends RST in place of FIN.
                linger = struct.pack("ii", 1, 0)
                self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self._writer.transport.abort()
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _exchange(self, head: Head) -> bool:
        """One request. Returns whether the connection can serve another."""
        method, target, _ = head.start
        has_body = head.chunked or bool(head.length)
        request = Request.parse(self._upstream.root.partition("://")[0], method, target, has_body)
        exchange, rule = self._decide(request)
        fault = rule.fault if rule else None
        if rule is None or fault not in {*ERRORS, Fault.TIMEOUT, Fault.RESET_BEFORE, Fault.LATE}:
            return await self._forward(head, exchange, rule, head.body(self._reader))
        waits = head.headers.get("expect", "").lower() == "100-continue"
        if fault is Fault.LATE:
            if waits:
                await self._send(CONTINUE)
            pieces = [piece async for piece in head.body(self._reader)]
            await asyncio.sleep(rule.seconds)
            return await self._forward(head, exchange, rule, _each(pieces))
        if not waits:  # who waits for a go-ahead has sent no body
            async for _ in head.body(self._reader):
                pass
        if fault is Fault.RESET_BEFORE:
            raise _Broken
        if fault is Fault.TIMEOUT:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reader.read(1), rule.seconds)  # ends early when the client gives up
            raise _Broken
        exchange.status, answer = error_answer(self._upstream.root, rule.fault, method)
        await self._send(answer)
        return False

    async def _forward(self, head: Head, exchange: Exchange, rule: Rule | None, body: AsyncIterator[Piece]) -> bool:
        """Pass the request on, and the answer back. Returns whether the connection can serve another."""
        fault = rule.fault if rule else None
        link = await self._linked()
        link.writer.write(head.raw)
        sending = asyncio.create_task(self._send_body(link, body, flip=fault is Fault.FLIPPED_REQUEST))
        try:
            answer = await self._answer(link, exchange, quiet=fault is Fault.LATE)
            until_end = not answer.chunked and answer.length is None
            empty = head.start[0] == "HEAD" or answer.status in (204, 304)
            pieces = _each([]) if empty else answer.body(link.reader, until_end=True)
            if fault in (Fault.RESET_AFTER, Fault.LOST_ANSWER):
                async for _ in pieces:
                    pass
                exchange.status = None
                raise _Broken(orderly=fault is Fault.LOST_ANSWER)
            await self._send_answer(answer, pieces, exchange, rule)
            if not sending.done():
                # It answered before it had the whole body. Who was told no before the go-ahead sends none.
                waits = head.headers.get("expect", "").lower() == "100-continue"
                await asyncio.wait([sending], timeout=0 if waits else 10)
            sound = sending.done() and sending.exception() is None
            link.used = time.monotonic()
            return sound and not (head.closes or answer.closes or (until_end and not empty))
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            _ = sending.cancelled() or sending.exception()

    async def _answer(self, link: _Link, exchange: Exchange, quiet: bool) -> Head:
        """The store's answer. A go-ahead before it is passed on, or the client would never send its body."""
        while True:
            answer = await Head.read(link.reader)
            if answer is None:
                raise ConnectionResetError("the store closed the connection in place of an answer")
            if answer.status >= 200:
                exchange.status = answer.status
                return answer
            if not quiet:
                await self._send(answer.raw)

    async def _send_answer(
        self, answer: Head, pieces: AsyncIterator[Piece], exchange: Exchange, rule: Rule | None
    ) -> None:
        fault = rule.fault if rule else None
        if rule is not None and fault is Fault.SLOW:
            await self._send_slowly(answer, pieces, rule.rate)
        elif fault not in (Fault.CUT_BODY, Fault.SHORT_BODY, Fault.FLIPPED_ANSWER):
            await self._send(answer.raw)
            async for piece in pieces:
                await self._send(piece.bytes)
        else:
            whole = [piece async for piece in pieces]
            content = b"".join(piece.bytes for piece in whole if piece.content)
            if answer.status >= 300 or not content:
                exchange.fault = None  # there is nothing to damage
                await self._send(answer.raw + b"".join(piece.bytes for piece in whole))
            elif fault is Fault.FLIPPED_ANSWER:
                await self._send(answer.raw + b"".join(piece.bytes for piece in flipped(whole)))
            elif fault is Fault.SHORT_BODY:
                half = content[: len(content) // 2]
                await self._send(answer.with_length(len(half)) + half)
            else:
                await self._send(answer.raw + b"".join(piece.bytes for piece in whole)[: len(content) // 2])
                raise _Broken(orderly=True)

    async def _send_slowly(self, answer: Head, pieces: AsyncIterator[Piece], rate: float) -> None:
        whole = b"".join([piece.bytes async for piece in pieces])
        # An answer without a body has only its head to be slow with.
        if whole:
            await self._send(answer.raw)
        for byte in whole or answer.raw:
            await asyncio.sleep(1 / rate)
            await self._send(bytes([byte]))

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def _send_body(self, link: _Link, body: AsyncIterator[Piece], flip: bool) -> None:
        if flip:
            body = _each(flipped([piece async for piece in body]))
        try:
            async for piece in body:
                link.writer.write(piece.bytes)
                await link.writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            # One of the two is gone. The store must not wait for the rest, nor the proxy for an answer to it.
            link.writer.transport.abort()
            raise

    async def _linked(self) -> _Link:
        if self._link is None or not self._link.fresh:
            self._drop_link()
            self._link = _Link(*await asyncio.open_connection("127.0.0.1", self._upstream.port, limit=HEAD_LIMIT))
        return self._link

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.writer.transport.abort()
            self._link = None


async def _each(pieces: list[Piece]) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece
