"""How many retries an origin gets: a fifth of its requests, and a few more (the retry budget).

Why: retries are how an upstream that stumbles is kept down. Each layer that asks again three times
makes four requests of one, just when one was too many. So all tries after the first, whatever they
are for, draw on one budget per origin: in a *window*, a fifth of the first tries in it, and a small
*reserve*, without which a proxy with little to do could not retry at all.

A spent budget is no failure. DESIGN says queue, do not fail: a retry that is held back waits, first
come, first served, and its request's own deadline is what ends the wait. So the budget paces; it
turns no pull into an error that time would have served.

A retry that goes well *gives its place back*: it did what the first try should have done, and was
not one too many. What the budget bounds are retries that fail. That is what keeps a crowd that
waited through an outage from being let out at the reserve's pace once the upstream is back: each
success lets the next one go, while an upstream that is still down gets no more than the budget.

``RetryBudget`` is the bookkeeping, without clock or loop. ``Retries`` waits on it. A waiter is a
future in line; it is granted when a first try is counted, when a place comes back, or when the
oldest failures have left the window (one timer, only while somebody waits). Cancelled waiters leave
the line at once; a grant that comes in the same loop turn as the cancellation is given back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from proxy.observe.metrics import Metrics
from proxy.oci.errors import ShuttingDown

#: Retries per first try.
SHARE = 0.2
#: Retries beyond that share, per window.
RESERVE = 20
#: Seconds that a request or a retry counts.
WINDOW = 10.0
#: The window moves on in so many steps.
STEPS = 10
#: Seconds between two looks at a clock that does not move on.
LEAST_WAIT = 0.05


@dataclass(slots=True)
class _Step:
    """What was counted in one step of the window."""

    number: int
    requests: int = 0
    retries: int = 0


class RetryBudget:
    """How many retries there may be. All times are monotonic seconds, given by the caller."""

    def __init__(
        self, *, share: float = SHARE, reserve: int = RESERVE, window: float = WINDOW
    ) -> None:
        self.share = share
        self.reserve = reserve
        self.window = window
        self._width = window / STEPS
        self._steps: deque[_Step] = deque()

    def another(self) -> RetryBudget:
        """One of the same size, of which nothing is spent."""
        return RetryBudget(share=self.share, reserve=self.reserve, window=self.window)

    def request(self, now: float) -> None:
        """A first try leaves."""
        self._step(now).requests += 1

    def take(self, now: float) -> int | None:
        """One more retry: the step it is counted in, or ``None`` if it must not leave yet."""
        if not self.left(now):
            return None
        return self.spend(now)

    def spend(self, now: float) -> int:
        """Count a retry that cannot wait; the step it is counted in."""
        step = self._step(now)
        step.retries += 1
        return step.number

    def give_back(self, number: int) -> None:
        """The retry that was counted in this step went well, or never left."""
        for step in self._steps:
            if step.number == number:
                step.retries -= 1

    def left(self, now: float) -> int:
        """Retries that may leave now."""
        self._move_on(now)
        requests = sum(step.requests for step in self._steps)
        retries = sum(step.retries for step in self._steps)
        return max(0, int(self.share * requests) + self.reserve - retries)

    def wait(self, now: float) -> float:
        """Seconds until the oldest retries have left the window."""
        self._move_on(now)
        oldest = next((step.number for step in self._steps if step.retries), None)
        return 0.0 if oldest is None else (oldest + STEPS) * self._width - now

    def _step(self, now: float) -> _Step:
        self._move_on(now)
        number = int(now // self._width)
        if not self._steps or self._steps[-1].number != number:
            self._steps.append(_Step(number))
        return self._steps[-1]

    def _move_on(self, now: float) -> None:
        oldest = int(now // self._width) - STEPS
        while self._steps and self._steps[0].number <= oldest:
            self._steps.popleft()

    def __repr__(self) -> str:
        requests = sum(step.requests for step in self._steps)
        retries = sum(step.retries for step in self._steps)
        return f"<RetryBudget {retries} retries to {requests} requests>"


class Retries:
    """The tries of one origin, held to its budget."""

    def __init__(
        self,
        label: str,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        budget: RetryBudget | None = None,
    ) -> None:
        self.budget = budget or RetryBudget()
        self._label = label
        self._metrics = metrics
        self._clock = clock
        self._line: deque[asyncio.Future[int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Retries that are held back."""
        return len(self._line)

    async def take(self, reason: str) -> int | None:
        """Count a try, and wait until it may leave if it is another one.

        ``reason`` says, in the word of the error before it, why it is another one; it is empty for
        a first try. Returns what ``give_back`` wants. Raises ``ShuttingDown``.
        """
        if not reason:
            self.budget.request(self._clock())
            self._grant()
            return None
        place = await self._place()
        self._metrics.upstream_retries.labels(self._label, reason).inc()
        return place

    async def _place(self) -> int:
        place = None if self._line else self.budget.take(self._clock())
        if place is not None:
            return place
        self._metrics.upstream_retries_held.labels(self._label).inc()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._line.append(future)
        self._grant()
        try:
            return await future
        except BaseException:
            if future in self._line:
                self._line.remove(future)
            elif not future.cancelled() and future.exception() is None:
                self.give_back(future.result())
            raise

    def give_back(self, place: int | None) -> None:
        """The retry of this place went well, or has not left; ``None`` was a first try."""
        if place is not None:
            self.budget.give_back(place)
            self._grant()

    def _grant(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._line:
            now = self._clock()
            if self._line[0].done():  # cancelled, but its task has not run yet
                del self._line[0]
                continue
            place = self.budget.take(now)
            if place is None:
                wait = max(LEAST_WAIT, self.budget.wait(now))
                self._timer = asyncio.get_running_loop().call_later(wait, self._grant)
                return
            self._line.popleft().set_result(place)

    def close(self) -> None:
        """Send away whoever waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._line:
            future = self._line.popleft()
            if not future.done():
                future.set_exception(ShuttingDown())

    def __repr__(self) -> str:
        return f"<Retries {self._label} {len(self._line)} held back, {self.budget!r}>"
