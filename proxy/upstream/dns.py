"""The addresses of one origin's host, asked for once for all of its lanes.

aiohttp keeps addresses per connector and every lane has its own, so a slow name server would have
each lane block a thread of the loop's executor (getaddrinfo cannot be cancelled). Here one lookup
serves everybody who asks while it runs; it is bounded in time for the one who asks, not for the
thread; its answer is used again for ``FRESH`` seconds, and for ``STALE`` seconds if the name
service fails (fault 22 of ``reliability.md``). Several addresses take turns in going first.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from aiohttp.abc import AbstractResolver, ResolveResult

#: Seconds for which an answer is not asked for again.
FRESH = 10.0
#: Seconds for which an old answer is better than none.
STALE = 3600.0


class OriginResolver(AbstractResolver):
    """Resolves the one host of an origin. ``patience`` is how long to wait for an answer."""

    def __init__(
        self, inner: AbstractResolver, *, patience: float, clock: Callable[[], float]
    ) -> None:
        self._inner = inner
        self._patience = patience
        self._clock = clock
        self._known: list[ResolveResult] = []
        self._asked_at = 0.0
        self._lookup: asyncio.Task[list[ResolveResult]] | None = None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses, another one first each time. Raises ``OSError``, ``TimeoutError``."""
        if not self._is_known_for(FRESH):
            try:
                await self._refresh(host, port, family)
            except OSError:  # TimeoutError is one
                if not self._is_known_for(STALE):
                    raise
        self._known.append(self._known.pop(0))
        return list(self._known)

    def _is_known_for(self, seconds: float) -> bool:
        return bool(self._known) and self._clock() - self._asked_at < seconds

    async def _refresh(self, host: str, port: int, family: socket.AddressFamily) -> None:
        lookup = self._lookup
        if lookup is None:
            lookup = asyncio.create_task(self._inner.resolve(host, port, family))
            lookup.add_done_callback(self._learn)
            self._lookup = lookup
        async with asyncio.timeout(self._patience):
            await asyncio.wait([lookup])  # which leaves the lookup alone when it is cancelled
        if lookup.cancelled():
            raise OSError("closed while a name was looked up")
        if not lookup.result():
            raise OSError("the name has no addresses")

    def _learn(self, lookup: asyncio.Task[list[ResolveResult]]) -> None:
        self._lookup = None
        if lookup.cancelled() or lookup.exception() is not None or not lookup.result():
            return
        self._known, self._asked_at = list(lookup.result()), self._clock()

    async def close(self) -> None:
        if self._lookup is not None:
            self._lookup.cancel()
        await self._inner.close()
