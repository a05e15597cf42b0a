"""A listener whose TLS context can be replaced while it serves.

Theory of operation. A server keeps the context it was made with, and to change a context that is
in use is to race with handshakes. So the listening socket stays for the life of the listener, and
what changes is the server on top of it: the new one, with the new context, accepts from a duplicate
of the socket's descriptor before the old one closes its own. Both take from one queue of the
kernel: no connection is refused or lost, a handshake that has begun ends with the old certificate,
and connections that are open know nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence

from aiohttp import web

#: Connections that may wait to be accepted.
BACKLOG = 4096


async def listen(
    stack: contextlib.AsyncExitStack,
    runner: web.BaseRunner,
    host: str,
    port: int,
    sockets: Sequence[socket.socket] = (),
) -> int:
    """Serve on an address, or on ``sockets`` that are bound to it, until the stack unwinds; the
    port, the one the system chose when 0 was asked for."""
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    sites: list[web.BaseSite] = [
        web.SockSite(runner, sock.dup(), backlog=BACKLOG) for sock in sockets
    ]
    for site in sites or [web.TCPSite(runner, host, port, backlog=BACKLOG)]:
        await site.start()
    return int(runner.addresses[0][1])


class Listener:
    """Serves ``runner`` on an address."""

    def __init__(
        self,
        runner: web.BaseRunner,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        *,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """``sockets`` that are bound already take the place of ``host`` and ``port``."""
        self._runner = runner
        self._host = host
        self._port = port
        self._tls = tls
        self._sockets = [sock.dup() for sock in sockets]
        self._sites: list[web.BaseSite] = []

    @property
    def port(self) -> int:
        """The port, the one the system chose when 0 was asked for."""
        return int(self._sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen. Raises ``OSError``; then nothing stays open."""
        try:
            await self._bind()
            self._sites = await self._serve(self._tls)
        except BaseException:
            await self.close()
            raise

    async def replace_tls(self, tls: ssl.SSLContext) -> None:
        """Use another context for connections that are accepted from now on. Raises ``OSError``
        (no descriptor is left, say); then everything is as it was."""
        old, self._sites = self._sites, await self._serve(tls)
        for site in old:
            await site.stop()

    async def close(self) -> None:
        """Accept no more; the connections are the runner's."""
        sites, self._sites = self._sites, []
        for site in sites:
            await site.stop()
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()

    async def _serve(self, tls: ssl.SSLContext | None) -> list[web.BaseSite]:
        """A server on each socket; none when one of them fails."""
        async with contextlib.AsyncExitStack() as started:
            sites: list[web.BaseSite] = []
            for sock in self._sockets:
                site = web.SockSite(self._runner, sock.dup(), ssl_context=tls, backlog=BACKLOG)
                await site.start()
                started.push_async_callback(site.stop)
                sites.append(site)
            started.pop_all()
        return sites

    async def _bind(self) -> None:
        if not self._sockets:
            self._sockets = await asyncio.to_thread(bound_sockets, self._host, self._port)


def bound_sockets(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """A socket for each address that ``host`` means. ``shared``: others may be bound beside them.
    Looks up names, which may take a while. Raises ``OSError``; then none is open."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for family, _, _, _, address in dict.fromkeys(found):
            if sockets and port == 0:
                break  # the system would choose another port for each
            sockets.append(_bound(family, address, shared=shared))
            stack.callback(sockets[-1].close)
        stack.pop_all()
    return sockets


def _bound(family: int, address: tuple[object, ...], *, shared: bool) -> socket.socket:
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:  # "::" is not 0.0.0.0 too
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind(address)
        except OSError as error:
            words = f"cannot listen on {address[0]} port {address[1]}: {error.strerror}".lower()
            raise OSError(error.errno, words) from error
        stack.pop_all()
    return sock
