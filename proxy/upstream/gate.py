"""The gate of an origin: a hard cap on slots, and a fair queue in front of them (D1-D3).

Theory of operation
-------------------
A *slot* is the right to hold one socket to the origin. There are ``capacity`` slots, numbered; slot
``n`` always belongs to lane ``n``, which owns at most one socket, so that counting slots is
counting sockets, idle ones included. Of the free slots the one given back last whose socket can be
used again is granted first, so that a socket is dialled only when none is idle.

``limit`` (1 … capacity) is how many may be in use at the moment; lowering it takes effect as turns
end. With a limit of four or more one slot is kept for metadata.

States of a waiter, and who moves it:

* *queued*   by ``acquire``, in the ``TurnQueue``
* *granted*  by ``_grant``, which runs whenever a slot comes free, the limit rises, or a ticket
  arrives or changes its class: the future gets the slot. Those that take what nobody else wants get
  one that comes free in the loop's next step only: a flight that goes on stands in the queue by
  then. In its place a further turn of another would last, and the flight have somebody cut for it
* *refused*  by ``acquire`` itself, if the queue is too long and no slot was free
* *gone*     by cancellation of ``acquire``. If the slot had been granted in the same loop turn the
  cancellation arrives after the future was resolved: the slot is given back there, which grants it
  to the next in line. Nothing is lost, whichever comes first.

A class may be *paused* for a while, because the upstream asked for it (Retry-After): its waiters
keep their places and are passed over until then. A timer, one at most, looks again at the end.

Where several nodes share an origin's cap (``leases.py``), turns may use only as many slots as this
node has leases for; who waits for one waits in the same queue.

The request rate, where there is one, is asked for after the slot: the limiter lets newcomers
overtake, the queue does not. A waiter cancelled there gives its slot back.

``acquire`` never suspends between having a slot and returning it, so its caller's ``finally`` is
the only owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

from prometheus_client import Histogram

from proxy.observe.metrics import GateState, Metrics
from proxy.oci.errors import QueueFull
from proxy.upstream.leases import Leases, RateLimit, Unshared
from proxy.upstream.turns import SPARE, Ticket, TurnClass, TurnQueue, TurnTimes

#: From this limit on one slot is kept for metadata (D3).
RESERVE_FROM = 4

#: Seconds between two looks at a pause whose clock does not move on.
LEAST_PAUSE = 0.05

#: Seconds after which a client that found the queue full may ask again.
QUEUE_FULL_RETRY = 5.0

_ALL = frozenset(TurnClass)
#: By itself, as to look up a member of an enumeration takes ten times what a name does.
_METADATA = TurnClass.METADATA
_METADATA_ONLY = frozenset({_METADATA})
_WANTED = _ALL.difference(SPARE)
#: Seconds for which such a turn is waited for, once it should make way, before one of another class
#: is cut: as long as it takes if it can be cut, even if its rest comes soon. One without an answer
#: cannot be, nor one that stands still, or whose upstream knows no ranges.
MAKES_WAY = 8.0


class Slot(NamedTuple):
    """A granted slot: which lane it opens, for what, and since when (monotonic seconds)."""

    number: int
    turn_class: TurnClass
    since: float


class Slots(Protocol):
    """May I open a socket to this origin? In-process it is a ``Gate``."""

    @property
    def limit(self) -> int: ...

    @property
    def spare(self) -> int:
        """How many more turns of blobs could begin now, as nobody waits."""
        ...

    async def acquire(self, ticket: Ticket) -> Slot:
        """Wait for the ticket's turn. Raises ``QueueFull``; cancelling it leaves no trace."""
        ...

    def release(self, slot: Slot, *, was_used: bool = True) -> None:
        """Give the slot back; its socket is idle and clean, or closed, or will be before use.

        One that was not used says nothing of how long turns last. Raises ``ValueError`` for a
        slot that is not held.
        """
        ...

    def has_rival(self, slot: Slot) -> bool:
        """Does anybody wait whom the holder of ``slot`` should let pass at its turn's end?"""
        ...

    def ahead_of(self, ticket: Ticket) -> int:
        """How many others wait now whose turns may come before the ticket's."""
        ...

    def state(self) -> GateState: ...


