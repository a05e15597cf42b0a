"""Recalling a turn that has no slot yet, because others bring by now what it was for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from proxy.upstream.turns import Ticket


class Recalled(Exception):
    """The turn did not begin."""


class Recall:
    """Of one ticket, whose turns come one after the other."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._waiting: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Inside, the turn may be recalled until it was ``answered``. Raises ``Recalled``."""
        waiting = self._waiting = asyncio.timeout(None)
        try:
            async with waiting:
                yield
        except TimeoutError as error:
            if not waiting.expired():
                raise
            raise Recalled from error
        finally:
            self._waiting = None

    def answered(self) -> None:
        """It goes to its end now."""
        if self._waiting is not None:
            self._waiting.reschedule(None)
            self._waiting = None

    def __call__(self) -> None:
        """Call the turn back if it stands in a queue."""
        if self._waiting is not None and self._ticket.is_queued:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    def __repr__(self) -> str:
        return f"<Recall of {self._ticket!r}>"
