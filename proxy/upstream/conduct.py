"""How we behave towards one origin, by what its answers say (DESIGN D5, D6).

Everything that an answer teaches besides its contents comes together here, so that ``origin.py``
can go on being about sockets: the *cap* (how many at once), the *health* (is it there at all), the
*retries* (how often again), the *pauses* it asked for (Retry-After) and its quota of *pulls*.

A Retry-After of 429 or 503 pauses the origin's gate, for at most ``MAX_PAUSE`` seconds: a request
in five minutes is no burden, and an upstream may be mistaken. 429 pauses the class whose turn it
was: metadata (Docker Hub's quota of manifests, while blobs go on), or everything but metadata. 503
pauses its repository, for each can only speak of itself: behind some there is another registry. If
all say it the breaker opens, and then stays open for as long as was asked for. Bulk that is paused
waits, as its readers have their headers early and long deadlines; a short question that would have
to wait longer than ``PATIENCE`` is answered at once, so that a tag is served stale or the client
hears when to come again.

What one repository brings about is not held against the others (``blame.py``): a repository that
fails by itself counts neither for the breaker nor for the cap, its retries draw on a budget apart,
and the cap gets back what it lost before that was known, unless another repository broke as well or
it was answered in the end.

An origin that could not be reached has said nothing about how many requests it stands: the cap of
before the first failure in the row is kept, and is what it starts from when the breaker closes. One
that was reached and failed has, and the cap stays what that made of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import aiohttp
from cachetools import TLRUCache

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics, OriginState
from proxy.oci.errors import EgressFailed, Throttled
from proxy.upstream.blame import KEPT, Blame
from proxy.upstream.budget import Retries, RetryBudget
from proxy.upstream.cap import Cap
from proxy.upstream.errors import UNREACHABLE, retry_after, sort_failure
from proxy.upstream.gate import Gate, Slot
from proxy.upstream.health import (
    PATIENCE,
    SILENT_SECONDS,
    Breaker,
    Health,
    State,
    Trouble,
)
from proxy.upstream.leases import Leases, Unshared
from proxy.upstream.quota import Pulls
from proxy.upstream.turns import Ticket, TurnClass

#: The longest pause that an upstream gets by asking, in seconds.
MAX_PAUSE = 300.0

#: Seconds after which it is tried again whether several turns bring more than one.
WIDENS_FOR = 300.0
#: Seconds for which blobs are not fetched in segments from an origin whose ranges were wrong.
DISTRUST = 600.0

#: Seconds after an overload in which what looks like a denial may be one more sign of it.
STRESSED = 10.0

#: Repositories that asked for a pause, of which that is remembered.
_MAX_PAUSED = 1024

_METADATA = frozenset({TurnClass.METADATA})
_EVERYTHING = frozenset(TurnClass)


class Conduct:
    """What one origin's answers have taught. ``clock`` is monotonic, in seconds; ``on_cap`` hears
    the cap with every answer."""

    def __init__(
        self,
        label: str,
        gate: Gate,
        cap: Cap,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        log: Logger | None = None,
        budget: RetryBudget | None = None,
        on_cap: Callable[[Cap], None] = lambda _cap: None,
        leases: Leases | None = None,
    ) -> None:
        self.cap = cap
        self._leases: Leases = leases or Unshared(cap.maximum)
        self.health = Health(label, clock=clock, on_change=self._health_changed)
        self.retries = Retries(label, metrics=metrics, clock=clock, budget=budget)
        apart = self.retries.budget.another()
        self._retries_apart = Retries(label, metrics=metrics, clock=clock, budget=apart)
        self.pulls = Pulls(label, clock=clock)
        self._label = label
        self._gate = gate
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._on_cap = on_cap
        self._before = cap  # as it was before the first failure in a row
        self._blame = Blame()
        self._charged: set[str] = set()  # repositories that broke and were not answered since
        self._uncharged = cap  # as it was before the first of them broke
        self._paused: TLRUCache[str, float, float] = TLRUCache(
            _MAX_PAUSED, ttu=lambda _name, until, _now: until, timer=clock
        )
        self._early: dict[int, float] = {}  # by slot: answered when others could still begin
        self._overloaded_at = float("-inf")
        self._distrusted_until = float("-inf")
        self._widens, self._widens_until = False, float("-inf")
        self._unsuspected: Cap | None = None  # as it was before overloads that are not proved
        gate.limit = cap.limit

    # -- before a request ------------------------------------------------------------------

    async def passage(self, ticket: Ticket, repository: str = "") -> None:
        """Wait until a request for ``repository`` may stand in the queue. Raises ``UpstreamDown``,
        ``Throttled``."""
        wait = max(self._gate.paused_for(ticket.turn_class), self._paused_for(repository))
        if ticket.turn_class is TurnClass.METADATA and wait > PATIENCE:
            raise Throttled(wait, message=f"{self._label} asked to be left alone for a while")
        await self.health.passage(repository)
        if (wait := self._paused_for(repository)) > 0:
            await asyncio.sleep(wait)

    def retries_of(self, repository: str) -> Retries:
        """The budget that tries for this repository draw on.

        Those that fail by themselves have one apart: they would spend the others' for nothing.
        """
        return self._retries_apart if self._is_blamed(repository) else self.retries

    def _paused_for(self, repository: str) -> float:
        """Seconds for which this repository asked to be left alone."""
        return max(0.0, self._paused.get(repository, 0.0) - self._clock())

    # -- after it --------------------------------------------------------------------------

    def heed(self, slot: Slot, response: aiohttp.ClientResponse, repository: str = "") -> None:
        """The head of an answer to a request for ``repository`` has come."""
        status = response.status
        if status >= 500 and status != 501:
            self._failed(slot, Trouble.BROKEN, f"status {status}", repository)
        else:
            self.health.answered()
        self.pulls.heed(response.headers)
        if status in (429, 503):
            self._pause(slot, status, retry_after(response.headers), repository)

    def broke(
        self,
        slot: Slot,
        error: Exception | asyncio.CancelledError,
        repository: str = "",
        *,
        sent_at: float,
    ) -> None:
        """There was no answer to what was sent at ``sent_at`` (monotonic seconds); cancelled, it
        was given up by whoever waited for it."""
        if isinstance(error, asyncio.CancelledError):
            self._was_silent(slot, repository, sent_at)
            return
        kind, said = sort_failure(error)
        no_connection = kind in UNREACHABLE or isinstance(error, aiohttp.ConnectionTimeoutError)
        if kind == "timeout" and not no_connection and self._is_long_ago(sent_at):
            self._was_silent(slot, repository, sent_at)
            return
        trouble = Trouble.UNREACHABLE if no_connection else Trouble.BROKEN
        self._failed(slot, trouble, said, repository)

    def lost_its_way(self, slot: Slot, failure: EgressFailed) -> None:
        """The egress proxy is not there, or makes no connection."""
        self._failed(slot, Trouble.EGRESS, failure.said, "")

    def _was_silent(self, slot: Slot, repository: str, sent_at: float) -> None:
        """That says nothing of how many at once it stands: the cap stays."""
        if self._is_long_ago(sent_at) and not self._is_blamed(repository):
            self._begin_row()
            self.health.was_silent(slot.number, sent_at, repository)

    def _is_long_ago(self, sent_at: float) -> bool:
        return round(self._clock() - sent_at, 3) >= SILENT_SECONDS  # a timer's time, rounded

    def _is_blamed(self, repository: str) -> bool:
        return self._blame.fails_by_itself(repository, self._clock())

    def _failed(self, slot: Slot, trouble: Trouble, reason: str, repository: str) -> None:
        if trouble.has_connected and self._is_blamed(repository):
            return  # as a probe it has no outcome
        self._begin_row()
        self.health.failed(slot.number, trouble, reason, repository)

    def _begin_row(self) -> None:
        if not self.health.breaker.run:
            self._before = self.cap

    def _pause(self, slot: Slot, status: int, seconds: float | None, repository: str) -> None:
        if not seconds:
            return
        if status == 503:
            if not self._is_blamed(repository):
                self.health.rest(min(seconds, MAX_PAUSE))
            self._paused[repository] = self._clock() + min(seconds, MAX_PAUSE)
            if self._log is not None:
                self._log.info(
                    "repository_paused",
                    upstream=self._label,
                    repository=repository,
                    seconds=round(min(seconds, MAX_PAUSE), 1),
                )
            return
        is_metadata = slot.turn_class is TurnClass.METADATA
        classes = _METADATA if is_metadata else _EVERYTHING - _METADATA
        longer = self._gate.pause(classes, min(seconds, MAX_PAUSE))
        self._metrics.upstream_throttled.labels(self._label).inc(longer)
        if self._log is not None and longer:
            self._log.info(
                "upstream_paused",
                upstream=self._label,
                status=status,
                seconds=round(longer, 1),
                classes=sorted(classes),
            )

    # -- ranges ----------------------------------------------------------------------------

    @property
    def trusts_ranges(self) -> bool:
        """Were its ranges right, as far as is known of late?"""
        return self._clock() >= self._distrusted_until

    def distrust_ranges(self) -> None:
        """Ranges of one blob did not make up that blob."""
        self._distrusted_until = self._clock() + DISTRUST

    # -- several turns ---------------------------------------------------------------------

    @property
    def widens(self) -> bool | None:
        """Do several turns at once bring more than one? None: nobody has tried of late."""
        return self._widens if self._clock() < self._widens_until else None

    def learn_widening(self, widens: bool) -> None:
        """A trial has shown whether they do."""
        self._widens, self._widens_until = widens, self._clock() + WIDENS_FOR

    # -- the cap ---------------------------------------------------------------------------

    @property
    def is_stressed(self) -> bool:
        """Was it overloaded a moment ago?"""
        return self._clock() - self._overloaded_at < STRESSED

    def answered(self, repository: str, sent_at: float) -> None:
        """A request for ``repository`` that was sent at ``sent_at`` (monotonic seconds) got an
        answer that was meant, be it that there is no such thing."""
        self._blame.answered(repository, self._clock(), sent_at=sent_at)
        if repository in self._charged:
            self._charged.clear()  # with fewer at once it is answered: they were too many

    def went_well(self, slot: Slot, sent_at: float, *, full: bool) -> None:
        """A request got what it asked for; ``full``: the cap was the limit when it was sent.

        If it was not, the answer counts when another one comes that was, if its body still comes.
        """
        self._succeeded(sent_at, full=full)
        if not full:
            self._early[slot.number] = sent_at
            return
        early, self._early = self._early, {}
        for began in early.values():
            self._succeeded(began, full=self.cap.counts_late(began))

    def leave(self, slot: Slot) -> None:
        """The slot's turn is over, and with it what came for it."""
        self._early.pop(slot.number, None)
        self.health.leave(slot.number)

    def _succeeded(self, sent_at: float, *, full: bool) -> None:
        cap = self.cap.succeeded(self._clock(), sent_at=sent_at, full=full)
        if self._leases.is_shared:
            # The successes of all nodes count together, and so it is not for this one to grow.
            if cap.run > self.cap.run or cap.limit > self.cap.limit:
                self._leases.went_well(self.cap.needed_run)
            cap = replace(self.cap, is_proved=cap.is_proved)
        self._settle(cap)

    def adopt(self, limit: int, ceiling: int | None) -> None:
        """The cap that the nodes of the fleet have agreed on."""
        limit = max(1, min(limit, self.cap.maximum))
        self._gate.limit = limit
        self.cap = replace(
            self.cap,
            limit=limit,
            ceiling=ceiling,
            run=0,
            changed_at=self._clock(),
            is_proved=limit >= self.cap.limit,
            reason="shared by the fleet",
        )
        self._note(self.cap)

    def was_too_much(self, repository: str, sent_at: float, reason: str) -> None:
        """The upstream broke under a request for ``repository`` sent at ``sent_at``."""
        self._unsuspected = None
        if self._blame.failed(repository, self._clock(), sent_at=sent_at):
            self._clear(repository)
            return
        if not self._charged:
            self._uncharged = self.cap
        if len(self._charged) < KEPT:
            self._charged.add(repository)
        self._metrics.upstream_overloads.labels(self._label).inc()
        self._overloaded_at = self._clock()
        self._settle(self.cap.overloaded(self._clock(), sent_at=sent_at, reason=reason))

    def may_be_too_much(self, sent_at: float, reason: str) -> None:
        """A request sent at ``sent_at`` was refused, be it for want of time or of rights: fewer at
        once will show it."""
        if self._unsuspected is None:
            self._unsuspected = self.cap
        self._metrics.upstream_overloads.labels(self._label).inc()
        self._settle(self.cap.overloaded(self._clock(), sent_at=sent_at, reason=reason))

    def was_meant(self) -> None:
        """What looked as if it might be too much was for want of rights."""
        if self._unsuspected is not None:
            self._settle(self.cap.cleared(self._unsuspected, self._clock()))
            self._unsuspected = None

    def _clear(self, repository: str) -> None:
        """It fails by itself. If all that broke do, the cap was lowered for nothing."""
        if repository in self._charged:
            self._charged.discard(repository)
            if not self._charged:
                self._settle(self.cap.cleared(self._uncharged, self._clock()))

    def _settle(self, cap: Cap) -> None:
        if cap.limit != self.cap.limit:
            self._gate.limit = cap.limit
        if (cap.limit, cap.ceiling) != (self.cap.limit, self.cap.ceiling):
            self._leases.cap_changed()
        self.cap = cap
        self._note(cap)

    def _note(self, cap: Cap) -> None:
        breaker = self.health.breaker
        is_out = breaker.state is not State.CLOSED and breaker.is_unreachable
        self._on_cap(self._before if is_out else cap)

    def _health_changed(self, before: Breaker, after: Breaker) -> None:
        if after.state is State.CLOSED and before.is_unreachable:
            self._charged.clear()
            self._settle(self._before.after_outage(self._clock()))
        if self._log is not None:
            self._log.warning(
                "upstream_breaker",
                upstream=self._label,
                state=after.state.value,
                was=before.state.value,
                reason=after.reason or before.reason,
                retry_in=round(self.health.retry_in, 1),
            )

    # -- for people ------------------------------------------------------------------------

    def state(self) -> OriginState:
        """What metrics show."""
        quota = self.pulls.quota
        return OriginState(
            upstream=self._label,
            breaker=self.health.breaker.state.value,
            quota=None if quota is None else (quota.limit, quota.remaining),
        )

    def details(self) -> Mapping[str, Any]:
        """What the status page shows, in seconds."""
        breaker, quota, gate = self.health.breaker, self.pulls.quota, self._gate.state()
        return {
            "upstream": gate.upstream,
            "connections": {"active": gate.active, "idle": gate.idle},
            "limit": gate.limit,
            "reason": self.cap.reason,
            "round_seconds": round(gate.round_seconds, 1),
            "breaker": {
                "state": breaker.state.value,
                "reason": breaker.reason,
                "retry_in": round(self.health.retry_in, 1),
            },
            "paused": {name: round(left, 1) for name, left in self._gate.pauses().items()},
            "retries_held": self.retries.waiting + self._retries_apart.waiting,
            "quota": None
            if quota is None
            else {
                "limit": quota.limit,
                "remaining": quota.remaining,
                "window": quota.window,
                "spacing": round(quota.spacing(self._clock()), 1),
            },
        }

    def close(self) -> None:
        """Stop timers, and send away who waits for a retry."""
        self.retries.close()
        self._retries_apart.close()
        self._gate.close()

    def __repr__(self) -> str:
        return f"<Conduct {self._label} cap {self.cap.limit}, {self.health.breaker.state}>"
