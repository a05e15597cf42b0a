"""The listener accepts as far as descriptors reach: whoever is beyond waits, and costs nothing."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest
import trustme
from aiohttp import web

from proxy.config import HostPort
from proxy.web.descriptors import Descriptors, for_clients, lowest_free
from proxy.web.listener import Listener, listening, unsent
from proxy.web.server import RegistryRunner, RegistryServer
from proxy.web.tls import TlsFiles, server_context
from tests.unit.proxy_kit import RawClient, until

#: Turns of the loop in which a listener that spins would be seen.
TURNS = 500
#: Clients that the listener has descriptors for, and those that come.
ROOM, CROWD = 3, 8


async def hello(_request: web.BaseRequest) -> web.Response:
    return web.Response(text="hello")


def malformed(_request: web.BaseRequest, _words: str) -> web.Response:
    return web.Response(status=400)


@contextlib.asynccontextmanager
async def serving(descriptors: Descriptors, **options: object) -> AsyncIterator[Listener]:
    runner = RegistryRunner(RegistryServer(hello, malformed), shutdown_timeout=0.1)
    async with listening(runner, "127.0.0.1", 0, descriptors=descriptors, **options) as listener:
        yield listener


class Crowd:
    """Clients whose descriptors are taken before anybody is accepted."""

    def __init__(self, stack: contextlib.ExitStack, size: int) -> None:
        self.sockets = [stack.enter_context(socket.socket()) for _ in range(size)]
        for sock in self.sockets:
            sock.setblocking(False)

    async def connect(self, port: int) -> list[RawClient]:
        loop = asyncio.get_running_loop()
        for sock in self.sockets:
            await loop.sock_connect(sock, ("127.0.0.1", port))
        return [RawClient(sock) for sock in self.sockets]


@contextlib.asynccontextmanager
async def crowded(
    on_pause: Callable[[OSError | None], None] = lambda _error: None,
    on_accept: Callable[[], None] = lambda: None,
) -> AsyncIterator[tuple[Listener, list[RawClient], list[socket.socket]]]:
    """A listener with room for ``ROOM``, and a crowd before it, as far as it gets."""
    with contextlib.ExitStack() as stack:
        crowd = Crowd(stack, CROWD)
        limit = lowest_free(crowd.sockets[0].fileno()) + 1 + ROOM  # the listener's own is one
        async with serving(Descriptors(limit), on_pause=on_pause, on_accept=on_accept) as listener:
            assert listener.state().limit == ROOM
            clients = await crowd.connect(listener.port)
            await until(lambda: listener.state().paused)
            await until(lambda: not listener._connecting)  # who is counted there and as open
            yield listener, clients, crowd.sockets


async def served(client: RawClient) -> None:
    """Ask, and get the answer."""
    client.received.clear()
    await client.ask("/")
    assert await client.rest(5) == b"hello"


async def test_at_the_limit_those_who_are_there_go_on_and_the_others_wait() -> None:
    async with crowded() as (listener, clients, _):
        held = listener.state().open
        assert ROOM <= held < CROWD
        for client in clients[:held]:
            await served(client)
        await clients[held].ask("/")
        for client in clients[:held]:
            await served(client)
        assert listener.state().open == held
        assert not clients[held].received


async def test_a_listener_that_pauses_does_not_look_at_its_queue() -> None:
    async with crowded() as (listener, _, _):
        before = listener.accepts
        for _ in range(TURNS):
            await asyncio.sleep(0)
        assert listener.accepts == before


async def test_everybody_is_served_as_others_leave() -> None:
    pauses, resumed = list[object](), list[None]()
    async with crowded(pauses.append, lambda: resumed.append(None)) as (listener, clients, socks):
        for client, sock in zip(clients, socks, strict=True):
            await served(client)
            sock.shutdown(socket.SHUT_RDWR)  # but the client's own descriptor stays taken
        await until(lambda: not listener.state().open)
        assert not listener.state().paused
    assert set(pauses) == {None}
    assert len(pauses) == len(resumed)
    # Each look that found a descriptor let at least one in.
    assert len(pauses) <= CROWD


async def test_a_listener_that_pauses_can_be_closed() -> None:
    async with crowded() as (listener, clients, _):
        await listener.close()
        assert await clients[-1].ending() in ("FIN", "RST")


async def test_descriptors_that_others_have_taken_count() -> None:
    with contextlib.ExitStack() as stack:
        crowd = Crowd(stack, 2)
        limit = lowest_free(crowd.sockets[0].fileno()) + 1 + ROOM
        async with serving(Descriptors(limit)) as listener:
            for _ in range(ROOM):
                stack.enter_context(socket.socket())
            first, second = await crowd.connect(listener.port)
            await served(first)
            assert listener.state().paused
            await second.ask("/")
            stack.close()  # which ends the clients too


async def test_the_kernel_holds_little_for_a_slow_client() -> None:
    async with (
        serving(Descriptors(1 << 20)) as listener,
        RawClient.connected(HostPort("127.0.0.1", listener.port)) as client,
    ):
        await served(client)
        [connection] = listener._server.connections
        assert connection.transport is not None
        sock = connection.transport.get_extra_info("socket")
        level = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    assert level == unsent(1)


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    issued = trustme.CA().issue_cert("127.0.0.1")
    files = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(files.cert)
    issued.private_key_pem.write_to_path(files.key)
    return files


async def test_what_a_slow_client_has_not_taken_is_held_once(files: TlsFiles) -> None:
    tls = await asyncio.to_thread(server_context, files)
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    async with serving(Descriptors(1 << 20), tls=tls) as listener:
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=trust)
        await until(lambda: bool(listener._server.connections))
        [connection] = listener._server.connections
        transport = cast(asyncio.Transport, connection.transport)  # uvloop's are none by class
        assert transport.get_write_buffer_limits() == (0, 1)
        writer.transport.abort()


async def test_a_handshake_that_fails_gives_its_connection_back(files: TlsFiles) -> None:
    tls = await asyncio.to_thread(server_context, files)
    async with serving(Descriptors(1 << 20), tls=tls) as listener:
        async with RawClient.connected(HostPort("127.0.0.1", listener.port)) as client:
            await client.send("GET / HTTP/1.1\n\n")
            assert await client.ending() in ("FIN", "RST")
        await until(lambda: not listener.state().open)


async def test_a_handshake_under_way_ends_with_the_listener(files: TlsFiles) -> None:
    tls = await asyncio.to_thread(server_context, files)
    async with (
        serving(Descriptors(1 << 20), tls=tls) as listener,
        RawClient.connected(HostPort("127.0.0.1", listener.port)) as client,
    ):
        await until(lambda: listener.state().open == 1)
        await listener.close()
        assert await client.ending() in ("FIN", "RST")


@pytest.mark.parametrize(
    ("limit", "upstream", "clients"),
    [
        (20_000, 80, 20_000 - 64 - 80 - 5_000),
        (1_024, 80, 1_024 - 64 - 80 - 256),
        (1_024, 4_000, 512),  # more than half is never kept
        (64, 16, 32),
    ],
)
def test_clients_leave_descriptors_to_what_serves_them(
    limit: int, upstream: int, clients: int
) -> None:
    descriptors = for_clients(limit, upstream)
    assert descriptors.left(0) == clients
    assert descriptors.are_short(clients)
    assert not descriptors.are_short(clients - 1)
    assert descriptors.left(limit) == 0


def test_what_the_kernel_holds_for_clients_grows_little_once_they_are_many() -> None:
    few, many = (sum(unsent(n) for n in range(1, count + 1)) for count in (64, 5000))
    assert few == 64 * unsent(1)
    assert many < 5000 * (256 << 10) + 4 * few
