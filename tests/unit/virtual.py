"""A loop whose time passes only when nothing else can happen: minutes of waiting in a moment.

Sockets and threads are real and take what they take; only when none of them has anything to say
does the clock jump to the next timer. A test that waits for 180 s this way takes none, and measures
exactly 180.0.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

#: Real seconds that the kernel gets to carry bytes from one end of a loopback socket to the other.
GRACE = 0.005


class _Selector(selectors.DefaultSelector):
    """Waits for sockets as usual, and for time by letting the loop's clock jump."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if timeout is None or self.loop.in_threads:
            return super().select(None)  # a socket, or a thread that has ended, wakes it
        events = super().select(self.loop.grace)
        if not events:
            self.loop.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` is seconds since the start, as the timers have it."""

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self.now = 0.0
        self.in_threads = 0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(  # type: ignore[override]  # typeshed has the arguments in a TypeVarTuple
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        future = super().run_in_executor(executor, func, *args)
        self.in_threads += 1
        future.add_done_callback(self._returned)
        return future

    def _returned(self, _future: "asyncio.Future[Any]") -> None:
        self.in_threads -= 1


def run_virtually(work: Coroutine[Any, Any, T], *, grace: float = GRACE) -> T:
    """Run it on a loop of its own; without sockets no ``grace`` is needed."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(grace)) as runner:
        return runner.run(work)


def now() -> float:
    """The running loop's time."""
    return asyncio.get_running_loop().time()
