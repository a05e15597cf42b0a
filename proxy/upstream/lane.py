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

Before each dial the lane asks (``on_dial``): where several nodes share the cap, the lease may have
been lost since the turn was granted. ``cut`` ends what is being dialled, too.

``abort`` is how a socket with an unfinished answer ends. Closing it would not do: uvloop with TLS
goes on downloading until its shutdown time-out (measured: 1 GB after the client had left at
0.4 MB). The descriptor goes away within a loop turn or two after it, on every loop we run on.

What the other side can do to a lane is bounded here: the head of an answer has its time from the
moment the request can leave, whatever comes meanwhile, and so many interim answers (1xx) and no
more; a socket on which bytes came that nobody asked for is not used again, because they would be
taken for the answer to the next request; and no socket is made, nor one that is open used, to an
address that the request may not reach (``reach.py``).

Through an egress proxy it is one socket too: the tunnel to an https origin is made by CONNECT on
the socket to the proxy, and what TLS wraps then is that socket.

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
import functools
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from proxy.upstream.certificates import Tls, context_of
from proxy.upstream.egress import EgressProxy
from proxy.upstream.reach import ANYWHERE, Reach

#: Seconds an idle socket to an upstream is kept.
KEEPALIVE = 30.0
#: Loop turns that an aborted socket is waited for before it is shut down under its transport.
CLOSE_PATIENCE = 100
#: Interim answers (1xx) before an answer, at most.
MAX_INTERIM = 16
#: Bytes in which no byte of a body comes: more than the largest head that is taken.
MAX_BARREN = 2 << 20


class _Protocol(ResponseHandler):
    """Gives up where aiohttp would go on for ever: interim answers; chunk sizes, extensions and
    whatever else is no body; answers to nobody on an idle socket, which it would keep."""

    _interim = 0
    _barren = 0
    _fed = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        fed = self._payload.total_bytes if self._payload is not None else 0
        self._barren = self._barren + len(data) if fed == self._fed else 0
        self._fed = fed
        if self._barren <= MAX_BARREN and len(self._buffer) <= MAX_INTERIM:
            return
        self._give_up(aiohttp.ClientPayloadError("more than an answer may have beside its body"))

    def connection_lost(self, exc: BaseException | None) -> None:
        payload = self._payload
        super().connection_lost(exc)
        # After some errors of its parser aiohttp leaves those waiting who read the body.
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(aiohttp.ClientPayloadError("it ended with its connection"))

    def _give_up(self, error: aiohttp.ClientPayloadError) -> None:
        self.set_exception(error)
        if self._payload is not None:
            self._payload.set_exception(error)
        if self.transport is not None:
            self.transport.abort()

    async def read(self) -> Any:
        message = await super().read()
        self._barren = self._fed = 0
        status = message[0].code
        self._interim = self._interim + 1 if status < 200 else 0
        if self._interim > MAX_INTERIM:
            raise HttpProcessingError(code=400, message="too many interim answers")
        return message


