"""How long a client waits, and what it is told when that was too long (DESIGN D7).

Every deadline counts from the request's arrival, whatever the time was spent on: the client's
password, the store, a proof, our queue, the upstream. Short questions (manifests, HEADs, listings)
end at ``manifest``; a blob's headers leave at ``header``, with bytes or without them, and its first
byte comes by ``blob``. What an upstream gets to answer in is what is left: when everybody who asked
has gone, so has the question.

Where an upstream's overload is *spilled* nothing is answered early: whatever has no answer a little
before ``header`` is sent away, in time for the client to go to its next host.

What is told afterwards depends on who kept the client waiting (``late``): our queue, an upstream
that said "too much", and we ourselves are an overload, which every client is told in its own words;
an upstream that said nothing is a gateway's time-out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from proxy.observe.metrics import Metrics
from proxy.oci.errors import Overloaded, PullError, QueueTimeout, UpstreamBusy, UpstreamTimeout
from proxy.pull.asks import Ask, Timing
from proxy.upstream.turns import Ticket, TurnClass

V = TypeVar("V")

#: Seconds after which a client that was sent away may come again.
COME_AGAIN = 10.0
#: Who spills answers so many seconds before the header deadline, at most this share of it.
SPILL_MARGIN = 1.0
SPILL_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Deadlines:
    """In seconds from the request's arrival. ``spill`` names the upstreams that send clients away
    before ``header`` instead of answering early."""

    header: float = 20.0
    blob: float = 180.0
    manifest: float = 20.0
    spill: frozenset[str] = frozenset()

    def headers(self, upstream: str) -> float:
        """Until a blob is answered, one way or the other."""
        if upstream not in self.spill:
            return self.header
        return self.header - min(SPILL_MARGIN, self.header * SPILL_SHARE)

    def short(self, upstream: str) -> float:
        """Until a manifest, a HEAD or a listing is answered."""
        if upstream not in self.spill:
            return self.manifest
        return min(self.manifest, self.headers(upstream))


def late(upstream: str, timing: Timing, *, after: float, spills: bool) -> PullError:
    """What a client is told that got no answer within ``after`` seconds."""
    if timing.is_queued:
        return QueueTimeout(COME_AGAIN)
    if not timing.asked:
        return QueueTimeout(COME_AGAIN, message="there was too much to do here to ask in time")
    failure = timing.failure
    if isinstance(failure, Overloaded):
        wait = max(COME_AGAIN, failure.retry_after or 0.0)
        return type(failure)(wait, message=failure.message)
    message = f"{upstream} did not answer within {after:g} s"
    if spills:
        return UpstreamBusy(COME_AGAIN, message=message)
    return UpstreamTimeout(message, retry_after=COME_AGAIN)


class Waits:
    """Holds requests to their deadlines, and counts those whose turn did not come in time."""

    def __init__(
        self, deadlines: Deadlines, *, metrics: Metrics, gates: Mapping[str, str] | None = None
    ) -> None:
        """``gates`` names each upstream's gate, as the other metrics of its queue do."""
        self._deadlines = deadlines
        self._metrics = metrics
        self._gates = gates or {}

    def spills(self, upstream: str) -> bool:
        """Are this upstream's clients sent away when their turn does not come in time?"""
        return upstream in self._deadlines.spill

    def headers(self, ask: Ask) -> asyncio.Timeout:
        """``TimeoutError`` when a blob's headers must leave."""
        return asyncio.timeout_at(ask.arrived + self._deadlines.headers(ask.upstream))

    def first_byte(self, ask: Ask) -> asyncio.Timeout:
        """``TimeoutError`` when a blob's first byte is overdue; never for a patient client."""
        if ask.is_patient:
            return asyncio.timeout(None)
        return asyncio.timeout_at(ask.arrived + self._deadlines.blob)

    async def short(self, ask: Ask, work: Coroutine[Any, Any, V]) -> V:
        """What ``work`` gives, if it gives it before a short question's deadline.

        Raises an ``Overloaded`` or ``UpstreamTimeout`` when it is late. Notes the time spent.
        """
        return await self._before(ask, self._deadlines.short(ask.upstream), work)

    async def proof(self, ask: Ask, work: Coroutine[Any, Any, V]) -> V:
        """The same for what must be known before a blob is answered at all."""
        return await self._before(ask, self._deadlines.headers(ask.upstream), work)

    async def _before(self, ask: Ask, after: float, work: Coroutine[Any, Any, V]) -> V:
        loop, timing = asyncio.get_running_loop(), ask.timing
        try:
            # Nothing suspends between the work's last step and the caller's next one.
            async with asyncio.timeout_at(ask.arrived + after):
                return await work
        except TimeoutError:
            raise self._gave_up(ask, after) from None
        finally:
            if timing.asked:
                timing.upstream = max(0.0, loop.time() - ask.arrived - timing.queue)

    def late_proof(self, ask: Ask) -> PullError:
        """Why a proof has not come by the time the blob's headers must leave."""
        return self._gave_up(ask, self._deadlines.headers(ask.upstream))

    def _gave_up(self, ask: Ask, after: float) -> PullError:
        if ask.timing.is_queued:
            self._count(ask, TurnClass.METADATA)
        return late(ask.upstream, ask.timing, after=after, spills=self.spills(ask.upstream))

    def late_blob(self, ask: Ask, ticket: Ticket) -> Overloaded:
        """Why a blob has not come in time; its flight's ``ticket`` tells whether it stands in the
        queue, which is counted then."""
        if ticket.is_queued:
            self._count(ask, ticket.turn_class)
            return QueueTimeout(COME_AGAIN)
        return UpstreamBusy(COME_AGAIN, message=f"no byte came from {ask.upstream} in time")

    def _count(self, ask: Ask, turn_class: TurnClass) -> None:
        gate = self._gates.get(ask.upstream, ask.upstream)
        self._metrics.queue_timeouts.labels(gate, turn_class).inc()

    def __repr__(self) -> str:
        return f"<Waits by {self._deadlines}>"
