"""How late the event loop runs: the number that tells whether the others can be believed."""

from __future__ import annotations

import asyncio
import contextlib

from proxy.observe.metrics import Metrics

#: Seconds between two looks.
INTERVAL = 0.5


class LoopWatch:
    """Measures the loop's lag while its block lasts."""

    def __init__(self, metrics: Metrics, interval: float = INTERVAL) -> None:
        self._metrics = metrics
        self._interval = interval
        self._lag = 0.0
        self._due = 0.0
        self._task: asyncio.Task[None] | None = None

    def lag(self) -> float:
        """Seconds the loop is behind, the look under way included."""
        overdue = asyncio.get_running_loop().time() - self._due
        return max(self._lag, overdue, 0.0) if self._due else 0.0

    async def __aenter__(self) -> LoopWatch:
        self._task = asyncio.create_task(self._watch(), name="loop watch")
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._due = loop.time() + self._interval
            await asyncio.sleep(self._interval)
            self._lag = max(0.0, loop.time() - self._due)
            self._metrics.loop_lag.set(self._lag)
