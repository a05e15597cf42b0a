"""The table of tasks: takes them, runs them, keeps them (DESIGN D19).

Theory of operation
-------------------
*States* are those of ``task.py``; every step is one function there, and is made by ``_move`` here,
which writes it down and tells whoever waits or listens. Who makes a step:

* PENDING by ``add``, and by ``drain`` for what runs while this process ends
* RUNNING by ``_start``, which is called whenever a place may have become free
* SUCCEEDED, FAILED by the end of the run; CANCELLED by ``cancel``, at once for what is PENDING, at
  the end of the run for what is RUNNING

*A run* is an asyncio task, owned by its entry. It is cancelled by ``cancel`` and by ``drain``;
which of them it was is in the entry. ``_ended`` is its done callback, so that it is heard of also
if it was cancelled before its first step. A run that raises is a defect of ours: its task FAILED.

*Kept.* A task is written when it comes, starts and ends, each time as a whole; the index works in
order, so the last one stays. How far it is is not written: a run that begins again finds what is
there. ``add`` is answered when the row is written. A process that is killed leaves RUNNING in the
index, which the next one reads as PENDING; one that ends in order leaves the same. The number of a
task is its place in the order for ever. Those that are over go by age and number.

*For the fleet.* A task with ``nodes`` is done by others. Those have places of their own, apart from
those of images: else four of them, which wait for four others at another node, could wait for ever.

*Only the leader* of a cache directory has a table; the others ask it (``team/tasks.py``). Therefore
ids are given by who asks: an order that is given again, because the leader died before it said yes,
is the same task.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

from proxy.observe.logs import Logger
from proxy.observe.task_metrics import TaskMetrics
from proxy.oci.errors import InternalError, QueueFull, RequestInvalid, TaskUnknown
from proxy.pull import task as decide
from proxy.pull.images import Report
from proxy.pull.task import Document, ImageResult, NodeResult, Order, Task, TaskState
from proxy.pull.task_news import Listeners, Watch

#: Tasks that run at once.
MAX_RUNNING = 4
#: Tasks for the fleet that run at once.
MAX_FOR_FLEET = 16
#: Tasks that wait, at most: a matter of memory, not of what others do.
MAX_WAITING = 10_000
#: Seconds between two words about how far a task is.
STEP_SECONDS = 0.25
#: Tasks in one list, at most.
MAX_LISTED = 200

_NO_FLEET = (
    "a task for other nodes needs a fleet whose nodes trust one another: set fleet.directory and"
    " fleet.secret"
)
_ID = re.compile(r"[0-9a-f]{16}")


def new_id() -> str:
    """The name of a task to come."""
    return secrets.token_hex(8)


class Board(Protocol):
    """What can be asked about tasks: a ``Tasks``, or whatever stands for it in another process.

    All raise ``PullError``; ``TaskUnknown`` where a task is named.
    """

    async def add(self, id: str, order: Order) -> Document: ...

    async def newest(self, state: TaskState | None, most: int) -> Document: ...

    async def get(self, id: str) -> Document: ...

    async def wait(self, id: str, seconds: float) -> Document: ...

    async def cancel(self, id: str) -> Document: ...

    async def watch(self, last: str | None, only: str | None) -> Watch: ...


class Runner(Protocol):
    """What does the work of a kind of task, and reports how far its images are."""

    async def run(self, task: Task, report: Report) -> None: ...


#: Is told how the nodes are doing, and what keeps the task from going on.
ToldOfNodes = Callable[[tuple[NodeResult, ...], str | None], None]


class FleetRunner(Protocol):
    """What has a task done by the nodes of a fleet."""

    async def run(self, task: Task, report: Report, told: ToldOfNodes) -> None: ...

    def cancel(self, task: str) -> None:
        """The nodes are to end it, too. It is not running any more."""
        ...


class Rows(Protocol):
    """Where tasks are kept: the ``Store``."""

    async def put_task(self, task: str, number: int, document: str) -> None: ...

    async def drop_tasks(self, tasks: Iterable[str]) -> None: ...

    async def tasks(self) -> list[tuple[str, int, str]]: ...


class _Entry:
    """A task as it is now."""

    def __init__(self, task: Task, version: int) -> None:
        self.bare = task  # but for how its images are
        self.images = list(task.images)
        self.nodes, self.note = task.nodes, task.note
        self.version = version
        self.run: asyncio.Task[None] | None = None
        self.is_cancelled = False  # the run is to end so
        self.over = asyncio.Event()
        self.step: asyncio.TimerHandle | None = None  # what is to be told of how far it is

    @property
    def task(self) -> Task:
        return replace(self.bare, images=tuple(self.images), nodes=self.nodes, note=self.note)

    @property
    def state(self) -> TaskState:
        return self.bare.state

    def become(self, task: Task) -> None:
        self.bare, self.images = task, list(task.images)
        self.nodes, self.note = task.nodes, task.note
        if task.state.is_over:
            self.over.set()


class Tasks:
    """The table, from ``open`` to ``close``."""

    def __init__(
        self,
        *,
        rows: Rows,
        kinds: Mapping[str, Runner],
        metrics: TaskMetrics,
        log: Logger,
        wall: Callable[[], float],
        most: int = MAX_RUNNING,
        fleet: FleetRunner | None = None,
    ) -> None:
        """``wall`` is seconds since the epoch, ``most`` how many run at once; ``fleet`` is None
        where there is none that could be told what to do."""
        self._rows = rows
        self._kinds = kinds
        self._metrics = metrics
        self._log = log
        self._wall = wall
        self._most = most
        self._fleet = fleet
        self._entries: dict[str, _Entry] = {}
        # The same, apart: what waits in the order of the numbers, what is over in that of the ends.
        self._pending: dict[str, Task] = {}
        self._running: dict[str, Task] = {}
        self._over: dict[str, Task] = {}
        self._number = 0
        self._version = 0
        self._epoch = secrets.token_hex(4)
        self._listeners = Listeners()
        self._writes: set[asyncio.Task[None]] = set()
        self._is_draining = False

    async def open(self) -> None:
        """Take up what was left, and begin."""
        for id, number, text in await self._rows.tasks():
            try:
                task = Task.read(id, number, text)
            except ValueError as error:
                self._log.warning("task_not_read", task=id, cause=str(error))
                continue
            self._number = max(self._number, number)
            task = decide.stopped(task)
            entry = self._entries[id] = _Entry(task, self._next_version())
            entry.become(task)
            self._file(task)
        self._over = dict(sorted(self._over.items(), key=lambda item: item[1].ended or 0.0))
        self._forget()
        self._start()

    def drain(self) -> None:
        """Start nothing any more, and leave what runs for the next process."""
        self._is_draining = True
        for entry in self._entries.values():
            if entry.run is not None:
                entry.run.cancel()
        self._listeners.stop()

    async def close(self) -> None:
        """Wait until nothing runs and all is written."""
        self.drain()
        runs = [entry.run for entry in self._entries.values() if entry.run is not None]
        if runs:
            await asyncio.wait(runs)
        while self._writes:
            await asyncio.wait(self._writes)

    # -- what can be asked -----------------------------------------------------------------

    async def add(self, id: str, order: Order) -> Document:
        """Take an order; it is PENDING, or RUNNING already. Given again it is the same task.

        Raises ``QueueFull``, ``RequestInvalid``.
        """
        if not _ID.fullmatch(id):
            raise RequestInvalid("the id of a task has 16 hexadecimal digits")
        if order.nodes is not None and self._fleet is None:
            raise RequestInvalid(_NO_FLEET)
        entry = self._entries.get(id)
        if entry is None:
            if len(self._pending) >= MAX_WAITING:
                raise QueueFull(60.0, message=f"{len(self._pending)} tasks wait already")
            self._number += 1
            task = decide.fresh(id, self._number, order, self._wall())
            entry = self._entries[id] = _Entry(task, 0)
            self._file(task)
            written = self._changed(entry)
            self._log.info("task_added", task=id, kind=order.kind, images=len(order.images))
            self._start()
            await asyncio.shield(written)
        return entry.task.document()

    async def newest(self, state: TaskState | None, most: int) -> Document:
        """The newest ``most`` tasks, of one state or all, without what became of each image; and
        how many there are in each state."""
        tasks = [entry.bare for entry in self._entries.values()]
        shown = decide.listed(tasks, state, min(most, MAX_LISTED))
        return {
            "tasks": [self._entries[task.id].task.document(whole=False) for task in shown],
            "counts": decide.counts(tasks),
        }

    async def get(self, id: str) -> Document:
        """A task as it is."""
        return self._find(id).task.document()

    async def wait(self, id: str, seconds: float) -> Document:
        """A task when it is over, or after ``seconds`` as it is then."""
        entry = self._find(id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await entry.over.wait()
        return entry.task.document()

    async def cancel(self, id: str) -> Document:
        """End a task that is not over, and say how it ended. What it has brought stays."""
        entry = self._find(id)
        if entry.state is TaskState.PENDING and entry.run is None:
            self._move(entry, decide.cancelled(entry.task, self._wall()))
        elif entry.run is not None:
            entry.is_cancelled = True
            entry.run.cancel()
            await asyncio.wait([entry.run])
        if entry.state is TaskState.CANCELLED and entry.bare.order.nodes and self._fleet:
            self._fleet.cancel(id)
        return entry.task.document()

    async def watch(self, last: str | None, only: str | None) -> Watch:
        """Listen to all tasks, or to ``only`` one: first to how they are, then to what changes;
        ``last`` is the id of the last word that was heard. Raises ``Overloaded``."""
        if only is not None:
            _ = self._find(only)
        since = self._heard(last)
        first = [
            id
            for id, entry in sorted(self._entries.items(), key=lambda item: item[1].version)
            if entry.version > since and only in (None, id)
        ]
        return self._listeners.add(first, only=only, tell=self._word, mark=self._mark)

    def counts(self) -> dict[str, int]:
        """How many tasks there are in each state."""
        return decide.counts(entry.bare for entry in self._entries.values())

    def _find(self, id: str) -> _Entry:
        entry = self._entries.get(id)
        if entry is None:
            raise TaskUnknown
        return entry

    # -- steps -----------------------------------------------------------------------------

    def _move(self, entry: _Entry, task: Task) -> None:
        """The one way in which a task changes its state."""
        entry.become(task)
        self._file(task)
        _ = self._changed(entry)
        if not task.state.is_over:
            return
        self._metrics.ended.labels(task.order.kind, task.state.value).inc()
        failed = [image.image for image in task.images if image.state is TaskState.FAILED]
        self._log.info("task_over", task=task.id, state=task.state.value, failed=failed)
        self._forget()

    def _file(self, task: Task) -> None:
        """Put it where tasks of its state are."""
        for shelf in (self._pending, self._running, self._over):
            shelf.pop(task.id, None)
        if task.state.is_over:
            self._over[task.id] = task
        else:
            shelf = self._pending if task.state is TaskState.PENDING else self._running
            shelf[task.id] = task

    def _changed(self, entry: _Entry) -> asyncio.Task[None]:
        """Write it down, and tell."""
        self._tell(entry)
        task = entry.task
        return self._write(self._rows.put_task(task.id, task.number, task.text()))

    def _write(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        # In the order of these calls: tasks begin in the order in which they are made.
        write = asyncio.create_task(work, name="task row")
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        return write

    def _forget(self) -> None:
        """Let go of old tasks that are over."""
        gone = decide.forgotten(self._over.values(), self._wall())
        for id in gone:
            del self._entries[id], self._over[id]
        if gone:
            _ = self._write(self._rows.drop_tasks(gone))

    def _start(self) -> None:
        """Start what may run now."""
        if self._is_draining:
            return
        for task in decide.next_ones(
            self._pending.values(), self._running.values(), self._most, MAX_FOR_FLEET
        ):
            entry = self._entries[task.id]
            self._move(entry, decide.started(task, self._wall()))
            entry.run = asyncio.create_task(self._run(entry), name=task.client)
            entry.run.add_done_callback(partial(self._ended, entry))

    async def _run(self, entry: _Entry) -> None:
        task, report = entry.task, partial(self._report, entry)
        if task.order.nodes is None:
            await self._kinds[task.order.kind].run(task, report)
        elif self._fleet is not None:
            await self._fleet.run(task, report, partial(self._told_of_nodes, entry))
        else:  # it was when the task came
            for place, image in enumerate(task.images):
                report(place, image.failed(RequestInvalid(_NO_FLEET)))

    def _report(self, entry: _Entry, place: int, result: ImageResult) -> None:
        """An image of a task that runs is so far."""
        entry.images[place] = result
        self._tell_soon(entry)

    def _told_of_nodes(
        self, entry: _Entry, nodes: tuple[NodeResult, ...], note: str | None
    ) -> None:
        """A task for the fleet that runs is so far."""
        if (entry.nodes, entry.note) != (nodes, note):
            entry.nodes, entry.note = nodes, note
            self._tell_soon(entry)

    def _tell_soon(self, entry: _Entry) -> None:
        if entry.step is None:
            loop = asyncio.get_running_loop()
            entry.step = loop.call_later(STEP_SECONDS, self._tell, entry)

    def _ended(self, entry: _Entry, run: asyncio.Task[None]) -> None:
        """A run is over, however that went, perhaps before its first step."""
        entry.run, task, now = None, entry.task, self._wall()
        if run.cancelled():
            ended = decide.cancelled(task, now) if entry.is_cancelled else decide.stopped(task)
        elif (error := run.exception()) is not None:
            self._log.error("task_defect", task=task.id, exc_info=error)
            ended = decide.finished(_broken(task), now)
        else:
            ended = decide.finished(task, now)
        self._move(entry, ended)
        self._start()

    # -- telling ---------------------------------------------------------------------------

    def _tell(self, entry: _Entry) -> None:
        if entry.step is not None:
            entry.step.cancel()
            entry.step = None
        entry.version = self._next_version()
        self._listeners.changed(entry.task.id)

    def _word(self, id: str) -> Document | None:
        entry = self._entries.get(id)
        return None if entry is None else entry.task.document()

    def _mark(self) -> str:
        return f"{self._epoch}.{self._version}"

    def _heard(self, last: str | None) -> int:
        """The version that who heard ``last`` knows."""
        epoch, _, version = (last or "").partition(".")
        return int(version) if epoch == self._epoch and version.isdecimal() else -1

    def _next_version(self) -> int:
        self._version += 1
        return self._version

    def __repr__(self) -> str:
        found = self.counts()
        return f"<Tasks {found['RUNNING']} running, {found['PENDING']} pending>"


def _broken(task: Task) -> Task:
    """What was not done of it failed by our own fault."""
    images = tuple(
        image if image.state.is_over else image.failed(InternalError()) for image in task.images
    )
    return replace(task, images=images)
