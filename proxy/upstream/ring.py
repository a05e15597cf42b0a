"""The memory that bodies are received into: rings of bytes, used again and again.

A fresh buffer for every piece costs its first touch (the kernel clears each page), which is as much
as receiving it. So a body is received into a ring, is written and hashed from there, and the next
body gets the same ring. Where a blob comes over several connections most of their rings are new, so
a ring asks for huge pages: its first 8 MiB take 1.3 to 1.6 ms then, and to give them back 0.06. In
small ones of memory that could be shared, as it was, they took 7.9 to 9.9 ms and 1.8 to 2.6.

Pure bookkeeping over three counts that only grow: bytes *received*, bytes *lent* to the consumer,
bytes *freed*, which may be overwritten. ``lend`` frees what it lent before. Who receives and who
is lent to may be two threads: each count is moved by one of them, when it is done with the bytes.
"""

from __future__ import annotations

import contextlib
import mmap

#: Bytes of a ring: a piece on its way to the disk, the next one, which the same thread takes, and
#: as much again coming in.
RING_BYTES = 8 << 20
#: Rings without a body that are kept for the next ones.
SPARE = 2


class Ring:
    """Bytes that are written at one end and lent at the other, in place."""

    def __init__(self, size: int = RING_BYTES) -> None:
        self.size = size
        # Begins at a page.
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if (huge := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:  # only Linux knows them
            with contextlib.suppress(OSError):  # a kernel that has none
                memory.madvise(huge)
        self._view = memoryview(memory)
        self.clear()

    def clear(self) -> None:
        """Forget what is in it."""
        self._received = self._lent = self._freed = 0

    @property
    def unread(self) -> int:
        """Bytes that have come and were not lent."""
        return self._received - self._lent

    @property
    def used(self) -> int:
        """Bytes that must not be overwritten."""
        return self._received - self._freed

    def space(self, most: int) -> memoryview:
        """Where the next bytes go: what is free in one piece, at most so many bytes."""
        at = self._received % self.size
        return self._view[at : at + min(most, self.size - self.used, self.size - at)]

    def received(self, count: int) -> None:
        """``count`` bytes have been written where ``space`` said."""
        self._received += count

    def free(self) -> None:
        """What was lent is not needed any more."""
        self._freed = self._lent

    def lend(self, most: int) -> memoryview:
        """The next unread bytes that lie in one piece, at most ``most``, until they are freed."""
        self.free()
        at = self._lent % self.size
        count = min(most, self.unread, self.size - at)
        self._lent += count
        return self._view[at : at + count]

    def __repr__(self) -> str:
        return f"<Ring {self.used} of {self.size} bytes used, {self.unread} unread>"


class Rings:
    """Rings for bodies, of which a few are kept. Only a ring that nobody writes to comes back."""

    def __init__(self, size: int = RING_BYTES, spare: int = SPARE) -> None:
        self._size = size
        self._most = spare
        self._spare: list[Ring] = []

    def take(self) -> Ring:
        return self._spare.pop() if self._spare else Ring(self._size)

    def give(self, ring: Ring) -> None:
        if len(self._spare) < self._most:
            ring.clear()
            self._spare.append(ring)

    def __repr__(self) -> str:
        return f"<Rings {len(self._spare)} spare>"
