"""An origin, its lanes and its turns: where sockets are opened and closed (DESIGN D1, D18).

Theory of operation
-------------------
aiohttp's connector frees its pool place *before* the socket is closed, counts only sockets in use,
and may dial a second one, so its ``limit`` is no cap. Here every slot of the gate has a *lane*: a
client session whose connector owns at most one socket. A lane

* dials only after its previous socket is closed (``_create_connection`` waits for that), so the
  sockets of an origin that are not yet closed on our side never outnumber its slots;
* keeps its socket after a body that was read to the end, for the next turn on the same slot;
* *aborts* the transport of a body that was not (uvloop with TLS would otherwise go on downloading
  it: measured 1 GB after the client had left at 0.4 MB).

A *turn* is one use of a slot: ``async with origin.turn(ticket) as turn``. On its way out, however
it ends, an unfinished response is aborted and the slot goes back.

When the limit is below the number of lanes, lanes with idle sockets beyond it are closed before a
cold lane dials, so that idle sockets never push the count over the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from proxy.observe.metrics import GateState, Metrics
from proxy.upstream.gate import Gate, HoldsSlot, RateLimit, Slot, Slots
from proxy.upstream.turns import Ticket

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler

#: Seconds a turn for bulk is meant to last (D2); a range is sized to it by the measured rate.
TURN_SECONDS = 2.0
#: A turn may overrun that this many times while others wait before it is cut.
OVERRUN = 2.0
MIN_TURN_BYTES = 1 << 20
MAX_TURN_BYTES = 64 << 20
#: Seconds an idle socket to an upstream is kept.
KEEPALIVE = 30.0
#: Loop turns a closing socket is waited for before the lane gives up.
CLOSE_PATIENCE = 1000


@dataclass(frozen=True, slots=True)
class OriginKey:
    """Where sockets go to: scheme, host, port."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: URL) -> OriginKey:
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"expected an http or https URL with a host, got {url}")
        return cls(url.scheme, url.host.lower(), url.port or 0)

    @property
    def label(self) -> str:
        """For metrics and logs: the host, with its port unless it is the scheme's own."""
        usual = {"http": 80, "https": 443}[self.scheme]
        return self.host if self.port == usual else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """How to reach an origin and how hard it may be used."""

    max_connections: int = 16
    max_waiting: int = 10_000
    connect_timeout: float = 10.0
    read_timeout: float = 60.0
    tls: ssl.SSLContext | None = None


