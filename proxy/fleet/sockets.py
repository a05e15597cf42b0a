"""The sockets to givers: few to each, some of them idle, and none that nobody counts (D1).

Theory of operation. A *berth* is the right to one socket to a giver; there are ``most`` for each.
It is taken before anything is looked up or dialled, and is free again when its socket is closed on
our side, however its transfer ended: what was aborted counts until then. A transfer whose answer
was read to the end leaves its connection idle, for the next one to the same giver; idle ones are
aborted after ``idle_seconds``, the oldest also when there are more than ``idle_most`` in all.

Nobody waits for a berth but for those that are being closed: a giver that is asked enough is busy,
and its taker asks another one.

Only the address that a giver's URL says is dialled, and nothing that an answer says. With TLS only
``https``, without it only ``http``; where nodes cannot prove who they are, only this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from proxy.fleet.connection import Connection, connect
from proxy.oci.errors import PeerBusy, PeerFailed

#: Loop turns that a socket which was aborted is waited for.
CLOSE_PATIENCE = 100

_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]{1,253}):([1-9][0-9]{0,4})/?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a giver listens."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Place:
        """Raises ``PeerFailed`` for what is no address of a node."""
        found = _URL.fullmatch(url)
        if found is None or int(found[3]) > 65535:
            raise PeerFailed("its URL is not http(s)://HOST:PORT")
        return cls(found[1], found[2].strip("[]").lower(), int(found[3]))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Berth:
    """One socket to a giver, from before it is dialled until it is closed."""

    def __init__(self) -> None:
        self.is_dialling = True
        self.connection: Connection | None = None
        self.sock: socket.socket | None = None
        self.expiry: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self.is_dialling or (self.sock is not None and self.sock.fileno() != -1)


class _Room:
    """Seats for those who use a socket to one giver; ``people``: they, and those who wait."""

    __slots__ = ("people", "seats")

    def __init__(self, seats: int) -> None:
        self.people = 0
        self.seats = asyncio.Semaphore(seats)


class Sockets:
    """See above. ``tls`` gives the context of the moment, None for plain HTTP."""

    def __init__(
        self,
        *,
        tls: Callable[[], ssl.SSLContext | None],
        is_local: bool,
        most: int,
        idle_most: int,
        idle_seconds: float,
        patience: float,
        progress: float,
        ahead: int,
    ) -> None:
        """``is_local``: only this machine may be dialled. Times in seconds, ``patience`` for a
        socket and ``progress`` for what comes over it; ``ahead`` in bytes."""
        self._tls = tls
        self._is_local = is_local
        self._most = most
        self._idle_most = idle_most
        self._idle_seconds = idle_seconds
        self._patience = patience
        self._progress = progress
        self._ahead = ahead
        self._berths: dict[Place, list[Berth]] = {}
        self._idle: dict[Berth, Place] = {}  # oldest first
        self._rooms: dict[Place, _Room] = {}  # where somebody uses or waits for one
        self._is_closed = False

    def __len__(self) -> int:
        """Sockets that are not closed on our side."""
        return sum(berth.is_open for berths in self._berths.values() for berth in berths)

    @property
    def idle(self) -> int:
        """Of these, those that no transfer uses."""
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """Those who wait for one, since as many as may be are used."""
        return sum(max(0, room.people - self._most) for room in self._rooms.values())

    @property
    def held(self) -> int:
        """Bytes that have come and were not gathered yet."""
        berths = (berth for known in self._berths.values() for berth in known)
        return sum(berth.connection.held for berth in berths if berth.connection is not None)

    async def take(self, place: Place, *, fresh: bool = False) -> tuple[Berth, Connection]:
        """A connection to a giver, a ``fresh`` one or one that was idle; ``give`` it back. Waits
        while as many are used as there may be.

        Raises ``PeerBusy`` and ``PeerFailed``.
        """
        await self._come(place)
        try:
            return await self._taken(place, fresh)
        except BaseException:
            self._go(place)
            raise

    async def _come(self, place: Place) -> None:
        """Into the giver's room, once there is a seat. Raises ``PeerBusy``."""
        room = self._rooms.setdefault(place, _Room(self._most))
        room.people += 1
        try:
            async with asyncio.timeout(self._patience):
                await room.seats.acquire()
        except BaseException as error:
            self._leave(place, room)
            if isinstance(error, TimeoutError):
                text = f"we ask it for {self._most} stripes already"
                raise PeerBusy(text) from None
            raise

    def _go(self, place: Place) -> None:
        room = self._rooms[place]
        room.seats.release()
        self._leave(place, room)

    def _leave(self, place: Place, room: _Room) -> None:
        room.people -= 1
        if not room.people:
            del self._rooms[place]

    async def _taken(self, place: Place, fresh: bool) -> tuple[Berth, Connection]:
        if self._is_closed:
            raise PeerFailed("this node is closing")
        while (berth := self._idle_at(place)) is not None:
            connection = self._roused(berth)
            if not fresh and connection.is_idle:
                return berth, connection
            connection.abort()  # one was stale, so they all may be
        berth = Berth()
        await self._enter(place, berth)
        try:
            connection = await self._dial(place, berth)
        finally:
            berth.is_dialling = False
        if self._is_closed:  # meanwhile
            self._put_back(place, berth)
            raise PeerFailed("this node is closing")
        return berth, connection

    def _idle_at(self, place: Place) -> Berth | None:
        """The one that was used last."""
        return next((berth for berth, at in reversed(self._idle.items()) if at == place), None)

    def _roused(self, berth: Berth) -> Connection:
        del self._idle[berth]
        if berth.expiry is not None:
            berth.expiry.cancel()
            berth.expiry = None
        assert berth.connection is not None
        return berth.connection

    async def _enter(self, place: Place, berth: Berth) -> None:
        """Take a place among the berths, once one is free. Raises ``PeerBusy``."""
        if place not in self._berths:
            for known_place in list(self._berths):
                self._sweep(known_place)
        for _ in range(CLOSE_PATIENCE):
            open_ones = [known for known in self._berths.get(place, ()) if known.is_open]
            if len(open_ones) < self._most:
                self._berths[place] = [*open_ones, berth]
                return
            if all(known.is_dialling or _is_used(known) for known in open_ones):
                break
            await asyncio.sleep(0)  # for one that is being closed
        raise PeerBusy(f"it is asked for {self._most} stripes already")

    async def _dial(self, place: Place, berth: Berth) -> Connection:
        tls = self._tls()
        if (tls is not None) != (place.scheme == "https"):
            expected = "https" if tls is not None else "http"
            raise PeerFailed(f"its URL is {place.scheme}, and nodes here speak {expected}")
        try:
            async with asyncio.timeout(self._patience):
                return await self._reach(place, berth, tls)
        except TimeoutError:
            raise PeerFailed(f"no connection within {self._patience:g} s") from None
        except (OSError, ValueError) as error:  # ssl.SSLError and ssl.CertificateError among them
            raise PeerFailed(f"no connection: {error}") from error

    async def _reach(self, place: Place, berth: Berth, tls: ssl.SSLContext | None) -> Connection:
        """Try the addresses that a host has, one after the other."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        refused: OSError | None = None
        for family, _, _, _, address in dict.fromkeys(found):
            if self._is_local and not _is_loopback(address):
                raise PeerFailed("without a secret or certificates only this machine is asked")
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            berth.sock = sock
            connection = Connection(patience=self._progress, ahead=self._ahead)
            try:
                await connect(connection, sock, address, tls=tls, name=place.host)
            except ssl.SSLError:
                raise
            except OSError as error:
                refused = error
                await _closed(partial(_is_shut, sock))
                continue
            berth.connection = connection
            return connection
        raise refused or OSError("the host has no address")

    def give(self, place: Place, berth: Berth) -> None:
        """Who took it is done with it."""
        self._put_back(place, berth)
        self._go(place)

    def _put_back(self, place: Place, berth: Berth) -> None:
        connection = berth.connection
        if connection is not None and connection.is_idle and not self._is_closed:
            loop = asyncio.get_running_loop()
            berth.expiry = loop.call_later(self._idle_seconds, self._expire, berth)
            self._idle[berth] = place
            if len(self._idle) > self._idle_most:
                self._expire(next(iter(self._idle)))
        elif connection is not None:
            connection.abort()
        self._sweep(place)

    def _expire(self, berth: Berth) -> None:
        place = self._idle[berth]
        self._roused(berth).abort()
        self._sweep(place)

    def _sweep(self, place: Place) -> None:
        """Forget what is closed, and a giver that has none left."""
        left = [berth for berth in self._berths.get(place, ()) if berth.is_open]
        if left:
            self._berths[place] = left
        else:
            self._berths.pop(place, None)

    async def close(self) -> None:
        """Abort them all, and wait until they are closed; none is dialled any more."""
        self._is_closed = True
        for berth in list(self._idle):
            self._roused(berth)
        for berths in self._berths.values():
            for berth in berths:
                if berth.connection is not None:
                    berth.connection.abort()
        await _closed(lambda: not len(self))

    def __repr__(self) -> str:
        return f"<Sockets {len(self)} to {len(self._berths)} givers, {len(self._idle)} idle>"


async def _closed(is_closed: Callable[[], bool]) -> None:
    """Give sockets that were aborted the few turns until they are closed."""
    for _ in range(CLOSE_PATIENCE):
        if is_closed():
            return
        await asyncio.sleep(0)


def _is_shut(sock: socket.socket) -> bool:
    return sock.fileno() == -1


def _is_used(berth: Berth) -> bool:
    """Is it neither closed nor being closed?"""
    return berth.connection is not None and not berth.connection.is_ending


def _is_loopback(address: Any) -> bool:
    return ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
