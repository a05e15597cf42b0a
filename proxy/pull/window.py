"""A bounded window of a body in memory, for blobs that the disk has no room for (DESIGN D14).

The fill appends at its end, readers follow inside it. Its front is given up as it grows past
``capacity``, so memory stays flat whatever the blob's size; a reader whose place was given up has
*fallen out* and goes on with turns of its own. Pure: whoever fills it waits for readers outside.
"""

from __future__ import annotations

from collections import deque

#: Windows that a budget holds at their full size before they become smaller.
FULL_SIZE = 4
#: The least window, in bytes: its turns are small, but it goes on.
LEAST = 256 << 10


class WindowBudget:
    """The bytes that all windows of a process share, so that a full disk under many blobs does not
    become full memory.

    A window gets up to ``largest`` bytes, later ones half of what is left, and at the least
    ``LEAST``: nobody waits for a window, because the reader who holds one may never go on.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._left = FULL_SIZE * largest

    def take(self) -> int:
        """The capacity of one more window; give it back."""
        least = min(LEAST, self._largest)
        capacity = min(self._largest, max(least, self._left // 2))
        self._left -= capacity
        return capacity

    def give(self, capacity: int) -> None:
        """A window of ``capacity`` bytes is gone."""
        self._left += capacity

    def __repr__(self) -> str:
        return f"<WindowBudget {self._left} bytes left>"


class Window:
    """Bytes ``start`` … ``end`` of a body, never more than ``capacity`` of them.

    Memory is kept by the piece: what is held beyond ``capacity`` is less than one piece.
    """

    def __init__(self, start: int, capacity: int) -> None:
        if capacity < 2:
            raise ValueError(f"a window needs at least two bytes, not {capacity}")
        self.start = start
        self.end = start
        self.capacity = capacity
        self._first = start  # where the first piece begins, at or before `start`
        self._pieces: deque[bytes] = deque()

    def append(self, data: bytes) -> None:
        """Add ``data`` at the end and give up in front what is beyond capacity."""
        if not data:
            return
        self._pieces.append(data)
        self.end += len(data)
        self.start = max(self.start, self.end - self.capacity)
        while self._first + len(self._pieces[0]) <= self.start:
            self._first += len(self._pieces.popleft())

    def holds(self, position: int) -> bool:
        """May a reader at ``position`` follow this window (maybe waiting at its end)?"""
        return self.start <= position <= self.end

    def piece(self, position: int) -> bytes:
        """The bytes from ``position`` to the end of the piece it lies in."""
        if not self.start <= position < self.end:
            raise ValueError(f"byte {position} is not in {self!r}")
        at = self._first
        for data in self._pieces:
            if position < at + len(data):
                return data[position - at :] if position > at else data
            at += len(data)
        raise AssertionError(f"the pieces of {self!r} do not reach its end")

    def clear(self) -> None:
        """Give up everything: nobody reads it any more."""
        self._pieces.clear()
        self.start = self.end

    def __repr__(self) -> str:
        return f"<Window {self.start}-{self.end}, at most {self.capacity}>"
