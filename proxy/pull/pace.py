"""Who holds a body up: the one that sends it, or we, who hash and write it?

Several connections bring a blob faster where each has a limit of its own. Where the bytes of one
already wait for us they bring nothing, and cost more: what is not next has to be read again to be
hashed. So whoever takes a body in says when it does; in between it waits.

The time alone does not tell: on a busy machine a small piece takes long, too, for most of it is the
way to a thread and back. But a body that outruns us comes in large pieces, since more arrives while
the last is taken in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: The part of the time that is spent taking bytes in, from which on we are who holds a body up.
BUSY = 0.5
#: Bytes of a large piece: more than a receiver waits for before it wakes anybody (512 KiB).
LARGE = 640 << 10


class Pace:
    """How the time is spent, and on what. ``clock`` is monotonic."""

    __slots__ = (
        "_bytes",
        "_clock",
        "_is_first",
        "_is_taking",
        "_pieces",
        "_since",
        "_taking",
        "_waiting",
    )

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._is_taking = False
        self._since = clock()
        self._taking = self._waiting = 0.0
        self._bytes = self._pieces = 0
        self._is_first = True

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Inside, a piece of so many bytes is taken in."""
        self._go_on()
        self._is_taking = True
        if self._is_first:
            self._is_first = False  # what had come by then says nothing
        else:
            self._bytes += size
            self._pieces += 1
        try:
            yield
        finally:
            self._go_on()
            self._is_taking = False

    def is_outrun(self) -> bool | None:
        """Has the body brought more than was taken in, since this was told the last time? None:
        there is no second piece yet, by whose size it could be told."""
        self._go_on()
        total = self._taking + self._waiting
        is_busy = self._taking >= BUSY * total
        if is_busy and not self._pieces:
            return None
        is_outrun = is_busy and self._bytes >= LARGE * self._pieces
        self._taking = self._waiting = 0.0
        self._bytes = self._pieces = 0
        return is_outrun

    def _go_on(self) -> None:
        now = self._clock()
        if self._is_taking:
            self._taking += now - self._since
        else:
            self._waiting += now - self._since
        self._since = now

    def __repr__(self) -> str:
        state = "taking" if self._is_taking else "waiting"
        return f"<Pace {state}, {self._taking:.3f} s taking, {self._waiting:.3f} s waiting>"
