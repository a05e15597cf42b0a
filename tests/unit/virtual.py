"""A loop whose time passes only when nothing else can happen: minutes of waiting in a moment.

Sockets and threads are real and take what they take; only when none of them has anything to say
does the clock jump to the next timer. A test that waits for 180 s this way takes none, and measures
exactly 180.0.
"""

import asyncio
import selectors
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

#: Real seconds that the kernel gets to carry bytes from one end of a loopback socket to the other,
#: beyond what a byte takes that is sent behind them.
GRACE = 0.002


class _Errand:
    """A byte over loopback and back: what was sent before it has come when it has. On a busy
    machine that takes as long as it takes, and on an idle one almost nothing."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._here = socket.create_connection(server.getsockname())
            self._there, _ = server.accept()
        for end in (self._here, self._there):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        self._here.send(b"?")
        self._there.send(self._there.recv(1))
        self._here.recv(1)

    def close(self) -> None:
        self._here.close()
        self._there.close()


class _Selector(selectors.DefaultSelector):
    """Waits for sockets as usual, and for time by letting the loop's clock jump."""

    loop: "VirtualLoop"

    def __init__(self) -> None:
        super().__init__()
        self._errand = _Errand()

    def close(self) -> None:
        super().close()
        self._errand.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if timeout is None or self.loop.in_threads:
            return super().select(None)  # a socket, or a thread that has ended, wakes it
        if self.loop.grace:
            self._errand.run()
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
