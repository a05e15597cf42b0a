"""The further turns of one spread (``spread.py``): who of them waits, and who brings something."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from proxy.pull.segments import Segment
from proxy.upstream.turns import Ticket


class Helper:
    """One further turn."""

    __slots__ = ("has_begun", "segment", "task", "ticket")

    def __init__(self, segment: Segment, ticket: Ticket, task: asyncio.Task[None]) -> None:
        self.segment = segment
        self.ticket = ticket
        self.task = task
        self.has_begun = False

    @property
    def is_waiting(self) -> bool:
        """Has it nothing that would be lost with it, not even a slot?"""
        if self.has_begun or self.task.cancelling():
            return False
        return self.ticket.is_queued or not self.ticket.grants

    @property
    def is_over(self) -> bool:
        """Has its task ended, or is it about to?"""
        return self.task.done() or self.task.cancelling() > 0

    def __repr__(self) -> str:
        state = "begun" if self.has_begun else "waiting" if self.is_waiting else "granted"
        return f"<Helper {state}, {self.segment!r}>"


class Helpers:
    """All of them, each until its task has ended."""

    def __init__(self) -> None:
        self._all: set[Helper] = set()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, helper: Helper) -> None:
        self._all.add(helper)

    def discard(self, helper: Helper) -> None:
        self._all.discard(helper)

    def begin(self, segment: Segment) -> None:
        """The head of the answer that brings ``segment`` has come."""
        for helper in self._all:
            if helper.segment is segment:
                helper.has_begun = True

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return [helper.task for helper in self._all]

    @property
    def begun(self) -> list[Segment]:
        """What those bring that are answered."""
        return [helper.segment for helper in self._all if helper.has_begun]

    @property
    def has_slots(self) -> bool:
        """Has any of them a slot, answered or not?"""
        return any(not (one.is_waiting or one.task.cancelling()) for one in self._all)

    @property
    def waiting(self) -> Iterator[Helper]:
        """Those that have no slot."""
        return (helper for helper in self._all if helper.is_waiting)

    @property
    def first(self) -> Helper | None:
        """Of those that have no slot the one that is to bring what comes first."""
        return min(self.waiting, key=lambda helper: helper.segment.start, default=None)

    def waiting_at(self, position: int) -> Helper | None:
        """The one that has no slot and begins there."""
        return next((one for one in self.waiting if one.segment.start == position), None)

    def join(self, client: str) -> None:
        for helper in self.waiting:
            helper.ticket.join(client)

    def leave(self, client: str) -> None:
        for helper in self.waiting:
            helper.ticket.leave(client)

    def cancel_waiting(self, start: int, stop: int) -> None:
        """Take back what has no slot and begins outside of this."""
        for helper in self.waiting:
            if not start <= helper.segment.start < stop:
                helper.task.cancel()

    def cancel(self) -> None:
        """End all."""
        for helper in self._all:
            helper.task.cancel()

    def __repr__(self) -> str:
        return f"<Helpers {len(self)}, {len(self.begun)} begun>"
