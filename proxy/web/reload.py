"""Files that are read again when they change: certificates, passwords.

The files are looked at every few seconds, by what ``stat`` tells, in a thread. That needs no help
of the system, and sees what else would be missed: a Kubernetes secret is changed by turning a
symbolic link two directories up. What is new takes the place of what is old only when all of it
can be used; until then the old one stays, and the log says why. A pair of files that are replaced
one after the other is therefore tried once too early at worst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from proxy.observe.logs import Logger

#: Seconds between two looks.
INTERVAL = 5.0

_Marks = tuple[tuple[int, int, int] | None, ...]


class Unusable(Exception):
    """What the files hold cannot be used; the message says which file and why."""


class Reloader:
    """Calls ``reload`` when one of the files has changed, while its block lasts.

    ``reload`` reads the files, off the loop, and raises ``Unusable`` when they are no use. It is
    not called for what the files hold when the block begins: that has just been read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reload: Callable[[], Awaitable[None]],
        *,
        log: Logger,
        interval: float = INTERVAL,
    ) -> None:
        self._files = tuple(files)
        self._reload = reload
        self._log = log
        self._interval = interval
        self._marks: _Marks = ()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Reloader:
        self._marks = await asyncio.to_thread(_look, self._files)
        self._task = asyncio.create_task(self._watch(), name="file watch")
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def look(self) -> None:
        """Look at the files now."""
        marks = await asyncio.to_thread(_look, self._files)
        if marks == self._marks:
            return
        # Before the files are read: a change in between is then seen at the next look.
        self._marks = marks
        names = [str(file) for file in self._files]
        try:
            await self._reload()
        except (Unusable, OSError) as error:
            self._log.error("not_reloaded", files=names, error=str(error))
        else:
            self._log.info("reloaded", files=names)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.look()


def _look(files: Sequence[Path]) -> _Marks:
    return tuple(_mark(file) for file in files)


def _mark(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
