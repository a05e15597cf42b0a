"""One server of the directory: a few connections to it, each lent to one call at a time.

More calls than connections wait for one, in order. The connection that was used last is lent first,
so that at rest one is used and the others age; those end after a while, as thousands of nodes may
be on one server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from proxy.fleet.link import Access, Link
from proxy.fleet.place import Address
from proxy.fleet.script import Argument, Script, root_of

#: Most connections of a node to one server.
MOST_LINKS = 4
#: Seconds after which a connection that is not the last one ends.
IDLE = 30.0


class Server:
    """The connections to one server, which is a primary."""

    def __init__(
        self, address: Address, access: Access, database: int, clock: Callable[[], float]
    ) -> None:
        self.address = address
        self._access = access
        self._database = database
        self._clock = clock
        self._room = asyncio.Semaphore(MOST_LINKS)
        self._idle: list[Link] = []
        self._is_closed = False
        self.answered = clock()  # when it did last

    def __repr__(self) -> str:
        return f"<Server {self.address} idle={len(self._idle)}>"

    async def probe(self) -> None:
        """Is it there, and does it take orders? Raises RedisError or OSError if not."""
        async with self._lent() as link:
            await link.call("PING")

    async def call(
        self,
        script: Script,
        tag: str,
        args: Sequence[Argument],
        *,
        asking: bool = False,
        slack: float = 1.0,
    ) -> Any:
        """Run a script. ``asking``: by way of exception, while the tag's slot moves here.
        ``slack``: the answer may take so many times as long as usual."""
        patience = slack * self._access.answer_timeout
        async with self._lent() as link:
            tail = (1, root_of(tag), *args, *([link.run_id] if script.wants_run_id else []))
            for words in (("EVALSHA", script.sha), ("EVAL", script.text)):
                if asking:
                    await link.call("ASKING")
                try:
                    reply = await link.call(*words, *tail, patience=patience)
                except NoScriptError:
                    continue  # nothing was done: a new server, or one that forgot its scripts
                self.answered = self._clock()
                return reply
            raise ResponseError("the server does not take scripts")

    @contextlib.asynccontextmanager
    async def _lent(self) -> AsyncIterator[Link]:
        async with self._room:
            link = await self._take()
            try:
                yield link
            except ResponseError:
                await self._put_back(link)  # it was answered: the next one may have it
                raise
            except BaseException:
                await link.close()
                raise
            else:
                await self._put_back(link)

    async def _take(self) -> Link:
        while self._idle:
            link = self._idle.pop()
            if not await link.is_stale():
                return link
            await link.close()
        link = await Link.open(self.address, self._access, database=self._database)
        try:
            await link.inspect()
            if not link.is_primary:
                raise ReadOnlyError(f"{self.address} is a replica")
        except BaseException:
            await link.close()
            raise
        return link

    async def _put_back(self, link: Link) -> None:
        if self._is_closed:
            await link.close()
            return
        now = link.idle_since = self._clock()
        self._idle.append(link)
        while len(self._idle) > 1 and self._idle[0].idle_since < now - IDLE:
            await self._idle.pop(0).close()

    async def close(self) -> None:
        """End what is idle now, and what is lent when it comes back."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().close()
