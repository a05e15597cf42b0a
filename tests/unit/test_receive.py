"""Large bodies past aiohttp: whole, in bounds, and nothing of one connection in another answer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from proxy.loop import INCOMING_BUFFER
from proxy.observe.metrics import Metrics
from proxy.testing import FakeClock
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.origin import Origin, Turn
from proxy.upstream.receive import GATHER, LEAST, SLACK, BodyReceiver
from proxy.upstream.ring import RING_BYTES, Ring, Rings
from tests.unit.upstream_kit import LOOPS, MIB, noise, run_on, ticket, tls, until

BODY = noise(2 * MIB)
KIB = 1 << 10

every_loop = pytest.mark.parametrize("loop", LOOPS)
plain_and_tls = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
both_paths = pytest.mark.parametrize("fast", [True, False], ids=["fast", "aiohttp"])

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


def head(length: int, *more: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {length}", *more, "", ""]).encode()


def saying(*parts: bytes, ends: bool = False) -> Script:
    """Say these bytes, each when the loop has had turns to deliver those before it."""

    async def script(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            for _ in range(20):
                await asyncio.sleep(0)
        if ends:
            writer.close()

    return script


@dataclass
class Server:
    """Answers its requests with its scripts, one after the other; the last one goes on."""

    scripts: list[Script]
    port: int = 0
    accepted: int = 0
    open: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def url(self, secure: bool) -> URL:
        return URL(f"{'https' if secure else 'http'}://127.0.0.1:{self.port}/")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                    await script(writer)
        finally:
            self.open -= 1
            writer.close()


class CountedRings(Rings):
    """Knows how many rings are out, and how many were made."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Ring] = []
        self.given: list[Ring] = []

    def take(self) -> Ring:
        self.taken.append(super().take())
        return self.taken[-1]

    def give(self, ring: Ring) -> None:
        self.given.append(ring)
        super().give(ring)


@dataclass
class Rig:
    server: Server
    origin: Origin
    rings: CountedRings
    url: URL

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator[Turn]:
        async with self.origin.turn(ticket()) as turn:
            await turn.request("GET", self.url)
            yield turn

    async def pull(self) -> bytes:
        received = bytearray()
        async with self.asking() as turn:
            while data := await turn.borrow():
                received += data
        return bytes(received)


@contextlib.asynccontextmanager
async def rigged(
    *scripts: Script, secure: bool = False, fast: bool = True, read_timeout: float = 60.0
) -> AsyncIterator[Rig]:
    server, rings = Server(list(scripts)), CountedRings()
    listener = await asyncio.start_server(
        server.serve, "127.0.0.1", 0, ssl=tls().server if secure else None
    )
    server.port = listener.sockets[0].getsockname()[1]
    url = server.url(secure)
    origin = Origin(
        OriginKey.of(url),
        OriginSettings(
            max_connections=1, tls=tls().client, fast_receive=fast, read_timeout=read_timeout
        ),
        metrics=Metrics(),
        clock=FakeClock(),
        rings=rings,
    )
    try:
        yield Rig(server, origin, rings, url)
    finally:
        await origin.close()
        listener.close()
        await until(lambda: server.open == 0)
        await listener.wait_closed()


# -- whole bodies ------------------------------------------------------------------------------


@every_loop
@plain_and_tls
@both_paths
def test_bodies_are_whole_and_their_socket_is_kept(loop: str, secure: bool, fast: bool) -> None:
    async def main() -> None:
        async with rigged(saying(head(len(BODY)) + BODY), secure=secure, fast=fast) as rig:
            for _ in range(3):
                assert await rig.pull() == BODY
            assert rig.server.accepted == 1
            assert len(rig.rings.taken) == (3 if fast else 0)
            assert len(set(map(id, rig.rings.taken))) == (1 if fast else 0)

    run_on(loop, main())


@every_loop
@plain_and_tls
@pytest.mark.parametrize("near", ["start", "body", "ring", "end"])
def test_a_body_may_be_split_anywhere(loop: str, secure: bool, near: str) -> None:
    """Before, in and after the end of the head; at the ring's edge; at the end of the body."""
    size = RING_BYTES + LEAST
    body = noise(size)
    whole = head(size) + body
    start = len(head(size))
    spots = {"start": 1, "body": start, "ring": start + RING_BYTES, "end": len(whole) - 2}[near]

    async def main() -> None:
        for at in range(max(1, spots - 3), min(len(whole), spots + 4)):
            async with rigged(saying(whole[:at], whole[at:]), secure=secure) as rig:
                assert await rig.pull() == body
                assert await rig.pull() == body
                assert rig.server.accepted == 1

    run_on(loop, main())


