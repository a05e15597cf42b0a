"""Sockets that can be written to again, in slices of a turn of the loop.

libuv asks epoll for 1,024 events at a time and up to 48 times over, and runs what waits for each of
them before anything else gets its turn. When thousands of clients follow one fill, most of their
sockets take more at once, and each of those events is a sendfile of up to hundreds of kilobytes:
measured, 5,000 clients held everything else up for 0.3 s and more.

So whoever waits to write is kept in an epoll instance of its own, whose descriptor is one more that
the loop watches for reading. In each turn of the loop those that are ready are run for ``SLICE``
seconds; the kernel gives those that were not run yet first in the next turn, and keeps the
descriptor readable until none is left. What they wake runs in between, and so does everything else.

Written as ``add_writer`` and ``remove_writer`` of a loop, which is all that aiofastnet's transports
use to wait; what uvloop does inside of itself does not come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import select
import time
from collections.abc import Callable
from typing import Any

#: Seconds of a turn of the loop that may go to those who are ready.
SLICE = 0.005
#: Of them so many are taken from the kernel at once; between two lots the clock is looked at. With
#: 16 of them a slice of 5 ms took up to 15, as each may be told to send all that has come since.
LOT = 4


class Writers:
    """Whoever waits to write on ``loop``, by descriptor. Belongs to that loop; ``close`` ends it,
    after which nobody may wait any more."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], float] = time.perf_counter,
        length: float = SLICE,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._length = length
        self._epoll = select.epoll()
        self._waiting: dict[int, Callable[[], object]] = {}
        loop.add_reader(self._epoll.fileno(), self._run)

    def add_writer(self, file: Any, callback: Callable[..., object], *args: Any) -> None:
        """Call back whenever the descriptor takes bytes, until ``remove_writer``."""
        fd = file if isinstance(file, int) else int(file.fileno())
        context = contextvars.copy_context()
        with contextlib.suppress(FileExistsError):  # it waits already: the last callback counts
            self._epoll.register(fd, select.EPOLLOUT)
        self._waiting[fd] = lambda: context.run(callback, *args)

    def remove_writer(self, file: Any) -> bool:
        """Whether anybody waited."""
        fd = file if isinstance(file, int) else int(file.fileno())
        if self._waiting.pop(fd, None) is None:
            return False
        with contextlib.suppress(OSError, ValueError):  # it, or all of us, closed already
            self._epoll.unregister(fd)
        return True

    def _run(self) -> None:
        end = self._clock() + self._length
        while True:
            events = self._epoll.poll(0, LOT)
            for fd, _ in events:
                callback = self._waiting.get(fd)
                if callback is None:  # one before it has taken it away
                    continue
                try:
                    callback()
                except Exception as error:
                    self._loop.call_exception_handler(
                        {"message": f"whoever waits to write to {fd} failed", "exception": error}
                    )
            if len(events) < LOT or self._clock() >= end:
                return

    def close(self) -> None:
        """Before the loop is closed; a second call does nothing."""
        if self._epoll.closed:
            return
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def __repr__(self) -> str:
        return f"<Writers {len(self._waiting)} waiting>"
