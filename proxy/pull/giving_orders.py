"""Has a task done by nodes of the fleet: the side of the node that was told (DESIGN D19).

Theory of operation
-------------------
``run`` is the task's run (``tasks.py``). It chooses nodes by who is in the fleet now, enters an
order of the task's own id in the directory (``fleet/orders.py``), again every third of its life,
reads what they report, and ends when each of them is done. This node is one of them like all
others. The directory may be down at any time: then it waits, and says so; what nodes have begun
goes on there meanwhile.

*A node* of the order is, in the end,

* done: it has reported so, whatever becomes of it later
* gone: it was not in the list of nodes for ``Patience.gone`` seconds. It is told so and counts no
  more; when it is back within the task's time, it goes on with its own task and counts again
* deaf: it lives and has said nothing new for ``Patience.deaf`` seconds, though a node makes its
  report again long before. It has another secret, or another version; that fails the task

No time counts while the directory is down.

*How it ends.* Done: the order is taken out. Cancelled: by ``cancel``, which says so to the others
until the directory has heard it, or for as long as that has a use; where it never does, or this
process ends before, the nodes bring their tasks to the end. Drained: nothing is said, the next
process runs the task again with the same id, and so with the same tasks at the nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from proxy.fleet.orders import LIFE, FleetOrder, OrderBook, Word, chosen, place_of
from proxy.observe.logs import Logger
from proxy.oci.errors import DirectoryDown, PullError
from proxy.oci.errors.base import ErrorCode
from proxy.oci.image import ImageName
from proxy.pull.images import Report
from proxy.pull.order_results import Part, Reported, image_of, not_done
from proxy.pull.task import ImageResult, Task
from proxy.pull.tasks import ToldOfNodes
from proxy.upstream.routing import Routes

if TYPE_CHECKING:  # it needs the extra
    from proxy.fleet.members import Node

#: Seconds between two looks at the reports: at least, for each image of a node, and at most.
LOOK, EACH, LONGEST_LOOK = 1.0, 0.001, 20.0
#: Seconds for which it is tried to say that a task was cancelled, and between two tries.
CANCELLING, CANCEL_PAUSE = 600.0, 2.0


def look_every(images: int, nodes: int, least: float = LOOK) -> float:
    """Seconds between two looks at reports, and between two of a node: so that what is read grows
    no faster than the time it takes."""
    return max(least, min(LONGEST_LOOK, EACH * images * nodes))


class Sees(Protocol):
    """Who knows the nodes: ``Members``."""

    known: tuple[Node, ...]

    async def look(self) -> tuple[Node, ...]: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. A node is missed ten seconds after it died, and one that is started again is back
    within ``gone``."""

    look: float = LOOK
    gone: float = 20.0
    deaf: float = LIFE


class GivingOrders:
    """``async with GivingOrders(…) as orders``: a ``FleetRunner``."""

    def __init__(
        self,
        book: OrderBook,
        *,
        members: Callable[[], Sees | None],
        routes: Routes,
        clock: Callable[[], float],
        log: Logger,
        patience: Patience | None = None,
    ) -> None:
        """``members`` is None while this node has not entered the fleet. ``clock`` is monotonic."""
        self.book = book
        self.members = members
        self.clock = clock
        self.patience = patience or Patience()
        self._routes = routes
        self._log = log
        self._cancelling: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._cancelling:
            task.cancel()
        await asyncio.gather(*self._cancelling, return_exceptions=True)

    async def run(self, task: Task, report: Report, told: ToldOfNodes) -> None:
        """Have all of it done. What became of it is reported."""
        nodes = await self._nodes(told)
        parts = self._parts(task, nodes)
        if not parts:
            words = f"no node of the fleet is meant by {task.order.nodes!r}"
            error = PullError(words, code=ErrorCode.UNAVAILABLE)
            for place, image in enumerate(task.order.images):
                report(place, ImageResult(image).failed(error))
            return
        self._log.info("order_given", task=task.id, nodes=len(parts))
        await _Giving(self, task, parts, report, told).run()
        with contextlib.suppress(DirectoryDown):  # then it expires
            await self.book.end(task.id)

    def cancel(self, task: str) -> None:
        """Tell the nodes that it is not wanted any more."""
        work = asyncio.create_task(self._cancel(task), name=f"task {task} is cancelled")
        self._cancelling.add(work)
        work.add_done_callback(self._cancelling.discard)

    async def _cancel(self, task: str) -> None:
        until = self.clock() + CANCELLING
        while self.clock() < until:
            with contextlib.suppress(DirectoryDown):
                if await self.book.give(FleetOrder(task, Word.CANCEL, {}, {})):
                    return
            await asyncio.sleep(CANCEL_PAUSE)
        self._log.warning("order_not_cancelled", task=task)

    async def _nodes(self, told: ToldOfNodes) -> list[Node]:
        """All nodes there are, each place once; waits for the directory."""
        while True:
            members = self.members()
            words = "this node has not entered the fleet yet"
            if members is not None:
                # A directory that has just forgotten all lists only who has beaten since.
                before = members.known
                try:
                    now = await members.look()
                except DirectoryDown as error:
                    words = error.message
                else:
                    return list({place_of(node): node for node in (*before, *now)}.values())
            told((), f"waits: {words}")
            await asyncio.sleep(self.patience.look)

    def _parts(self, task: Task, nodes: Sequence[Node]) -> dict[str, Part]:
        """What each of them is to do, by its place."""
        wanted = task.order.nodes or "all"
        parts: dict[str, Part] = {}
        for number, image in enumerate(task.order.images):
            for node in chosen(nodes, wanted, self._whole_name(image)):
                place = place_of(node)
                part = parts.get(place) or Part(node.name, node.zone, {})
                images = {**part.images, number: ImageResult(image)}
                parts[place] = replace(part, images=images)
        return parts

    def _whole_name(self, text: str) -> str:
        """The image, however it was written."""
        try:
            name = ImageName.parse(text)
            route = self._routes.route(name.repository, name.registry)
        except PullError:
            return text  # its nodes will say so
        return f"{route.upstream.name}/{route.repository}@{name.reference}"

    def __repr__(self) -> str:
        return f"<GivingOrders by {self.book!r}>"


