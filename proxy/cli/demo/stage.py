"""The demonstration itself: one registry, one crowd straight at it, one through pullpool.

Whatever ends it (the last pull, a child that dies, a signal) unwinds in one order: the clients and
whoever watches for the screen are cancelled, then the servers are ended, then the temporary
directory goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp

from proxy.cli.demo.crowd import Tally, run_crowd
from proxy.cli.demo.figures import Outcome
from proxy.cli.demo.plan import Plan
from proxy.cli.demo.screen import Screen, Sight
from proxy.cli.demo.servers import Pullpool, Registry

#: What the two crowds are called on the screen and in the table.
TITLES = ("direct", "through pullpool")

#: Seconds between two drawings.
_FRAME = 0.2


async def play(plan: Plan, screen: Screen) -> list[Outcome]:
    """Both crowds, one after the other. Raises ChildFailed when a server gives up."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(screen)
        directory = await stack.enter_async_context(_temporary_directory())
        http = await stack.enter_async_context(_http())
        registry = await Registry.start(stack, http, plan, directory)
        pullpool = await Pullpool.start(stack, http, plan, registry.url, directory)
        stage = _Stage(plan, registry, pullpool, screen)
        direct = await stage.crowd(TITLES[0], registry.url, registry.sight)
        through = await stage.crowd(TITLES[1], pullpool.url, stage.sight)
    return [direct, through]


@contextlib.asynccontextmanager
async def _temporary_directory() -> AsyncIterator[Path]:
    """Removed in a thread, so that a signal that comes meanwhile does not leave half of it."""
    directory = tempfile.TemporaryDirectory(prefix="pullpool-demo-")
    try:
        yield Path(directory.name)
    finally:
        await asyncio.to_thread(directory.cleanup)


def _http() -> aiohttp.ClientSession:
    """For the servers' own pages; every answer is small and local."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))


class _Stage:
    def __init__(self, plan: Plan, registry: Registry, pullpool: Pullpool, screen: Screen) -> None:
        self._plan = plan
        self._registry = registry
        self._pullpool = pullpool
        self._screen = screen

    async def sight(self) -> Sight:
        """The registry and pullpool together."""
        return await self._pullpool.sight(await self._registry.sight())

    async def crowd(self, title: str, url: str, look: Callable[[], Awaitable[Sight]]) -> Outcome:
        """One crowd at `url`, drawn with what `look` sees."""
        tally = Tally(self._plan.clients)
        await self._registry.reset()
        self._screen.begin(title, self._plan.wanted)
        began = time.monotonic()
        await _first_of(
            run_crowd(url, self._registry.images, tally),
            self._watch(title, tally, look),
            self._registry.child.ended(),
            self._pullpool.child.ended(),
        )
        wall = time.monotonic() - began
        self._screen.end(title, tally)
        counters = await self._registry.counters()
        return Outcome.of(title, tally, sent=counters.sent, peak=counters.peak, wall=wall)

    async def _watch(self, title: str, tally: Tally, look: Callable[[], Awaitable[Sight]]) -> None:
        """Draw until cancelled."""
        while True:
            if self._screen.is_live:
                self._screen.show(title, tally, await look())
            await asyncio.sleep(_FRAME)


async def _first_of(*work: Awaitable[None]) -> None:
    """Return or raise as the first of them does; the others are cancelled and over by then."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