@every_loop
@both_paths
def test_a_socket_that_closes_with_its_body_is_not_used_again(loop: str, fast: bool) -> None:
    async def main() -> None:
        last = saying(head(len(BODY), "Connection: close") + BODY, ends=True)
        async with rigged(last, saying(head(len(BODY)) + BODY), fast=fast) as rig:
            assert await rig.pull() == BODY
            assert await rig.pull() == BODY
            assert rig.server.accepted == 2

    run_on(loop, main())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100000\r\n"
        + BODY[:MIB]
        + b"\r\n100000\r\n"
        + BODY[MIB:]
        + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BODY,
    ],
    ids=["chunked", "until close"],
)
async def test_a_body_whose_end_only_aiohttp_knows_is_left_to_it(answer: bytes) -> None:
    async with rigged(saying(answer, ends=True)) as rig:
        assert await rig.pull() == BODY
        assert rig.rings.taken == []


async def test_a_small_body_is_left_to_aiohttp() -> None:
    body = noise(LEAST - 1)
    async with rigged(saying(head(len(body)), body)) as rig:
        assert await rig.pull() == body
        assert rig.rings.taken == []


async def test_who_asks_for_few_bytes_gets_few() -> None:
    async with rigged(saying(head(len(BODY)) + BODY)) as rig, rig.asking() as turn:
        received = bytearray()
        while data := await turn.borrow(100 * KIB):
            assert len(data) <= 100 * KIB
            received += data
        assert received == BODY


async def test_what_is_read_may_be_kept() -> None:
    async with rigged(saying(head(len(BODY)) + BODY)) as rig, rig.asking() as turn:
        pieces = []
        while data := await turn.read():
            pieces.append(data)
        assert b"".join(pieces) == BODY


# -- bodies that are not what they say ---------------------------------------------------------


@every_loop
@plain_and_tls
@both_paths
@pytest.mark.parametrize("missing", [1, MIB])
def test_a_body_that_ends_early_is_an_error(
    loop: str, secure: bool, fast: bool, missing: int
) -> None:
    async def main() -> None:
        short = saying(head(len(BODY)) + BODY[:-missing], ends=True)
        whole = saying(head(len(BODY)) + BODY)
        async with rigged(short, whole, secure=secure, fast=fast) as rig:
            with pytest.raises(aiohttp.ClientPayloadError):
                await rig.pull()
            assert await rig.pull() == BODY
            assert rig.server.accepted == 2
            assert len(rig.rings.given) == (1 if fast else 0)

    run_on(loop, main())


async def test_the_bytes_before_an_early_end_are_not_lost() -> None:
    async with rigged(saying(head(len(BODY)) + BODY[:-1], ends=True)) as rig, rig.asking() as turn:
        received = bytearray()
        while len(received) < len(BODY) - 1:
            received += await turn.borrow()
        with pytest.raises(aiohttp.ClientPayloadError, match="the connection ended after"):
            await turn.borrow()
        assert received == BODY[:-1]


