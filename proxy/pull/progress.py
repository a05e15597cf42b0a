"""How readers learn that a fill has gone on: in steps, and in lots.

Steps, because a reader that is woken for every chunk costs more than the chunk; lots, because a
crowd that follows one fill would wake in a single turn of the loop, each of them starting a
sendfile: measured, 5,000 of them hold everything else up for 222 ms, in lots of 64 for 51 ms. Each
of them sends all that has come since its last turn, up to megabytes: 1.4 ms. In lots of 32 there
were turns of 57 to 69 ms on a quiet machine, so a lot is a quarter of that.
"""

from __future__ import annotations

import asyncio
from collections import deque

#: Waiters that are woken in one turn of the loop.
LOT = 8
#: Readers are told about progress after this many bytes …
STEP_BYTES = 1 << 20
#: … or after this many seconds.
STEP_SECONDS = 0.02


class Bell:
    """``wait`` returns after the next ``ring``. It remembers nothing: whoever waits looks himself
    what has changed, before and after."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._waking: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Until the next ring. Waits from the moment it is awaited, so no ring is missed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            await future
        finally:
            self._waiting.pop(future, None)

    async def pass_on(self) -> None:
        """Until those who are waking have woken: in the next turn, or a later one."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waking.append(future)
        if len(self._waking) == 1:
            loop.call_soon(self._wake_lot)
        await future

    def ring(self) -> None:
        """Wake everybody who waits now: the first lot at once, one more in each loop turn."""
        is_idle = not self._waking
        self._waking.extend(self._waiting)
        self._waiting.clear()
        if is_idle:
            self._wake_lot()

    def _wake_lot(self) -> None:
        for _ in range(min(LOT, len(self._waking))):
            future = self._waking.popleft()
            if not future.done():
                future.set_result(None)
        if self._waking:
            asyncio.get_running_loop().call_soon(self._wake_lot)

    def __repr__(self) -> str:
        return f"<Bell {len(self._waiting)} waiting, {len(self._waking)} waking>"


class Progress:
    """The mark up to which readers may have a fill's bytes, and telling them so."""

    def __init__(self) -> None:
        self.mark = 0
        self._bell = Bell()
        self._told = 0
        self._told_at = 0.0
        self._due: asyncio.TimerHandle | None = None
        self._beyond = 0  # of those who wait

    async def changed(self, *, beyond: bool = False) -> None:
        """Wait for the next step, or whatever else ``tell`` is called for; ``beyond`` the mark also
        for bytes there."""
        self._beyond += beyond
        try:
            await self._bell.wait()
        finally:
            self._beyond -= beyond

    async def let_others_go(self) -> None:
        """For whoever has more at hand than he may have in one turn of the loop."""
        await self._bell.pass_on()

    def went_ahead(self) -> None:
        """There is more beyond the mark: tell those who wait there, if any do, in a step's time."""
        if self._beyond and self._due is None:
            due = self._told_at + STEP_SECONDS
            self._due = asyncio.get_running_loop().call_at(due, self.tell)

    def reach(self, mark: int, *, now: bool = False) -> None:
        """Let readers have the bytes before ``mark``; tell them in a step's time, or ``now``. The
        first bytes of all are told of at once: whoever reads may have waited since it asked."""
        self.mark = max(self.mark, mark)
        if self.mark == self._told:
            return
        loop = asyncio.get_running_loop()
        due = self._told_at + STEP_SECONDS
        if now or not self._told or self.mark - self._told >= STEP_BYTES or loop.time() >= due:
            self.tell()
        elif self._due is None:
            self._due = loop.call_at(due, self.tell)

    def tell(self) -> None:
        """Wake everybody who waits."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._told, self._told_at = self.mark, asyncio.get_running_loop().time()
        self._bell.ring()

    def __repr__(self) -> str:
        return f"<Progress {self.mark}, told {self._told}>"
