"""Places where requests wait until a test lets them go: barriers instead of sleeps.

A request that enters waits in arrival order. The test awaits `arrived(n)`, knows that n requests
are waiting at this very point, looks at the world, and releases them. A request whose client leaves
is cancelled and is no longer counted. Everything moves on one event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from proxy.testing.wire import Asked


class Parking:
    """A waiting place that can be used again after each release."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}  # ordered: first in, first out
        self._watchers: dict[asyncio.Future[None], int] = {}

    @property
    def waiting(self) -> int:
        """How many requests wait here now."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Wait for a release."""
        place = asyncio.get_running_loop().create_future()
        self._waiting[place] = None
        self._tell_watchers()
        try:
            await place
        finally:
            self._waiting.pop(place, None)

    async def arrived(self, count: int = 1) -> None:
        """Return as soon as at least `count` requests wait here at the same time."""
        if self.waiting >= count:
            return
        watcher = asyncio.get_running_loop().create_future()
        self._watchers[watcher] = count
        try:
            await watcher
        finally:
            self._watchers.pop(watcher, None)

    def release(self, count: int | None = None) -> None:
        """Let the `count` longest-waiting requests go on, or all of them."""
        for place in list(self._waiting)[:count]:
            del self._waiting[place]
            if not place.done():
                place.set_result(None)

    def _tell_watchers(self) -> None:
        for watcher, count in self._watchers.items():
            if self.waiting >= count and not watcher.done():
                watcher.set_result(None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.waiting} waiting>"


class Hold(Parking):
    """Stops every request that `matches`, just before it is answered.

    `release(n)` lets n go and goes on stopping new ones; `release()` lets all go and lifts the hold
    for good, as does leaving it as a context manager.
    """

    def __init__(self, matches: Callable[[Asked], bool]) -> None:
        super().__init__()
        self._matches = matches
        self.is_lifted = False

    def stops(self, asked: Asked) -> bool:
        """Whether this request has to wait here."""
        return not self.is_lifted and self._matches(asked)

    def release(self, count: int | None = None) -> None:
        """Let `count` requests go, or all of them and everyone after."""
        if count is None:
            self.is_lifted = True
        super().release(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
