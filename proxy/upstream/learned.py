"""What caps were learned, kept across a restart (DESIGN D6, D11).

A proxy that starts anew in front of an upstream at its limit would break it once more to find out
what the process before it knew. So each origin's cap is written down: when it has changed, but not
before ``QUIET`` seconds are over, so that a cap that hunts for its level costs one write and not
one per step; once in ``CONFIRM`` seconds while it is in use, so that its age is that of the last
look and not of the last change; and at the end.

The book does not know where it is kept: ``save`` is an upsert of somebody else's store. It holds
what is dirty and one task, which ends when everything is written; ``close`` writes the rest. A
write that fails is not tried again before the next change: the cap is found again in seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from proxy.upstream.cap import Cap, Learned

#: Seconds after a change until it is written.
QUIET = 10.0
#: Seconds after which a cap that has not changed is written again.
CONFIRM = 3600.0

#: Keeps an origin's limit and ceiling, with the time.
Save = Callable[[str, int, int | None], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Written:
    limit: int
    ceiling: int | None
    at: float


class CapBook:
    """The caps that were learned, by their origin's label.

    ``known`` is what earlier processes wrote; ``clock`` is monotonic, in seconds, and so are the
    other two.
    """

    def __init__(
        self,
        known: Mapping[str, Learned],
        save: Save,
        *,
        clock: Callable[[], float],
        quiet: float = QUIET,
        confirm: float = CONFIRM,
    ) -> None:
        self._known = known
        self._save = save
        self._clock = clock
        self._quiet = quiet
        self._confirm = confirm
        self._written: dict[str, _Written] = {}
        self._dirty: dict[str, Cap] = {}
        self._latest: dict[str, Cap] = {}
        self._task: asyncio.Task[None] | None = None

    def learned(self, label: str) -> Learned | None:
        """What an earlier process knew of this origin."""
        return self._known.get(label)

    def note(self, label: str, cap: Cap) -> None:
        """The origin's cap, which may or may not have changed. Cheap: called with every answer."""
        self._latest[label] = cap
        if label in self._dirty:
            self._dirty[label] = cap
        elif not self._is_written(label, cap):
            self._dirty[label] = cap
            if self._task is None:
                self._task = asyncio.create_task(self._write_later(), name="learned caps")

    def _is_written(self, label: str, cap: Cap) -> bool:
        last = self._written.get(label)
        if last is None:
            return False
        is_same = (last.limit, last.ceiling) == (cap.limit, cap.ceiling)
        return is_same and self._clock() - last.at < self._confirm

    async def _write_later(self) -> None:
        try:
            while self._dirty:
                await asyncio.sleep(self._quiet)
                await self._write()
        finally:
            self._task = None

    async def _write(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for label, cap in dirty.items():
            self._written[label] = _Written(cap.limit, cap.ceiling, self._clock())
            await self._save(label, cap.limit, cap.ceiling)

    async def close(self) -> None:
        """Write what every origin's cap is now."""
        if self._task is not None:
            task = self._task
            task.cancel()
            await asyncio.wait([task])
        self._dirty = dict(self._latest)
        await self._write()

    def __repr__(self) -> str:
        return f"<CapBook {len(self._latest)} origins, {len(self._dirty)} to be written>"
