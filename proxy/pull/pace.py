"""Who holds a body up: the one that sends it, or we, who hash and write it?

Several connections bring a blob faster where each has a limit of its own. Where the bytes of one
already wait for us they bring nothing, and cost more: what is not next has to be read again to be
hashed. So whoever takes a body in says when it does; in between it waits.

The time alone does not tell: on a busy machine a small piece takes long, too, for most of it is the
way to a thread and back. But a body that outruns us comes in large pieces, since more arrives while
the last is taken in. Nor does one look tell: between two turns nothing comes, which is nobody's
limit, and a moment in which the sender had no core looks like one. So only the time inside bodies
counts, and each look still sees half of what the one before it saw.

A body that brings ``FAST`` bytes a second outruns us as well, whoever waits for whom: where sender,
receiver and client share the cores of a machine each of them waits for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: The part of the time that is spent taking bytes in, from which on we are who holds a body up.
BUSY = 0.5
#: Bytes of a large piece: more than a receiver waits for before it wakes anybody (512 KiB).
LARGE = 640 << 10
#: Bytes a second of one connection that are no limit of its own: more than a line of 1 Gbit/s.
FAST = 150e6
#: Pieces by whose size it can be told.
PIECES = 2


class Pace:
    """How the time inside bodies is spent, and on what. ``clock`` is monotonic."""

    __slots__ = (
        "_bytes",
        "_clock",
        "_is_first",
        "_is_inside",
        "_is_taking",
        "_pieces",
        "_since",
        "_taking",
        "_waiting",
    )

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._is_inside = self._is_taking = False
        self._since = clock()
        self._is_first = True
        self.forget()

    def forget(self) -> None:
        """Tell of what comes from here on."""
        self._go_on()
        self._taking = self._waiting = 0.0
        self._bytes = self._pieces = 0.0

    @contextmanager
    def body(self) -> Iterator[None]:
        """Inside, a body comes."""
        self._go_on()
        self._is_inside = self._is_first = True
        try:
            yield
        finally:
            self._go_on()
            self._is_inside = False

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Inside, a piece of so many bytes is taken in."""
        self._go_on()
        self._is_taking = True
        if self._is_first:
            self._is_first = False  # how much had come by then says nothing
        else:
            self._bytes += size
            self._pieces += 1
        try:
            yield
        finally:
            self._go_on()
            self._is_taking = False

    def more(self, size: int) -> None:
        """So many bytes had come while the piece was taken in, and are taken in as part of it."""
        self._bytes += size

    def is_outrun(self) -> bool | None:
        """Does the body bring more than is taken in, or as much as one has to? None: there are not
        the pieces yet by whose size it could be told."""
        self._go_on()
        total = self._taking + self._waiting
        is_busy = self._taking >= BUSY * total
        if is_busy and self._pieces < PIECES:
            return None
        is_fast = self._bytes >= FAST * total > 0
        is_outrun = is_fast or (is_busy and self._bytes >= LARGE * self._pieces)
        self._taking, self._waiting = self._taking / 2, self._waiting / 2
        self._bytes, self._pieces = self._bytes / 2, self._pieces / 2
        return is_outrun

    def _go_on(self) -> None:
        now = self._clock()
        if self._is_taking:
            self._taking += now - self._since
        elif self._is_inside:
            self._waiting += now - self._since
        self._since = now

    def __repr__(self) -> str:
        state = "taking" if self._is_taking else "waiting" if self._is_inside else "between bodies"
        return f"<Pace {state}, {self._taking:.3f} s taking, {self._waiting:.3f} s waiting>"
