"""Several URLs of one registry: which is asked next (the first that is not known to fail).

Theory of operation
-------------------
Each URL has a *standing*: how often it failed in a row, and until when it is down for that. It is

* *up*     from the start, and after any answer that was meant (a denial is one);
* *down*   after a failure, for a time that doubles with each; failures of requests that left
           before it was marked down are the same failure;
* *due*    when that time has passed: the next live request tries it, and while that one is under
           way nobody else does (``begin`` moves the time on), so that a URL that hangs costs one
           request and not all of them. A trial that is cancelled says nothing.

A failure of a request that was made although the URL was down, for want of a better one, lengthens
nothing: else a crowd in an outage of seconds would put every URL away for minutes.

Besides, a URL may be *closed*: it asked for a pause, or its circuit breaker is open. It is not
asked while another is ready, and not tried before it is open again; its standing stays as it is.

The order is: those that are up or due, and not closed, as they were configured; then those that are
down, the one that is due soonest first, because a URL that failed a moment ago is better than an
error; then those that are closed.

Pure but for the clock, which is injected. What counts as a failure, and what is closed, is
``mirrored.py``'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

#: Seconds that a URL is down after its first failure, and at most.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 300.0
#: Seconds that a trial has before somebody else tries.
TRIAL = 15.0


class State(StrEnum):
    """What a URL is, for people."""

    IN_USE = "in use"
    STANDBY = "standby"
    DOWN = "down"  # or not yet known to be up again


@dataclass(frozen=True, slots=True)
class Standing:
    """How one URL has fared. Times are monotonic seconds."""

    failures: int = 0
    down_until: float = 0.0
    since: float = 0.0  # when it was marked down last
    cause: str = ""
    due: float = 0.0  # when it is tried: `down_until`, but for a trial that is under way

    def is_ready(self, now: float) -> bool:
        """Is it up, or due for a trial?"""
        return not self.failures or now >= self.down_until

    def began(self, now: float) -> Standing:
        """A request goes to it; if it was due, that is its trial."""
        if not self.failures or now < self.down_until:
            return self
        return replace(self, down_until=now + TRIAL)

    def failed(self, now: float, began_at: float, cause: str) -> Standing:
        """A request that began then has failed."""
        if self.failures and began_at < self.due:
            return self  # left before the failure that is known, or when it was known
        # Bounded, because 2.0 ** 1024 is an error.
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.failures, 32))
        return Standing(self.failures + 1, now + pause, now, cause, now + pause)

    def worked(self, began_at: float) -> Standing:
        """A request that began then was answered."""
        return self if began_at < self.since else Standing(since=self.since)


def choose(
    standings: Sequence[Standing], now: float, closed: Collection[int] = ()
) -> tuple[int, ...]:
    """Every URL, the one to ask first at the front."""
    places = range(len(standings))
    ready = [place for place in places if place not in closed and standings[place].is_ready(now)]
    rest = [place for place in places if place not in ready]
    rest.sort(key=lambda place: (place in closed, standings[place].down_until))
    return (*ready, *rest)


@dataclass(frozen=True, slots=True)
class MirrorState:
    """One URL as the status shows it; ``retry_in`` is in seconds."""

    upstream: str
    url: str
    state: State
    cause: str
    retry_in: float


class Mirrors:
    """The URLs of one upstream, in order, and how they fare.

    ``on_change`` hears the URL that went down with the cause, or came up again with ``None``.
    """

    def __init__(
        self,
        upstream: str,
        urls: Sequence[str],
        *,
        clock: Callable[[], float],
        on_change: Callable[[str, str | None], None] = lambda _url, _cause: None,
    ) -> None:
        self.upstream = upstream
        self.urls = tuple(urls)
        self._clock = clock
        self._on_change = on_change
        self._standings = [Standing() for _ in urls]

    def order(self, closed: Collection[int] = ()) -> tuple[int, ...]:
        """The URLs to ask in turn."""
        return choose(self._standings, self._clock(), closed)

    def is_up(self, place: int) -> bool:
        """Did it not fail when it was asked last?"""
        return not self._standings[place].failures

    def is_ready(self, place: int) -> bool:
        """Is it up, or due for a trial?"""
        return self._standings[place].is_ready(self._clock())

    def begin(self, place: int) -> float:
        """A request goes to this URL; hand back what it returns with the outcome."""
        now = self._clock()
        self._standings[place] = self._standings[place].began(now)
        return now

    def failed(self, place: int, began_at: float, cause: str) -> None:
        """The request that began then has failed."""
        known = self._standings[place]
        self._standings[place] = known.failed(self._clock(), began_at, cause)
        if not known.failures:
            self._on_change(self.urls[place], cause)

    def worked(self, place: int, began_at: float) -> None:
        """The request that began then was answered as it was meant."""
        known = self._standings[place]
        self._standings[place] = known.worked(began_at)
        if known.failures and not self._standings[place].failures:
            self._on_change(self.urls[place], None)

    def states(self, closed: Mapping[int, float] = MappingProxyType({})) -> list[MirrorState]:
        """How all of them stand, in the order of the configuration; ``closed`` says for how many
        seconds each URL is that is."""
        now = self._clock()
        order = choose(self._standings, now, closed)
        # One that failed and is due is tried by the next request; until then it serves nobody.
        first = next(
            (p for p in order if not self._standings[p].failures and p not in closed), order[0]
        )
        found = []
        for place, (url, standing) in enumerate(zip(self.urls, self._standings, strict=True)):
            is_down = bool(standing.failures) or place in closed
            state = State.DOWN if is_down else State.STANDBY
            state = State.IN_USE if place == first else state
            retry_in = max(0.0, standing.down_until - now) if standing.failures else 0.0
            retry_in = max(retry_in, closed.get(place, 0.0))
            found.append(MirrorState(self.upstream, url, state, standing.cause, retry_in))
        return found

    def __repr__(self) -> str:
        shown = ", ".join(f"{one.url} {one.state}" for one in self.states())
        return f"<Mirrors {self.upstream}: {shown}>"