class _Giving:
    """One order, while it is wanted."""

    def __init__(
        self,
        orders: GivingOrders,
        task: Task,
        parts: dict[str, Part],
        report: Report,
        told: ToldOfNodes,
    ) -> None:
        self._orders = orders
        self._task = task
        self._parts = parts
        self._report = report
        self._told = told
        images = range(len(task.order.images))
        nodes = {
            place: None if len(part.images) == len(images) else tuple(part.images)
            for place, part in parts.items()
        }
        work = replace(task.order, nodes=None).document()
        self._order = FleetOrder(task.id, Word.DO, nodes, work)
        self._given: float | None = None
        self._said: dict[str, float] = {}  # when a node has last said something, by its own clock
        self._heard: dict[str, float] = {}  # and by ours
        self._missed: dict[str, float] = {}  # since when a node is not in the list

    async def run(self) -> None:
        """Until all is over."""
        images, nodes = self._task.order.images, len(self._parts)
        pause = look_every(len(images), nodes, self._orders.patience.look)
        while True:
            note = await self._round()
            results = [
                image_of(place, image, self._parts.values()) for place, image in enumerate(images)
            ]
            for place, result in enumerate(results):
                self._report(place, result)
            parts = sorted(self._parts.values(), key=lambda part: part.node)
            self._told(tuple(part.result() for part in parts), note)
            if all(result.state.is_over for result in results):
                return
            await asyncio.sleep(pause)

    async def _round(self) -> str | None:
        """Give it again when it is time, and hear everybody. What it waits for, if it does."""
        book, clock = self._orders.book, self._orders.clock
        try:
            if self._given is None or clock() - self._given >= LIFE / 3:
                if not await book.give(self._order):
                    self._forget_times()
                    return "waits: the fleet has too many orders under way"
                self._given = clock()
            reports = await book.reports(self._task.id, self._parts)
        except DirectoryDown as error:
            self._forget_times()
            return f"waits: {error.message}"
        self._hear(reports)
        self._judge()
        return None

    def _forget_times(self) -> None:
        """Nobody could be heard: that is not the nodes' fault."""
        self._given = None
        self._heard.clear()
        self._missed.clear()

    def _hear(self, reports: dict[str, dict[str, Any]]) -> None:
        for place, document in reports.items():
            part, reported = self._parts.get(place), Reported.read(document)
            said, before = float(document["at"]), self._said.get(place, 0.0)
            if part is None or reported is None or said < before:
                continue  # an older one is shown again by somebody
            self._parts[place] = reported.applied(part)
            if said > before:
                self._said[place], self._heard[place] = said, self._orders.clock()

    def _judge(self) -> None:
        """Who is gone, and who does not answer?"""
        now, patience, members = self._orders.clock(), self._orders.patience, self._orders.members()
        there = set() if members is None else {place_of(node) for node in members.known}
        for place, part in self._parts.items():
            if place in there:
                self._missed.pop(place, None)
            missed = now - self._missed.setdefault(place, now) if place not in there else 0.0
            self._parts[place] = part = replace(part, is_gone=missed >= patience.gone)
            silent = now - self._heard.setdefault(place, now)
            if place in there and not part.state.is_over and silent >= patience.deaf:
                words = "it does not answer to orders: has it the same secret and version?"
                self._parts[place] = not_done(part, words)

    def __repr__(self) -> str:
        return f"<_Giving {self._task.id} to {len(self._parts)} nodes>"