@every_loop
@plain_and_tls
@pytest.mark.parametrize("surplus", [1, 4 * KIB, MIB])
def test_bytes_after_a_body_never_reach_the_next_answer(
    loop: str, secure: bool, surplus: int
) -> None:
    false = (head(5) + b"false") * (surplus // 10 + 1)

    async def main() -> None:
        lying = saying(head(len(BODY)) + BODY + false[:surplus])
        async with rigged(lying, secure=secure) as rig:
            for asked in range(1, 4):
                assert await rig.pull() == BODY
                assert rig.server.accepted == asked

    run_on(loop, main())


@every_loop
@both_paths
def test_a_reset_in_the_middle_is_an_error(loop: str, fast: bool) -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        await saying(head(len(BODY)) + BODY[:MIB])(writer)
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def main() -> None:
        async with rigged(reset, saying(head(len(BODY)) + BODY), fast=fast) as rig:
            with pytest.raises((aiohttp.ClientPayloadError, OSError)):
                await rig.pull()
            assert await rig.pull() == BODY

    run_on(loop, main())


@every_loop
@both_paths
def test_silence_in_the_middle_is_a_time_out(loop: str, fast: bool) -> None:
    async def main() -> None:
        silent = saying(head(len(BODY)) + BODY[:MIB])
        async with rigged(silent, fast=fast, read_timeout=0.05) as rig:
            with pytest.raises(aiohttp.SocketTimeoutError):
                await rig.pull()

    run_on(loop, main())


# -- leaving -----------------------------------------------------------------------------------


@every_loop
@plain_and_tls
@both_paths
def test_a_turn_may_be_cancelled_at_any_step(loop: str, secure: bool, fast: bool) -> None:
    """The socket is gone then, the next turn gets its own bytes, and no ring is used again that
    something may still be written to."""
    body = noise(LEAST + 64 * KIB)

    async def main() -> None:
        async with rigged(saying(head(len(body)), body), secure=secure, fast=fast) as rig:
            for steps in range(0, 120, 7):
                before = len(rig.rings.given)
                pulling = asyncio.create_task(rig.pull())
                for _ in range(steps):
                    await asyncio.sleep(0)
                pulling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    assert await pulling == body
                if pulling.cancelled() and not rig.origin.is_open:
                    assert len(rig.rings.given) == before
                assert await rig.pull() == body

    run_on(loop, main())


@every_loop
@plain_and_tls
@both_paths
def test_a_body_that_is_left_ends_its_socket(loop: str, secure: bool, fast: bool) -> None:
    async def main() -> None:
        async with rigged(saying(head(len(BODY)) + BODY), secure=secure, fast=fast) as rig:
            async with rig.asking() as turn:
                assert BODY.startswith(await turn.borrow(1))
            await until(lambda: rig.server.open == 0)
            assert rig.rings.given == []
            assert await rig.pull() == BODY
            assert rig.server.accepted == 2

    run_on(loop, main())


# -- back-pressure -----------------------------------------------------------------------------


@every_loop
@plain_and_tls
def test_a_body_that_nobody_reads_is_held_back(loop: str, secure: bool) -> None:
    """What can be under way is a ring, and what both kernels hold; then it goes on to its end."""
    size = 64 * MIB
    sent = 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(head(size))
        while sent < size:
            writer.write(BODY)
            await writer.drain()
            sent += len(BODY)

    async def main() -> None:
        async with rigged(flood, secure=secure) as rig, rig.asking() as turn:
            received = len(await turn.borrow()) + len(await turn.borrow())
            before = -1
            while before < sent:  # until TCP holds the server back
                before = sent
                await asyncio.sleep(0.05)
            assert sent < 32 * MIB
            (ring,) = rig.rings.taken
            assert ring.used <= ring.size
            while data := await turn.borrow():
                received += len(data)
            assert received == size

    run_on(loop, main())


def test_the_slack_is_more_than_a_tls_layer_holds() -> None:
    assert SLACK > INCOMING_BUFFER


class Wire(asyncio.Transport):
    """A transport that hands over what it has as loops do: ``secure`` ones go on while the room
    they are offered is filled, and forget what they still have when reading is paused then."""

    def __init__(self, *, secure: bool) -> None:
        super().__init__()
        self.secure = secure
        self.protocol: Any = None
        self.is_paused = False
        self.left = b""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "ssl_object" and self.secure else default

    def is_closing(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return not self.is_paused

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def give(self, data: bytes) -> int:
        """Hand over what is taken of ``data``."""
        left = memoryview(data)
        while left and not self.is_paused:
            space = self.protocol.get_buffer(-1)
            count = min(len(space), len(left))
            space[:count] = left[:count]
            self.protocol.buffer_updated(count)
            left = left[count:]
        assert not (self.secure and left), "something stays behind in the TLS layer"
        return len(data) - len(left)


@settings(max_examples=40, deadline=None)
@given(
    secure=st.booleans(),
    comes=st.lists(st.integers(64, INCOMING_BUFFER), min_size=1, max_size=40),
    asked=st.lists(st.integers(64, MIB), min_size=1, max_size=10),
    hauls=st.booleans(),
)
def test_whatever_comes_and_is_asked_for_the_bytes_are_right_and_bounded(
    secure: bool, comes: list[int], asked: list[int], hauls: bool
) -> None:
    body = BODY[: 3 * LEAST]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        handler, wire, ring = ResponseHandler(loop), Wire(secure=secure), Ring(SLACK + 300 * KIB)
        handler.connection_made(wire)
        content = aiohttp.StreamReader(handler, 2**16, loop=loop)
        receiver = BodyReceiver(handler, content, len(body), ring, ahead=RING_BYTES)

        async def feed() -> None:
            given = 0
            for turn in itertools.count():
                if given == len(body):
                    return
                if not wire.is_paused:
                    given += wire.give(body[given : given + comes[turn % len(comes)]])
                assert ring.used <= ring.size
                await asyncio.sleep(0)

        feeding = asyncio.create_task(feed())
        received = bytearray()
        for turn in itertools.count():
            if len(received) == len(body):
                break
            received += await receiver.borrow(asked[turn % len(asked)])
            while hauls and (data := await asyncio.to_thread(receiver.more, MIB)):
                received += data
                receiver.resume()
        await feeding
        assert received == body
        assert await receiver.borrow(GATHER) == b""
        assert receiver.is_handed_back
        assert content.is_eof()
        assert wire.protocol is handler
        assert not handler.should_close

    asyncio.run(main())
