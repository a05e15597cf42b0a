"""A client's connection: just enough HTTP/1.1 to pull, cheap for bytes that nobody looks at.

Real clients bring their own cores; those of a bench share the machine with what is measured. So
where the bytes themselves do not matter the kernel drops them unread: tcp(7), `MSG_TRUNC` on a
stream discards without copying. With 64 clients that take 64 MiB each out of nginx on two cores
that costs a sixth less CPU than receiving into one reused buffer, and the last is done earlier.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

SCRATCH = bytearray(1 << 20)  # MSG_TRUNC wants a buffer although it writes nothing into it
READ_SIZE = 1 << 18
HEAD_SIZE = 1 << 12  # of a head, and what comes with it of a body that may not be looked at
PACE_STEP = 0.02  # seconds between two looks of a client with a rate
PACE_BURST = 0.05  # seconds' worth of bytes that it may catch up at most, and that have room
ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "*/*",
    )
)


class ShortAnswer(Exception):
    """The other side closed the connection before the answer was whole."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers (names in lower case) of an answer."""

    status: int
    headers: Mapping[str, str]

    @property
    def length(self) -> int | None:
        text = self.headers.get("content-length")
        return None if text is None else int(text)

    @property
    def is_chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def keeps_alive(self) -> bool:
        framed = self.is_chunked or self.length is not None
        return framed and self.headers.get("connection", "").lower() != "close"


class Received:
    """What came for one request: status, length, first byte's moment; on demand hash and bytes."""

    __slots__ = ("count", "first_byte", "hasher", "kept", "status")

    def __init__(self, *, hashed: bool, kept: bool) -> None:
        self.status = 0
        self.count = 0
        self.first_byte: float | None = None
        self.hasher = hashlib.sha256() if hashed else None
        self.kept: list[bytes] | None = [] if kept else None

    @property
    def is_looked_at(self) -> bool:
        return self.hasher is not None or self.kept is not None

    @property
    def digest(self) -> str | None:
        """`sha256:…` of the body; None when it was not looked at."""
        return None if self.hasher is None else f"sha256:{self.hasher.hexdigest()}"

    def skip(self, count: int) -> None:
        if self.first_byte is None:
            self.first_byte = time.monotonic()
        self.count += count

    def feed(self, data: bytes) -> None:
        if data:
            self.skip(len(data))
            if self.hasher is not None:
                self.hasher.update(data)
            if self.kept is not None:
                self.kept.append(data)


def client_socket(rate: int | None = None) -> socket.socket:
    """A socket for a client whose line carries `rate` bytes a second, without waiting.

    Left to itself the kernel may never let more than 64 KiB come between two looks, for a client
    that takes no more than that at a time needs no more: then the line carries a third of its rate.
    Whether it does hangs on when the first bytes come.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    if rate is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, int(rate * PACE_BURST))
    return sock


class Wire:
    """One connection, one request at a time; with a rate it takes only so many bytes a second."""

    def __init__(self, sock: socket.socket, rate: int | None = None) -> None:
        self._sock = sock
        self._rate = rate
        self._loop = asyncio.get_running_loop()
        self._rest = b""

    @classmethod
    async def dial(cls, host: str, port: int, source: str, rate: int | None = None) -> Self:
        """Connects from the address `source`. Raises OSError."""
        sock = client_socket(rate)
        try:
            sock.bind((source, 0))
            try:
                sock.connect((host, port))  # which loopback mostly does at once
            except BlockingIOError:
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        return cls(sock, rate)

    def close(self) -> None:
        self._sock.close()

    async def get(self, path: str, host: str, received: Received) -> bool:
        """Pulls `path` into `received`; says whether the connection may be used again.

        Raises ShortAnswer, OSError, ValueError (not HTTP); `received` holds what came until then.
        """
        head = await self._ask(path, host)
        received.status = head.status
        if head.is_chunked:
            await self._chunks(received)
        elif head.length is not None:
            await self._exactly(head.length, received)
        else:
            await self._until_closed(received)
        return head.keeps_alive

    async def _ask(self, path: str, host: str) -> Head:
        lines = (
            f"GET {path} HTTP/1.1",
            f"Host: {host}",
            f"Accept: {ACCEPT}",
            "User-Agent: bench/1",
        )
        await self._loop.sock_sendall(self._sock, ("\r\n".join(lines) + "\r\n\r\n").encode())
        text = await self._line(b"\r\n\r\n", size=HEAD_SIZE)
        status, *fields = text.decode("latin-1").split("\r\n")
        pairs = (field.partition(":") for field in fields)
        return Head(int(status.split()[1]), {n.lower(): value.strip() for n, _, value in pairs})

    async def _line(self, end: bytes, size: int = READ_SIZE) -> bytes:
        while end not in self._rest:
            data = await self._loop.sock_recv(self._sock, size)
            if not data:
                raise ShortAnswer("closed inside a head")
            self._rest += data
        line, _, self._rest = self._rest.partition(end)
        return line

    async def _chunks(self, received: Received) -> None:
        while size := int((await self._line(b"\r\n")).split(b";")[0], 16):
            await self._exactly(size, received)
            await self._line(b"\r\n")
        await self._line(b"\r\n")

    async def _until_closed(self, received: Received) -> None:
        received.feed(self._rest)
        while data := await self._loop.sock_recv(self._sock, READ_SIZE):
            received.feed(data)

    async def _exactly(self, count: int, received: Received) -> None:
        early, self._rest = self._rest[:count], self._rest[count:]
        received.feed(early)
        left = count - len(early)
        if left and self._rate is not None:
            await self._paced(left, self._rate, received)
            return
        if left and not received.is_looked_at:
            await self._drop(left, received)
            return
        while left:
            data = await self._loop.sock_recv(self._sock, min(left, READ_SIZE))
            if not data:
                raise ShortAnswer(f"closed {left} bytes early")
            received.feed(data)
            left -= len(data)

    async def _paced(self, count: int, rate: int, received: Received) -> None:
        """Takes `count` bytes at a rate; what it did not take in time it may not catch up."""
        flags = 0 if received.is_looked_at else socket.MSG_TRUNC
        left, allowed, before = count, 0.0, time.monotonic()
        while left:
            now = time.monotonic()
            allowed = min(allowed + (now - before) * rate, rate * PACE_BURST)
            before = now
            try:
                room = min(left, int(allowed), len(SCRATCH))
                got = self._sock.recv_into(SCRATCH, room, flags) if room else 0
            except (BlockingIOError, InterruptedError):
                room = got = 0
            if room and not got:
                raise ShortAnswer(f"closed {left} bytes early")
            if got and flags:
                received.skip(got)
            elif got:
                received.feed(bytes(SCRATCH[:got]))
            left, allowed = left - got, allowed - got
            if left:
                await asyncio.sleep(PACE_STEP)

    async def _drop(self, count: int, received: Received) -> None:
        """Has the kernel discard `count` bytes: one callback for each wake-up, no task switch."""
        end = received.count + count
        done: asyncio.Future[None] = self._loop.create_future()

        def readable() -> None:
            if done.done():
                return
            try:
                room = min(end - received.count, len(SCRATCH))
                got = self._sock.recv_into(SCRATCH, room, socket.MSG_TRUNC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                done.set_exception(error)
                return
            if not got:
                done.set_exception(ShortAnswer(f"closed {end - received.count} bytes early"))
                return
            received.skip(got)
            if received.count == end:
                done.set_result(None)

        self._loop.add_reader(self._sock.fileno(), readable)
        try:
            await done
        finally:
            self._loop.remove_reader(self._sock.fileno())
