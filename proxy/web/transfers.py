"""How many stripes go out at the same time, and who waits for a place.

An uplink that is shared by too many gives none of them anything in time, so there are few places,
by the byte rate; and few wait for one, shortly: there are other nodes to ask.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from proxy.oci.errors import Overloaded

#: Places of an uplink without a byte rate.
MOST = 16
#: Bytes a second that each place has, at least, of an uplink with one.
LEAST_RATE = 256 << 10
#: Seconds that a taker waits for a place, and is sent away for when there is none.
PATIENCE = 1.0


def places(uplink: float | None) -> int:
    """How many an uplink of so many bytes a second has."""
    return MOST if uplink is None else max(1, min(MOST, int(uplink / LEAST_RATE)))


class Transfers:
    """The places; first come, first served."""

    def __init__(self, most: int, *, waiting: int | None = None, patience: float = PATIENCE):
        """``waiting``: who may wait at the same time, at most; as many as there are places."""
        self.most = most
        self.under_way = 0
        self.waiting = 0
        self._waiting_most = most if waiting is None else waiting
        self._patience = patience
        self._free = asyncio.Semaphore(most)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place until the block ends. Raises ``Overloaded`` when there is none in time."""
        await self._take()
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._free.release()

    async def _take(self) -> None:
        if self._free.locked() and self.waiting >= self._waiting_most:
            raise self._no_room()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._free.acquire()
        except TimeoutError:
            raise self._no_room() from None
        finally:
            self.waiting -= 1

    def _no_room(self) -> Overloaded:
        return Overloaded(PATIENCE, message="there is no room on the uplink of this node")

    def __repr__(self) -> str:
        return f"<Transfers {self.under_way} of {self.most} under way, {self.waiting} wait>"
