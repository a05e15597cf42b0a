"""Work that cannot be taken back half-way, and callers that may be cancelled at any time.

A system call in a thread goes on when the task that waits for it is cancelled; what it opened or
wrote would belong to nobody. So the waiter stays until the work has ended, brings the object into
a consistent state, and only then lets its cancellation go on.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

# Reads and writes mostly hit the page cache and are done in microseconds to a millisecond; what
# waits for the platter (fsync, unlink of a large file, hashing for recovery) must not stand in
# front of them.
_QUICK = 6
_SLOW = 4


async def finish(work: "asyncio.Future[T]", undo: Callable[[T], object] | None = None) -> T:
    """The result of `work`, which is never cancelled by this.

    A cancellation that arrives meanwhile is raised when the work has ended; a result that then
    has no taker is handed to `undo`, and an error of the work gives way to the cancellation.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return work.result()
    if not work.cancelled() and work.exception() is None and undo is not None:
        undo(work.result())
    raise cancelled


async def end_threads(*pools: ThreadPoolExecutor) -> None:
    """End all threads of some pools, after what they still do, without blocking the loop."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def join() -> None:
        for pool in pools:
            pool.shutdown()
        loop.call_soon_threadsafe(ended.set_result, None)

    joiner = threading.Thread(target=join, name="pullpool-end")
    joiner.start()
    await finish(ended)
    # For the few instructions between its last call and its end, which nothing can signal.
    while joiner.is_alive():  # noqa: ASYNC110 -- see above
        await asyncio.sleep(0)


class Threads:
    """The store's own threads, in two pools, so that a slow disk does not delay a hit."""

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(_QUICK, thread_name_prefix="pullpool-disk")
        self._slow = ThreadPoolExecutor(_SLOW, thread_name_prefix="pullpool-sync")
        self.running: set[asyncio.Future[Any]] = set()  # whatever a thread still works on
        self._quick_calls = 0  # under way, or waiting for a thread

    async def quick(self, call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Run a call that rarely waits for the disk; see `finish` for cancellation."""
        self._quick_calls += 1  # first: a new thread begins before `_submit` returns
        work = self._submit(self._quick, call)
        work.add_done_callback(self._ended)
        return await finish(work, undo)

    def _ended(self, _work: "asyncio.Future[Any]") -> None:
        self._quick_calls -= 1

    @property
    def is_crowded(self) -> bool:
        """Are all threads for quick calls taken? May be asked in one of them."""
        return self._quick_calls >= _QUICK

    async def slow(self, call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Run a call that waits for the disk; see `finish` for cancellation."""
        return await finish(self._submit(self._slow, call), undo)

    def _submit(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> "asyncio.Future[T]":
        work = asyncio.get_running_loop().run_in_executor(pool, call)
        self.running.add(work)
        work.add_done_callback(self.running.discard)
        return work

    async def close(self) -> None:
        """End all threads, after what they still do."""
        await end_threads(self._slow, self._quick)
