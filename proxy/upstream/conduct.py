"""How we behave towards one origin, by what its answers say (DESIGN D5, D6).

Everything that an answer teaches besides its contents comes together here, so that ``origin.py``
can go on being about sockets: the *cap* (how many at once), the *health* (is it there at all), the
*retries* (how often again), the *pauses* it asked for (Retry-After) and its quota of *pulls*.

A Retry-After of 429 or 503 pauses the origin's gate, for at most ``MAX_PAUSE`` seconds: a request
in five minutes is no burden, and an upstream may be mistaken. 429 pauses the class whose turn it
was: metadata (Docker Hub's quota of manifests, while blobs go on), or everything but metadata. 503
is about the whole origin. Bulk that is paused waits in the queue, as its readers have their headers
early and long deadlines; a short question that would have to wait longer than ``PATIENCE`` is
answered at once, so that a tag is served stale or the client hears when to come again.

An outage says nothing about how many requests the origin stands: the cap of before the first
failure in the row is kept, and is what it starts from when the breaker closes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics, OriginState
from proxy.oci.errors import Throttled
from proxy.upstream.budget import Retries, RetryBudget
from proxy.upstream.cap import Cap
from proxy.upstream.errors import retry_after, sort_failure
from proxy.upstream.gate import Gate, Slot
from proxy.upstream.health import PATIENCE, Breaker, Health, State, Trouble
from proxy.upstream.quota import Pulls
from proxy.upstream.turns import Ticket, TurnClass

#: The longest pause that an upstream gets by asking, in seconds.
MAX_PAUSE = 300.0

#: Seconds after an overload in which what looks like a denial may be one more sign of it.
STRESSED = 10.0

_METADATA = frozenset({TurnClass.METADATA})
_EVERYTHING = frozenset(TurnClass)
#: Kinds of failures (``upstream/errors.py``) in which there was no connection.
_UNREACHABLE = frozenset({"dns", "tls", "connect"})


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
    ) -> None:
        self.cap = cap
        self.health = Health(label, clock=clock, on_change=self._health_changed)
        self.retries = Retries(label, metrics=metrics, clock=clock, budget=budget)
        self.pulls = Pulls(label, clock=clock)
        self._label = label
        self._gate = gate
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._on_cap = on_cap
        self._before = cap  # as it was before the first failure in a row
        self._overloaded_at = float("-inf")
        gate.limit = cap.limit

    # -- before a request ------------------------------------------------------------------

    async def passage(self, ticket: Ticket) -> None:
        """Wait until a request may stand in the queue. Raises ``UpstreamDown``, ``Throttled``."""
        await self.health.passage()
        wait = self._gate.paused_for(ticket.turn_class)
        if ticket.turn_class is TurnClass.METADATA and wait > PATIENCE:
            raise Throttled(wait, message=f"{self._label} asked to be left alone for a while")

    # -- after it --------------------------------------------------------------------------

    def heed(self, slot: Slot, response: aiohttp.ClientResponse) -> None:
        """An answer's head has come."""
        status = response.status
        if status >= 500 and status != 501:
            self._failed(slot, Trouble.BROKEN, f"status {status}")
        else:
            self.health.answered()
        self.pulls.heed(response.headers)
        if status in (429, 503):
            self._pause(slot, status, retry_after(response.headers))

    def broke(self, slot: Slot, error: Exception) -> None:
        """There was no answer."""
        kind, said = sort_failure(error)
        no_connection = kind in _UNREACHABLE or isinstance(error, aiohttp.ConnectionTimeoutError)
        self._failed(slot, Trouble.UNREACHABLE if no_connection else Trouble.BROKEN, said)

    def _failed(self, slot: Slot, trouble: Trouble, reason: str) -> None:
        if not self.health.breaker.run:
            self._before = self.cap
        self.health.failed(slot.number, trouble, reason)

    def _pause(self, slot: Slot, status: int, seconds: float | None) -> None:
        if not seconds:
            return
        classes = _EVERYTHING
        if status == 429:
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

    # -- the cap ---------------------------------------------------------------------------

    @property
    def is_stressed(self) -> bool:
        """Was it overloaded a moment ago?"""
        return self._clock() - self._overloaded_at < STRESSED

    def went_well(self, *, full: bool) -> None:
        """A request went well; ``full``: the cap was the limit when it was sent."""
        self._settle(self.cap.succeeded(self._clock(), full=full))

    def was_too_much(self, sent_at: float, reason: str) -> None:
        """The upstream broke under a request sent at ``sent_at`` (monotonic seconds)."""
        self._metrics.upstream_overloads.labels(self._label).inc()
        self._overloaded_at = self._clock()
        self._settle(self.cap.overloaded(self._clock(), sent_at=sent_at, reason=reason))

    def _settle(self, cap: Cap) -> None:
        if cap.limit != self.cap.limit:
            self._gate.limit = cap.limit
        self.cap = cap
        self._on_cap(self._before if self.health.is_down else cap)

    def _health_changed(self, before: Breaker, after: Breaker) -> None:
        if after.state is State.CLOSED:
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
            "retries_held": self.retries.waiting,
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
        self._gate.close()

    def __repr__(self) -> str:
        return f"<Conduct {self._label} cap {self.cap.limit}, {self.health.breaker.state}>"
