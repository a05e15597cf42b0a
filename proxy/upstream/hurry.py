"""How long a question may stay at a URL of an upstream that has others besides it.

Theory of operation
-------------------
A question at such a URL is

* *waiting*   from the start: for the breaker, its place in the quota, the retry budget, the gate.
              A queue is no failure, so it may last; but ``look``, which runs at once when the URL
              fails somebody else and every ``haste`` seconds besides, asks ``leave`` whether it is
              time to go.
* *asked*     once a slot was granted. The head of the answer is due ``haste`` seconds later,
              whatever the time goes into: the connection, TLS, a token and the queue of those who
              issue it, redirects and theirs. That is ``HASTE`` or less: all URLs but the last
              share ``WHOLE``, so that one that is well behind several that hang is found in time.
* *answered*  once the head has come. What is slow from now on is the stall limit's to judge, whose
              window is no longer than ``HASTE`` here. Another request for the same question waits
              again.

A question leaves by a cancellation of what is inside ``bounded``, where it becomes the error that
says why. So whatever it holds or waits for is given back as if its client had left; a cancellation
from outside stays what it is, and if the slot was granted in the same moment it goes back as well.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from enum import Enum, auto

from proxy.oci.errors import UpstreamTimeout
from proxy.upstream.origin import Turn

#: Seconds for the head of an answer where there is another URL to ask.
HASTE = 5.0
#: Seconds for all of them but the last: it is to be asked well before a client's deadline.
WHOLE = 15.0
#: Seconds that a request's own limit, which tells the breaker, runs out before that of the whole.
GRACE = 0.1


class MovedOn(Exception):
    """The question was not asked here, which says nothing of the URL."""


class _State(Enum):
    WAITING = auto()
    ASKED = auto()
    ANSWERED = auto()


def share(spent: float, others: int) -> float:
    """The haste at a URL of a question that began ``spent`` seconds ago and has so many other URLs
    to go to. At the end of ``WHOLE`` it is as if it had just begun: what is slow then is a queue.
    """
    left = WHOLE - spent if spent < WHOLE else WHOLE
    return min(HASTE, max(left, WHOLE / 10) / max(1, others))


class Leisure:
    """A question at the only URL that is left: everything lasts as long as usual."""

    def __init__(self) -> None:
        self._asked_at: float | None = None  # what has no answer yet, by the loop's time

    @property
    def silence(self) -> float:
        """Seconds for which it has been asked without an answer."""
        now = asyncio.get_running_loop().time()
        return 0.0 if self._asked_at is None else now - self._asked_at

    @contextlib.asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """What is inside may be ended for lack of time."""
        yield

    def waits(self) -> None:
        """A request is to be made."""

    def asked(self, turn: Turn) -> None:
        """A slot is granted, and ``turn`` is what it is used for."""
        if self._asked_at is None:
            self._asked_at = asyncio.get_running_loop().time()

    def answered(self) -> None:
        """The head of the answer has come."""
        self._asked_at = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class Hurry(Leisure):
    """One question at one URL. ``leave`` gets the seconds waited so far, and gives the error to
    leave with, or ``None``."""

    def __init__(
        self, label: str, leave: Callable[[float], Exception | None], *, haste: float = HASTE
    ) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._label = label
        self._leave = leave
        self._haste = haste
        self._state = _State.WAITING
        self._at = self._loop.time()  # when it began to wait; then, when the head is due
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None

    @contextlib.asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """Raises what ``leave`` gave, or ``UpstreamTimeout``."""
        try:
            async with self._scope:
                self._call(self._haste, self.look)
                yield
        except TimeoutError:
            if not self._scope.expired():
                raise
            assert self._error is not None
            raise self._error from None
        finally:
            self._stop()

    def waits(self) -> None:
        if self._state is _State.WAITING:
            return  # since it began
        self._state, self._at = _State.WAITING, self._loop.time()
        self._call(self._haste, self.look)

    def look(self) -> None:
        """If it still waits: is it time to leave?"""
        if self._state is not _State.WAITING or self._error is not None:
            return
        error = self._leave(self._loop.time() - self._at)
        if error is None:
            self._call(self._haste, self.look)
        else:
            self._end(error)

    def asked(self, turn: Turn) -> None:
        super().asked(turn)
        if self._state is _State.WAITING:
            self._state, self._at = _State.ASKED, self._loop.time() + self._haste
            self._call(self._haste, self._overdue)
        turn.patience = max(0.0, self._at - GRACE - self._loop.time())
        turn.stall = replace(turn.stall, window=min(turn.stall.window, HASTE))

    def answered(self) -> None:
        super().answered()
        self._state = _State.ANSWERED
        self._stop()

    def _call(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop()
        if self._error is None:
            self._timer = self._loop.call_later(seconds, then)

    def _overdue(self) -> None:
        self._end(UpstreamTimeout(f"{self._label}: no answer in {self._haste:.3g} s"))

    def _end(self, error: Exception) -> None:
        self._stop()
        self._error = error
        self._scope.reschedule(self._loop.time())

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __repr__(self) -> str:
        return f"<Hurry {self._label} {self._state.name.lower()}>"
