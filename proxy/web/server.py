"""aiohttp's low-level server with our words for what never becomes a request.

A request line or header that is not HTTP is answered by aiohttp itself, as plain text and with a
trace in its own log. Here it becomes what every other refusal of the listener is: JSON, one line in
our log. Errors that reach this point from a handler mean that its connection is of no use any more.

A crowd that comes at once asks at once as well: libuv tells of all that can be read before anything
else runs, and all those requests begin in one turn of the loop. Measured, with 5,000 clients: 0.16
to 0.55 s. So ``BEGUN`` are handed to their parsers in a turn, and the others wait in line, unread.

A client that stops reading would hold its descriptors, and maybe a window, for ever: the kernel
ends a connection whose bytes it could not deliver for ``STUCK_SECONDS`` (tcp(7): also when the
peer's window stays closed).
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

from proxy.web.forwarded import Network, is_trusted, parse_address
from proxy.web.proxyline import NotProxied, parse_header

#: Requests, or parts of them, that are handed on in one turn of the loop.
BEGUN = 32
#: Seconds that a client may take no byte; CRI gives a whole pull up after as many.
STUCK_SECONDS = 300

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
#: Makes the answer to what could not be parsed, from the parser's words.
Malformed = Callable[[web.BaseRequest, str], web.StreamResponse]


@dataclass(frozen=True, slots=True)
class Proxies:
    """Peers whose connections begin with a header of the PROXY protocol.

    ``refused`` is told the peer and the reason when one does not.
    """

    trusted: tuple[Network, ...]
    refused: Callable[[str, str], None]


class Line:
    """Who may hand on what has come in this turn of the loop, and who waits for one of the next."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = BEGUN
        self._waiting: deque[Callable[[], None]] = deque()

    def __repr__(self) -> str:
        return f"<Line {len(self._waiting)} waiting, {self._left} may go>"

    def passes(self, go_on: Callable[[], None]) -> bool:
        """Go now; else ``go_on`` is called when it is time to."""
        if not self._left:
            self._waiting.append(go_on)
            return False
        if self._left == BEGUN:
            self._loop.call_soon(self._turn)
        self._left -= 1
        return True

    def _turn(self) -> None:
        going = [self._waiting.popleft() for _ in range(min(BEGUN, len(self._waiting)))]
        self._left = BEGUN - len(going)
        if going:
            self._loop.call_soon(self._turn)
        for go_on in going:  # each by itself: none is lost by another's defect
            self._loop.call_soon(go_on)


#: What only the server takes, and not the protocol of a connection.
_OF_THE_SERVER = ("handler_cancellation", "request_factory")


class RegistryServer(web.Server):
    """Makes one protocol per connection. ``proxies`` None: nobody speaks the PROXY protocol."""

    def __init__(
        self,
        handler: Handler,
        malformed: Malformed,
        *,
        proxies: Proxies | None = None,
        **options: Any,
    ) -> None:
        super().__init__(handler, **options)
        self._malformed = malformed
        self._proxies = proxies
        self._options = {k: v for k, v in options.items() if k not in _OF_THE_SERVER}
        self.on_connection_lost: Callable[[], None] | None = None  # told each time
        self.scratch = bytearray()
        self.line = Line(self._loop)

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        if self.on_connection_lost is not None:
            self.on_connection_lost()

    def __call__(self) -> web.RequestHandler:
        return self._made(ClientProtocol)

    def _made(self, make: Callable[..., web.RequestHandler]) -> web.RequestHandler:
        return make(self, self._malformed, self._proxies, loop=self._loop, **self._options)

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._connections)


class RegistryRunner(web.ServerRunner):
    """Runs a server of the above."""

    def __init__(self, server: RegistryServer, **options: Any) -> None:
        super().__init__(server, **options)
        self.registry_server = server