class _LaneConnector(aiohttp.TCPConnector):
    """A connector that has at most one socket that is not closed.

    ``socket_factory`` shows every socket that is dialled; one whose descriptor is gone is closed.
    ``_create_connection`` is aiohttp's hook for connectors (its own Unix connector overrides it).
    """

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        super().__init__(
            limit=1,
            ssl=tls if tls is not None else True,
            keepalive_timeout=KEEPALIVE,
            happy_eyeballs_delay=None,  # would dial a second socket beside the first
            socket_factory=self._dial,
        )
        self._sockets: list[socket.socket] = []
        self._transport: asyncio.BaseTransport | None = None

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

    async def _create_connection(self, *args: Any, **kwargs: Any) -> ResponseHandler:
        await self.shut()
        proto = await super()._create_connection(*args, **kwargs)
        self._transport = proto.transport
        return proto

    async def shut(self) -> None:
        """Abort the socket, if there is one, and wait until it is closed."""
        transport, self._transport = self._transport, None
        if isinstance(transport, asyncio.Transport):
            transport.abort()
        for _ in range(CLOSE_PATIENCE):
            if not self.is_open:
                return
            await asyncio.sleep(0)
        # Not closed by its transport: say goodbye to the peer at least, before another is dialled.
        for sock in self._sockets:
            if sock.fileno() != -1:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class Lane:
    """One slot's socket and the session that uses it."""

    def __init__(self, settings: OriginSettings) -> None:
        self._connector = _LaneConnector(settings.tls)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "pullpool"},
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=settings.connect_timeout,
                sock_read=settings.read_timeout,
            ),
            raise_for_status=False,
            read_bufsize=1 << 18,
        )

    @property
    def is_open(self) -> bool:
        return self._connector.is_open

    async def request(
        self, method: str, url: URL, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        return await self._session.request(method, url, headers=headers, allow_redirects=False)

    async def shut(self) -> None:
        await self._connector.shut()

    async def close(self) -> None:
        await self._connector.shut()
        await self._session.close()


class Turn:
    """The use of one slot, from its grant to its end."""

    def __init__(self, origin: Origin, slot: Slot) -> None:
        self.origin = origin
        self.slot = slot
        self._response: aiohttp.ClientResponse | None = None

    async def request(
        self, method: str, url: URL, headers: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """Send one request on this turn's socket; what is left of the previous one is aborted."""
        await self.finish()
        self._response = await self.origin.send(self.slot, method, url, headers or {})
        return self._response

    async def finish(self) -> None:
        """End the response: nothing to do if it was read to its end, else abort its socket."""
        response, self._response = self._response, None
        if response is None:
            return
        connection = response.connection
        if connection is not None and connection.transport is not None:
            # Before close(): see the module's docstring.
            connection.transport.abort()
        response.close()

    @property
    def is_overdue(self) -> bool:
        """Has the turn lasted so long that somebody who waits should have it now?"""
        held = self.origin.clock() - self.slot.since
        return held > TURN_SECONDS * OVERRUN and self.origin.slots.has_rival(self.slot)

    def __repr__(self) -> str:
        return f"<Turn on slot {self.slot.number} of {self.origin.key.label}>"


class Origin:
    """A (scheme, host, port): its gate and its lanes."""

    def __init__(
        self,
        key: OriginKey,
        settings: OriginSettings,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        rate: RateLimit | None = None,
    ) -> None:
        self.key = key
        self.settings = settings
        self.clock = clock
        self.gate = Gate(
            key.label,
            capacity=settings.max_connections,
            metrics=metrics,
            clock=clock,
            max_waiting=settings.max_waiting,
            rate=rate,
            is_open=self._is_open,
        )
        self.slots: Slots = self.gate
        self._metrics = metrics
        self._lanes: dict[int, Lane] = {}
        self._busy: set[int] = set()
        self._bytes_per_second = MAX_TURN_BYTES / TURN_SECONDS

    @contextlib.asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncIterator[Turn]:
        """Wait for a turn and hold it. Raises ``QueueFull``."""
        async with HoldsSlot(self.slots, ticket) as slot:
            turn = Turn(self, slot)
            self._busy.add(slot.number)
            try:
                yield turn
            finally:
                self._busy.discard(slot.number)
                await turn.finish()

    async def send(
        self, slot: Slot, method: str, url: URL, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """One request on the slot's lane, counted. Raises what aiohttp raises."""
        lane = self._lanes.get(slot.number)
        if lane is None:
            lane = self._lanes[slot.number] = Lane(self.settings)
        if not lane.is_open:
            await self._make_room()
        started = self.clock()
        response = await lane.request(method, url, headers)
        self._metrics.upstream_requests.labels(self.key.label, str(response.status)).inc()
        self._metrics.upstream_duration.labels(self.key.label).observe(self.clock() - started)
        return response

    async def _make_room(self) -> None:
        """Close idle sockets that would, with the ones in turns, exceed the limit."""
        for number, lane in list(self._lanes.items()):
            held = self._busy | {n for n, other in self._lanes.items() if other.is_open}
            if len(held) <= self.slots.limit:
                return
            if number not in self._busy and lane.is_open:
                await lane.shut()

    def learn_rate(self, received: int, seconds: float) -> None:
        """One turn brought ``received`` bytes in ``seconds``: size the next one by it."""
        if received >= MIN_TURN_BYTES // 4 and seconds > 0:
            self._bytes_per_second += (received / seconds - self._bytes_per_second) / 4

    @property
    def turn_bytes(self) -> int:
        """How many bytes the next turn for bulk should ask for: about two seconds' worth."""
        return int(max(MIN_TURN_BYTES, min(MAX_TURN_BYTES, self._bytes_per_second * TURN_SECONDS)))

    def count_bytes(self, received: int) -> None:
        self._metrics.upstream_bytes.labels(self.key.label).inc(received)

    @property
    def is_idle(self) -> bool:
        """No turn in use, nobody waiting, no socket open."""
        state = self.slots.state()
        return not (state.active or state.idle or sum(state.depth.values()))

    def state(self) -> GateState:
        return self.slots.state()

    def _is_open(self, number: int) -> bool:
        lane = self._lanes.get(number)
        return lane is not None and lane.is_open

    async def close(self) -> None:
        for lane in self._lanes.values():
            await lane.close()
        self._lanes.clear()

    def __repr__(self) -> str:
        return f"<Origin {self.key.label} {self.slots!r}>"


class Origins:
    """Every origin in use: those of configured upstreams, and those that redirects lead to."""

    #: Redirect targets kept at most; idle ones leave first.
    MAX_FOREIGN = 256

    def __init__(self, *, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._own: dict[OriginKey, Origin] = {}
        self._foreign: OrderedDict[OriginKey, Origin] = OrderedDict()

    def add(self, url: URL, settings: OriginSettings, rate: RateLimit | None = None) -> Origin:
        """The origin of a configured upstream. Upstreams that share one share its gate, which
        takes the settings of the first."""
        key = OriginKey.of(url)
        if key not in self._own:
            self._own[key] = Origin(
                key, settings, metrics=self._metrics, clock=self._clock, rate=rate
            )
        return self._own[key]

    async def foreign(self, url: URL, settings: OriginSettings) -> Origin:
        """The origin of a redirect or of a token service, made when it is first met."""
        key = OriginKey.of(url)
        known = self._own.get(key) or self._foreign.get(key)
        if known is None:
            known = Origin(key, settings, metrics=self._metrics, clock=self._clock)
            self._foreign[key] = known
            await self._forget_idle()
        elif key in self._foreign:
            self._foreign.move_to_end(key)
        return known

    async def _forget_idle(self) -> None:
        for key, origin in list(self._foreign.items())[:-1]:
            if len(self._foreign) <= self.MAX_FOREIGN:
                return
            if origin.is_idle:
                del self._foreign[key]
                await origin.close()

    def states(self) -> list[GateState]:
        return [origin.state() for origin in (*self._own.values(), *self._foreign.values())]

    async def close(self) -> None:
        for origin in (*self._own.values(), *self._foreign.values()):
            await origin.close()
        self._own.clear()
        self._foreign.clear()
