"""Receiving and writing at the same time: one batch goes to the file while the next one comes in.

The first bytes go at once, so the first reader waits for nothing; after that a batch is whatever
came in while the previous one was being written. A body that outruns the disk is slowed down at
``MAX_PENDING``: not reading it lets TCP stop the upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

#: Bytes received ahead of the disk before the pump stops reading.
MAX_PENDING = 4 << 20

Take = Callable[[list[bytes]], Awaitable[None]]


class Readable(Protocol):
    """The body of one turn."""

    @property
    def is_overdue(self) -> bool: ...

    async def read(self) -> bytes: ...


class Pump:
    """Moves one turn's body into ``take``, which is never called twice at once."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._pending: list[bytes] = []
        self._size = 0
        self._writing: asyncio.Task[None] | None = None

    async def run(self, body: Readable) -> bool:
        """Until the body ends (true) or is cut because its turn is overdue (false).

        Whatever ends it, what has come in has been taken, or ``take`` has failed, when this
        returns: the caller may go on at the byte after it. Raises what ``read`` and ``take`` raise.
        """
        try:
            whole = await self._receive(body)
        except asyncio.CancelledError:
            await self._settle()
            raise
        except Exception:
            await self._flush()
            raise
        await self._flush()
        return whole

    async def _receive(self, body: Readable) -> bool:
        while data := await body.read():
            self._pending.append(data)
            self._size += len(data)
            if self._size >= MAX_PENDING:
                await self._finish_write()
            if self._writing is None or self._writing.done():
                await self._finish_write()
                self._start_write()
            if body.is_overdue:
                return False
        return True

    def _start_write(self) -> None:
        batch, self._pending, self._size = self._pending, [], 0
        self._writing = asyncio.ensure_future(self._take(batch))

    async def _finish_write(self) -> None:
        """Wait for the write under way. Cancelled, it stays under way for ``_settle``."""
        if self._writing is not None:
            await asyncio.shield(self._writing)
            self._writing = None

    async def _flush(self) -> None:
        try:
            await self._finish_write()
            if self._pending:
                self._start_write()
                await self._finish_write()
        except asyncio.CancelledError:
            await self._settle()
            raise

    async def _settle(self) -> None:
        """Let the write under way come to its end: its thread uses the file."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.cancel()
            await asyncio.wait([writing])
            if not writing.cancelled():
                writing.exception()  # seen: the cancellation is what the caller hears of
