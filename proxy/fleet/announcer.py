"""Blobs that are stored already, told to the fleet: after a start, and to a directory that is new.

What a node fetches it says at once (``claiming.py``), and again in time (``keeper.py``). But one
that begins finds blobs of the process before it, and a directory that was flushed or started again
knows nobody's. Until that is said the fleet fetches them anew.

That a node has all of a blob is all that is said; whoever takes it asks for what it needs. As long
as nobody has published the hashes of its stripes such a node stands in for the upstream
(``stripes.py``), and hashes what is asked for when it is asked.

Theory of operation. ``Announcer`` works in *rounds*, one for each epoch of the directory
(``members.py``); the first one is that of the start. A round asks the store what it has, says one
blob after the other, and ends when the directory turns again. While that is down the round waits.

The directory lists so many nodes for a blob, and refuses others. Of those it lists some have gone:
a node that was restarted has another id, and what the one before it said stands until it ends. So
when a whole fleet was restarted all may be refused for the sake of nodes that are none, and once
these have ended nobody is listed. Therefore what is not kept is said *again* after ``AGAIN``, as
long as what was said may stand, at a slower pace.

Thousands of nodes begin a round within seconds of each other when a directory was lost, each with
thousands of blobs. So all of them together have a rate (``ALL``), of which each takes its part by
the number of nodes; and which blobs come first is so that the fleet's hot ones are soon known:

* of a few nodes each begins with what was used last;
* of many all would say the same then, while the directory lists a few dozen nodes for a blob.
  Where there are N nodes each goes through its list by blocks of ``BLOCK`` x N, inside which the
  order is a draw. A blob that all of them hold is said by one of them within ``BLOCK`` calls of a
  node on average, however many there are.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from proxy.fleet.claims import Terms
from proxy.fleet.keeper import MOST, Keeper
from proxy.observe.logs import Logger
from proxy.oci.digest import Digest
from proxy.oci.errors import DirectoryDown

#: Blobs a second that all nodes say together, and that one node says, at most. One costs the
#: directory 0.07 to 0.3 ms of its processor.
ALL, ONE = 1000.0, 50.0
#: How many blobs there are in a block for each node, if there are more than FEW.
BLOCK, FEW = 8, 2
#: Seconds until a directory that is down is told again.
REST = 3.0
#: Seconds until what it did not enter is said again, and how much slower that is.
AGAIN, SLOWER = Terms().whole, 4.0


def pause(nodes: int, chance: float) -> float:
    """Seconds between two blobs that one of so many nodes says; ``chance`` from 0 to 1."""
    return (0.5 + chance) * max(1 / ONE, nodes / ALL)


def in_order(digests: Sequence[Digest], nodes: int, rng: random.Random) -> list[Digest]:
    """Which to say first: ``digests`` are by their last use, the youngest first."""
    size = BLOCK * nodes if nodes > FEW else 1
    found: list[Digest] = []
    for at in range(0, len(digests), size):
        block = list(digests[at : at + size])
        rng.shuffle(block)
        found += block
    return found


class Turning(Protocol):
    """What is wanted of ``Members``."""

    count: int
    epoch: str

    async def turned(self, epoch: str) -> str:
        """Wait until the directory's epoch is another one, and which."""


class Stored(Protocol):
    """What is wanted of the store."""

    async def recent(self, most: int) -> Sequence[Digest]:
        """Blobs that other nodes may have, those first that were used last."""

    def has(self, digest: Digest) -> bool:
        """Is it there now?"""

    async def recovered(self) -> None:
        """Wait until all that is there is known to be right."""


class Announcer:
    """``async with Announcer(…)``: tells the fleet while the block lasts."""

    def __init__(
        self,
        keeper: Keeper,
        stored: Stored,
        members: Turning,
        *,
        log: Logger,
        rng: random.Random | None = None,
        most: int = MOST,
    ) -> None:
        self._keeper = keeper
        self._stored = stored
        self._members = members
        self._log = log
        self._rng = rng or random.Random()
        self._most = most
        self._task: asyncio.Task[None] | None = None
        self._said: set[Digest] = set()  # in this round

    def __repr__(self) -> str:
        return f"<Announcer in epoch {self._members.epoch!r}: {len(self._said)} said>"

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="announcer")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        epoch = ""
        while True:
            former, epoch = epoch, await self._turned(epoch)
            is_again = epoch == former
            self._said.clear()
            await self._tell(epoch, is_again)
            await self._stored.recovered()  # what a crash has left in doubt is judged then
            await self._tell(epoch, is_again)
            self._log.debug("announced", blobs=len(self._said), again=is_again)

    async def _turned(self, epoch: str) -> str:
        """Wait for another epoch, or until what is not kept is to be said again in this one."""
        try:
            async with asyncio.timeout(AGAIN * (0.5 + self._rng.random()) if epoch else None):
                return await self._members.turned(epoch)
        except TimeoutError:
            return epoch

    async def _tell(self, epoch: str, is_again: bool) -> None:
        found = await self._stored.recent(self._most)
        for digest in in_order(found, self._members.count, self._rng):
            if digest in self._said or not self._stored.has(digest):
                continue
            if is_again and digest in self._keeper:
                continue
            seconds = pause(self._members.count, self._rng.random())
            await asyncio.sleep(seconds * SLOWER if is_again else seconds)
            if self._members.epoch != epoch:
                return
            await self._say(digest)

    async def _say(self, digest: Digest) -> None:
        while self._stored.has(digest):
            try:
                await self._keeper.announce(digest)
            except DirectoryDown:
                await asyncio.sleep(REST * (0.5 + self._rng.random()))
            else:
                self._said.add(digest)
                return
