"""What one way to a thread takes in: the piece that it was for, and what has come meanwhile.

The way to a thread and back costs 0.1 to 0.2 ms of CPU, and while the loop finds the time to send
the next piece on its way the thread has nothing to do. So where an upstream brings more than is
taken in, the thread asks the body itself for the next piece (``more``), which lies in the ring
already. The loop is only told: it lets readers have what is written and hashed by then, lets as
much come in again, and says whether the haul may go on.

* The thread begins with the piece that was borrowed. Each ``more`` gives that memory back for the
  next bytes, so it is asked when the piece before is done with, and by nobody else: while the haul
  lasts the loop borrows nothing.
* It ends when not enough has come for another piece, at ``most`` bytes, when the loop says so, when
  its task is cancelled, or when its thread is wanted for something else (``Staging.haul``).
* What the loop is told arrives before the end of the haul does: both take the same queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from proxy.oci.digest import Chunk


class Follower(Protocol):
    """A body that can be asked for more where it is taken in. ``more``: in a thread; the next
    bytes in place of those before, at most so many, or ``b""``. ``settle``: in the loop; what
    ``more`` gave has been taken, or will be: count it, and let more come."""

    def more(self, most: int) -> Chunk: ...

    def settle(self) -> None: ...


class Haul:
    """One of them, made by the task that waits for it."""

    def __init__(self, body: Follower, most: int, went_on: Callable[[int], bool]) -> None:
        """At most ``most`` bytes by ``more``. ``went_on`` is called in the loop with the bytes of
        each piece that begins; the one before is done. It says whether another one may follow."""
        self._body = body
        self._left = most
        self._went_on = went_on
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._is_over = False

    def more(self) -> Chunk:
        """In the thread: the next piece, in place of the one before; ``b""``: that is all."""
        is_cancelled = self._task is not None and self._task.cancelling()
        if self._is_over or is_cancelled or self._left <= 0:
            return b""
        data = self._body.more(self._left)
        if data:
            self._left -= len(data)
            self._loop.call_soon_threadsafe(self._tell, len(data))
        return data

    def _tell(self, count: int) -> None:
        self._body.settle()
        self._is_over = not self._went_on(count)

    def __repr__(self) -> str:
        return f"<Haul {'that ends' if self._is_over else f'of {self._left} bytes more at most'}>"
