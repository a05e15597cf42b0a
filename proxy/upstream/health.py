"""Is an origin there at all? The circuit breaker of one origin, with half-open probes.

Why: an upstream that is down costs every pull a connect time-out, and every cached tag the patience
of its check, although the answer is known. The breaker remembers it. It is not for an upstream that
has too much to do: that is the cap's business (``cap.py``), and answers of an overloaded one, false
401s included, are answers. Nothing that a client can bring about opens it: 404, denials and quotas
show that the origin is there, and so does every byte of a body. Nor does one repository that is
answered 5xx: it may be broken by itself (``blame.py``), so that such answers have to be for
``SEVERAL``.

Silence is another matter than a bad answer. A request is *silent* when no head came for as long as
somebody waited for it, ``SILENT_SECONDS`` at least, whoever gave it up in the end: its client, our
deadline, or the time that a socket has to answer. It counts only if the origin gave nobody else
anything meanwhile. So a client that leaves early tells nothing, one repository that hangs beside
others that are answered is held against nobody, and neither is an origin that is merely slow.

Theory of operation
-------------------
``Breaker`` is a value; these move it:

* CLOSED     requests pass. Failures in a row are counted; any answer begins the count anew. It
             opens when nobody could connect (refused, unresolvable, TLS, connect time-out)
             ``UNREACHABLE_RUN`` times in a row, or when ``BROKEN_RUN`` requests in a row, for
             ``SEVERAL`` repositories, ended in 5xx or a reset, which must also have lasted a while:
             a burst that breaks at once, while others are still being answered, is an overload. Or
             when ``SILENT_RUN`` in a row were silent.
* OPEN       nobody passes until ``until``, when the first request that is sent is the *probe*; one
             for a repository that failed in the row may be it ``LATER`` only, for its failure would
             say less than that of another. One for a repository that is *news* passes at once: the
             row says nothing of it, and perhaps it is only those of the row that fail. Nobody is
             news after ``KEPT`` have failed, or where there was no connection.
* HALF_OPEN  one probe is under way, everybody else waits for it. Its answer closes the breaker; its
             failure opens it for twice as long, jittered, up to a bound; if it is given up without
             an outcome (its client left) the next request is the probe at once. A probe for a
             repository of the row gives way to one for another, for the same reason, and so does
             one that has been silent for ``SLOW`` seconds to one that is news.

An answer to a request that was sent before it opened closes it too; a failure of such a request
says nothing but that its repository is no news. How often an origin is asked is in ``_WAITS``: one
that still talks, if only in 5xx, is asked again soon, and who waits for that goes on waiting; a
probe of a silent one costs its client as long as it lasts. It gets ``SILENT_SECONDS`` for its head,
and more each time, so that an origin that has become slow is found all the same.

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
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from proxy.oci.errors import UpstreamDown

#: Failures to connect in a row that open it, if the first is so many seconds ago.
UNREACHABLE_RUN = 5
UNREACHABLE_SECONDS = 1.0
#: The same for failures of any kind: 5xx, resets, silence.
BROKEN_RUN = 10
BROKEN_SECONDS = 3.0
#: Requests in a row that are silent, …
SILENT_RUN = 3
#: … each for so many seconds at least, in which nobody else was answered either.
SILENT_SECONDS = 10.0
#: Repositories for which requests have to fail that were answered badly.
SEVERAL = 3
#: Those of a row that are remembered, at most.
KEPT = 16
#: Seconds that a repository of the row leaves the probe to others.
LATER = 0.5
#: Seconds without an answer after which a probe gives way to one that is news.
SLOW = 2.0
#: Seconds that it stays open at first; each probe that fails doubles them.
FIRST = 1.0
LONGEST = 60.0
#: The most for an origin that can be reached: its pulls wait for the next probe, they do not fail.
LONGEST_BROKEN = 4.0
#: The same for one that is silent: from the start most pulls are told at once.
FIRST_SILENT = 10.0
LONGEST_SILENT = 30.0
#: Seconds that a request waits for a probe and its outcome.
PATIENCE = 5.0
#: Seconds between two looks at a clock that does not move on.
LEAST_WAIT = 0.01


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Trouble(StrEnum):
    """What kind of failure it was."""

    UNREACHABLE = "unreachable"  # there was no connection
    EGRESS = "egress"  # there was none to the egress proxy, or by it
    BROKEN = "broken"  # there was one, and it broke or gave a 5xx
    SILENT = "silent"  # there was no answer for a long while, to nobody

    @property
    def has_connected(self) -> bool:
        """Is it about requests, which are for a repository each?"""
        return self in (Trouble.BROKEN, Trouble.SILENT)


#: Seconds that the breaker stays open, at first and at most.
_WAITS = {
    Trouble.UNREACHABLE: (FIRST, LONGEST),
    Trouble.EGRESS: (FIRST, LONGEST),
    Trouble.BROKEN: (FIRST, LONGEST_BROKEN),
    Trouble.SILENT: (FIRST_SILENT, LONGEST_SILENT),
}


@dataclass(frozen=True, slots=True)
class Breaker:
    """The state machine. Times are monotonic seconds."""

    state: State = State.CLOSED
    run: int = 0  # failures since the last answer
    unreachable: int = 0  # those of them without a connection
    silent: int = 0  # those of them without a word
    repositories: frozenset[str] = frozenset()  # what the others were for, and probes since
    since: float = 0.0  # when the row began
    openings: int = 0  # since it was closed last
    until: float = 0.0  # when the probe is due
    reason: str = ""
    trouble: Trouble | None = None  # what opened it last

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
        row = self.having(repository) if trouble.has_connected else self
        if self.state is not State.CLOSED and not (is_probe and self.state is State.HALF_OPEN):
            return row
        if self.state is not State.CLOSED:
            return row._opened(now, trouble, reason, chance)
        row = replace(
            row,
            run=self.run + 1,
            unreachable=self.unreachable + (not trouble.has_connected),
            silent=self.silent + (trouble is Trouble.SILENT),
            since=self.since if self.run else now,
            reason=reason,
        )
        return row._opened(now, trouble, reason, chance) if row._is_long(now) else row

    def having(self, repository: str) -> Breaker:
        """The same with this repository in the row."""
        if repository in self.repositories or len(self.repositories) >= KEPT:
            return self
        return replace(self, repositories=self.repositories | {repository})

    def _is_long(self, now: float) -> bool:
        if self.silent >= SILENT_RUN:
            return True
        lasted = now - self.since
        if self.is_unreachable and lasted >= UNREACHABLE_SECONDS:
            return True
        return self.is_widespread and self.run >= BROKEN_RUN and lasted >= BROKEN_SECONDS

    @property
    def is_unreachable(self) -> bool:
        """Could nobody connect?"""
        return self.unreachable >= UNREACHABLE_RUN

    @property
    def is_widespread(self) -> bool:
        """Is it about more than a repository or two? Connections are the origin's own."""
        return len(self.repositories) + self.unreachable >= SEVERAL

    def is_news(self, repository: str) -> bool:
        """Would a request for it tell more than the row does?"""
        is_full = self.is_unreachable or len(self.repositories) >= KEPT
        return bool(self.repositories) and not is_full and repository not in self.repositories

    def is_about(self, repository: str) -> bool:
        """Does the row say that a request for it would fail?"""
        is_known = self.is_widespread or repository in self.repositories
        return self.state is not State.CLOSED and (is_known or not self.repositories)

    def _opened(self, now: float, trouble: Trouble, reason: str, chance: float) -> Breaker:
        first, longest = _WAITS[trouble]
        # The exponent is bounded before the power: it grows for as long as the outage lasts.
        lasts = min(longest, first * 2 ** min(self.openings, 16)) * (0.5 + chance / 2)
        return replace(
            self,
            state=State.OPEN,
            openings=self.openings + 1,
            until=now + lasts,
            reason=reason,
            trouble=trouble,
        )

    def resting(self, until: float) -> Breaker:
        """It is open until then, if so many ask for it that nobody is news any more."""
        is_all = self.state is State.OPEN and len(self.repositories) >= KEPT
        is_longer = is_all and until > self.until
        return replace(self, until=until) if is_longer else self

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
        if repository is not None and self.is_news(repository):
            return 0.0
        return self.until + (LATER if repository in self.repositories else 0.0)


