"""A listener that accepts as far as descriptors reach, with the TLS context of the moment.

Theory of operation. The loops' own servers are no use at the limit of descriptors: aiofastnet's
fails in its handling of EMFILE and is called again at once, for ever; libuv's accepts and closes,
which tells a client to go elsewhere. So the listening sockets are watched here:

* accepting: what is readable is accepted, at most ``LOT`` in a turn of the loop. A socket that took
  one of the reserve (descriptors.py) is the last one: it is served, and the listener pauses.
* paused: nothing watches the sockets, so a full queue of the kernel costs nothing. Clients wait in
  that queue, in order, and none is refused until it is full too. The end of any connection, or
  ``RETRY`` seconds, makes the listener look whether descriptors have come free; then it accepts
  again. An error of ``accept`` (EMFILE, ENFILE, ENOMEM, …) is a pause as well, so nothing spins.
* closed: the sockets are, and connections that were still being made end.

An accepted socket becomes a connection in a task of its own, as a handshake may take its time: with
the TLS context that was there when it was accepted. To replace the context is to name another one:
handshakes that have begun end with the old certificate, open connections know nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from proxy.observe.metrics import ListenerState
from proxy.store.work import finish
from proxy.web.descriptors import Descriptors, lowest_free
from proxy.web.server import AdminRunner, RegistryRunner, RegistryServer

#: Connections that may wait to be accepted.
BACKLOG = 4096
#: Connections accepted in one turn of the loop. With 64 the beginnings of as many answers, which
#: come of them, held everything else up for up to 0.12 s of CPU while 5,000 came; now for 0.05 s.
LOT = 16
#: Seconds until a listener that pauses looks again, if no connection ends before.
RETRY = 1.0
#: Bytes that the kernel holds and has not sent yet: of each client, and of all while they are few.
#: Without a limit it takes megabytes for each one that is slow. But with 256 KiB each a crowd of 64
#: fast ones took 2.9 s for what takes 1.8 s without: each is woken for little at a time.
LEAST_UNSENT, MOST_UNSENT, ALL_UNSENT = 256 << 10, 4 << 20, 256 << 20

#: Errors of accept that are one client's: it has gone, or the network has (accept(2)).
_OF_ONE_CLIENT = frozenset(
    {
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
    }
)


class Listener:
    """Has ``server`` serve on an address.

    ``on_pause`` is told when no more clients are accepted for now, and the error if one is the
    cause; ``on_accept`` when they are again.
    """

    def __init__(
        self,
        server: RegistryServer,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        *,
        descriptors: Descriptors,
        sockets: Sequence[socket.socket] = (),
        on_pause: Callable[[OSError | None], None] = lambda _error: None,
        on_accept: Callable[[], None] = lambda: None,
    ) -> None:
        """``sockets`` that are bound already take the place of ``host`` and ``port``; they stay
        the caller's."""
        self._server = server
        self._host = host
        self._port = port
        self._tls = tls
        self._descriptors = descriptors
        self._on_pause = on_pause
        self._on_accept = on_accept
        self._sockets = [sock.dup() for sock in sockets]
        self._connecting: set[asyncio.Task[None]] = set()
        self._next_look: asyncio.Handle | None = None  # set while it pauses
        self._looks_soon = False
        self._is_watching = False
        self._room = 0
        self.accepts = 0  # calls of accept

    @property
    def port(self) -> int:
        """The port, the one the system chose when 0 was asked for."""
        return int(self._sockets[0].getsockname()[1])

    def state(self) -> ListenerState:
        """What metrics and the status page show."""
        return ListenerState(
            open=self._server.open + len(self._connecting),
            limit=self._room,
            paused=self._next_look is not None,
        )

    async def start(self) -> None:
        """Listen. Raises ``OSError``; then nothing stays open."""
        self._server.on_connection_lost = self.connection_lost
        try:
            await self._bind()
            for sock in self._sockets:
                sock.listen(BACKLOG)
            self._room = self._descriptors.left(lowest_free(self._sockets[0].fileno()))
        except BaseException:
            await self.close()
            raise
        self._watch()

    def replace_tls(self, tls: ssl.SSLContext) -> None:
        """Use another context for connections that are accepted from now on."""
        self._tls = tls

    async def close(self) -> None:
        """Accept no more; the connections are the server's."""
        self._stop_watching()
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()
        await asyncio.sleep(0)  # a task that is cancelled before its first step closes nothing
        connecting = list(self._connecting)
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)

    # -- accepting -------------------------------------------------------------------------

    def _accept(self, listening: socket.socket) -> None:
        """Take what waits at a socket."""
        for _ in range(LOT):
            self.accepts += 1
            try:
                sock, _address = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OF_ONE_CLIENT:
                    continue
                self._pause(error)
                return
            self._begin(sock)
            if self._descriptors.are_short(sock.fileno()):
                self._pause(None)
                return

    def _begin(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        held = unsent(self._server.open + len(self._connecting) + 1)
        with contextlib.suppress(OSError):  # its client has left
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, held)
        task = asyncio.create_task(self._connect(sock, self._tls), name="connect a client")
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Make a connection of an accepted socket, which belongs to its transport from then on."""
        options: dict[str, Any] = {} if tls is None else {"ssl": tls}
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the handshake failed, or its client has left
            await loop.connect_accepted_socket(self._server, sock, **options)
            return
        self.connection_lost()

    # -- pausing ---------------------------------------------------------------------------

    def _pause(self, error: OSError | None) -> None:
        self._stop_watching()
        self._look_later()
        self._on_pause(error)

    def connection_lost(self) -> None:
        """A connection has ended: look for descriptors once this turn of the loop is over."""
        if self._next_look is not None and not self._looks_soon:
            self._next_look.cancel()
            self._looks_soon = True
            self._next_look = asyncio.get_running_loop().call_soon(self._look)

    def _look_later(self) -> None:
        self._looks_soon = False
        self._next_look = asyncio.get_running_loop().call_later(RETRY, self._look)

    def _look(self) -> None:
        """Accept again if there are descriptors for it."""
        try:
            is_short = self._descriptors.are_short(lowest_free(self._sockets[0].fileno()))
        except OSError:
            is_short = True
        if is_short:
            self._look_later()
            return
        self._next_look, self._looks_soon = None, False
        self._watch()
        self._on_accept()

    def _watch(self) -> None:
        self._is_watching = True
        for sock in self._sockets:
            asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _stop_watching(self) -> None:
        if self._is_watching:
            for sock in self._sockets:
                asyncio.get_running_loop().remove_reader(sock.fileno())
        self._is_watching = False
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    async def _bind(self) -> None:
        if not self._sockets:
            loop = asyncio.get_running_loop()
            binding = loop.run_in_executor(None, bound_sockets, self._host, self._port)
            self._sockets = await finish(binding, _close_all)

    def __repr__(self) -> str:
        state = "paused" if self._next_look is not None else "accepting"
        return f"<Listener {self._host}:{self._port} {state}, {len(self._connecting)} connecting>"


@contextlib.asynccontextmanager
async def listening(
    runner: AdminRunner | RegistryRunner, host: str, port: int, **options: Any
) -> AsyncIterator[Listener]:
    """Serve on an address until the block ends; the arguments are ``Listener``'s. Raises
    ``OSError``."""
    await runner.setup()
    try:
        listener = Listener(runner.registry_server, host, port, **options)
        await listener.start()
        try:
            yield listener
        finally:
            await listener.close()
    finally:
        await runner.cleanup()


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


def unsent(clients: int) -> int:
    """Bytes that the kernel may hold unsent for one more client when there are ``clients``."""
    return max(LEAST_UNSENT, min(MOST_UNSENT, ALL_UNSENT // clients))


def _close_all(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


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
