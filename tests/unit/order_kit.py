"""Nodes that give and take orders on one directory; they have tables, and nothing to pull."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Self

from prometheus_client import CollectorRegistry

from proxy.fleet.members import Node, new_id
from proxy.fleet.orders import OrderBook, place_of
from proxy.observe.task_metrics import TaskMetrics
from proxy.oci.errors import NotFound
from proxy.pull.giving_orders import GivingOrders, Patience
from proxy.pull.images import Report
from proxy.pull.taking_orders import TakingOrders
from proxy.pull.task import PREFETCH, Document, Task, TaskState
from proxy.pull.tasks import Tasks
from proxy.upstream.routing import Routes, Upstream
from tests.unit.directory_kit import Asking
from tests.unit.store_kit import silent
from tests.unit.test_task_table import FakeRows

SECRET = b"what only nodes of this fleet know"
HUB = Upstream("hub.example.com", "https://hub.example.com")
ROUTES = Routes([HUB], HUB.name)
QUICK = 0.02


class Sight:
    """Who is in the fleet, as a test says it."""

    def __init__(self) -> None:
        self.known: tuple[Node, ...] = ()

    async def look(self) -> tuple[Node, ...]:
        return self.known


class Work:
    """Brings images when it is let go: of 10 bytes each, and those called "bad" not at all."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = list[tuple[str, ...]]()

    async def run(self, task: Task, report: Report) -> None:
        self.begun.append(task.order.images)
        for place, image in enumerate(task.images):
            report(place, replace(image, state=TaskState.RUNNING, blobs=2, bytes=10))
        await self.go.wait()
        for place, image in enumerate(task.images):
            done = replace(image, state=TaskState.SUCCEEDED, blobs=2, blobs_done=2)
            done = replace(done, bytes=10, bytes_done=10)
            report(place, done.failed(NotFound("manifest")) if image.image == "bad" else done)


class OrderNode:
    """One node, while its block lasts; ``rows`` are those of its cache."""

    def __init__(
        self,
        ours: Asking,
        name: str,
        sight: Sight,
        *,
        clock: Callable[[], float] = time.monotonic,
        zone: str = "",
        secret: bytes = SECRET,
        rows: FakeRows | None = None,
    ) -> None:
        self.node = Node(new_id(), name, zone, f"http://{name}:5052", "1.0")
        self.sight = sight
        self.rows = rows or FakeRows()
        self.work = Work()
        self.book = OrderBook(ours.directory, secret=secret, wall=time.time)
        self.giving = GivingOrders(
            self.book,
            members=lambda: sight,
            routes=ROUTES,
            clock=clock,
            log=silent(),
            patience=Patience(look=QUICK),
        )
        self.tasks = Tasks(
            rows=self.rows,
            kinds={PREFETCH: self.work},
            metrics=TaskMetrics(CollectorRegistry()),
            log=silent(),
            wall=time.time,
            most=1,
            fleet=self.giving,
        )
        self.taking = TakingOrders(
            self.book, place_of(self.node), self.tasks, clock=clock, log=silent(), idle=QUICK
        )
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.giving)
        await self.tasks.open()
        self._stack.push_async_callback(self.tasks.close)
        await self._stack.enter_async_context(self.taking)
        self.sight.known = (*self.sight.known, self.node)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.leave()
        await self._stack.aclose()

    def leave(self) -> None:
        """Be seen no more."""
        self.sight.known = tuple(node for node in self.sight.known if node is not self.node)

    async def newest(self) -> list[Document]:
        documents = (await self.tasks.newest(None, 100))["tasks"]
        return [await self.tasks.get(document["id"]) for document in documents]

    async def seen(self, task: Document, state: str, node: str = "") -> Document:
        """Wait until the task is so, or the task of one node of it."""
        with contextlib.closing(await self.tasks.watch(None, task["id"])) as watch:
            while True:
                news = await watch.next()
                assert news is not None
                if state in states_of(news.document, node):
                    return news.document


def states_of(task: Document, node: str) -> list[str]:
    """The states of a task, or of it at a node."""
    if not node:
        return [task["state"]]
    found = [one for one in task["by_node"] if one["node"] == node]
    return [word for one in found for word in (one["state"], "GONE" if one["gone"] else "THERE")]


@contextlib.asynccontextmanager
async def order_nodes(
    ours: Asking, *names: str, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[list[OrderNode]]:
    """Nodes by their names; "a/n1" is n1 of zone a."""
    sight = Sight()
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for text in names:
            zone, _, name = text.rpartition("/")
            node = OrderNode(ours, name, sight, clock=clock, zone=zone)
            nodes.append(await stack.enter_async_context(node))
        yield nodes
