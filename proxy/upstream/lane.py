"""A lane: one slot's socket, and the session that uses it (DESIGN D1, D18).

Theory of operation
-------------------
aiohttp's connector frees its pool place *before* the socket is closed, counts only sockets in use,
and may dial a second one, so its ``limit`` is no cap. A lane's connector owns at most one socket
that is not closed on our side:

* it sees every socket that is dialled (``socket_factory``); one whose descriptor is gone is closed;
* it dials only after its previous socket is closed: ``_create_connection`` waits for that, which
  covers a new request, the replay of one whose keep-alive socket had gone stale, and a request
  that was cancelled while it dialled;
* it keeps its socket after a body that was read to the end, for the next turn on the same slot.

``abort`` is how a socket with an unfinished answer ends. Closing it would not do: uvloop with TLS
goes on downloading until its shutdown time-out (measured: 1 GB after the client had left at
0.4 MB). The descriptor goes away within a loop turn or two after it, on every loop we run on.

Replay
------
The peer may close an idle socket at any time. If its FIN or RST has been seen when a request comes,
the socket is dialled anew and nothing happened. If it has not been seen, or is on its way, the
request goes out and finds the connection closed before a byte of an answer (RFC 9112 §9.3.1). Then,
and only if the socket had been used before, the request is sent once more, on a fresh socket. What
happens to a fresh one is the upstream's doing, and told to the caller.

aiohttp would replay as well, but requests on fresh sockets too, which hides every other reset by an
overloaded upstream. So its replay is off; the attribute for that is private, and ``test_replay.py``
tells when it ceases to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler

#: Seconds an idle socket to an upstream is kept.
KEEPALIVE = 30.0
#: Loop turns that an aborted socket is waited for before it is shut down under its transport.
CLOSE_PATIENCE = 100


class _LaneConnector(aiohttp.TCPConnector):
    """A connector that has at most one socket that is not closed.

    ``_create_connection`` is aiohttp's hook for connectors (its own Unix connector overrides it).
    """

    def __init__(self, tls: ssl.SSLContext | None, resolver: AbstractResolver) -> None:
        super().__init__(
            limit=1,
            ssl=tls if tls is not None else True,
            keepalive_timeout=KEEPALIVE,
            happy_eyeballs_delay=None,  # would dial a second socket beside the first
            resolver=resolver,
            use_dns_cache=False,  # the resolver has its own, for all lanes
            socket_factory=self._dial,
        )
        self.dialled = 0  # how often
        self._sockets: list[socket.socket] = []
        self._transport: asyncio.Transport | None = None

    def _dial(self, addr_info: Any) -> socket.socket:
        family, kind, proto, _name, _address = addr_info
        sock = socket.socket(family, kind, proto)
        self._sockets = [known for known in self._sockets if known.fileno() != -1]
        self._sockets.append(sock)
        return sock

    @property
    def is_open(self) -> bool:
        """Is there a socket that is not yet closed on our side?"""
        return any(sock.fileno() != -1 for sock in self._sockets)

    @property
    def is_warm(self) -> bool:
        """Is there a socket that, as far as is known, can be used?"""
        return self._transport is not None and not self._transport.is_closing()

    async def _create_connection(self, *args: Any, **kwargs: Any) -> ResponseHandler:
        self.dialled += 1
        await self.shut()
        proto = await super()._create_connection(*args, **kwargs)
        self._transport = proto.transport
        return proto

    def abort(self) -> None:
        """Drop the socket, whatever it is doing; it is closed within a loop turn or two."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    async def shut(self) -> None:
        """Abort the socket, if there is one, and wait until it is closed."""
        # Those of now only: while this waits, the lane's next turn may dial.
        going = list(self._sockets)
        self.abort()
        for _ in range(CLOSE_PATIENCE):
            if all(sock.fileno() == -1 for sock in going):
                return
            await asyncio.sleep(0)
        # Not closed by its transport: end it for the peer at least, before another is dialled.
        for sock in going:
            if sock.fileno() != -1:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class Lane:
    """One slot's socket and the session that uses it."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None,
        resolver: AbstractResolver,
        connect_timeout: float,
        read_timeout: float,
        on_replay: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_replay = on_replay
        self._connector = _LaneConnector(tls, resolver)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "pullpool"},
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=connect_timeout, sock_read=read_timeout
            ),
            raise_for_status=False,
            read_bufsize=1 << 18,
        )
        self._session._retry_connection = False  # see "Replay"

    @property
    def is_open(self) -> bool:
        """Is there a socket that is not yet closed on our side?"""
        return self._connector.is_open

    @property
    def is_warm(self) -> bool:
        """Is there a socket that the next request will use?"""
        return self._connector.is_warm

    async def request(
        self, method: str, url: URL, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Send a request, once more if its socket was stale; follow nothing. Raises what aiohttp
        raises."""
        before = self._connector.dialled
        try:
            return await self._send(method, url, headers)
        except aiohttp.ClientConnectionError as error:
            if self._connector.dialled > before or not _is_stale(error):
                raise
        self._on_replay()
        return await self._send(method, url, headers)

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        return await self._session.request(method, url, headers=headers, allow_redirects=False)

    def abort(self) -> None:
        """Drop the socket, whatever it is doing."""
        self._connector.abort()

    async def shut(self) -> None:
        """Drop the socket and wait until it is closed."""
        await self._connector.shut()

    async def close(self) -> None:
        await self._connector.shut()
        await self._session.close()


def _is_stale(error: aiohttp.ClientConnectionError) -> bool:
    """Was the socket closed under a request? Not if it was silent, or a part of an answer came."""
    if isinstance(error, TimeoutError):
        return False
    # In a ServerDisconnectedError aiohttp hands on the head as far as it came.
    return not isinstance(error, aiohttp.ServerDisconnectedError) or isinstance(error.message, str)
