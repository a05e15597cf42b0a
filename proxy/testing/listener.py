"""The fake's own accept loop, because the cap under test is about sockets and not about requests.

Theory of operation. A listening socket is watched by the event loop; every readiness takes *all*
waiting connections, in the kernel's order. At each accept the fake asks the kernel (TCP_INFO) how
many of the sockets it still knows are ESTABLISHED, the new one included. A socket whose peer has
closed is in CLOSE_WAIT by then, whether or not the server has noticed yet, so a client that closes
before it dials is never counted twice; one that dials first is. A connection accepted beyond the
limit stays marked for its whole life.

A connection is known from accept until its transport is lost. `close()` stops accepting, aborts
every transport (a client may have stopped reading: nothing is flushed), and returns after each
connection was lost and each handler has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import ssl
import struct
import termios
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

_ESTABLISHED = 1  # linux/include/net/tcp_states.h; first byte of struct tcp_info
_BACKLOG = 4096
_QUEUE_POLL = 0.001  # seconds


class Connection:
    """One accepted socket. `ready_at` is when pacing lets its next piece leave (loop time)."""

    def __init__(self, sock: socket.socket) -> None:
        self.is_over_limit = False
        self.ready_at = 0.0
        self.is_busy = False
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        self._sock = sock

    @property
    def is_established(self) -> bool:
        """Whether neither side has closed."""
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:  # closed on our side
            return False
        return info[0] == _ESTABLISHED

    def abort(self) -> None:
        """Close at once, dropping what is not yet written."""
        if self.transport is not None:
            self.transport.abort()

    def finish(self) -> None:
        """Close with FIN after what was written."""
        if self.transport is not None:
            self.transport.close()

    async def reset(self) -> None:
        """Close with RST, once the peer's kernel has everything written so far.

        SO_LINGER with time 0 would throw away what is still queued, so the queue is awaited first.
        """
        await self.taken()
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    async def taken(self) -> None:
        """Until the peer's kernel has everything written so far."""
        while self.transport is not None and self._unacknowledged():  # noqa: ASYNC110 - no event
            await asyncio.sleep(_QUEUE_POLL)

    def _unacknowledged(self) -> int:
        try:
            queued = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError):
            return 0
        return int.from_bytes(queued, "little")

    def __repr__(self) -> str:
        state = "over the limit" if self.is_over_limit else "within the limit"
        return f"<Connection {state}, {'established' if self.is_established else 'closed'}>"


class _Server(web.Server):
    """aiohttp's server, reporting the life of each connection."""

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        connections: dict[RequestHandler, Connection],
        greeting: bytes,
    ) -> None:
        # handler_cancellation: a request that stalls or hangs ends when its client leaves.
        super().__init__(answer, handler_cancellation=True, access_log=None)
        self._known = connections
        self._greeting = greeting

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        # With no room above the kernel's, a write has reached the kernel once it was drained.
        # asyncio's TLS transport pauses at `>= high`, so that 0 would pause it for ever.
        is_tls = transport.get_extra_info("ssl_object") is not None
        transport.set_write_buffer_limits(high=1 if is_tls else 0, low=0)
        self._known[handler].transport = transport
        if self._greeting:
            transport.write(self._greeting)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        connection = self._known.pop(handler)
        connection.transport = None
        connection.lost.set()


class Listener:
    """Accepts, counts and serves connections.

    `on_accept` gets the number of ESTABLISHED sockets after each accept. Sockets beyond `limit` are
    accepted too, and marked: refusing them is the answer's business. A connection begins with
    `greeting`, whatever the client has to say.
    """

    def __init__(
        self,
        answer: Callable[[web.BaseRequest, Connection], Awaitable[web.StreamResponse]],
        limit: int | None,
        on_accept: Callable[[int], None],
        ssl_context: ssl.SSLContext | None,
        greeting: bytes = b"",
    ) -> None:
        self.limit = limit
        self._greeting = greeting
        self._answer = answer
        self._on_accept = on_accept
        self._ssl_context = ssl_context
        self._connections: dict[RequestHandler, Connection] = {}
        self._handshakes: set[asyncio.Task[None]] = set()
        self._handlers: dict[asyncio.Task[None], Connection] = {}
        self._listening: socket.socket | None = None
        self._server: _Server | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen, and return the port (a free one for 0). Raises OSError when it is taken."""
        self._server = _Server(self._serve, self._connections, self._greeting)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listening.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listening, self._accept_all)
        return int(self._listening.getsockname()[1])

    async def close(self) -> None:
        """End everything; idempotent."""
        if self._listening is None:
            return
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        self._listening = None
        handshakes = list(self._handshakes)
        for task in handshakes:
            task.cancel()
        await asyncio.gather(*handshakes, return_exceptions=True)
        await self.drop_connections()

    async def drop_connections(self, *, idle_only: bool = False) -> None:
        """Abort the connections, or those without a request in progress.

        Returns when they are lost and their handlers have ended, as have those of connections that
        were lost before.
        """
        doomed = [
            connection
            for connection in self._connections.values()
            if connection.transport is not None and not (idle_only and connection.is_busy)
        ]
        for connection in doomed:
            connection.abort()
        for connection in doomed:
            await connection.lost.wait()
        ended = [task for task, owner in self._handlers.items() if owner.lost.is_set()]
        await asyncio.gather(*ended, return_exceptions=True)

    def established(self) -> int:
        """How many accepted sockets neither side has closed."""
        return sum(connection.is_established for connection in self._connections.values())

    def _accept_all(self) -> None:
        while self._listening is not None:
            try:
                sock, _ = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            sock.setblocking(False)
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        assert self._server is not None
        handler = self._server()
        connection = self._connections[handler] = Connection(sock)
        established = self.established()
        connection.is_over_limit = self.limit is not None and established > self.limit
        self._on_accept(established)
        task = asyncio.get_running_loop().create_task(self._hand_over(sock, handler))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _hand_over(self, sock: socket.socket, handler: RequestHandler) -> None:
        """Give the socket to a transport; with TLS this is the handshake, one task each."""
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: handler, sock, ssl=self._ssl_context)
        except OSError:  # a handshake that failed; ssl.SSLError is one as well
            pass
        finally:
            connection = self._connections.get(handler)
            if connection is not None and connection.transport is None:
                del self._connections[handler]

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = self._connections.get(request.protocol)
        if connection is None:
            raise ConnectionResetError("the client left before its request was read")
        # The task of the whole connection: it ends after this request's.
        if request.task not in self._handlers:
            self._handlers[request.task] = connection
            request.task.add_done_callback(lambda task: self._handlers.pop(task, None))
        connection.is_busy = True
        try:
            return await self._answer(request, connection)
        finally:
            connection.is_busy = False

    def __repr__(self) -> str:
        return f"<Listener {len(self._connections)} connections, limit {self.limit}>"
