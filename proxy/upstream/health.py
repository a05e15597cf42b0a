"""Is an origin there at all? The circuit breaker of one origin, with half-open probes.

Why: an upstream that is down costs every pull a connect time-out, and every cached tag the patience
of its check, although the answer is known. The breaker remembers it. It is not for an upstream that
has too much to do: that is the cap's business (``cap.py``), and answers of an overloaded one, false
401s included, are answers. Nothing that a client can bring about opens it: 404, denials and quotas
show that the origin is there, and so does every byte of a body. Nor does one repository: it may be
broken by itself (``blame.py``), so that requests which got through have to fail for ``SEVERAL``.

Theory of operation
-------------------
``Breaker`` is a value; these move it:

* CLOSED     requests pass. Failures in a row are counted; any answer begins the count anew. It
             opens when nobody could connect (refused, unresolvable, TLS, connect time-out)
             ``UNREACHABLE_RUN`` times in a row, or when ``BROKEN_RUN`` requests in a row, for
             ``SEVERAL`` repositories, ended in 5xx, a reset or silence. The row must also have
             lasted a while: a burst that breaks at once, while others are still being answered, is
             an overload.
* OPEN       nobody passes until ``until``. Then the first request that is sent is the *probe*; one
             for a repository that failed in the row may be it ``LATER`` only, for its failure would
             say less than that of another.
* HALF_OPEN  one probe is under way, everybody else waits for it. Its answer closes the breaker; its
             failure opens it for twice as long, jittered, up to a bound; if it is given up without
             an outcome (its client left) the next request is the probe at once. A probe for a
             repository of the row gives way to one for another, for the same reason.

An answer to a request that was sent before it opened closes it too; a failure of such a request
says nothing new. An origin that still talks, if only in 5xx, is asked at least every
``LONGEST_BROKEN`` seconds; one that cannot be reached every ``LONGEST``.

Requests that find it open (``passage``): if the probe is due within ``PATIENCE`` they wait for it
and for its outcome, at most so long altogether: a restart of the upstream is over in seconds, and a
pull that waited for it is a pull that did not fail. If it is due later they fail at once with
``UpstreamDown``, which says when to come again: silence would only hide what is known, and the
client may have another mirror. When a probe fails that got through they wait on, for the next one
is due soon and it may be about the probe's repository only. After the wait the same is asked again
when the slot is granted (``admits``), because those who stood in the gate's queue when it opened
never came through here, and once more when the request is sent (``enter``), which is when it
becomes the probe: in between it may have to wait for another origin's token service.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from proxy.oci.errors import UpstreamDown

#: Failures to connect in a row that open it, if the first is so many seconds ago.
UNREACHABLE_RUN = 5
UNREACHABLE_SECONDS = 1.0
#: The same for failures of any kind: 5xx, resets, silence.
BROKEN_RUN = 10
BROKEN_SECONDS = 3.0
#: Repositories for which requests have to fail that got through.
SEVERAL = 3
#: Those of a row that are remembered, at most.
KEPT = 16
#: Seconds that a repository of the row leaves the probe to others.
LATER = 0.5
#: Seconds that it stays open at first; each probe that fails doubles them.
FIRST = 1.0
LONGEST = 60.0
#: The most for an origin that can be reached: its pulls wait for the next probe, they do not fail.
LONGEST_BROKEN = 4.0
#: Seconds that a request waits for a probe and its outcome.
PATIENCE = 5.0


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Trouble(StrEnum):
    """What kind of failure it was."""

    UNREACHABLE = "unreachable"  # there was no connection
    BROKEN = "broken"  # there was one, and no answer or a 5xx


@dataclass(frozen=True, slots=True)
class Breaker:
    """The state machine. Times are monotonic seconds."""

    state: State = State.CLOSED
    run: int = 0  # failures since the last answer
    unreachable: int = 0  # those of them without a connection
    repositories: frozenset[str] = frozenset()  # what the others were for, and probes since
    since: float = 0.0  # when the row began
    openings: int = 0  # since it was closed last
    until: float = 0.0  # when the probe is due
    reason: str = ""

    def failed(
        self,
        now: float,
        trouble: Trouble,
        reason: str,
        *,
        chance: float,
        repository: str = "",
        is_probe: bool = False,
    ) -> Breaker:
        """A request failed; ``chance`` is a random number in [0, 1)."""
        if self.state is not State.CLOSED and not (is_probe and self.state is State.HALF_OPEN):
            return self
        has_connected = trouble is Trouble.BROKEN
        row = self._with(repository) if has_connected else self
        if self.state is not State.CLOSED:
            return row._opened(now, trouble, reason, chance)
        row = replace(
            row,
            run=self.run + 1,
            unreachable=self.unreachable + (not has_connected),
            since=self.since if self.run else now,
            reason=reason,
        )
        return row._opened(now, trouble, reason, chance) if row._is_long(now) else row

    def _with(self, repository: str) -> Breaker:
        if len(self.repositories) >= KEPT:
            return self
        return replace(self, repositories=self.repositories | {repository})

    def _is_long(self, now: float) -> bool:
        lasted = now - self.since
        if self.is_unreachable and lasted >= UNREACHABLE_SECONDS:
            return True
        return self.is_widespread and self.run >= BROKEN_RUN and lasted >= BROKEN_SECONDS

    @property
    def is_unreachable(self) -> bool:
        """Could nobody connect in this row?"""
        return self.unreachable >= UNREACHABLE_RUN

    @property
    def is_widespread(self) -> bool:
        """Is the row about more than a repository or two? Connections are the origin's own."""
        return len(self.repositories) + self.unreachable >= SEVERAL

    def _opened(self, now: float, trouble: Trouble, reason: str, chance: float) -> Breaker:
        longest = LONGEST if trouble is Trouble.UNREACHABLE else LONGEST_BROKEN
        # The exponent is bounded before the power: it grows for as long as the outage lasts.
        lasts = min(longest, FIRST * 2 ** min(self.openings, 16)) * (0.5 + chance / 2)
        return replace(
            self, state=State.OPEN, openings=self.openings + 1, until=now + lasts, reason=reason
        )

    def answered(self) -> Breaker:
        """The origin gave an answer, or a byte of one."""
        return Breaker()

    def probing(self) -> Breaker:
        """The probe leaves. Raises ``ValueError`` if the breaker is not open."""
        if self.state is not State.OPEN:
            raise ValueError(f"expected an open breaker for a probe, got {self.state}")
        return replace(self, state=State.HALF_OPEN)

    def given_up(self, now: float) -> Breaker:
        """The probe ended without an outcome: the next request is one at once."""
        return replace(self, state=State.OPEN, until=now)

    def due(self, repository: str | None = None) -> float:
        """When a request for ``repository``, or for one that has not failed, may be the probe."""
        return self.until + (LATER if repository in self.repositories else 0.0)


