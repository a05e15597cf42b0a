"""An HTTP proxy as companies have them: CONNECT for https, absolute form for http, a password.

It counts sockets where a cap has to be seen: at accept, asking the kernel how many of those that it
took are ESTABLISHED. `names` are hosts that only the proxy can resolve.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

_ESTABLISHED = 1  # linux/include/net/tcp_states.h; first byte of struct tcp_info
_NO_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One request as the proxy saw it; header names in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


class ForwardProxy:
    """`async with ForwardProxy(...) as proxy:` serves on `proxy.url` until the block ends.

    - `credentials`: "user:password" that has to be shown, else 407.
    - `refuse`: a status for every CONNECT. `hangs`: CONNECT gets no answer. Both may be set.
    - `names`: addresses of hosts that nobody else knows.
    """

    def __init__(
        self,
        *,
        credentials: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        names: Mapping[str, str] = _NO_NAMES,
        name: str = "127.0.0.1",
    ) -> None:
        self.refuse: int | None = None
        self.hangs = False
        self.seen: list[Forwarded] = []
        self.peak_sockets = 0
        self._credentials = credentials
        self._ssl = ssl_context
        self._names = names
        self._name = name
        self._listening: socket.socket | None = None
        self._accepted: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._listening is not None
        return int(self._listening.getsockname()[1])

    @property
    def netloc(self) -> str:
        return f"{self._name}:{self.port}"

    @property
    def url(self) -> str:
        """What a client configures, credentials included."""
        scheme = "http" if self._ssl is None else "https"
        user = f"{self._credentials}@" if self._credentials else ""
        return f"{scheme}://{user}{self.netloc}"

    @property
    def sockets_now(self) -> int:
        """Accepted sockets that neither side has closed."""
        return sum(map(_is_established, self._accepted))

    async def __aenter__(self) -> Self:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listening.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listening, self._accept)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._listening is not None
        asyncio.get_running_loop().remove_reader(self._listening)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in (self._listening, *self._accepted):
            sock.close()

    def _accept(self) -> None:
        assert self._listening is not None
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                sock, _ = self._listening.accept()
                sock.setblocking(False)
                # A duplicate, to be asked about the connection when the transport has closed its.
                known = sock.dup()
                self._accepted.append(known)
                self.peak_sockets = max(self.peak_sockets, self.sockets_now)
                task = asyncio.get_running_loop().create_task(self._serve(sock, known))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket, known: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        writer: asyncio.StreamWriter | None = None
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=self._ssl)
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client left, or a handshake that failed
        finally:
            if writer is not None:
                writer.transport.abort()
            known.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await self._read(reader)
        if self._credentials is not None:
            expected = f"Basic {base64.b64encode(self._credentials.encode()).decode()}"
            if asked.headers.get("proxy-authorization") != expected:
                await _say(writer, 407, 'Proxy-Authenticate: Basic realm="proxy"')
                return
        if asked.method == "CONNECT":
            await self._tunnel(asked, reader, writer)
        else:
            await self._forward(asked, reader, writer)

    async def _tunnel(
        self, asked: Forwarded, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.hangs:
            await reader.read()
            return
        if self.refuse is not None:
            await _say(writer, self.refuse)
            return
        host, _, port = asked.target.rpartition(":")
        try:
            there, out = await self._dial(host.strip("[]"), int(port))
        except OSError:
            await _say(writer, 502)
            return
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _both(_pipe(reader, out), _pipe(there, writer))
        finally:
            out.transport.abort()

    async def _forward(
        self, asked: Forwarded, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Requests of one client to one host: a lane's are."""
        target = urlsplit(asked.target)
        try:
            there, out = await self._dial(target.hostname or "", target.port or 80)
        except OSError:
            await _say(writer, 502)
            return
        try:
            out.write(_origin_form(asked))
            await _both(self._requests(reader, out), _pipe(there, writer))
        finally:
            out.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        while True:
            out.write(_origin_form(await self._read(reader)))
            await out.drain()

    async def _dial(
        self, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._names.get(host, host), port)

    async def _read(self, reader: asyncio.StreamReader) -> Forwarded:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        asked = Forwarded(method, target, headers)
        self.seen.append(asked)
        return asked

    def __repr__(self) -> str:
        return f"<ForwardProxy {self.sockets_now} sockets, {len(self.seen)} requests>"


def _is_established(sock: socket.socket) -> bool:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED
    except OSError:  # closed on our side
        return False


def _origin_form(asked: Forwarded) -> bytes:
    path = "/" + asked.target.partition("://")[2].partition("/")[2]
    kept = {name: value for name, value in asked.headers.items() if not name.startswith("proxy-")}
    lines = [f"{asked.method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in kept.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _say(writer: asyncio.StreamWriter, status: int, *headers: str) -> None:
    lines = [f"HTTP/1.1 {status} Refused", *headers, "Content-Length: 0", "Connection: close"]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    await writer.drain()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def _both(*ways: Coroutine[None, None, None]) -> None:
    """Until one of the ways has ended; then the other ends too."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
