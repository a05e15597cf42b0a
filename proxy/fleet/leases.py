"""One cap for all nodes: the leases of each origin's sockets (DESIGN D1, D3, D6, D16).

Theory of operation
-------------------
A *lease* is the right to hold one socket to an origin, an idle one included. The directory has, for
each origin, a row for each node that holds leases or wants some: how many, since when, until when.
A node calls with what it holds and wants, and is told what it holds from now on, what it should
give back, and what the cap is. So nothing is counted up and down: every call says all.

What a node may believe is ``ledger.py``, what the directory does is ``lease_script.py``; between
them they see to it that the sum never exceeds the cap. Here is who calls, when, and what becomes of
the sockets::

    wanted        by the gate, which has a ticket and no lease for it: call at once, then as often
                  as the directory says while there is something to wait for
    held          granted slots, and lanes whose socket is not closed. Renewed several times in a
                  lease time, by a task that no transfer can hold up
    contested     the directory says that others lack what is held here beyond the fair share: the
                  gate grants no more than ``keep``, idle sockets are closed, turns end soon, and
                  what is free then goes with the next call
    given back    only what has no socket any more: the call claims what is held at that moment
    lost          not renewed in time: a timer drops every socket, a margin before anybody else may
                  have the lease. Turns fail with ``LeaseLost`` and go on at their byte later
    released      at the end, after the sockets

Fairness between nodes is equal parts of the cap among those that want some; nobody gets more than
it wants, and the rest goes to who wants more. With more nodes than leases they take turns: who has
had a lease for about a turn's time while others wait is asked for it, and who waited longest is
next. Inside a node the gate orders its own queue. From a cap of four on one lease is kept for nodes
where metadata waits, as in the gate of a single node.

A call that is cancelled, late or lost changes nothing that matters: the next one says all again,
and the directory knows by its number which one is the latest. A directory that was restarted,
flushed or replaced begins a new *epoch*: for one lease time (and ``lag``) nothing is granted, who
still holds leases is entered again, and then all goes on. While it is down calls fail at once, each
node tries again at its own, random pace, and they find their rows, or enter them, one by one.

The *reserve* (one socket of four to 31, one of each 16 above) is never leased. The directory makes
nodes owners of its parts, one each at most, for half an hour from when they were last heard of; an
owner may use its part while the directory is gone. Who wants to be one is decided by rendezvous
hash over the members that a node knows (``is_keeper``); that this may be old news does no harm,
since the directory gives a part to one node only, and to another one only when its time is over.
Where there is a cap of less than four there is no reserve: without a directory there are no
fetches, only hits and peers.

The *adaptive cap* (D6) is the directory's, with a version. A node whose answers lower it, or bring
it back, says so and names the version it saw: the first one is heard, the others meant the same
overload. Successes at a full cap are counted for all nodes together, and let it grow by one. The
*rate* is a bucket in the directory of which nodes get as many requests as they have waiting.

What is not covered: a node that is stopped (SIGSTOP, a suspended machine) cannot close its sockets.
A directory whose time is set forward ends leases early by half a margin, and the reserve's parts by
a minute; more than one such step in a lease time, or in half an hour, is too much. Two servers that
both take themselves for the primary: the former one has to stop taking orders
(``min-replicas-to-write 1``, ``min-replicas-max-lag`` of at most ``lag``).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from proxy.fleet.lease_call import Call, CapNews, Granted, reserve_of
from proxy.fleet.lease_rate import Pace, SharedRate
from proxy.fleet.lease_script import SCRIPT
from proxy.fleet.ledger import Ledger, Terms
from proxy.fleet.script import Argument, Script
from proxy.observe.fleet import FleetMetrics, LeaseState
from proxy.observe.logs import Logger
from proxy.oci.errors import DirectoryDown

#: Seconds between two calls at least: what comes at once is told at once.
LEAST_PAUSE = 0.01


class Asks(Protocol):
    """What is needed of the directory. Raises ``DirectoryDown``."""

    async def run(self, script: Script, tag: str, args: Sequence[Argument] = ()) -> Any: ...


class Borrower(Protocol):
    """What uses the leases: an origin. ``upstream/leases.py`` says what these are."""

    @property
    def held(self) -> int: ...
    @property
    def busy(self) -> int: ...
    @property
    def pressing(self) -> int: ...
    @property
    def spare(self) -> int: ...
    @property
    def metadata(self) -> int: ...
    @property
    def cap(self) -> tuple[int, int | None]: ...
    def regrant(self) -> None: ...
    async def shut_idle(self, keep: int) -> None: ...
    def cut(self) -> None: ...
    def adopt(self, limit: int, ceiling: int | None) -> None: ...


def is_keeper(node: str, nodes: Collection[str], label: str, count: int) -> bool:
    """Is ``node`` one of the ``count`` that rendezvous hashing picks for this origin?"""

    def weight(one: str) -> bytes:
        return hashlib.sha256(f"{label}\n{one}".encode()).digest()

    return node in sorted({*nodes, node}, key=weight)[:count]


class FleetLeases:
    """Where an origin's leases come from: the fleet's directory.

    ``nodes`` are the ids of the members, as far as is known; ``clock`` is monotonic.
    """

    def __init__(
        self,
        directory: Asks,
        *,
        node: str,
        metrics: FleetMetrics,
        clock: Callable[[], float],
        log: Logger | None = None,
        nodes: Callable[[], Collection[str]] = tuple,
        terms: Terms | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self.node = node
        self.directory = directory
        self.terms = terms or Terms()
        self.metrics = metrics
        self.clock = clock
        self.log = log
        self.nodes = nodes
        self.chance = chance or random.Random()
        self._open: dict[str, OriginLeases] = {}

    def open(self, label: str, capacity: int, rate: Pace | None) -> OriginLeases:
        """The leases of one origin, which has ``capacity`` sockets on all nodes together."""
        leases = self._open[label] = OriginLeases(self, label, capacity, rate)
        return leases

    def forget(self, leases: OriginLeases) -> None:
        if self._open.get(leases.label) is leases:
            del self._open[leases.label]

    def states(self) -> list[LeaseState]:
        """What metrics and the status page show."""
        return [leases.state() for leases in self._open.values()]

    def __repr__(self) -> str:
        return f"<FleetLeases of {self.node} for {len(self._open)} origins>"


class OriginLeases:
    """One node's leases of one origin's sockets: ``upstream``'s ``Leases``."""

    is_shared = True

    def __init__(self, fleet: FleetLeases, label: str, capacity: int, rate: Pace | None) -> None:
        self.label = label
        self.capacity = capacity
        self.reserve = reserve_of(capacity)
        self._fleet = fleet
        self._clock = fleet.clock
        self._ledger = Ledger(fleet.terms)
        self._granted: Granted | None = None  # the latest answer
        self._keep = capacity
        self._rate: SharedRate | None = None
        if rate is not None:
            part = self.reserve / capacity
            self._rate = SharedRate(rate, part, clock=fleet.clock, on_wait=self.changed)
        self._borrower: Borrower | None = None
        self._said: tuple[int, int] = (0, 0)  # wanted, and of that for metadata, in the last call
        self._version = 0
        self._is_cap_news = False
        self._went_well = 0
        self._needed = 1
        self._wake = asyncio.Event()
        self._is_calling = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    # -- what the origin asks ----------------------------------------------------------------

    @property
    def total(self) -> int:
        return self.capacity - self.reserve

    @property
    def most(self) -> int:
        now = self._clock()
        leased = self._ledger.leased(now)
        return min(leased, self._keep) + max(0, self._ledger.grantable(now) - leased)

    @property
    def bulk(self) -> int:
        granted, most = self._granted, self.most
        if granted is None or self._ledger.leased(self._clock()) < granted.most:
            return most
        return max(0, most - (granted.most - granted.bulk))

    @property
    def free(self) -> int:
        if self._ledger.has_failed:
            return 0
        if self._granted is None:
            return self.total  # nobody knows better yet
        return 0 if self._granted.rivals or self._granted.calm else self._granted.free

    @property
    def free_bulk(self) -> int:
        if self._granted is None or not self.free:
            return self.free
        return self._granted.free_bulk

    @property
    def allowed(self) -> int:
        return self._ledger.allowed(self._clock())

    @property
    def is_contested(self) -> bool:
        return self._keep < self._ledger.leased(self._clock())

    @property
    def rate(self) -> SharedRate | None:
        return self._rate

    def bind(self, borrower: Borrower) -> None:
        self._borrower = borrower

    def cap_changed(self) -> None:
        self._is_cap_news = True
        self._wake.set()

    def went_well(self, needed: int) -> None:
        self._went_well += 1
        self._needed = needed

    def changed(self) -> None:
        if self._borrower is None or self._is_closed or not self._needs_call(self._borrower):
            return
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"leases of {self.label}")

    def _needs_call(self, borrower: Borrower) -> bool:
        """Is there something that the directory should know at once?"""
        want, metadata = self._wanted(borrower)
        leased = self._ledger.leased(self._clock())
        if want > self._said[0] and want > leased:
            return True
        if metadata and not self._said[1] and want > leased:
            return True
        if self._rate is not None and self._rate.is_waited_for:
            return True
        has_some_to_give = borrower.busy < borrower.held or borrower.held < leased
        return self.is_contested and has_some_to_give

    def _wanted(self, borrower: Borrower) -> tuple[int, int]:
        rivals = self._granted.rivals if self._granted is not None else 0
        want = borrower.pressing + (0 if rivals else borrower.spare)
        return min(want, self.capacity), min(borrower.metadata, self.capacity)

    @property
    def is_settled(self) -> bool:
        """Does the directory know all that it should know at once?"""
        return not (self._wake.is_set() or self._is_calling)

    # -- calls -------------------------------------------------------------------------------

    async def _run(self) -> None:
        borrower = self._borrower
        if borrower is None:
            raise RuntimeError(f"{self!r} works for no origin")
        while True:
            await self._rest(borrower)
            await self._make_way(borrower)
            await self._call(borrower)
            await asyncio.sleep(LEAST_PAUSE)

    async def _make_way(self, borrower: Borrower) -> None:
        """Close idle sockets whose leases others wait for, and those of the reserve as soon as the
        directory is back."""
        now = self._clock()
        if self._ledger.is_engaged and not self._ledger.is_gone(now):
            await borrower.shut_idle(min(self._keep, self._ledger.leased(now)))
        elif self.is_contested:
            await borrower.shut_idle(self._keep)

    async def _rest(self, borrower: Borrower) -> None:
        """Until something has changed, or it is time to call again."""
        try:
            async with asyncio.timeout(self._pause(borrower)):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _pause(self, borrower: Borrower) -> float | None:
        """Seconds until the next call; ``None`` if there is none to make."""
        terms, chance = self._fleet.terms, self._fleet.chance
        now = self._clock()
        is_waiting = self._rate is not None and self._rate.is_in_use
        if borrower.pressing or borrower.held or self._ledger.allowed(now) or is_waiting:
            again = terms.poll if self._granted is None else self._granted.again
            if self._ledger.has_failed:
                again = max(again, 2 * terms.poll)
            elif self._ledger.leased(now):
                again = min(again, terms.renewal)
            return again * chance.uniform(0.8, 1.2)
        if self._ledger.owned:
            return terms.hold / 8 * chance.uniform(0.8, 1.2)
        return None

    async def _call(self, borrower: Borrower) -> None:
        now = self._clock()
        self._ledger = self._ledger.asking(now, borrower.held)
        call = self._next_call(borrower, now)
        self._said = (call.want, call.metadata)
        self._went_well = 0
        self._is_calling = True
        try:
            granted = await self._ask(call)
        except DirectoryDown:
            granted = None
        finally:
            self._is_calling = False
        if granted is None:
            self._failed(borrower)
        else:
            self._heed(borrower, call, granted)

    def _next_call(self, borrower: Borrower, now: float) -> Call:
        want, metadata = self._wanted(borrower)
        limit, ceiling = borrower.cap
        fleet, rate = self._fleet, self._rate
        news = CapNews(
            self._version, limit, ceiling, self._is_cap_news, self._went_well, self._needed
        )
        return Call(
            fleet.node,
            self._ledger.seq,
            self.capacity,
            self.reserve,
            held=self._ledger.most,
            want=want,
            metadata=metadata,
            news=news,
            owned=self._ledger.claims_reserve(now),
            may_own=is_keeper(fleet.node, fleet.nodes(), self.label, self.reserve),
            permits=rate.wanted if rate else 0,
            rate=rate.per_second if rate else 0.0,
            burst=rate.burst if rate else 0.0,
        )

    async def _ask(self, call: Call) -> Granted | None:
        """The directory's answer; ``None`` if a later call has overtaken this one, or for what is
        no answer. Raises ``DirectoryDown``."""
        tag, args = f"origin {self.label}", [call.encoded(self._fleet.terms)]
        text = await self._fleet.directory.run(SCRIPT, tag, args)
        try:
            return Granted.decoded(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if self._fleet.log is not None:
                self._fleet.log.error("lease_answer_invalid", upstream=self.label, error=str(error))
            return None

    def _heed(self, borrower: Borrower, call: Call, granted: Granted) -> None:
        self._ledger = self._ledger.answered(call.seq, granted.most, granted.owned)
        self._granted, self._keep = granted, granted.keep
        self._enforce(borrower)
        if granted.version != self._version:
            self._version = granted.version
            self._is_cap_news, self._went_well = False, 0
            borrower.adopt(granted.limit, granted.ceiling)
        elif call.news.is_changed and call.news.limit == borrower.cap[0]:
            self._is_cap_news = False
        if self._rate is not None:
            self._rate.give(granted.permits)
        borrower.regrant()

    def _failed(self, borrower: Borrower) -> None:
        was_engaged = self._ledger.is_engaged
        self._ledger = self._ledger.failed(self._clock())
        if self._ledger.is_engaged and not was_engaged and self._fleet.log is not None:
            self._fleet.log.warning(
                "lease_reserve", upstream=self.label, sockets=len(self._ledger.owned)
            )
        if self._ledger.is_engaged and self._rate is not None:
            self._rate.give_reserve()
        self._enforce(borrower)
        borrower.regrant()

    # -- the end of leases -------------------------------------------------------------------

    def _enforce(self, borrower: Borrower) -> None:
        """Drop the sockets if there are more than may be, and look again when that may be so."""
        now = self._clock()
        self._ledger = self._ledger.settled(now, borrower.held)
        if borrower.held > self._ledger.allowed(now):
            self._lost(borrower)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ends = self._ledger.ends_at(now)
        if ends is not None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(LEAST_PAUSE, ends - now), self._enforce, borrower)

    def _lost(self, borrower: Borrower) -> None:
        self._fleet.metrics.leases_lost.labels(self.label).inc()
        if self._fleet.log is not None:
            allowed = self._ledger.allowed(self._clock())
            self._fleet.log.warning(
                "leases_lost", upstream=self.label, held=borrower.held, allowed=allowed
            )
        borrower.cut()

    async def close(self) -> None:
        """Give everything back; the sockets are closed."""
        self._is_closed = True
        self._fleet.forget(self)
        if self._timer is not None:
            self._timer.cancel()
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        self._ledger = self._ledger.asking(self._clock(), 0)
        call = Call(
            self._fleet.node,
            self._ledger.seq,
            self.capacity,
            self.reserve,
            held=0,
            want=0,
            metadata=0,
            news=CapNews(limit=self.capacity),
            leaves=True,
        )
        try:
            await self._ask(call)
        except DirectoryDown:
            return  # they end by themselves

    def state(self) -> LeaseState:
        borrower, now = self._borrower, self._clock()
        ledger = self._ledger
        return LeaseState(
            upstream=self.label,
            held=ledger.leased(now),
            wanted=self._wanted(borrower)[0] if borrower is not None else 0,
            rivals=self._granted.rivals if self._granted is not None else 0,
            reserve=len(ledger.owned) if ledger.is_engaged else 0,
        )

    def __repr__(self) -> str:
        now = self._clock()
        kept = f", keep {self._keep}" if self.is_contested else ""
        gone = ", the directory is gone" if self._ledger.is_gone(now) else ""
        return f"<OriginLeases {self.label} {self._ledger.leased(now)}/{self.total}{kept}{gone}>"
