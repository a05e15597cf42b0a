"""One timer for all the waits of a body: for silence, and for too little in too long.

A timer per read costs more than the read. Time that is left when a wait begins only grows with what
comes, never shrinks but by waiting, so a timer that was set earlier is never late: it looks what is
left, and is set again for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from proxy.upstream.stall import StallMeter


class Watch:
    """Minds the waits of one body. ``fail`` is called with the reason why one has to end."""

    def __init__(
        self,
        meter: StallMeter,
        *,
        clock: Callable[[], float],
        stalled: Callable[[], Exception],
        fail: Callable[[Exception], None],
    ) -> None:
        self.silence: float | None = None  # seconds in which something has to come
        self._meter = meter
        self._clock = clock
        self._stalled = stalled
        self._fail = fail
        self._since: float | None = None  # of the wait under way
        self._since_loop = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A wait begins. Raises if the body has had its time."""
        if self._meter.patience <= 0:
            raise self._stalled()
        self._since = self._clock()
        self._since_loop = asyncio.get_running_loop().time()
        if self._timer is None:
            self._set(self._left())

    def end(self, received: int) -> None:
        """The wait has ended, with so many bytes."""
        if self._since is not None:
            self._meter.received(received, self._clock() - self._since)
            self._since = None

    def close(self) -> None:
        """Nobody waits any more. Idempotent."""
        self._since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _left(self, waited: float = 0.0, waited_loop: float = 0.0) -> float:
        """Seconds until the wait under way has to end, if nothing comes."""
        left = self._meter.patience - waited
        return left if self.silence is None else min(left, self.silence - waited_loop)

    def _set(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return  # the next wait sets it
        waited = self._clock() - self._since
        waited_loop = asyncio.get_running_loop().time() - self._since_loop
        if waited >= self._meter.patience:
            self._fail(self._stalled())
        elif self.silence is not None and waited_loop >= self.silence:
            self._fail(aiohttp.SocketTimeoutError(f"nothing came for {self.silence:g} s"))
        else:
            self._set(self._left(waited, waited_loop))

    def __repr__(self) -> str:
        return f"<Watch {'at rest' if self._since is None else 'in a wait'}, {self._meter!r}>"
