"""An origin, its lanes and its turns: where sockets are opened and closed (DESIGN D1, D2).

Theory of operation
-------------------
Every slot of an origin's gate has a *lane* (``lane.py``), made when it is first needed, which owns
at most one socket. A *turn* is one use of a slot: ``async with origin.turn(ticket) as turn``. On
its way out, however it ends, an answer that was not read to its end is aborted and the slot goes
back; neither step suspends, so a cancellation cannot come between them. The slot may be granted
again before the aborted socket is closed: its lane waits for that before it dials.

So the sockets that are not yet closed on our side never outnumber the lanes. When the limit is
below the number of lanes, lanes with idle sockets beyond it are closed before a request is sent, so
that idle sockets never push the count over the limit either. Where nodes share the limit
(``leases.py``) that is true of this node's part of it, and a turn whose socket had to be given up
with its lease fails with ``LeaseLost``, which is held against nobody.

Before a turn is queued for, ``conduct.py`` may hold it back: the origin is down, it asked for a
pause, or too many retries were made. The breaker is asked again when the slot has been granted, and
when the request is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TypeVar

import aiohttp
from yarl import URL

from proxy.observe.logs import Logger
from proxy.observe.metrics import GateState, Metrics
from proxy.oci.digest import Chunk
from proxy.oci.errors import (
    EgressFailed,
    EgressRefused,
    LeaseLost,
    PullError,
    UpstreamStalled,
)
from proxy.upstream.budget import RetryBudget
from proxy.upstream.cap import Cap
from proxy.upstream.conduct import Conduct
from proxy.upstream.egress import EgressProxy
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.errors import egress_failure, egress_refusal
from proxy.upstream.gate import Gate, Slot, Slots
from proxy.upstream.incoming import Incoming
from proxy.upstream.lanes import Borrowing, Lanes
from proxy.upstream.learned import CapBook
from proxy.upstream.leases import Alone, LeaseSource, RateLimit
from proxy.upstream.reach import ANYWHERE, Reach
from proxy.upstream.ring import Rings
from proxy.upstream.stall import StallLimit
from proxy.upstream.turns import Ticket

E = TypeVar("E", bound=PullError)

#: Seconds a turn for bulk is meant to last (D2); a range is sized to it by the measured rate.
TURN_SECONDS = 2.0
#: A turn may overrun that this many times while others wait before it is cut.
OVERRUN = 2.0
MIN_TURN_BYTES = 512 << 10
#: A turn that brought so many bytes before it broke was no failed try.
WORTHWHILE = 256 << 10
MAX_TURN_BYTES = 64 << 20


class Turn:
    """The use of one slot, from its grant to its end."""

    def __init__(self, origin: Origin, slot: Slot, repository: str = "") -> None:
        self.origin = origin
        self.slot = slot
        self.repository = repository
        self.patience: float | None = None  # for the head of an answer; None: read_timeout
        self.stall = origin.settings.stall
        self._response: aiohttp.ClientResponse | None = None
        self._incoming: Incoming | None = None
        self._answered_at: float | None = None
        self._sent_at = slot.since
        # Only a request that went out at a full cap says that the cap could be larger.
        self._was_full = origin.gate.is_full(slot.turn_class)
        self.cuts = origin.cuts  # when its request was sent
        self.was_of_use = False  # there was an answer that was meant
        self._received = 0  # bytes of bodies

    async def request(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | None = None,
        *,
        reach: Reach = ANYWHERE,
        data: bytes | None = None,
    ) -> aiohttp.ClientResponse:
        """Send one request on this turn's socket; what is left of the previous one is aborted.

        ``reach`` says where it may go, ``data`` is its body.
        Raises what aiohttp raises, ``TimeoutError`` and ``RedirectRefused``.
        """
        self.finish()
        await self.origin.allow(self)
        self._sent_at = self.origin.clock()
        self.cuts = self.origin.cuts
        try:
            self._response = await self.origin.send(
                self, method, url, headers or {}, reach=reach, patience=self._patience(), data=data
            )
        except BaseException:
            # aiohttp closes the socket; but a cancelled request may be answered at length.
            self.origin.abort(self.slot)
            raise
        self._answered_at = self.origin.clock()
        self._incoming = Incoming(self._response, self.stall, self.origin)
        return self._response

    def _patience(self) -> float | None:
        """For the head of the next answer; that of a probe may be shorter."""
        known = [self.patience, self.origin.conduct.health.patience(self.slot.number)]
        return min((one for one in known if one is not None), default=None)

    async def borrow(self, most: int = -1) -> Chunk:
        """The next bytes of the body, up to ``most`` (-1: as many as there are); ``b""`` at its
        end. They are good until the next call, or the end of the turn.
        Raises what aiohttp raises, and ``UpstreamStalled`` and ``LeaseLost``, after which the turn
        has to end.
        """
        if self._incoming is None:
            raise ValueError(f"{self!r} has no answer to read")
        try:
            data = await self._incoming.borrow(most)
        except (aiohttp.ClientError, OSError, UpstreamStalled) as error:
            self.origin.expect_lease(self, error)
            raise
        if not data and self._response is not None and self._response.content_length is None:
            self.origin.expect_lease(self)  # the end may be that of a socket that was dropped
        self._received += len(data)
        return data

    def more(self, most: int) -> Chunk:
        """In a thread: see ``Incoming``."""
        return b"" if self._incoming is None else self._incoming.more(most)

    def settle(self, count: int) -> None:
        """So many bytes were taken by ``more``."""
        self._received += count
        if self._incoming is not None:
            self._incoming.settle(count)

    async def read(self, most: int = -1) -> bytes:
        """The same, to keep."""
        return bytes(await self.borrow(most))

    @property
    def peer(self) -> str:
        """Who answers: an address, or what the egress proxy was asked for."""
        return self.origin.peer(self.slot)

    def finish(self) -> None:
        """End the response: nothing to do if it was read to its end, else abort its socket."""
        response, self._response = self._response, None
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.end()
        if response is None:
            return
        if response.connection is not None:
            self.origin.abort(self.slot)  # before close(), which would only begin to close
        response.close()

    def was_answered(self, *, well: bool) -> None:
        """The upstream gave an answer that it meant; ``well``: what was asked for.

        Only that says that it stands more at once: to refuse or to miss something is little work,
        and whoever asks for nothing real would decide how many others may.
        """
        self.was_of_use = True
        self.origin.conduct.answered(self.repository, self._sent_at)
        if well:
            self.origin.conduct.went_well(self.slot, self._sent_at, full=self._was_full)

    def was_too_much(self, reason: str) -> None:
        """The upstream broke under this turn's request: fewer at once from now on (D6)."""
        self.origin.conduct.was_too_much(self.repository, self._sent_at, reason)

    def may_be_too_much(self, reason: str) -> None:
        """It was refused, be it for want of time."""
        self.origin.conduct.may_be_too_much(self._sent_at, reason)

    @property
    def has_moved_on(self) -> bool:
        """Did it bring so much that it was worth its place, even if it breaks then?"""
        return self._received >= WORTHWHILE

    @property
    def is_overdue(self) -> bool:
        """Has the answer lasted so long that somebody who waits should have the slot now?

        Counted from its head: a turn that had to wait for that still gets something done.
        """
        if self._answered_at is None:
            return False
        lasted = self.origin.clock() - self._answered_at
        return lasted > TURN_SECONDS * OVERRUN and self.origin.slots.has_rival(self.slot)

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
        log: Logger | None = None,
        caps: CapBook | None = None,
        budget: RetryBudget | None = None,
        rings: Rings | None = None,
        leases: LeaseSource | None = None,
    ) -> None:
        """``caps``: where the cap is remembered; without, nothing of it is. ``leases``: of whom
        the cap is shared with; without, of nobody."""
        self.key = key
        self.settings = settings
        self.clock = clock
        self.rings = (rings or Rings()) if settings.fast_receive else None
        self.leases = (leases or Alone()).open(key.label, settings.max_connections, rate)
        self.gate = Gate(
            key.label,
            capacity=settings.max_connections,
            metrics=metrics,
            clock=clock,
            max_waiting=settings.max_waiting,
            rate=self.leases.rate,
            leases=self.leases,
            is_open=lambda number: self._lanes.is_open(number),
            is_warm=lambda number: self._lanes.is_warm(number),
        )
        self._lanes = Lanes(
            key.label,
            settings,
            self.leases,
            granted=lambda: self.gate.granted,
            clock=clock,
            proxy=self.proxy,
            on_replay=metrics.upstream_replays.labels(key.label).inc,
        )
        self.slots: Slots = self.gate
        self.conduct = Conduct(
            key.label,
            self.gate,
            self._first_cap(caps),
            metrics=metrics,
            clock=clock,
            log=log,
            budget=budget,
            on_cap=(lambda cap: caps.note(key.label, cap)) if caps else lambda _cap: None,
            leases=self.leases,
        )
        self.leases.bind(Borrowing(self.gate, self._lanes, self.conduct))
        self._metrics = metrics
        self._coming = 0
        self._bytes_per_second: float | None = None  # of one turn, once one was seen

    def _first_cap(self, caps: CapBook | None) -> Cap:
        maximum = self.settings.max_connections
        if not self.settings.starts_low:
            return Cap(maximum, maximum)
        return Cap.starting(maximum, caps.learned(self.key.label) if caps else None)

    @contextlib.asynccontextmanager
    async def turn(self, ticket: Ticket, repository: str = "") -> AsyncIterator[Turn]:
        """Wait for a turn, for this repository, and hold it. Raises ``QueueFull``, ``Throttled``
        and ``UpstreamDown``."""
        retries = self.conduct.retries_of(repository)
        self._coming += 1  # until the gate knows of it: this origin must not be forgotten
        try:
            with ticket.held():
                await self.conduct.passage(ticket, repository)
                place = await retries.take(ticket.retry)
            try:
                slot = await self._slot(ticket, repository)
            except BaseException:
                retries.give_back(place)
                raise
        finally:
            self._coming -= 1
        turn = Turn(self, slot, repository)
        try:
            yield turn
        except PullError:
            turn.was_of_use = turn.has_moved_on
            raise
        finally:
            turn.finish()
            self.conduct.leave(slot)
            self.slots.release(slot)
            if turn.was_of_use:
                retries.give_back(place)

    async def _slot(self, ticket: Ticket, repository: str) -> Slot:
        """A slot; one that is granted when the breaker has opened meanwhile goes back."""
        while True:
            async with self.conduct.health.queueing():
                slot = await self.slots.acquire(ticket)
            if self.conduct.health.admits(repository):
                return slot
            self.slots.release(slot, was_used=False)
            with ticket.held():
                await self.conduct.passage(ticket, repository)

    async def allow(self, turn: Turn) -> None:
        """Wait until the turn's request may be sent. Raises ``UpstreamDown``.

        If it has to wait there is a probe on the way, which has a slot of its own.
        """
        health = self.conduct.health
        while not health.enter(turn.slot.number, turn.repository):
            await health.passage(turn.repository)

    async def send(
        self,
        turn: Turn,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        *,
        reach: Reach = ANYWHERE,
        patience: float | None = None,
        data: bytes | None = None,
    ) -> aiohttp.ClientResponse:
        """One request on the lane of the turn's slot, counted. Raises as ``Turn.request`` does."""
        slot = turn.slot
        lane = self._lanes.lane(slot.number)
        await self._lanes.make_room(min(self.slots.limit, self.leases.allowed))
        started = self.clock()
        try:
            response = await lane.request(
                method, url, headers, reach=reach, patience=patience, data=data
            )
        except (aiohttp.ClientError, OSError, asyncio.CancelledError) as error:
            self.expect_lease(turn, error)
            failure = self._egress_failure(error)
            if failure is None:
                self.conduct.broke(slot, error, turn.repository, sent_at=started)
                raise
            if isinstance(failure, EgressFailed):
                self.conduct.lost_its_way(slot, failure)
            raise self._counted(failure) from error
        if response.status == 407 and self.proxy is not None:  # no registry's to say
            raise self._counted(egress_refusal(self.key.label, self.proxy.label, 407))
        self.conduct.heed(slot, response, turn.repository)
        self._metrics.upstream_requests.labels(self.key.label, str(response.status)).inc()
        self._metrics.upstream_duration.labels(self.key.label).observe(self.clock() - started)
        return response

    def _egress_failure(self, error: BaseException) -> EgressFailed | EgressRefused | None:
        if self.proxy is None or not isinstance(error, aiohttp.ClientError):
            return None
        return egress_failure(error, self.key.label, self.proxy.label)

    def _counted(self, failure: E, kind: str = "egress") -> E:
        self._metrics.upstream_errors.labels(self.key.label, kind).inc()
        return failure

    @property
    def cuts(self) -> int:
        """How often all sockets had to be given up."""
        return self._lanes.cuts

    def expect_lease(self, turn: Turn, error: BaseException | None = None) -> None:
        """Raises ``LeaseLost`` if the turn's socket was given up since it sent its request; that
        is why there was this ``error``."""
        if turn.cuts != self.cuts and not isinstance(error, asyncio.CancelledError):
            lost = LeaseLost(f"{self.key.label}: its leases ended")
            raise self._counted(lost, "lease") from error

    def abort(self, slot: Slot) -> None:
        """Drop the socket of the slot's lane, whatever it is doing."""
        lane = self._lanes.find(slot.number)
        if lane is not None:
            lane.abort()

    def peer(self, slot: Slot) -> str:
        """Who answers on the slot's lane."""
        lane = self._lanes.find(slot.number)
        return (lane.peer if lane is not None else None) or self.key.host

    @property
    def proxy(self) -> EgressProxy | None:
        """The egress proxy that its sockets go through."""
        return self.settings.egress.proxy_for(self.key.scheme, self.key.host, self.key.port)

    async def shut_idle(self) -> None:
        """Close every socket that no turn uses."""
        await self._lanes.shut_idle()

    def stalled(self, limit: StallLimit) -> UpstreamStalled:
        """The error of a body that was slower than this, counted."""
        self._metrics.upstream_stalls.labels(self.key.label).inc()
        return UpstreamStalled(f"{self.key.label}: {limit}")

    def learn_rate(self, received: int, seconds: float) -> None:
        """One turn brought ``received`` bytes in ``seconds``: size the next one by it."""
        if received >= MIN_TURN_BYTES // 4 and seconds > 0:
            # What a turn cannot ask for counts for no more, or one burst would for dozens of turns.
            rate = min(received / seconds, 2 * MAX_TURN_BYTES / TURN_SECONDS)
            known = rate if self._bytes_per_second is None else self._bytes_per_second
            self._bytes_per_second = known + (rate - known) / 4

    @property
    def knows_rate(self) -> bool:
        """Has a turn shown how fast its bytes come?"""
        return self._bytes_per_second is not None

    @property
    def turn_bytes(self) -> int:
        """How many bytes the next turn for bulk should ask for: about two seconds' worth."""
        if self._bytes_per_second is None:
            return MAX_TURN_BYTES
        return int(max(MIN_TURN_BYTES, min(MAX_TURN_BYTES, self._bytes_per_second * TURN_SECONDS)))

    def count_bytes(self, received: int) -> None:
        self._metrics.upstream_bytes.labels(self.key.label).inc(received)
        if received:
            self.conduct.health.answered()

    @property
    def is_in_use(self) -> bool:
        """Is there a turn, or somebody who waits for one?"""
        state = self.slots.state()
        return bool(self._coming or state.active or sum(state.depth.values()))

    @property
    def is_open(self) -> bool:
        """Is there a socket that is not yet closed on our side?"""
        return self._lanes.is_any_open

    def state(self) -> GateState:
        return self.slots.state()

    async def close(self) -> None:
        """Close every socket, and give its leases back; turns that are in use fail."""
        self.conduct.close()
        await self._lanes.close()
        await self.leases.close()

    def __repr__(self) -> str:
        return f"<Origin {self.key.label} {self.slots!r}>"
