"""aiohttp's low-level server with our words for what never becomes a request.

A request line or header that is not HTTP is answered by aiohttp itself, as plain text and with a
trace in its own log. Here it becomes what every other refusal is: OCI JSON, one access-log line.
Errors that reach this point from a handler mean that its connection is of no use any more.

A client that stops reading would hold its descriptors, and maybe a window, for ever: the kernel
ends a connection whose bytes it could not deliver for ``STUCK_SECONDS`` (tcp(7): also when the
peer's window stays closed).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

#: Seconds that a client may take no byte; CRI gives a whole pull up after as many.
STUCK_SECONDS = 300

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
#: Makes the answer to what could not be parsed, from the parser's words.
Malformed = Callable[[web.BaseRequest, str], web.StreamResponse]


class RegistryServer(web.Server):
    """Makes one protocol per connection."""

    def __init__(self, handler: Handler, malformed: Malformed, **options: Any) -> None:
        super().__init__(handler, **options)
        self._malformed = malformed
        self._options = options

    def __call__(self) -> web.RequestHandler:
        options = {k: v for k, v in self._options.items() if k != "handler_cancellation"}
        return _Protocol(self, self._malformed, loop=self._loop, **options)


class _Protocol(web.RequestHandler):
    __slots__ = ("_malformed",)

    def __init__(self, manager: web.Server, malformed: Malformed, **options: Any) -> None:
        super().__init__(manager, **options)
        self._malformed = malformed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        limit_delivery(transport.get_extra_info("socket"))

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