@dataclass(frozen=True, slots=True)
class _Probe:
    slot: int
    repository: str
    since: float


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
        self._probe: _Probe | None = None
        self._answered_at = float("-inf")
        self._talked_at = float("-inf")  # when it last gave a bad answer, or broke
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

    def would_probe(self, repository: str) -> bool:
        """Would a request for ``repository`` find out whether it is back?"""
        return self.is_down and self.admits(repository)

    def admits(self, repository: str = "") -> bool:
        """Might a request for ``repository`` be sent now?"""
        failed, probe = self.breaker.repositories, self._probe
        match self.breaker.state:
            case State.CLOSED:
                return True
            case State.OPEN:
                return self._clock() >= self.breaker.due(repository)
            case State.HALF_OPEN:
                if probe is None or repository in failed:
                    return False
                is_late = self._clock() >= probe.since + SLOW
                return probe.repository in failed or (is_late and self.breaker.is_news(repository))

    async def passage(self, repository: str = "") -> None:
        """Wait until a request may ask for a slot. Raises ``UpstreamDown``."""
        if not self.is_down:
            return
        try:
            async with asyncio.timeout(self._patience):
                while not self.admits(repository):
                    if self.breaker.state is State.OPEN and self.retry_in > self._patience:
                        raise self._down()
                    await self._moved(repository)
        except TimeoutError:
            raise self._down() from None

    async def _moved(self, repository: str) -> None:
        """Wait for a change, or until the probe is due."""
        changed, wait = self._changed, None
        if self.breaker.state is State.OPEN:
            wait = max(0.0, self.breaker.due(repository) - self._clock())
        elif self._probe is not None and self.breaker.is_news(repository):
            wait = max(LEAST_WAIT, self._probe.since + SLOW - self._clock())
        try:
            async with asyncio.timeout(wait):
                await changed.wait()
        except TimeoutError:
            return
        has_failed = self.breaker.state is State.OPEN and not self.wants_probe
        if has_failed and not self.breaker.repositories:
            raise self._down()  # nobody got through: nothing is left to hope for

    @contextlib.asynccontextmanager
    async def queueing(self) -> AsyncIterator[None]:
        """What is inside waits for a slot: while the origin is down not for longer than for a
        probe, for those with slots may be waiting themselves. Raises ``UpstreamDown``."""
        if not self.is_down:
            yield
            return
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)

        def look() -> None:
            if self.is_down:
                limit.reschedule(loop.time())

        try:
            async with limit:
                timer = loop.call_later(self._patience, look)
                try:
                    yield
                finally:
                    timer.cancel()
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._down() from None

    def _down(self) -> UpstreamDown:
        breaker = self.breaker
        least = SILENT_SECONDS if breaker.trouble is Trouble.SILENT else 1.0
        text = f"{self._label} is down ({breaker.reason})"
        if breaker.trouble is Trouble.EGRESS:  # of the upstream itself nothing is known
            text = f"{self._label} is not asked: {breaker.reason}"
        down = UpstreamDown(text, retry_after=max(least, self.retry_in))
        down.talks = breaker.trouble is Trouble.BROKEN
        return down

    def enter(self, slot: int, repository: str = "") -> bool:
        """May the request that holds this slot be sent? If the probe is due it becomes it."""
        is_probing = self.breaker.state is State.HALF_OPEN and self._is_probe(slot)
        if not self.is_down or is_probing:
            return True
        if not self.admits(repository):
            return False
        if self._probe is not None and self.breaker.state is State.HALF_OPEN:
            # It gives way: it has told nothing yet, and what it tells says nothing new.
            self.breaker = self.breaker.having(self._probe.repository)
        self._probe = _Probe(slot, repository, self._clock())
        if self.breaker.state is State.OPEN:
            self._become(self.breaker.probing())
        return True

    def _is_probe(self, slot: int) -> bool:
        return self._probe is not None and self._probe.slot == slot

    def patience(self, slot: int) -> float | None:
        """Seconds that the slot's request has for its head, as the probe of a silent origin."""
        if self.breaker.trouble is not Trouble.SILENT or not self._is_probe(slot):
            return None
        return SILENT_SECONDS * self.breaker.openings

    def leave(self, slot: int) -> None:
        """The slot's turn is over, whatever came of it."""
        if not self._is_probe(slot):
            return
        self._probe = None
        if self.breaker.state is State.HALF_OPEN:
            self._become(self.breaker.given_up(self._clock()))

    def answered(self) -> None:
        """The origin gave an answer, or a byte of one."""
        self._answered_at = self._clock()
        if self.is_down or self.breaker.run:
            self._become(self.breaker.answered())

    def failed(self, slot: int, trouble: Trouble, reason: str, repository: str = "") -> None:
        """The request of this slot, for ``repository``, failed."""
        if trouble is Trouble.BROKEN:
            self._talked_at = self._clock()
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

    def rest(self, seconds: float) -> None:
        """A repository of the origin asks to be left alone for so long."""
        self.breaker = self.breaker.resting(self._clock() + seconds)

    def was_silent(self, slot: int, sent_at: float, repository: str = "") -> None:
        """This slot's request, sent ``SILENT_SECONDS`` ago or earlier, is given up unanswered."""
        if self._answered_at >= sent_at:
            return  # others were answered meanwhile
        trouble = Trouble.BROKEN if self._talked_at >= sent_at else Trouble.SILENT
        talked_at = self._talked_at  # which this is not
        self.failed(slot, trouble, f"no answer in {self._clock() - sent_at:.0f} s", repository)
        self._talked_at = talked_at

    def _become(self, breaker: Breaker) -> None:
        before, self.breaker = self.breaker, breaker
        if breaker.state is before.state:
            return
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change(before, breaker)

    def __repr__(self) -> str:
        return f"<Health {self._label} {self.breaker.state}, {self.breaker.run} failures in a row>"