class _LaneConnector(aiohttp.TCPConnector):
    """A connector that has at most one socket that is not closed.

    ``_create_connection`` is aiohttp's hook for connectors (its own Unix connector overrides it).
    """

    def __init__(
        self,
        tls: Tls,
        proxy_tls: Tls,
        resolver: AbstractResolver,
        connect_timeout: float,
        on_dial: Callable[[], None],
    ) -> None:
        super().__init__(
            limit=1,
            keepalive_timeout=KEEPALIVE,
            happy_eyeballs_delay=None,  # would dial a second socket beside the first
            resolver=resolver,
            use_dns_cache=False,  # the resolver has its own, for all lanes
            socket_factory=self._dial,
        )
        self.dialled = 0  # how often
        self._dial_limit: asyncio.Timeout | None = None  # while it dials
        self._on_dial = on_dial
        # aiohttp has no parameter for it.
        self._factory = functools.partial(
            _Protocol,
            loop=self._loop,  # type: ignore[assignment]  # partial is invariant
        )
        self._tls = tls
        self._proxy_tls = proxy_tls
        self._contexts: tuple[ssl.SSLContext | None, ssl.SSLContext | None] = (None, None)
        self._connect_timeout = connect_timeout
        self._sockets: list[socket.socket] = []
        self._proto: ResponseHandler | None = None
        self._transport: asyncio.Transport | None = None
        self._request = _Request(ANYWHERE)
        self.peer: str | None = None  # whom the socket leads to: an address, or a name

    def begin(self, request: _Request) -> None:
        """What is asked for from now on is this: a lane serves one request at a time."""
        self._request = request

    def _dial(self, addr_info: Any) -> socket.socket:
        family, kind, proto, _name, address = addr_info
        if not self._request.is_proxied:
            self._request.expect(str(address[0]), address[1])
        self._on_dial()
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

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        """The socket for a request; the time for the head of its answer begins with it.

        Raises ``RedirectRefused`` for one that the request may not reach.
        """
        self._request.is_proxied = req.proxy is not None
        if req.proxy is not None:
            self._request.expect(req.host, req.port)
        elif self.peer is not None and self.is_warm:
            self._request.expect(self.peer, req.port)
        if self._is_poisoned():
            await self.shut()
        self._request.stop_clock()
        known = self._proto
        connection = await super().connect(req, traces, timeout)
        if self._proto is not known and self._is_poisoned(is_fresh=True):
            connection.close()
            await self.shut()
            text = "it spoke before anything was asked"
            raise aiohttp.ClientResponseError(req.request_info, (), message=text)
        self._request.start_clock()
        return connection

    def _is_poisoned(self, *, is_fresh: bool = False) -> bool:
        """Did bytes come, or the end, on the idle socket? They would be the next answer."""
        if not self.is_warm or self._proto is None or self._transport is None:
            return False
        if self._proto.should_close:
            return True
        if is_fresh and self._transport.get_extra_info("ssl_object") is not None:
            return False  # TLS 1.3 begins with tickets that nobody asked for
        try:
            # What the kernel has and the loop has not read yet. Over TLS it may be a harmless
            # record; then one socket more is made than was needed.
            found = self._sockets[-1].recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:  # reset, or closed on our side
            return not is_fresh
        return bool(found) or not is_fresh  # who closes at once says so to the request itself

    async def _create_connection(self, req: Any, *args: Any, **kwargs: Any) -> ResponseHandler:
        self.dialled += 1
        await self.shut()
        self.peer = None
        self._contexts = (await context_of(self._tls), await context_of(self._proxy_tls))
        try:
            async with asyncio.timeout(None) as self._dial_limit:
                proto = await self._connect(req, *args, **kwargs)
        finally:
            self._dial_limit = None
        self._proto = proto
        self._transport = proto.transport
        return proto

    async def _connect(self, req: Any, *args: Any, **kwargs: Any) -> ResponseHandler:
        if req.proxy is None:
            proto = await super()._create_connection(req, *args, **kwargs)
            self.peer = _peer_of(proto)
        else:
            try:
                # aiohttp waits for the answer to CONNECT without an end.
                async with asyncio.timeout(self._connect_timeout):
                    proto = await super()._create_connection(req, *args, **kwargs)
            except TimeoutError as error:
                raise aiohttp.ConnectionTimeoutError("through the egress proxy") from error
            self.peer = req.host
        return proto

    def _get_ssl_context(self, req: Any) -> ssl.SSLContext | None:
        """The upstream's context for the upstream, another one for the egress proxy."""
        is_to_proxy = self._request.is_proxied and req.proxy is None
        context = self._contexts[is_to_proxy]
        if context is None or not req.is_ssl():
            return super()._get_ssl_context(req)
        return context

    def abort(self) -> None:
        """Drop the socket, whatever it is doing; it is closed within a loop turn or two."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def cut(self) -> None:
        """Drop the socket and, other than ``abort``, one that is being made: that is cancelled."""
        self.abort()
        if self._dial_limit is not None:
            self._dial_limit.reschedule(asyncio.get_running_loop().time())

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


def _peer_of(proto: ResponseHandler) -> str | None:
    name = proto.transport.get_extra_info("peername") if proto.transport is not None else None
    return str(name[0]) if name else None


class _Request:
    """The request under way: where it may go, and until when the head of its answer has to come."""

    def __init__(
        self, reach: Reach, name: str = "", patience: float = 0.0, *, hurries: bool = False
    ) -> None:
        self._reach = reach
        self._name = name
        self._patience = patience
        self._hurries = hurries
        self.is_proxied = False
        self.limit = asyncio.timeout(None)

    def expect(self, place: str, port: int) -> None:
        """Raises ``RedirectRefused`` if it may not go there."""
        self._reach.expect(place, port, self._name)

    def stop_clock(self) -> None:
        """A socket may be made, which has a time of its own unless there is none to lose."""
        if self._hurries:
            self.start_clock()
        else:
            self.limit.reschedule(None)

    def start_clock(self) -> None:
        self.limit.reschedule(asyncio.get_running_loop().time() + self._patience)


class Lane:
    """One slot's socket and the session that uses it."""

    def __init__(
        self,
        *,
        tls: Tls,
        resolver: AbstractResolver,
        connect_timeout: float,
        read_timeout: float,
        on_replay: Callable[[], None] = lambda: None,
        on_dial: Callable[[], None] = lambda: None,
        proxy: EgressProxy | None = None,
        proxy_tls: Tls = None,
    ) -> None:
        self._on_replay = on_replay
        self._connector = _LaneConnector(tls, proxy_tls, resolver, connect_timeout, on_dial)
        self._patience = read_timeout
        self._proxy = proxy
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

    @property
    def peer(self) -> str | None:
        """The address that the socket leads to, or what the egress proxy was asked for."""
        return self._connector.peer

    async def request(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        *,
        reach: Reach = ANYWHERE,
        patience: float | None = None,
        data: bytes | None = None,
    ) -> aiohttp.ClientResponse:
        """Send a request, once more if its socket was stale; follow nothing.

        ``patience`` is for the head of the answer, and for the socket before it, in seconds.

        Raises what aiohttp raises, ``TimeoutError``, ``RedirectRefused`` and ``CannotTrust``.
        """
        hurries = patience is not None
        patience = self._patience if patience is None else min(patience, self._patience)
        request = _Request(reach, url.host or "", patience, hurries=hurries)
        self._connector.begin(request)
        before = self._connector.dialled
        async with request.limit:
            try:
                return await self._send(method, url, headers, data)
            except aiohttp.ClientConnectionError as error:
                if self._connector.dialled > before or not _is_stale(error):
                    raise
            self._on_replay()
            return await self._send(method, url, headers, data)

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str], data: bytes | None
    ) -> aiohttp.ClientResponse:
        return await self._session.request(
            method, url, allow_redirects=False, data=data, **self._through_proxy(url, headers)
        )

    def _through_proxy(self, url: URL, headers: Mapping[str, str]) -> dict[str, Any]:
        """What a request is sent with. Inside a tunnel nothing shows the proxy's password."""
        if self._proxy is None:
            return {"headers": headers}
        shown = self._proxy.authorization
        known = {"Proxy-Authorization": shown} if shown else {}
        if url.scheme == "https":
            return {"headers": headers, "proxy": self._proxy.url, "proxy_headers": known}
        return {"headers": {**headers, **known}, "proxy": self._proxy.url}

    def abort(self) -> None:
        """Drop the socket, whatever it is doing."""
        self._connector.abort()

    def cut(self) -> None:
        """Drop the socket, be it that it is only being made."""
        self._connector.cut()

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
