"""Takes the fleet's orders that are for this node, and reports how far they are (DESIGN D19).

One loop looks at the list of orders (``fleet/orders.py``), reads what is new in it, and makes each
order for this node a task of the table, whose id follows from the order's. So an order is taken
once: also by the process that leads next, and however often it is shown. The table keeps the task;
that the order ends, or that the directory is lost, stops nothing. Only a sealed "cancel" does.

The table forgets tasks that are over for long, or when very many are; therefore this remembers what
it has taken for longer than an old order could be shown.

What is known of an order: not readable (nobody of us has sealed it, or it has just gone: it is
read again in a while), not for this node, taken, cancelled. A full table takes it later.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from proxy.fleet.orders import LIFE, SKEW, FleetOrder, OrderBook, Word
from proxy.observe.logs import Logger
from proxy.oci.errors import DirectoryDown, PullError, QueueFull, TaskUnknown
from proxy.pull.giving_orders import LOOK, look_every
from proxy.pull.order_results import Reported
from proxy.pull.task import Document, Order, TaskState

#: Seconds between two looks at the list, while there is nothing to do.
IDLE = 3.0
#: Seconds for which an order is remembered that is in the list no more.
REMEMBER = LIFE + 3 * SKEW


def task_of(order: str) -> str:
    """The id of an order's task at any node."""
    return hashlib.sha256(f"pullpool task of order {order}".encode()).hexdigest()[:16]


class Table(Protocol):
    """What this needs of a ``Tasks``."""

    async def add(self, id: str, order: Order) -> Document: ...

    async def get(self, id: str) -> Document: ...

    async def cancel(self, id: str) -> Document: ...


@dataclass(slots=True)
class _Known:
    """An order that is in the list, or was a moment ago."""

    seen: float
    mark: str = ""
    order: FleetOrder | None = None  # None: it could not be read, or taken
    tried: float = -math.inf  # to read it
    places: tuple[int, ...] | None = None  # which of its images are for this node; None: not ours
    pace: float = LOOK  # seconds between two reports of what goes on
    last: dict[str, Any] | None = None  # report
    reported: float | None = None

    @property
    def is_going_on(self) -> bool:
        return self.places is not None and (self.last is None or not _is_over(self.last))

    def is_due(self, said: Document, now: float) -> bool:
        """Is it time to report this?"""
        if self.reported is None:
            return True
        since = now - self.reported
        return since >= LIFE / 3 or (said != self.last and (_is_over(said) or since >= self.pace))


def _is_over(report: Document) -> bool:
    return TaskState(report["state"]).is_over


class TakingOrders:
    """``async with TakingOrders(…)``: takes orders for the node of this ``place`` meanwhile."""

    def __init__(
        self,
        book: OrderBook,
        place: str,
        table: Table,
        *,
        clock: Callable[[], float],
        log: Logger,
        idle: float = IDLE,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``clock`` is monotonic, ``chance`` between 0 and 1."""
        self._book = book
        self._place = place
        self._table = table
        self._clock = clock
        self._log = log
        self._idle = idle
        self._chance = chance
        self._known: dict[str, _Known] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._rounds(), name="fleet orders")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _rounds(self) -> None:
        while True:
            with contextlib.suppress(DirectoryDown):
                await self.round()
            await asyncio.sleep(self._pause() * (0.9 + 0.2 * self._chance()))

    def _pause(self) -> float:
        paces = [known.pace for known in self._known.values() if known.is_going_on]
        return min([self._idle, *paces])

    async def round(self) -> None:
        """Look once, and report. DirectoryDown."""
        live, now = await self._book.live(), self._clock()
        for id, mark in live.items():
            known = self._known.get(id)
            if known is None:
                known = self._known[id] = _Known(now)
            known.seen = now
            # What nobody of us has sealed can change as often as somebody likes.
            is_due = now - known.tried >= LIFE / 3
            if is_due if known.order is None else known.mark != mark:
                order = await self._book.read(id)
                known.mark, known.tried = mark, now
                await self._hear(id, known, order)
        for id, known in list(self._known.items()):
            if now - known.seen > REMEMBER:
                del self._known[id]
            elif id in live and known.places is not None:
                await self._report(id, known)

    async def _hear(self, id: str, known: _Known, order: FleetOrder | None) -> None:
        """Do what an order says that was read."""
        if order is None:
            self._log.warning("order_not_believed", order=id)
            return
        was = known.order
        known.order = order
        if order.word is Word.CANCEL:
            with contextlib.suppress(TaskUnknown):
                await self._table.cancel(task_of(id))
                self._log.info("order_cancelled", order=id, task=task_of(id))
        elif was is None and self._place in order.nodes:
            await self._take(id, order, known)

    async def _take(self, id: str, order: FleetOrder, known: _Known) -> None:
        images, mine = order.work.get("images", []), order.nodes[self._place]
        places = tuple(range(len(images))) if mine is None else mine
        try:
            wanted = Order.parse({**order.work, "images": [images[place] for place in places]})
            await self._table.add(task_of(id), wanted)
        except QueueFull:
            known.order, known.tried = None, -math.inf  # at the next look
            return
        except (PullError, IndexError) as error:  # of a node of another version
            known.last = Reported(TaskState.FAILED, error=str(error)).document()
        known.places = places
        known.pace = look_every(len(images), len(order.nodes))
        self._log.info("order_taken", order=id, task=task_of(id), images=len(places))

    async def _report(self, id: str, known: _Known) -> None:
        """Say how far it is, if that is news or was said long ago."""
        said = known.last
        # What was forgotten here, or never begun, is as it was last told.
        with contextlib.suppress(TaskUnknown):
            task = await self._table.get(task_of(id))
            said = Reported.of(task, known.places or ()).document()
        now = self._clock()
        if said is not None and known.is_due(said, now):
            await self._book.report(id, self._place, said)
            known.last, known.reported = said, now

    def __repr__(self) -> str:
        return f"<TakingOrders at {self._place} known={len(self._known)}>"
