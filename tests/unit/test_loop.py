"""The loops that pullpool may run on, at the edge where one of them lost the end of a body."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import ssl
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import cast

import pytest

from proxy.loop import loop_factory
from tests.unit.upstream_kit import LOOPS, run_on, tls

RECORD = 16 << 10
#: Sixteen full records and the head of an answer in front of them.
HEAD, BODY = 281, 16 * RECORD
#: Turns of the loop in which whatever is held back would have been handed over.
PATIENCE = 1000


@pytest.mark.parametrize("fast", [True, False])
def test_the_loop_is_uvloop_with_and_without_the_fast_transports(fast: bool) -> None:
    loop = loop_factory(fast_transport=fast)()
    try:
        assert "uvloop" in "".join(str(base) for base in type(loop).__mro__)
    finally:
        loop.close()


class PausingClient(asyncio.Protocol):
    """Pauses at everything that comes, and counts it."""

    def __init__(self) -> None:
        self.received = 0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.transport.pause_reading()


@contextmanager
def answering(context: ssl.SSLContext, sizes: list[int]) -> Iterator[tuple[str, int]]:
    """A server that answers one byte with records of these sizes, and then is silent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)

        def serve() -> None:
            with suppress(OSError):  # the client ends by a reset, or never comes
                plain, _ = listener.accept()
                with context.wrap_socket(plain, server_side=True) as sock:
                    while sock.recv(1):
                        for size in sizes:
                            sock.sendall(bytes(size))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def waiting_in_kernel(sock: socket.socket) -> int:
    """Bytes that have come and were not read."""
    found: int
    (found,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))
    return found


async def received_by_a_pausing_client(
    address: tuple[str, int], context: ssl.SSLContext, length: int
) -> int:
    """All of the answer is in the kernel before its first byte is read; then it is read as far as
    it is handed over."""
    loop = asyncio.get_running_loop()
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 2 * length:
            pytest.skip("the kernel grants no socket a buffer for all of the answer")
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        transport, client = await loop.create_connection(
            PausingClient, sock=sock, ssl=context, server_hostname="localhost"
        )
        transport.write(b"?")
        # The loop stands still here, so that nobody reads: on some loops pausing alone does not.
        while waiting_in_kernel(sock) < length:
            pass
        for _ in range(PATIENCE):
            transport.resume_reading()
            await asyncio.sleep(0)
        transport.abort()
        await asyncio.sleep(0)
    return client.received


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("head", [1, HEAD, RECORD - 1])
def test_no_loop_keeps_the_end_of_a_tls_body_from_a_protocol_that_pauses(
    loop: str, head: int
) -> None:
    both, length = tls(), head + BODY
    with answering(both.server, [head, *[RECORD] * 16]) as address:
        received = run_on(loop, received_by_a_pausing_client(address, both.client, length))
    assert received == length


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_leaves_in_its_handshake_is_nothing_to_report(loop: str) -> None:
    async def main() -> list[dict[str, object]]:
        reported: list[dict[str, object]] = []
        running = asyncio.get_running_loop()
        running.set_exception_handler(lambda _, context: reported.append(context))
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.close()
        with pytest.raises(ConnectionError):
            await running.connect_accepted_socket(asyncio.Protocol, ours, ssl=tls().server)
        await asyncio.sleep(0)
        running.call_exception_handler({"message": "what else goes wrong is"})
        return reported

    assert [context["message"] for context in run_on(loop, main())] == ["what else goes wrong is"]
