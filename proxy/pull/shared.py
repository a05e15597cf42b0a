"""Work that is done once for everybody who asks for it at the same time.

A *shared work* is a task per key, owned by the table. Whoever asks for a key under way joins it:
the ticket that stands in the gate's queue then belongs to all of them (D3). When the last one
leaves, the task is cancelled, unless it may linger for a while. The outcome, value or
``PullError``, goes to everybody. Nobody's cancellation reaches the others.

A work that nobody waits for any more leaves the table before it is cancelled, so whoever asks in
the same loop turn starts afresh; its task is held until it has ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from proxy.oci.errors import ShuttingDown
from proxy.upstream.turns import Ticket, TurnClass

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Work(Generic[V]):
    __slots__ = ("clients", "linger", "task", "ticket")

    def __init__(self, ticket: Ticket, task: asyncio.Task[V]) -> None:
        self.ticket = ticket
        self.task = task
        self.clients: Counter[str] = Counter()
        self.linger = 0.0  # the loop's time until which it goes on without anybody


class SharedWork(Generic[K, V]):
    """The table of works under way; at most one per key."""

    def __init__(self, turn_class: TurnClass = TurnClass.METADATA) -> None:
        self._turn_class = turn_class
        self._works: dict[K, _Work[V]] = {}
        self._tasks: set[asyncio.Task[V]] = set()
        self._is_closing = False

    def __len__(self) -> int:
        return len(self._works)

    async def do(
        self,
        key: K,
        client: str,
        start: Callable[[Ticket], Awaitable[V]],
        *,
        linger: float = 0.0,
    ) -> tuple[V, bool]:
        """The outcome for ``key``, and whether somebody else had started it. Raises its error.

        Until the loop's time is ``linger`` the work goes on when everybody has left (a freshness
        check whose result is of use to the next one). Raises ``ShuttingDown`` when the table is
        closed meanwhile.
        """
        if self._is_closing:
            raise ShuttingDown()
        work = self._works.get(key)
        joined = work is not None
        if work is None:
            work = self._start(key, start)
        work.linger = max(work.linger, linger)
        self._enter(work, client)
        try:
            return await asyncio.shield(work.task), joined
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if work.task.cancelled() and caller is not None and not caller.cancelling():
                raise ShuttingDown() from None  # the work was stopped, not the one who waits
            raise
        finally:
            self._leave(key, work, client)

    def _start(self, key: K, start: Callable[[Ticket], Awaitable[V]]) -> _Work[V]:
        ticket = Ticket(self._turn_class)
        work: _Work[V] = _Work(ticket, asyncio.ensure_future(self._run(start, ticket)))
        self._works[key] = work
        self._tasks.add(work.task)
        work.task.add_done_callback(lambda task: self._ended(key, work, task))
        return work

    @staticmethod
    async def _run(start: Callable[[Ticket], Awaitable[V]], ticket: Ticket) -> V:
        return await start(ticket)

    def _ended(self, key: K, work: _Work[V], task: asyncio.Task[V]) -> None:
        self._tasks.discard(task)
        self._forget(key, work)
        if not task.cancelled():
            task.exception()  # seen, also when nobody waits any more

    def _forget(self, key: K, work: _Work[V]) -> None:
        if self._works.get(key) is work:
            del self._works[key]

    def _enter(self, work: _Work[V], client: str) -> None:
        work.clients[client] += 1
        work.ticket.join(client)

    def _leave(self, key: K, work: _Work[V], client: str) -> None:
        work.clients[client] -= 1
        if not work.clients[client]:
            del work.clients[client]
            work.ticket.leave(client)
        if not work.clients and not work.task.done():
            loop = asyncio.get_running_loop()
            if loop.time() < work.linger:
                loop.call_at(work.linger, self._drop, key, work)
            else:
                self._drop(key, work)

    def _drop(self, key: K, work: _Work[V]) -> None:
        """End a work that nobody waits for."""
        if not work.clients and not work.task.done():
            self._forget(key, work)
            work.task.cancel()

    async def close(self) -> None:
        """Cancel what is under way and wait for it; nothing starts any more."""
        self._is_closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def __repr__(self) -> str:
        return f"<SharedWork {len(self._works)} under way>"
