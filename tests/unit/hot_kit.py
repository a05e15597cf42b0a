"""What the tests of the hot path share: two servers over one registry, one of which answers hot,
and connections to them in memory."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from proxy.app import CANCEL_PATIENCE, KEEPALIVE, MAX_HEAD
from proxy.observe.logs import LogFormat, make_logger
from proxy.observe.metrics import Metrics
from proxy.testing import FakeClock
from proxy.testing.registry import FakeRegistry
from proxy.upstream.routing import Routes
from proxy.web.access import AccessLog
from proxy.web.clients import Clients
from proxy.web.forwarded import Network
from proxy.web.hot_server import HotServer
from proxy.web.registry import Registry
from proxy.wiring import make_hot_path
from tests.unit.proxy_kit import UPSTREAM, Pullpool, pulling

#: What differs between two answers to the same request.
_VARYING = re.compile(
    rb"(?i)(?<=\r\ndate: )[^\r]*|(?<=\r\nx-request-id: )[^\r]*|(?<=\r\nserver-timing: )[^\r]*"
    rb'|(?<="request_id":")[0-9a-f]*'
)
_VARYING_FIELDS = ("request_id", "ms", "first_byte_ms", "queue_ms", "timestamp")


class MemoryTransport(asyncio.Transport):
    """Takes what is written. With ``limit`` it is full after so many bytes, until ``drain``."""

    def __init__(
        self, peer: object = ("192.0.2.7", 4711), limit: int | None = None, **extra: object
    ) -> None:
        super().__init__({"peername": peer, **extra})
        self.protocol: asyncio.Protocol | None = None
        self.written = bytearray()
        self.limit = limit
        self.is_full = False
        self.ended = ""
        self.reads = True

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not self.ended:
            self.written += data
            if self.limit is not None and len(self.written) > self.limit and not self.is_full:
                self.is_full = True
                assert self.protocol is not None
                self.protocol.pause_writing()

    def drain(self) -> None:
        """The client has read everything."""
        self.written.clear()
        if self.is_full:
            self.is_full = False
            assert self.protocol is not None
            self.protocol.resume_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return bool(self.ended)

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def _end(self, how: str) -> None:
        if not self.ended:
            self.ended = how
            assert self.protocol is not None
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def close(self) -> None:
        self._end("closed")

    def abort(self) -> None:
        self._end("aborted")


class Connection:
    """A client's connection to a server, in memory."""

    def __init__(self, server: web.Server, transport: MemoryTransport | None = None) -> None:
        self.transport = transport or MemoryTransport()
        self.protocol = server()
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)

    async def send(self, data: bytes, *, turns: int = 0) -> None:
        """The server receives this, if it reads; then so many turns of the loop pass."""
        while not self.transport.reads and not self.transport.ended:  # noqa: ASYNC110 -- see until
            await asyncio.sleep(0)
        if not self.transport.ended:
            self.protocol.data_received(data)
        for _ in range(turns):
            await asyncio.sleep(0)

    async def settle(self) -> None:
        """Until the server has nothing more to say."""
        while not self.transport.ended and not self.is_idle:  # noqa: ASYNC110 -- see until
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    @property
    def is_idle(self) -> bool:
        """Does its handler wait for a request?"""
        protocol: Any = self.protocol
        waiter = protocol._waiter
        is_held = bool(getattr(protocol, "_held", ()) or protocol._late)
        return waiter is not None and not waiter.done() and not protocol._messages and not is_held

    @property
    def normal(self) -> bytes:
        """What was written, with what differs taken out."""
        return _VARYING.sub(b"", bytes(self.transport.written))

    async def end(self) -> None:
        """The client goes."""
        self.transport.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@dataclass
class Side:
    """A server with its log and its metrics."""

    server: HotServer
    metrics: Metrics
    stream: io.StringIO
    draining: list[bool] = field(default_factory=lambda: [False])

    def lines(self) -> list[dict[str, Any]]:
        """What was logged since the last time, with what differs taken out."""
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        lines: list[dict[str, Any]] = []
        for line in text.splitlines():
            fields = json.loads(line)
            for name in _VARYING_FIELDS:
                if name in fields:
                    fields[name] = type(fields[name]).__name__
            lines.append(fields)
        return lines

    def count(self, sample: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"pullpool_{sample}", labels) or 0.0

    @property
    def hot_hits(self) -> float:
        return sum(self.count("http_hot_requests_total", kind=k) for k in ("manifest", "blob"))


def make_side(
    pool: Pullpool,
    *,
    hot: bool,
    clock: Callable[[], float],
    log_format: LogFormat = "json",
    trusted: tuple[Network, ...] = (),
    stream: io.StringIO | None = None,
) -> Side:
    """A registry server over the proxy's pull layer, with or without the hot path."""
    stream, metrics, proxy = stream or io.StringIO(), Metrics(), pool.proxy
    draining = [False]
    access_log = AccessLog(make_logger(log_format, stream), metrics, clock)
    settings = proxy.settings.model_copy(update={"trusted_proxies": trusted, "hot_path": hot})
    path = make_hot_path(settings, proxy.puller.at_hand, access_log, lambda: draining[0])
    assert (path is not None) is hot
    upstreams = [client.upstream for client in proxy.clients.values()]
    registry = Registry(
        puller=proxy.puller,
        routes=Routes(upstreams, UPSTREAM),
        metrics=metrics,
        access_log=access_log,
        clock=clock,
        clients=Clients(trusted),
        is_draining=lambda: draining[0],
        offer=None if path is None else path.offer,
    )
    server = HotServer(
        registry,
        registry.malformed,
        hot=path,
        access_log=None,
        keepalive_timeout=KEEPALIVE,
        handler_cancellation=True,
        max_line_size=MAX_HEAD,
        max_field_size=MAX_HEAD,
        auto_decompress=False,
        lingering_time=0.0,
    )
    return Side(server, metrics, stream, draining)


@contextlib.asynccontextmanager
async def two_sides(
    directory: Path, clock: FakeClock, **changes: Any
) -> AsyncIterator[tuple[Side, Side, Pullpool, FakeRegistry]]:
    """A server that answers hot and one that does not, over one store."""
    async with pulling(directory, clock=clock, **changes) as (pool, fake):
        fast, slow = (make_side(pool, hot=hot, clock=clock) for hot in (True, False))
        try:
            yield fast, slow, pool, fake
        finally:
            for side in (fast, slow):
                await side.server.shutdown(CANCEL_PATIENCE)


async def exchange(
    server: web.Server, chunks: Sequence[bytes], turns: Sequence[int]
) -> tuple[bytes, str]:
    """What comes back for these chunks, and whether the connection was ended. After each chunk
    pass so many turns of the loop; -1: until it is answered."""
    connection = Connection(server)
    for chunk, count in zip(chunks, turns, strict=True):
        await connection.send(chunk, turns=max(0, count))
        if count < 0:
            await connection.settle()
    await connection.settle()
    result = connection.normal, connection.transport.ended
    await connection.end()
    return result


def request(target: str, method: str = "GET", **headers: str) -> bytes:
    """A plain request; `If_None_Match="…"` sends If-None-Match."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"{method} {target} HTTP/1.1\r\nHost: pullpool\r\n{''.join(lines)}\r\n".encode()
