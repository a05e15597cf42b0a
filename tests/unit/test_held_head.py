"""The head of an answer that leaves with its first bytes, in one call of the kernel."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.pull.reader import FileSpan, Piece
from proxy.store.blobs import FileLease
from proxy.testing import FakeClock
from proxy.web.sending import BodyResponse, Sender, break_off, send_head
from proxy.web.server import RegistryServer
from tests.unit.hot_kit import Connection, MemoryTransport, make_side, request
from tests.unit.proxy_kit import IMAGE, blob_path, pulling


class Writes(MemoryTransport):
    """Tells what was written at once."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.writes.append(bytes(data))
        super().write(data)


async def written(answer: Any) -> Writes:
    """What a server writes whose requests are answered like this, until it is done."""
    server = RegistryServer(
        answer, lambda _request, _words: web.Response(), handler_cancellation=True
    )
    connection = Connection(server, transport := Writes())
    await connection.send(request("/"))
    await connection.settle()
    await connection.end()
    await server.shutdown(1)
    return transport


async def begun(incoming: web.BaseRequest) -> BodyResponse:
    response = BodyResponse()
    response.hold_head()
    response.content_length = 3
    await response.prepare(incoming)
    return response


async def test_it_leaves_with_the_first_bytes() -> None:
    async def answer(incoming: web.BaseRequest) -> web.StreamResponse:
        response = await begun(incoming)
        await response.write(b"ab")
        await response.write(b"c")
        return response

    first, second = (await written(answer)).writes
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\nab")
    assert second == b"c"


async def test_it_leaves_alone_when_it_is_let_go() -> None:
    async def answer(incoming: web.BaseRequest) -> web.StreamResponse:
        response = await begun(incoming)
        send_head(incoming)
        send_head(incoming)
        await response.write(b"abc")
        return response

    head, body = (await written(answer)).writes
    assert head.endswith(b"\r\n\r\n")
    assert body == b"abc"


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_who_gets_no_byte_gets_the_head_before_the_end(reset: bool) -> None:
    async def answer(incoming: web.BaseRequest) -> web.StreamResponse:
        response = await begun(incoming)
        break_off(incoming, response, reset=reset)
        return response

    transport = await written(answer)
    [head] = transport.writes
    assert head.endswith(b"\r\n\r\n")
    assert transport.ended == ("aborted" if reset else "closed")


async def test_a_client_that_has_left_is_broken_off_all_the_same() -> None:
    async def answer(incoming: web.BaseRequest) -> web.StreamResponse:
        response = await begun(incoming)
        assert incoming.transport is not None
        incoming.transport.abort()
        break_off(incoming, response, reset=False)
        return response

    assert (await written(answer)).writes == []


class Asked(ThreadPoolExecutor):
    """Tells what ``transport`` had written when the first thread was asked for."""

    transport: Writes
    before: bytes | None = None

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        if self.before is None:
            self.before = bytes(self.transport.written)
        return super().submit(call, *args, **named)


async def test_it_does_not_wait_for_a_disk() -> None:
    """Where bytes are copied. Files of /proc are never in memory, so a thread reads them."""
    disk = Asked(1)
    asyncio.get_running_loop().set_default_executor(disk)

    async def answer(incoming: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(incoming.transport, Writes)
        disk.transport = incoming.transport
        response = BodyResponse()
        response.hold_head()  # without a length the body is chunked, and so is copied
        await response.prepare(incoming)
        file = Path("/proc/self/stat").open("rb")  # noqa: ASYNC230, SIM115 - no disk; the lease closes it
        with FileLease(file, 4, lambda: None) as lease:
            await Sender(incoming, response).send_all(only(FileSpan(lease, 0, 4)))
        return response

    transport = await written(answer)
    assert disk.before == transport.writes[0]
    assert transport.writes[0].endswith(b"\r\n\r\n")
    body = b"4\r\n" + str(os.getpid()).encode()[:4]
    assert transport.written.endswith(b"\r\n\r\n" + body + b"\r\n0\r\n\r\n")


async def only(piece: Piece) -> AsyncGenerator[Piece, None]:
    yield piece


async def test_a_small_blob_is_one_write_through_the_slow_path(tmp_path: Path) -> None:
    clock = FakeClock()
    async with pulling(tmp_path, clock=clock) as (pool, _):
        path = blob_path(IMAGE.config.digest)
        await pool.get(path)
        await pool.stored()
        side = make_side(pool, hot=False, clock=clock)
        connection = Connection(side.server, transport := Writes())
        for _ in range(2):  # read from its file, and from memory
            transport.writes.clear()
            await connection.send(request(path))
            await connection.settle()
            [whole] = transport.writes
            assert whole.endswith(b"\r\n\r\n" + IMAGE.config.data)
        await connection.end()
        await side.server.shutdown(1)
