"""Short questions to an upstream: asked once for everybody, and again while that can help.

Manifests, HEADs and listings are alike: they take one turn of the first class, their failures may
pass, many clients ask the same at the same time, and each waits no longer than its own deadline. A
*question* is shared by all who ask it under one key (``SharedWork``); its tries belong to the
question, its deadline to each who waits (``deadlines.py``). Who gives it up notes where it stood.
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
#: Tries of one question while anybody's deadline lasts. An overloaded upstream also answers 500 or
#: resets the connection, and several times in a row.
TRIES = 6
#: The same for an upstream that is busy, which pauses make a matter of the asker's deadline.
BUSY_TRIES = 64
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
    failure: PullError | None = None


class Questions(Generic[V]):
    """Questions under way, by key."""

    def __init__(self, *, log: Logger, pause: Pause = short_pause) -> None:
        self._log = log
        self._pause = pause
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
        try:
            outcome, joined = await self._work.do(
                key,
                ask.client,
                lambda ticket: self._put(key, question, ticket, named),
                linger=linger,
            )
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
        self, key: Key, question: Callable[[Ticket], Awaitable[V]], ticket: Ticket, named: bool
    ) -> _Outcome[V]:
        standing = self._standing[key] = _Standing(ticket)
        failures = 0  # of an upstream that is not just busy
        try:
            for tries in range(1, BUSY_TRIES):
                try:
                    return _Outcome(await question(ticket), ticket.waited)
                except (*PASSING, NotFound) as error:
                    standing.failure = error.bare()
                    failures += not isinstance(error, UpstreamBusy)
                    if failures >= TRIES or not _may_pass(error, named):
                        raise
                    ticket.retry = error.retried_as
                    self._log.info(
                        "asked_again", about=":".join(key), tries=tries, cause=str(error)
                    )
                    await asyncio.sleep(max(self._pause(tries), error.retry_after or 0.0))
            return _Outcome(await question(ticket), ticket.waited)
        finally:
            if self._standing.get(key) is standing:
                del self._standing[key]

    async def close(self) -> None:
        """Stop what is under way."""
        await self._work.close()

    def __repr__(self) -> str:
        return f"<Questions {len(self._standing)} under way>"


def _may_pass(error: PullError, named: bool) -> bool:
    if isinstance(error, NotFound):
        return named
    if isinstance(error, UpstreamDown):
        return False  # the question has waited for the probe, if that was due
    return (error.retry_after or 0.0) <= MAX_PAUSE