class AdminRunner(web.AppRunner):
    """Serves an application by a server of the above. Bodies reach it as they came: what a sender
    says of their compression may be wrong, and aiohttp would find out where nobody can answer."""

    def __init__(self, app: web.Application, malformed: Malformed, **options: Any) -> None:
        super().__init__(app, access_log=None, auto_decompress=False, **options)
        self._malformed = malformed

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()  # has no connections yet: only its parts are wanted
        self.registry_server = RegistryServer(
            plain.request_handler,
            self._malformed,
            request_factory=plain.request_factory,
            **self._kwargs,
        )
        return self.registry_server


class ClientProtocol(web.RequestHandler):
    """One connection of a client."""

    __slots__ = ("_client", "_header", "_late", "_line", "_malformed", "_proxies")

    def __init__(
        self, manager: RegistryServer, malformed: Malformed, proxies: Proxies | None, **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._line = manager.line
        self._late: list[bytes] = []  # received, and to be handed on when it is time
        self._malformed = malformed
        self._proxies = proxies
        self._client: str | None = None
        # What has come of a header that is still to come; None when none is.
        self._header: bytes | None = None

    @property
    def peername(self) -> Any:
        """Whom the connection is from; what a request takes for its peer."""
        if self._client is not None or self.transport is None:
            return self._client
        return self.transport.get_extra_info("peername")

    @property
    def others(self) -> int:
        """Connections that are open beside it."""
        server = self._manager
        # As its `connections` they are a list, made anew for whoever asks.
        return 0 if server is None else max(0, len(server._connections) - 1)

    def scratch(self, size: int) -> bytearray | None:
        """So many bytes or more that all connections of the server share: whoever fills them is
        done with them before it awaits anything."""
        server = self._manager
        if not isinstance(server, RegistryServer):
            return None
        if len(server.scratch) < size:
            server.scratch = bytearray(size)
        return server.scratch

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        limit_delivery(transport.get_extra_info("socket"))
        if transport.get_extra_info("sslcontext") is not None:
            # What a slow client has not taken is held once: its next piece is not read before. Not
            # 0, at which asyncio's TLS pauses a writer who has nothing left that could resume it.
            cast(asyncio.Transport, transport).set_write_buffer_limits(high=1)
        if self._proxies is not None and is_trusted(
            parse_address(self._peer()), self._proxies.trusted
        ):
            self._header = b""

    def data_received(self, data: bytes) -> None:
        if self._header is None or self._proxies is None:
            self._hand_on(data)
            return
        self._header += data
        try:
            header = parse_header(self._header)
        except NotProxied as error:
            self._proxies.refused(self._peer(), str(error))
            self.force_close()
            return
        if header is not None:
            rest, self._header = self._header[header.length :], None
            self._client = header.address
            if rest:
                self.data_received(rest)

    def _hand_on(self, data: bytes) -> None:
        """Give this to aiohttp's parser, now or in one of the next turns of the loop."""
        # Without data it is aiohttp's own call, to parse what it holds.
        if not data or (not self._late and self._line.passes(self._catch_up)):
            super().data_received(data)
            return
        self._late.append(bytes(data))
        # It has asked: aiohttp, which has not heard of it, would close it as one that is idle.
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self._pause_transport_reading()

    def _catch_up(self) -> None:
        late, self._late = self._late, []
        for data in late:
            super().data_received(data)
        if not (self._reading_paused or self._buffer_paused):
            self._resume_transport_reading()

    def _peer(self) -> str:
        peer = self.peername
        return str(peer[0]) if isinstance(peer, tuple) else str(peer)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a malformed request. Raises ``ConnectionError``, which closes quietly,
        for what a handler has raised: it has told its client and the log whatever it could."""
        if status != 400 or request.writer.output_size > 0:
            raise ConnectionResetError("the handler gave its connection up") from exc
        return self._malformed(request, message or "")


def limit_delivery(sock: socket.socket | None, seconds: float = STUCK_SECONDS) -> None:
    """Let the kernel give the connection up when it can deliver nothing for ``seconds``."""
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
