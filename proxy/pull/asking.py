"""Short questions to an upstream: asked once for everybody, and again while that can help.

Manifests, HEADs and listings are alike: they take one turn of the first class, their failures may
pass, many clients ask the same at the same time, and each waits no longer than its own deadline. A
*question* is shared by all who ask it under one key (``SharedWork``); its tries belong to the
question, its deadline to each who waits (``deadlines.py``). Who gives it up notes where it stood.

How often it is tried is a matter of time. An upstream that fails is tried again until ``patience``
seconds after the arrival of the client that began the question, so that an outage that ends before
is noticed by nobody, and one that does not is told well before the client's own deadline. One that
is busy, or whose "later" is short, is tried for as long as anybody waits. What keeps the tries few
is full jitter, and the retry budget of the origin. Who joined later than the one that began has
waited for less: it asks anew, as another try. A denial is an answer and tried no second time. Only
``TRIES`` gets what says "not now" in so many words: a 429, and "not found" of what a manifest
names, which may be late; and where there is no connection, since the client may have another
mirror. For the same reason who asks an upstream that is known to be out of reach, or to be silent,
is told so at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from proxy.observe.logs import Logger
from proxy.oci.errors import (
    NotFound,
    PullError,
    Throttled,
    TokenServiceFailed,
    UpstreamBusy,
    UpstreamDown,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from proxy.pull.asks import Ask
from proxy.pull.shared import SharedWork
from proxy.upstream.turns import Ticket

V = TypeVar("V")

Key = tuple[str, ...]  # upstream, repository, reference; listings have more

#: Seconds to wait before try ``n`` (1, 2, …).
Pause = Callable[[int], float]

#: Failures that another try may not meet.
PASSING = (UpstreamUnavailable, UpstreamTimeout, UpstreamBusy, Throttled, TokenServiceFailed)
#: Seconds from the arrival of the first who asks in which an upstream that fails is tried again;
#: as a share of the deadline of a short question, …
PATIENCE_SHARE = 0.7
#: … whose default this is for.
PATIENCE = 14.0
#: Seconds that it is tried again in any case: the first try may have waited long for its turn.
LEAST_PATIENCE = 4.0
#: A try that breaker or budget hold back is given up after so much more than the patience.
LAST_CALL = 1.3
#: Tries of one question that is answered "not yet" or "too often", or cannot be asked.
TRIES = 6
#: Tries of one question for whatever reason: pauses make them a matter of time long before.
MOST_TRIES = 64
#: An upstream that asks for a longer pause than this, in seconds, is not asked again: the client
#: hears how long.
MAX_PAUSE = 5.0
#: The longest pause of our own between two tries, in seconds.
LONGEST_PAUSE = 3.0


def short_pause(tries: int) -> float:
    """Full jitter, so that those who failed together do not come back together."""
    return random.uniform(0, min(LONGEST_PAUSE, 0.2 * 2**tries))


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[V]):
    value: V
    waited: float


@dataclass(slots=True)
class _Standing:
    """Where a question stands: its ticket, and what its last try failed with."""

    ticket: Ticket
    arrived: float  # the client that began it; the loop's time, in seconds
    failure: PullError | None = None
    until: float = 0.0  # an upstream that fails is tried again


class Questions(Generic[V]):
    """Questions under way, by key."""

    def __init__(
        self, *, log: Logger, pause: Pause = short_pause, patience: float = PATIENCE
    ) -> None:
        """``patience``: how long an upstream that fails is tried again, in seconds."""
        self._log = log
        self._pause = pause
        self._patience = patience
        self._work: SharedWork[Key, _Outcome[V]] = SharedWork()
        self._standing: dict[Key, _Standing] = {}
        self.waiting = 0  # requests that wait for an answer

    async def ask(
        self,
        ask: Ask,
        key: Key,
        question: Callable[[Ticket], Awaitable[V]],
        *,
        named: bool = False,
        linger: float = 0.0,
    ) -> tuple[V, bool]:
        """The answer, and whether somebody else was asking already. Raises ``PullError``.

        ``named`` says that a manifest names what is asked for: then "not found" means "late".
        Until the loop's time is ``linger`` it goes on when everybody who asked has left.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        waited: float | None = None
        self.waiting += 1
        ask.timing.asked = True
        retry = ""

        async def put(ticket: Ticket) -> _Outcome[V]:
            ticket.retry = retry
            return await self._put(key, question, _Standing(ticket, ask.arrived), named)

        try:
            while True:
                is_first = key not in self._standing
                try:
                    outcome, joined = await self._work.do(key, ask.client, put, linger=linger)
                except PASSING as error:
                    if is_first or not _is_early(error, ask.arrived + self._patience):
                        raise
                    retry = error.reason  # it was tried for somebody who came earlier
                    continue
                waited = outcome.waited
                return outcome.value, joined
        finally:
            self.waiting -= 1
            elapsed = loop.time() - began
            standing = self._standing.get(key) if waited is None else None
            ask.timing.is_queued = standing is not None and standing.ticket.is_queued
            ask.timing.failure = standing.failure if standing is not None else None
            if waited is None:
                waited = elapsed if ask.timing.is_queued else 0.0
            ask.timing.queue += min(waited, elapsed)

    async def _put(
        self,
        key: Key,
        question: Callable[[Ticket], Awaitable[V]],
        standing: _Standing,
        named: bool,
    ) -> _Outcome[V]:
        self._standing[key], ticket, loop = standing, standing.ticket, asyncio.get_running_loop()
        answers = 0
        try:
            for tries in range(1, MOST_TRIES):
                try:
                    return await self._try(standing, question)
                except (*PASSING, NotFound) as error:
                    if standing.failure is None:
                        least = loop.time() + LEAST_PATIENCE
                        standing.until = max(standing.arrived + self._patience, least)
                    standing.failure = error.bare()
                    answers += isinstance(error, (NotFound, Throttled, UpstreamUnreachable))
                    is_final = isinstance(error, NotFound) and not named
                    is_final |= isinstance(error, UpstreamDown) and not error.talks
                    pause = max(self._pause(tries), error.retry_after or 0.0)
                    is_hopeless = is_final or answers >= TRIES
                    if is_hopeless or not _is_early(error, standing.until - pause):
                        raise
                    ticket.retry = error.retried_as
                    self._log.info(
                        "asked_again", about=":".join(key), tries=tries, cause=str(error)
                    )
                    await asyncio.sleep(pause)
            return _Outcome(await question(ticket), ticket.waited)
        finally:
            if self._standing.get(key) is standing:
                del self._standing[key]

    async def _try(
        self, standing: _Standing, question: Callable[[Ticket], Awaitable[V]]
    ) -> _Outcome[V]:
        """One try. If it is another one, of an upstream that fails, it has to stand in the queue in
        time: raises the failure before it when breaker or budget still hold it back then."""
        ticket, failure = standing.ticket, standing.failure
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)

        def look() -> None:
            if ticket.is_held and failure is not None and not isinstance(failure, UpstreamBusy):
                limit.reschedule(loop.time())

        timer = loop.call_at(standing.arrived + self._patience * LAST_CALL, look)
        try:
            async with limit:
                return _Outcome(await question(ticket), ticket.waited)
        except TimeoutError:
            if failure is None or not limit.expired():
                raise
            raise failure from None
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Stop what is under way."""
        await self._work.close()

    def __repr__(self) -> str:
        return f"<Questions {len(self._standing)} under way>"


def _is_early(error: PullError, until: float) -> bool:
    """May another try help somebody who waits for an upstream that fails until then?"""
    if (error.retry_after or 0.0) > MAX_PAUSE:
        return False
    # Those are no failures: how often they are tried is not a matter of time.
    is_patient = isinstance(error, (UpstreamBusy, Throttled, NotFound))
    return is_patient or asyncio.get_running_loop().time() < until