class Gate:
    """The in-process ``Slots``."""

    def __init__(
        self,
        name: str,
        *,
        capacity: int,
        metrics: Metrics,
        clock: Callable[[], float],
        max_waiting: int = 10_000,
        rate: RateLimit | None = None,
        leases: Leases | None = None,
        is_open: Callable[[int], bool] = lambda _number: False,
        is_warm: Callable[[int], bool] = lambda _number: False,
    ) -> None:
        """``is_open(n)``: does lane ``n`` hold a socket? ``is_warm(n)``: one fit for use?"""
        if capacity < 1:
            raise ValueError(f"a gate needs at least one slot, not {capacity}")
        self.name = name
        self.capacity = capacity
        self.max_waiting = max_waiting
        self._metrics = metrics
        self._clock = clock
        self._rate = rate
        self._leases: Leases = leases or Unshared(capacity)
        self._is_open = is_open
        self._is_warm = is_warm
        self._limit = capacity
        self._times = TurnTimes()
        self._queue = TurnQueue(on_move=self._grant, row=self._times.row)
        self._waiters: dict[Ticket, tuple[asyncio.Future[Slot], float]] = {}
        self._free = list(range(capacity - 1, -1, -1))  # a stack: the last given back goes first
        self._granted: dict[int, Slot] = {}
        self._bulk = 0  # granted slots that are not for metadata
        self._called: dict[int, float] = {}  # since when those that are spare should make way
        self._paused: dict[TurnClass, float] = {}  # until when
        self._waits: dict[TurnClass, Histogram] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._later: asyncio.Handle | None = None

    @property
    def limit(self) -> int:
        return min(self._limit, self._leases.total)

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = max(1, min(limit, self.capacity))
        self._grant()

    @property
    def spare(self) -> int:
        return 0 if len(self._queue) else max(0, self._could_open_to(TurnClass.BLOB))

    def is_full(self, turn_class: TurnClass) -> bool:
        """Are as many slots granted as may be to this class?"""
        return self._could_open_to(turn_class) <= 0

    def _could_open_to(self, turn_class: TurnClass) -> int:
        """Slots that could still be granted to this class, which does not get the kept one, as far
        as is known of leases that nobody has."""
        leases = self._leases
        free = min(self.limit, leases.most + leases.free) - len(self._granted)
        if turn_class is _METADATA:
            return free
        return min(free, self._bulk_room(self.limit, leases.free_bulk) - self._bulk)

    def _bulk_room(self, limit: int, more: int = 0) -> int:
        """Slots that may be used for anything but metadata."""
        return min(limit - (limit >= RESERVE_FROM), self._leases.bulk + more)

    # -- for leases ------------------------------------------------------------------------

    @property
    def granted(self) -> Collection[int]:
        """The numbers of slots in use."""
        return self._granted.keys()

    @property
    def pressing(self) -> int:
        """Slots in use and waited for, but for those that take what nobody else wants."""
        waiting = sum(self._queue.depth(one) for one in TurnClass if one not in SPARE)
        return (
            len(self._granted)
            + waiting
            - sum(self._queue.depth(one) for one in self._paused_now() if one not in SPARE)
        )

    @property
    def spare_waiters(self) -> int:
        """Waiters that take what nobody else wants."""
        return sum(map(self._queue.depth, SPARE))

    @property
    def metadata(self) -> int:
        """Slots that metadata uses and waits for."""
        return len(self._granted) - self._bulk + self._queue.depth(_METADATA)

    def regrant(self) -> None:
        """There may be more leases, or fewer, than there were."""
        self._grant()

    # -- pauses ----------------------------------------------------------------------------

    def pause(self, classes: Collection[TurnClass], seconds: float) -> float:
        """Grant these classes nothing for so long; returns by how much that is longer than the
        longest of their pauses so far."""
        until = self._clock() + seconds
        longer = seconds - max(self.paused_for(turn_class) for turn_class in classes)
        for turn_class in classes:
            self._paused[turn_class] = max(until, self._paused.get(turn_class, until))
        self._grant()
        return max(0.0, longer)

    def paused_for(self, turn_class: TurnClass) -> float:
        """Seconds until this class may be granted again."""
        return max(0.0, self._paused.get(turn_class, 0.0) - self._clock())

    def pauses(self) -> Mapping[str, float]:
        """Seconds until each paused class may be granted again, by the class's name."""
        return {paused.value: self.paused_for(paused) for paused in self._paused_now()}

    def _paused_now(self) -> Collection[TurnClass]:
        now = self._clock()
        for turn_class in [known for known, until in self._paused.items() if until <= now]:
            del self._paused[turn_class]
        return self._paused.keys()

    def _look_again(self) -> None:
        """Grant once more when the first pause is over, if somebody waits for that."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waits = [self.paused_for(c) for c in self._paused_now() if self._queue.depth(c)]
        if waits:
            wait = max(LEAST_PAUSE, min(waits))
            self._timer = asyncio.get_running_loop().call_later(wait, self._grant)

    def close(self) -> None:
        """Stop what would grant later."""
        for handle in (self._timer, self._later):
            if handle is not None:
                handle.cancel()
        self._timer = self._later = None

    async def acquire(self, ticket: Ticket) -> Slot:
        """Wait for a turn; see ``Slots.acquire``."""
        slot = await self._slot(ticket)
        if self._rate is None:
            return slot
        try:
            await self._rate.acquire(1)
        except BaseException:
            self.release(slot, was_used=False)
            raise
        return slot._replace(since=self._clock())

    async def _slot(self, ticket: Ticket) -> Slot:
        self._queue.add(ticket)
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = (future, self._clock())
        self._grant()
        # Only now: a slot may have been free for this ticket though others wait (the kept one).
        # Further turns of flights wait for everybody else, and so they take nobody's place.
        is_full = len(self._queue) - self._queue.depth(TurnClass.SEGMENT) > self.max_waiting
        if is_full and not self._can_be_leased(ticket.turn_class):
            self._withdraw(ticket, future)
            raise QueueFull(
                QUEUE_FULL_RETRY,
                message=f"{len(self._queue)} requests wait for {self.name}, the most that may",
            )
        try:
            return await future
        except BaseException:
            if not self._withdraw(ticket, future):
                self.release(future.result(), was_used=False)
            self._metrics.queue_abandoned.labels(self.name, ticket.turn_class).inc()
            raise

    def _can_be_leased(self, turn_class: TurnClass) -> bool:
        """Is a slot free for this class, as soon as there is a lease for it?"""
        return self._leases.is_shared and self._could_open_to(turn_class) > 0

    def _withdraw(self, ticket: Ticket, future: asyncio.Future[Slot]) -> bool:
        """Leave the queue; false if it is too late, because the slot has been granted."""
        if future.done() and not future.cancelled():
            return False
        self._waiters.pop(ticket, None)
        self._queue.discard(ticket)
        return True

    def release(self, slot: Slot, *, was_used: bool = True) -> None:
        """Take the slot back and grant it to whoever is next."""
        held = self._granted.pop(slot.number, None)
        if held is None:
            raise ValueError(f"{slot} of {self.name} is not held")
        turn_class = held.turn_class
        if self._called:
            self._called.pop(slot.number, None)
        self._bulk -= turn_class is not _METADATA
        if was_used:
            self._times.ended(turn_class, self._clock() - slot.since)
        self._free.append(slot.number)
        self._grant(_WANTED)
        if self._later is None and self.spare_waiters:
            # Whose turn has ended stands in the queue again in this step of the loop, if at all.
            self._later = asyncio.get_running_loop().call_soon(self._grant_spare)

    def _grant_spare(self) -> None:
        """Grant what nobody wanted in the step in which it came free."""
        self._later = None
        self._grant()

    @property
    def round_seconds(self) -> float:
        """About how long it takes until every image that waits has had a turn.

        The kubelet gives an image up after five minutes without a byte: with more images than the
        limit can serve in that time no order of turns helps.
        """
        bulk = (TurnClass.SMALL, TurnClass.BLOB)
        seconds = sum(self._queue.images(one) * self._times.of(one) for one in bulk)
        return seconds / max(1, self.limit - (self.limit >= RESERVE_FROM))

    def _grant(self, classes: frozenset[TurnClass] = _ALL) -> None:
        if self._paused:
            self._look_again()
        # Nothing here changes these while slots are granted. By comparing: a call of ``min`` takes
        # as long as three of these lines, and this is done in each turn.
        queue, granted, waits, leases = self._queue, self._granted, self._waits, self._leases
        limit, most, room = self._limit, leases.most, leases.bulk
        if limit > (total := leases.total):
            limit = total
        if most > limit:
            most = limit
        if room > (unkept := limit - (limit >= RESERVE_FROM)):
            room = unkept
        while len(granted) < most:
            if self._bulk < room:
                allowed = _ALL
            elif queue.depth(_METADATA):
                allowed = _METADATA_ONLY
            else:
                break  # so most turns of blobs end
            if self._paused:
                allowed = allowed.difference(self._paused_now())
            if classes is not _ALL:
                allowed = allowed & classes
            ticket = queue.take(allowed)
            if ticket is None:
                break
            future, since = self._waiters.pop(ticket)
            if future.done():  # cancelled, but its task has not run yet
                continue
            now = self._clock()
            number, turn_class = self._next_free(), ticket.turn_class
            slot = granted[number] = Slot(number, turn_class, now)
            self._bulk += turn_class is not _METADATA
            ticket.waited += now - since
            (waits.get(turn_class) or self._waited(turn_class)).observe(now - since)
            future.set_result(slot)
        self._leases.changed()

    def _waited(self, turn_class: TurnClass) -> Histogram:
        """Where the waits of a class are counted, from now on."""
        found = self._waits[turn_class] = self._metrics.queue_wait.labels(self.name, turn_class)
        return found

    def _next_free(self) -> int:
        free, is_warm = self._free, self._is_warm
        for place in range(len(free) - 1, -1, -1):
            if is_warm(free[place]):
                return free.pop(place)
        return free.pop()

    def has_rival(self, slot: Slot) -> bool:
        is_wanted = self._queue.has_rival(slot.turn_class, self._paused_now())
        if not (is_wanted or self._leases.is_contested):
            return False
        return slot.turn_class in SPARE or not self._makes_way()

    def _makes_way(self) -> bool:
        """Does a turn that took what nobody else wanted make way before others do? It has some time
        for that, from when it is looked at first."""
        now, makes_way = self._clock(), False
        for number, held in self._granted.items():
            if held.turn_class in SPARE:
                makes_way |= now - self._called.setdefault(number, now) < MAKES_WAY
        return makes_way

    def ahead_of(self, ticket: Ticket) -> int:
        return self._queue.ahead_of(ticket)

    def state(self) -> GateState:
        """What metrics and the status page show."""
        return GateState(
            upstream=self.name,
            active=len(self._granted),
            idle=sum(1 for number in self._free if self._is_open(number)),
            limit=self.limit,
            depth=self._queue.depths(),
            queue_limit=self.max_waiting,
            round_seconds=self.round_seconds,
        )

    def __repr__(self) -> str:
        return f"<Gate {self.name} {len(self._granted)}/{self.limit} active, {self._queue!r}>"
