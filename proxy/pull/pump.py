"""Receiving and writing at the same time: one batch goes to the file while the next one comes in.

The first bytes go at once, so the first reader waits for nothing; after that a batch is whatever
came in while the previous one was being written, so that a fast body costs few thread hops and a
slow one no delay. A body that outruns the disk is slowed down at ``MAX_PENDING``: not reading it
lets TCP stop the upstream.

``take`` runs in a task of its own, one at a time. However ``run`` ends, that task has ended too: a
cancellation is handed to it and waited for, because its thread uses the file.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

#: Bytes received ahead of the disk before the pump stops reading.
MAX_PENDING = 4 << 20

Take = Callable[[list[bytes]], Awaitable[None]]


class Readable(Protocol):
    """The body of one turn; ``b""`` is its end."""

    async def read(self) -> bytes: ...


class Pump:
    """Moves one turn's body into ``take``, which is never called twice at once."""

    def __init__(self, take: Take, max_pending: int = MAX_PENDING) -> None:
        self._take = take
        self._max_pending = max_pending
        self._pending: list[bytes] = []
        self._size = 0
        self._has_room = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def run(self, body: Readable, is_cut: Callable[[], bool] = lambda: False) -> bool:
        """Until the body ends (true) or ``is_cut`` says so after a read (false).

        Unless ``take`` fails or this is cancelled, what has come in has been taken when this
        returns or raises: the caller may go on at the byte after it. Raises what ``read`` and
        ``take`` raise, the latter if both do.
        """
        try:
            try:
                whole = await self._receive(body, is_cut)
            except Exception:
                await self._finish_writing()
                raise
            await self._finish_writing()
            return whole
        finally:
            await self._stop_writing()

    async def _receive(self, body: Readable, is_cut: Callable[[], bool]) -> bool:
        while data := await body.read():
            self._pending.append(data)
            self._size += len(data)
            if self._writing is None or self._writing.done():
                await self._finish_writing()
                self._writing = asyncio.ensure_future(self._write())
            elif self._size >= self._max_pending:
                self._has_room.clear()
                await self._has_room.wait()
            if is_cut():
                return False
        return True

    async def _write(self) -> None:
        """Take batch after batch, until nothing is pending; a body that stalls holds none back."""
        try:
            while self._pending:
                batch, self._pending, self._size = self._pending, [], 0
                self._has_room.set()
                await self._take(batch)
        finally:
            self._has_room.set()

    async def _finish_writing(self) -> None:
        """Wait for the writes under way. Cancelled, they are left to ``_stop_writing``."""
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def _stop_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.cancel()
        while not writing.done():
            # The caller is on its way out with the first cancellation already.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([writing])
        if not writing.cancelled():
            writing.exception()  # seen: the caller has raised it, or its own cancellation
