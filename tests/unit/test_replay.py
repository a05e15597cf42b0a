"""A keep-alive socket that its peer has closed is replaced once; a fresh one tells the truth."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator

import aiohttp
import pytest
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.errors import UpstreamUnavailable
from proxy.testing import Disconnect, FakeClock, FakeRegistry, Fault, Hang
from proxy.upstream.cap import START
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.origin import Origin
from tests.unit.fake_kit import IMAGE
from tests.unit.upstream_kit import LOOPS, Puller, opened, run_on, sample, ticket, tls, until

every_loop = pytest.mark.parametrize("loop", LOOPS)
plain_and_tls = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
fin_and_rst = pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])

BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def is_established(here: tuple[str, int], there: tuple[str, int]) -> bool:
    """Is this end's connection open, of which ``there`` is not known to be closed? An end may have
    connections to others from the same port."""

    def named(address: tuple[str, int]) -> str:
        host, port = address
        return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"

    ends = [named(here), named(there)]
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table]
    return any(row[1:3] == ends and row[3] == "01" for row in rows)


class Peer:
    """A server whose one thread takes requests when it is told to, so that the test decides what
    the loop has seen when a socket is closed: nothing, until it next looks."""

    def __init__(self, secure: bool) -> None:
        self.url = URL("https://127.0.0.1" if secure else "http://127.0.0.1")
        self.accepted = 0
        self.requests = 0
        self._context = tls().server if secure else None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = self.url.with_port(self._listening.getsockname()[1])
        self._sock: socket.socket | ssl.SSLSocket | None = None

    def answer(self, text: bytes = BODY) -> None:
        """Take one request, on a new socket if there is none, and answer it. Blocks."""
        if self._sock is None:
            sock, _ = self._listening.accept()
            self.accepted += 1
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            self._sock = sock
        head = b""
        while b"\r\n\r\n" not in head:
            data = self._sock.recv(65536)
            if not data:
                return
            head += data
        self.requests += 1
        self._sock.sendall(text)

    def hang_up(self, *, reset: bool) -> None:
        """Close the socket, at once and without a word of TLS, until the client's kernel knows."""
        sock, self._sock = self._sock, None
        assert sock is not None
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client, server = sock.getpeername(), sock.getsockname()
        sock.close()
        while is_established(client, server):  # a busy machine takes its time
            pass

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._listening.close()


class Line:
    """An origin at a cap of one, with its metrics."""

    def __init__(self, url: URL, read_timeout: float = 60.0) -> None:
        self.url = url
        self.metrics = Metrics()
        settings = OriginSettings(max_connections=1, tls=tls().client, read_timeout=read_timeout)
        key = OriginKey.of(url)
        self.origin = Origin(key, settings, metrics=self.metrics, clock=FakeClock())

    async def ask(self) -> bytes:
        async with self.origin.turn(ticket()) as turn:
            return await (await turn.request("GET", self.url)).read()

    @property
    def is_warm(self) -> bool:
        return self.origin._lanes.is_warm(0)

    @property
    def replays(self) -> float:
        return sample(self.metrics, "upstream_replays_total", upstream=self.origin.key.label)


@contextlib.asynccontextmanager
async def peered(secure: bool) -> AsyncIterator[tuple[Peer, Line]]:
    peer = Peer(secure)
    try:
        line = Line(peer.url)
        async with opened(line.origin):
            yield peer, line
    finally:
        peer.close()


async def served(peer: Peer, line: Line, text: bytes = BODY) -> bytes:
    answering = asyncio.create_task(asyncio.to_thread(peer.answer, text))
    try:
        return await line.ask()
    finally:
        await answering


# -- idle sockets ------------------------------------------------------------------------------


@every_loop
@plain_and_tls
@fin_and_rst
def test_a_socket_seen_to_be_closed_is_dialled_anew(loop: str, secure: bool, reset: bool) -> None:
    """Nothing to replay: nothing was sent on it."""

    async def main() -> None:
        async with peered(secure) as (peer, line):
            assert await served(peer, line) == b"ok"
            peer.hang_up(reset=reset)
            await until(lambda: not line.is_warm)
            assert await served(peer, line) == b"ok"
            assert (peer.accepted, peer.requests, line.replays) == (2, 2, 0)

    run_on(loop, main())


@every_loop
@plain_and_tls
@fin_and_rst
def test_a_socket_closed_just_before_the_request_is_dialled_anew(
    loop: str, secure: bool, reset: bool
) -> None:
    """Closed by the kernel, but the loop has not looked when the request comes: the lane has."""

    async def main() -> None:
        async with peered(secure) as (peer, line):
            assert await served(peer, line) == b"ok"
            async with line.origin.turn(ticket()) as turn:
                peer.hang_up(reset=reset)
                asking = turn.request("GET", line.url)
                answering = asyncio.create_task(asyncio.to_thread(peer.answer))
                assert await (await asking).read() == b"ok"
                await answering
            assert (peer.accepted, peer.requests, line.replays) == (2, 2, 0)

    run_on(loop, main())


