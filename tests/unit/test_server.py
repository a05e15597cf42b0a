"""The listener's own limits: what a connection may cost when its client does nothing."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from proxy.web.server import BEGUN, STUCK_SECONDS, RegistryServer, limit_delivery
from tests.unit.hot_kit import Connection
from tests.unit.proxy_kit import until


def test_a_client_that_takes_no_byte_is_given_up_by_the_kernel() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
    ):
        accepted, _ = server.accept()
        with accepted:
            limit_delivery(accepted, 0.2)
            with pytest.raises(TimeoutError):
                accepted.sendall(bytes(64 << 20))  # far more than the buffers of both sides hold


def test_the_limit_is_set_in_milliseconds() -> None:
    with socket.socket() as sock:
        limit_delivery(sock)
        found = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert found == STUCK_SECONDS * 1000


def test_other_sockets_are_left_alone() -> None:
    one, other = socket.socketpair()
    with one, other:
        limit_delivery(one)
    limit_delivery(None)


# -- a crowd that asks at once -----------------------------------------------------------------

ASKING = b"GET /%d HTTP/1.1\r\nHost: here\r\n\r\n"


class Crowd:
    """Connections to a server, and which requests have begun, by the turn of the loop."""

    def __init__(self, number: int) -> None:
        self.begun: list[str] = []
        self.server = RegistryServer(self._answer, lambda _request, text: web.Response(text=text))
        self.connections = [Connection(self.server) for _ in range(number)]

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        self.begun.append(request.path)
        return web.Response(text=request.path)

    def ask(self) -> None:
        """All in one turn, each for its own number."""
        for number, connection in enumerate(self.connections):
            connection.protocol.data_received(ASKING % number)

    async def turns(self, number: int) -> list[int]:
        """How many had begun after each turn, until ``number`` have."""
        counts = [0]
        while counts[-1] < number:
            await asyncio.sleep(0)
            counts.append(len(self.begun))
        return counts


@contextlib.asynccontextmanager
async def crowd(number: int) -> AsyncIterator[Crowd]:
    made = Crowd(number)
    for _ in range(3):
        await asyncio.sleep(0)  # each waits for its first request
    try:
        yield made
    finally:
        await made.server.shutdown(0.1)
        for connection in made.connections:
            await connection.end()


async def test_of_a_crowd_that_asks_at_once_a_lot_is_begun_in_each_turn() -> None:
    number = 3 * BEGUN + 1
    async with crowd(number) as clients:
        clients.ask()
        reading = [each.transport.reads for each in clients.connections]
        assert reading == [True] * BEGUN + [False] * (number - BEGUN)
        counts = await clients.turns(number)
        assert max(b - a for a, b in pairwise(counts)) <= BEGUN
        assert clients.begun == [f"/{at}" for at in range(number)]  # in the order they came
        await until(lambda: all(each.is_idle for each in clients.connections))
        assert all(each.transport.reads for each in clients.connections)
        for at, each in enumerate(clients.connections):
            assert each.transport.written.endswith(b"\r\n\r\n/%d" % at)


async def test_what_comes_while_a_connection_waits_in_line_comes_after() -> None:
    async with crowd(BEGUN + 1) as clients:
        clients.ask()
        last = clients.connections[-1]
        for part in (b"GET /7 HT", b"TP/1.1\r\nHost: here\r\n\r\n"):
            last.protocol.data_received(part)
        assert len(clients.begun) == 0
        await until(lambda: last.transport.written.endswith(b"\r\n\r\n/7"))
        assert clients.begun[-2:] == [f"/{BEGUN}", "/7"]


async def test_a_client_that_leaves_while_it_waits_in_line_holds_nobody_up() -> None:
    async with crowd(BEGUN + 3) as clients:
        clients.ask()
        await clients.connections[BEGUN].end()
        await clients.turns(BEGUN + 2)
        assert f"/{BEGUN}" not in clients.begun
        assert len(clients.server.connections) == BEGUN + 2


async def test_whoever_waits_in_line_is_not_taken_for_idle() -> None:
    async with crowd(BEGUN + 1) as clients:
        last: Any = clients.connections[-1].protocol
        last._next_keepalive_close_time = 0.0  # it has been idle for as long as it may
        clients.ask()
        last._process_keepalive()
        assert clients.connections[-1].transport.written == b""
        assert not last._force_close
        await until(lambda: clients.connections[-1].transport.written.endswith(b"/%d" % BEGUN))


async def test_who_asks_alone_does_not_wait() -> None:
    async with crowd(1) as clients:
        [connection] = clients.connections
        for _ in range(3 * BEGUN):
            clients.ask()
            assert connection.transport.reads
            await clients.turns(1)
            clients.begun.clear()
            await until(lambda: connection.is_idle)