class Health:
    """One origin's breaker, and those who wait for it.

    ``clock`` is monotonic, in seconds; ``chance`` gives numbers in [0, 1). ``on_change`` hears the
    breaker before and after each change of its state.
    """

    def __init__(
        self,
        label: str,
        *,
        clock: Callable[[], float],
        on_change: Callable[[Breaker, Breaker], None],
        chance: Callable[[], float] = random.random,
        patience: float = PATIENCE,
    ) -> None:
        self.breaker = Breaker()
        self._label = label
        self._clock = clock
        self._chance = chance
        self._on_change = on_change
        self._patience = patience
        self._probe: tuple[int, str] | None = None  # slot and repository of the one under way
        self._changed = asyncio.Event()

    @property
    def is_down(self) -> bool:
        """Is the origin known not to answer?"""
        return self.breaker.state is not State.CLOSED

    @property
    def wants_probe(self) -> bool:
        """Is it open, and the time come to ask whether the origin is back?"""
        return self.breaker.state is State.OPEN and self._clock() >= self.breaker.due()

    @property
    def retry_in(self) -> float:
        """Seconds until the next probe is due."""
        return max(0.0, self.breaker.until - self._clock()) if self.is_down else 0.0

    def admits(self, repository: str = "") -> bool:
        """Might a request for ``repository`` be sent now?"""
        failed = self.breaker.repositories
        match self.breaker.state:
            case State.CLOSED:
                return True
            case State.OPEN:
                return self._clock() >= self.breaker.due(repository)
            case State.HALF_OPEN:
                is_telling = self._probe is None or self._probe[1] not in failed
                return not is_telling and repository not in failed

    async def passage(self, repository: str = "") -> None:
        """Wait until a request may ask for a slot. Raises ``UpstreamDown``."""
        if not self.is_down:
            return
        try:
            async with asyncio.timeout(self._patience):
                while not self.admits(repository):
                    if self.retry_in > self._patience:
                        raise self._down()
                    await self._moved(repository)
        except TimeoutError:
            raise self._down() from None

    async def _moved(self, repository: str) -> None:
        """Wait for a change, or until the probe is due."""
        changed, wait = self._changed, None
        if self.breaker.state is State.OPEN:
            wait = max(0.0, self.breaker.due(repository) - self._clock())
        try:
            async with asyncio.timeout(wait):
                await changed.wait()
        except TimeoutError:
            return
        has_failed = self.breaker.state is State.OPEN and not self.wants_probe
        if has_failed and not self.breaker.repositories:
            raise self._down()  # nobody got through: nothing is left to hope for

    def _down(self) -> UpstreamDown:
        return UpstreamDown(
            f"{self._label} is down ({self.breaker.reason})",
            retry_after=max(1.0, self.retry_in),
        )

    def enter(self, slot: int, repository: str = "") -> bool:
        """May the request that holds this slot be sent? If the probe is due it becomes it."""
        is_probing = self.breaker.state is State.HALF_OPEN and self._is_probe(slot)
        if not self.is_down or is_probing:
            return True
        if not self.admits(repository):
            return False
        self._probe = slot, repository
        if self.breaker.state is State.OPEN:
            self._become(self.breaker.probing())
        return True

    def _is_probe(self, slot: int) -> bool:
        return self._probe is not None and self._probe[0] == slot

    def leave(self, slot: int) -> None:
        """The slot's turn is over, whatever came of it."""
        if not self._is_probe(slot):
            return
        self._probe = None
        if self.breaker.state is State.HALF_OPEN:
            self._become(self.breaker.given_up(self._clock()))

    def answered(self) -> None:
        """The origin gave an answer, or a byte of one."""
        if self.is_down or self.breaker.run:
            self._become(self.breaker.answered())

    def failed(self, slot: int, trouble: Trouble, reason: str, repository: str = "") -> None:
        """The request of this slot, for ``repository``, failed."""
        self._become(
            self.breaker.failed(
                self._clock(),
                trouble,
                reason,
                chance=self._chance(),
                repository=repository,
                is_probe=self._is_probe(slot),
            )
        )

    def _become(self, breaker: Breaker) -> None:
        before, self.breaker = self.breaker, breaker
        if breaker.state is before.state:
            return
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change(before, breaker)

    def __repr__(self) -> str:
        return f"<Health {self._label} {self.breaker.state}, {self.breaker.run} failures in a row>"
