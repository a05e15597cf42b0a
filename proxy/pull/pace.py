"""Who holds a body up: the one that sends it, or we, who hash and write it?

Several connections bring a blob faster where each has a limit of its own. Where the bytes of one
already wait for us they bring nothing, and cost more: what is not next has to be read again to be
hashed. So whoever takes a body in says when it does; in between it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """How much of the time is spent taking bytes in. ``clock`` is monotonic."""

    __slots__ = ("_clock", "_is_taking", "_since", "_taking", "_waiting")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._is_taking = False
        self._since = clock()
        self._taking = self._waiting = 0.0

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Inside, bytes that have come are taken in."""
        self._go_on()
        self._is_taking = True
        try:
            yield
        finally:
            self._go_on()
            self._is_taking = False

    def share(self) -> float | None:
        """The part of the time since the last call in which bytes were taken in: 0 … 1; None when
        no time has passed."""
        self._go_on()
        total = self._taking + self._waiting
        share = self._taking / total if total > 0 else None
        self._taking = self._waiting = 0.0
        return share

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
