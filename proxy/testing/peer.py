"""A giver that does as it is told: honest, or with any of the faults that a node can have.

It answers the one request of fleet/protocol.py for one stripe, whatever digest is asked for. What
it does with the next requests is scripted by ``Conduct``, one for each; the last one stays.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from proxy.fleet.pieces import Pieces, StripeHasher
from proxy.fleet.protocol import PIECES, RANK, SEAL, STRIPE, written
from proxy.fleet.seal import Seal, Sealer, answer_said, request_said

#: Bytes that are written at once.
STEP = 64 << 10


def pieces_of(data: bytes) -> Pieces:
    """The digests of a stripe at hand."""
    hasher = StripeHasher(len(data))
    hasher.update(data)
    return hasher.pieces()


@dataclass(frozen=True, slots=True)
class Conduct:
    """What one answer is like. Positions count the bytes of its body."""

    status: int | None = None  # other than the right one
    headers: Sequence[tuple[str, str]] = ()  # more of them
    pieces: str | None = None  # another header of digests
    body: bytes | None = None  # another one, with its own length
    length: int | None = None  # another Content-Length
    raw: bytes | None = None  # instead of a head; the connection stays open
    lie: int | None = None  # the byte there is another one
    cut: int | None = None  # the connection ends there
    stall: int | None = None  # nothing comes from there on, until the taker has left
    drip: float | None = None  # … or one byte each time so many seconds have passed
    surplus: bytes = b""  # behind the answer
    closes: bool = False  # the connection ends behind the answer, unannounced
    hangs_up: bool = False  # it ends without an answer
    is_sealed: bool = True


HONEST = Conduct()


class ScriptedGiver:
    """``async with`` it: listens on a free port of the loopback address."""

    def __init__(
        self,
        stripe: bytes,
        *conducts: Conduct,
        sealer: Sealer | None = None,
        tls: ssl.SSLContext | None = None,
        silent: bool = False,
    ) -> None:
        """``sealer``: it knows the fleet's secret. ``silent``: it accepts and never says a thing,
        not even what TLS begins with."""
        self.stripe = stripe
        self.requests: list[str] = []  # heads, as they came
        self.sent = 0  # bytes of bodies, as far as they went to the kernel
        self.accepted = 0
        self.open = 0
        self.most_open = 0
        self._conducts = list(conducts) or [HONEST]
        self._sealer = sealer
        self._tls = tls
        self._silent = silent
        self._changed = asyncio.Condition()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        tls = None if self._silent else self._tls
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self.until_open(0)

    async def until_open(self, count: int) -> None:
        """Wait until just so many connections are open."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.open == count)

    async def until_sent(self, count: int) -> None:
        """Wait until so many bytes of bodies have been sent."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.sent >= count)

    async def until_asked(self, count: int) -> None:
        """Wait until so many requests have come."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.requests) >= count)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        self._writers.add(writer)
        await self._tell()
        try:
            if self._silent:
                await _until_left(reader)
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self.open -= 1
            await self._tell()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer the next request; whether another one may follow."""
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(request)
        conduct = self._conducts[0] if len(self._conducts) == 1 else self._conducts.pop(0)
        await self._tell()
        if conduct.hangs_up:
            return False
        if conduct.raw is not None:
            writer.write(conduct.raw)
            await _until_left(reader)
            return False
        fields = dict(line.split(": ", 1) for line in request.splitlines()[1:-1])
        asked = fields.get("Range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        body = self.stripe[start:] if conduct.body is None else conduct.body
        writer.write(self._head(conduct, request, fields, start, len(body)))
        return await self._send(conduct, reader, writer, body)

    async def _send(
        self,
        conduct: Conduct,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        body: bytes,
    ) -> bool:
        if conduct.lie is not None:
            at = conduct.lie
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        ends = [end for end in (conduct.cut, conduct.stall) if end is not None]
        for start in range(0, min([len(body), *ends]), STEP):
            part = body[start : min([start + STEP, *ends])]
            writer.write(part)
            await writer.drain()
            self.sent += len(part)
            await self._tell()
        if conduct.stall is not None:
            if conduct.drip is not None:
                await _drip(writer, body[conduct.stall :], conduct.drip)
            await _until_left(reader)
            return False
        if conduct.cut is not None or conduct.closes:
            writer.close()
            await writer.wait_closed()
            return False
        writer.write(conduct.surplus)
        return True

    def _head(
        self, conduct: Conduct, request: str, fields: dict[str, str], start: int, length: int
    ) -> bytes:
        status = conduct.status or (206 if start else 200)
        length = length if conduct.length is None else conduct.length
        headers = {"Content-Length": str(length)}
        if status in (200, 206):
            right = written(pieces_of(self.stripe))
            headers[PIECES] = right if conduct.pieces is None else conduct.pieces
        if status == 206:
            whole = len(self.stripe)
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        headers.update(conduct.headers)
        if self._sealer is not None and conduct.is_sealed:
            headers[SEAL] = self._sealed(request, fields, status, headers)
        lines = [f"HTTP/1.1 {status} Scripted", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        return "\r\n".join(lines).encode()

    def _sealed(
        self, request: str, fields: dict[str, str], status: int, headers: dict[str, str]
    ) -> str:
        assert self._sealer is not None
        method, path, _ = request.split(" ", 2)
        said = request_said(method, path, fields.get(RANK), fields.get("Range"), fields.get(STRIPE))
        asked: Seal = self._sealer.accept(fields.get(SEAL), said)
        answer = answer_said(
            status,
            length=headers.get("Content-Length"),
            content_range=headers.get("Content-Range"),
            pieces=headers.get(PIECES),
            retry_after=headers.get("Retry-After"),
        )
        return self._sealer.seal_answer(asked, answer)

    def __repr__(self) -> str:
        return f"<ScriptedGiver {self.open} open, {len(self.requests)} requests>"


async def _drip(writer: asyncio.StreamWriter, data: bytes, pause: float) -> None:
    for at in range(len(data)):
        writer.write(data[at : at + 1])
        await writer.drain()
        await asyncio.sleep(pause)


async def _until_left(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 10):
        pass
