"""A request rate for all nodes: requests wait here until the directory lets so many of them go.

The bucket is the directory's. A node asks for as many permits as requests wait, none in advance:
what is not used would be lost to the others. The reserve's part of the rate stays out of the
bucket; it is for who uses the reserve while the directory is gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Pace(Protocol):
    """A rate: ``max_rate`` requests in ``time_period`` seconds. aiolimiter's ``AsyncLimiter``."""

    max_rate: float
    time_period: float


class SharedRate:
    """The gate's ``RateLimit``, on permits of the directory. ``on_wait`` hears of new waiters."""

    def __init__(
        self,
        pace: Pace,
        reserved: float,
        *,
        clock: Callable[[], float],
        on_wait: Callable[[], None],
    ) -> None:
        """``reserved``: which part of it is the reserve's."""
        self.max_rate = pace.max_rate
        self.time_period = pace.time_period
        self.per_second = (1 - reserved) * pace.max_rate / pace.time_period
        self.burst = max(1.0, (1 - reserved) * pace.max_rate)
        self._reserved = reserved * pace.max_rate / pace.time_period
        self._reserve_since: float | None = None
        self._clock = clock
        self._on_wait = on_wait
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._is_new = False

    @property
    def wanted(self) -> int:
        """Requests that wait; asking says that they were heard of."""
        self._is_new = False
        return sum(not waiter.done() for waiter in self._waiters)

    @property
    def is_in_use(self) -> bool:
        """Does any request wait?"""
        return any(not waiter.done() for waiter in self._waiters)

    @property
    def is_waited_for(self) -> bool:
        """Does a request wait that the directory has not heard of?"""
        return self._is_new

    async def acquire(self, amount: float = 1) -> None:
        """Wait for one permit."""
        if amount != 1:
            raise ValueError(f"expected an amount of one, got {amount}")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._is_new = True
        self._on_wait()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give(1)
            raise

    def give(self, permits: int) -> None:
        """So many requests may go; what nobody waits for any more is lost."""
        self._reserve_since = None
        self._let_go(permits)

    def give_reserve(self) -> None:
        """The directory is gone, and this node uses the reserve: so many may go as the reserve's
        part of the rate allows since the last time, at most one more than waited for."""
        now = self._clock()
        if self._reserve_since is None:
            self._reserve_since = now
        permits = int((now - self._reserve_since) * self._reserved)
        if permits:
            self._reserve_since += permits / self._reserved
            self._let_go(permits)

    def _let_go(self, permits: int) -> None:
        while permits and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                permits -= 1

    def __repr__(self) -> str:
        return f"<SharedRate {self.max_rate:g}/{self.time_period:g}s, {len(self._waiters)} waiting>"