@every_loop
@plain_and_tls
@fin_and_rst
def test_a_socket_closed_upon_the_request_is_replayed(loop: str, secure: bool, reset: bool) -> None:
    """The peer has read the request, and closes without a byte of an answer."""

    async def main() -> None:
        server = tls().server if secure else None
        async with FakeRegistry(ssl_context=server) as registry:
            line = Line(URL(registry.url) / "v2/")
            async with opened(line.origin):
                await line.ask()
                registry.script(Fault(Disconnect(reset=reset)))
                assert await line.ask() == b"{}"
                counters = registry.counters
                assert (counters.accepted, counters.peak_sockets) == (2, 1)
                assert (counters.count("ping"), line.replays) == (3, 1)

    run_on(loop, main())


# -- what is not replayed ----------------------------------------------------------------------


@every_loop
@plain_and_tls
@fin_and_rst
def test_a_request_on_a_fresh_socket_is_not_replayed(loop: str, secure: bool, reset: bool) -> None:
    async def main() -> None:
        server = tls().server if secure else None
        async with FakeRegistry(ssl_context=server) as registry:
            line = Line(URL(registry.url) / "v2/")
            async with opened(line.origin):
                registry.script(Fault(Disconnect(reset=reset)))
                with pytest.raises(aiohttp.ClientConnectionError):
                    await line.ask()
                assert (registry.counters.count("ping"), line.replays) == (1, 0)
                assert await line.ask() == b"{}"

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_it_is_replayed_once(loop: str, secure: bool) -> None:
    async def main() -> None:
        server = tls().server if secure else None
        async with FakeRegistry(ssl_context=server) as registry:
            line = Line(URL(registry.url) / "v2/")
            async with opened(line.origin):
                await line.ask()
                registry.script(Fault(Disconnect(), times=3))
                with pytest.raises(aiohttp.ServerDisconnectedError):
                    await line.ask()
                assert (registry.counters.count("ping"), line.replays) == (3, 1)
                assert registry.counters.peak_sockets == 1

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_an_answer_that_has_begun_is_not_replayed(loop: str, secure: bool) -> None:
    async def main() -> None:
        async with peered(secure) as (peer, line):
            await served(peer, line)

            def half() -> None:
                peer.answer(b"HTTP/1.1 200 OK\r\nContent-Le")
                peer.hang_up(reset=False)

            answering = asyncio.create_task(asyncio.to_thread(half))
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await line.ask()
            await answering
            assert (peer.accepted, peer.requests, line.replays) == (1, 2, 0)

    run_on(loop, main())


@every_loop
def test_a_silent_socket_is_not_replayed(loop: str) -> None:
    async def main() -> None:
        async with FakeRegistry() as registry:
            line = Line(URL(registry.url) / "v2/", read_timeout=1.0)
            async with opened(line.origin):
                await line.ask()
                registry.script(Fault(Hang()))
                with pytest.raises(TimeoutError):
                    await line.ask()
                assert (registry.counters.count("ping"), line.replays) == (2, 0)

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_a_replay_that_is_cancelled_leaves_no_socket(loop: str, secure: bool) -> None:
    async def main() -> None:
        server = tls().server if secure else None
        async with FakeRegistry(ssl_context=server) as registry:
            line = Line(URL(registry.url) / "v2/")
            async with opened(line.origin):
                await line.ask()
                registry.script(Fault(Disconnect()), Fault(Hang()))
                asking = asyncio.create_task(line.ask())
                await registry.stalls.arrived()
                asking.cancel()
                await asyncio.wait([asking])
                await until(lambda: registry.counters.sockets_now == 0)
                assert not line.origin.is_open
                assert line.origin.state().active == 0
                registry.release()

    run_on(loop, main())


# -- what it counts as -------------------------------------------------------------------------


@fin_and_rst
async def test_a_replay_is_no_overload_and_no_failure(reset: bool) -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        settings = OriginSettings(starts_low=True)
        async with Puller(registry, cap=16, settings=settings) as puller:
            assert (await puller.client.manifest(IMAGE.name, "v1", ticket()))[0] == IMAGE.manifest
            before = puller.origin.conduct.cap
            registry.script(Fault(Disconnect(reset=reset)))
            assert (await puller.client.manifest(IMAGE.name, "v1", ticket()))[0] == IMAGE.manifest
            label = puller.origin.key.label
            assert puller.origin.conduct.cap.limit == before.limit == START
            assert sample(puller.metrics, "upstream_replays_total", upstream=label) == 1
            assert sample(puller.metrics, "upstream_overloads_total", upstream=label) == 0
            kinds = ("reset", "body", "timeout", "protocol")
            errors = [
                sample(puller.metrics, "upstream_errors_total", upstream=label, kind=kind)
                for kind in kinds
            ]
            assert not any(errors)


@fin_and_rst
async def test_a_reset_of_a_fresh_socket_is_an_overload(reset: bool) -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        settings = OriginSettings(starts_low=True)
        async with Puller(registry, cap=16, settings=settings) as puller:
            registry.script(Fault(Disconnect(reset=reset)))
            with pytest.raises(UpstreamUnavailable):
                await puller.client.manifest(IMAGE.name, "v1", ticket())
            label = puller.origin.key.label
            assert sample(puller.metrics, "upstream_overloads_total", upstream=label) == 1
            assert puller.origin.conduct.cap.limit < START
