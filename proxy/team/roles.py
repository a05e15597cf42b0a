"""Who leads: this process, or the one whose lock on the cache directory it meets.

The loop is the same at the start and whenever the leader has gone: try the lock, else the socket,
else wait a moment. Whoever gets the lock leads until it ends. At the start it gives up after a
while, so that a directory held by something that does not listen (another machine, over NFS; a
process that is stopped) is refused as it would be without all this. It does not give up while a
worker of the same supervisor holds it, which may need long to open a large store. Later it never
does, because hits are served meanwhile and only the kernel knows when the lock is free.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from proxy.observe.logs import Logger
from proxy.oci.errors import LeaderMissing
from proxy.store.lock import CacheDirBusy, CacheDirUnusable
from proxy.store.reading import Reading
from proxy.team.channel import BEAT
from proxy.team.follower import NoLeader, Remote, Unlike
from proxy.team.front import Front
from proxy.team.hits import Hits
from proxy.team.leader import Leader

#: The leader's socket in the cache directory.
SOCKET = "leader.sock"
#: Seconds between two looks at lock and socket, at most; and after a failure.
PAUSE = 0.1
LONG_PAUSE = 1.0
#: Seconds in which a start must have found a role.
START = 5.0

#: Opens all that leading takes, onto the stack. Raises ``CacheDirBusy`` when another one leads.
Lead = Callable[[AsyncExitStack], Awaitable[Leader]]


class Roles:
    """This process's role, from ``start`` to ``close``."""

    def __init__(
        self,
        front: Front,
        *,
        lead: Lead,
        directory: Path,
        settings: str,
        memory: int,
        blob_memory: int = 0,
        log: Logger,
        clock: Callable[[], float] = time.monotonic,
        beat: float = BEAT,
        patience: float = START,
        is_sibling: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """``settings`` is what leader and follower must have in common, as a hash; ``memory``
        and ``blob_memory`` are how many bytes of manifests and of small blobs a follower keeps.
        ``is_sibling`` says whether a process is another worker of the same supervisor."""
        self._front = front
        self._open = lead
        self._directory = directory
        self._settings = settings
        self._memory = memory
        self._blob_memory = blob_memory
        self._clock = clock
        self._log = log
        self._beat = beat
        self._patience = patience
        self._is_sibling = is_sibling
        self._stack = AsyncExitStack()  # what the present role has open
        self._remote: Remote | None = None
        self._watch: asyncio.Task[None] | None = None
        self._why: CacheDirBusy | None = None  # no role was found

    async def status(self) -> dict[str, Any]:
        """The leader's, while this process follows. Raises ``LeaderMissing``."""
        if self._remote is None:
            raise LeaderMissing
        return await self._remote.status()

    async def start(self) -> None:
        """Lead or follow. Raises ``CacheDirError``, and what leading raises."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience
        while not await self._lead():
            try:
                if await self._follow():
                    break
            except Unlike as error:
                raise CacheDirUnusable(self._directory, f"another process leads: {error}") from None
            if loop.time() >= end and self._why is not None and not await self._waits_for_sibling():
                raise self._why
            await asyncio.sleep(_pause())
        if not self._front.leads:
            self._watch = asyncio.create_task(self._take_over(), name="roles")

    async def _waits_for_sibling(self) -> bool:
        pid = None if self._why is None else self._why.pid
        return pid is not None and await asyncio.to_thread(self._is_sibling, pid)

    async def close(self) -> None:
        """Give the role back."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self._stack.aclose()

    async def _take_over(self) -> None:
        """Follow one leader after the other, until this process leads."""
        while self._remote is not None:
            reason = await self._remote.lost()
            self._log.warning("leader_gone", reason=reason)
            self._front.lose()
            await self._until_a_role()

    async def _until_a_role(self) -> None:
        while True:
            try:
                if await self._lead() or await self._follow():
                    return
                await asyncio.sleep(_pause())
            except Exception as error:  # whatever it is: the next try, or the next leader, may do
                self._log.error("no_role", error=str(error), exc_info=error)
                await asyncio.sleep(LONG_PAUSE)

    async def _lead(self) -> bool:
        """Lead, if nobody else does."""
        async with AsyncExitStack() as stack:
            try:
                leader = await self._open(stack)
            except CacheDirBusy as error:
                self._why = error
                return False
            stack.push_async_callback(leader.close)
            try:
                await leader.start(self._directory / SOCKET)
            except OSError as error:
                raise CacheDirUnusable(self._directory, f"{SOCKET}: {error}") from error
            await self._leave()
            self._stack = stack.pop_all()
        self._front.lead(leader.puller, leader.puller.at_hand, leader.tasks)
        self._log.info("leads", directory=str(self._directory))
        return True

    async def _follow(self) -> bool:
        """Follow the process that leads, if it answers. Raises ``Unlike``."""
        async with AsyncExitStack() as stack:
            try:
                remote = await Remote.connect(
                    self._directory / SOCKET, self._settings, beat=self._beat, clock=self._clock
                )
                stack.callback(remote.close)
                reading = await Reading.open(self._directory)
            except (NoLeader, sqlite3.Error) as error:
                self._log.debug("not_followed", reason=str(error))
                return False
            hits = Hits(
                reading,
                tags=remote.tags,
                memory=self._memory,
                blob_memory=self._blob_memory,
                touch=remote.touch,
                pulled=remote.pulled if remote.wants_pulls else None,
            )
            stack.push_async_callback(hits.close)
            remote.tell(reading)
            await self._leave()
            self._stack = stack.pop_all()
        self._remote = remote
        self._front.follow(remote, hits)
        self._log.info("follows", directory=str(self._directory))
        return True

    async def _leave(self) -> None:
        """Close what the last role had open."""
        stack, self._stack = self._stack, AsyncExitStack()
        self._remote = None
        await stack.aclose()

    def __repr__(self) -> str:
        return f"<Roles: {'leads' if self._front.leads else self._remote or 'none'}>"


def _pause() -> float:
    return random.uniform(PAUSE / 2, PAUSE)
