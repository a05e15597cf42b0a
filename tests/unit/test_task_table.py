"""The table of tasks by itself: rows, order, runs that fail, and what is forgotten."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from proxy.observe.task_metrics import TaskMetrics
from proxy.oci.errors import QueueFull, RequestInvalid, TaskUnknown
from proxy.pull.images import Report
from proxy.pull.task import KEEP_SECONDS, Order, Task, TaskState
from proxy.pull.tasks import MAX_WAITING, Tasks, new_id
from proxy.testing import FakeClock
from tests.unit.flight_kit import until
from tests.unit.store_kit import silent

ORDER = Order(("a", "b"))


class FakeRows:
    """Keeps rows as the index does; ``gate`` holds back what is written."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.written = list[str]()

    async def put_task(self, task: str, number: int, document: str) -> None:
        await self.gate.wait()
        self.rows[task] = (number, document)
        self.written.append(Task.read(task, number, document).state)

    async def drop_tasks(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            self.rows.pop(task, None)

    async def tasks(self) -> list[tuple[str, int, str]]:
        return sorted(((id, *row) for id, row in self.rows.items()), key=lambda row: row[1])


class FakeRunner:
    """Ends when it is let go; then ``error`` is raised, or all images have come."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = list[str]()
        self.error: Exception | None = None

    async def run(self, task: Task, report: Report) -> None:
        self.begun.append(task.id)
        await self.go.wait()
        if self.error is not None:
            raise self.error
        for place, image in enumerate(task.images):
            report(place, replace(image, state=TaskState.SUCCEEDED))


@contextlib.asynccontextmanager
async def table(
    rows: FakeRows, runner: FakeRunner, wall: FakeClock | None = None, most: int = 2
) -> AsyncIterator[Tasks]:
    tasks = Tasks(
        rows=rows,
        kinds={"prefetch": runner},
        metrics=TaskMetrics(CollectorRegistry()),
        log=silent(),
        wall=wall or FakeClock(),
        most=most,
    )
    await tasks.open()
    try:
        yield tasks
    finally:
        await tasks.close()


async def test_an_order_is_answered_when_it_is_written() -> None:
    rows, runner = FakeRows(), FakeRunner()
    async with table(rows, runner) as tasks:
        rows.gate.clear()
        adding = asyncio.create_task(tasks.add(new_id(), ORDER))
        await until(lambda: bool(runner.begun))
        assert not adding.done()
        rows.gate.set()
        assert (await adding)["id"] in rows.rows


async def test_rows_are_written_in_the_order_of_the_steps() -> None:
    rows, runner = FakeRows(), FakeRunner()
    runner.go.set()
    async with table(rows, runner) as tasks:
        task = await tasks.add(new_id(), ORDER)
        assert (await tasks.wait(task["id"], 60.0))["state"] == "SUCCEEDED"
    assert rows.written == ["PENDING", "RUNNING", "SUCCEEDED"]


async def test_who_leaves_before_the_answer_has_ordered_all_the_same() -> None:
    rows, runner = FakeRows(), FakeRunner()
    async with table(rows, runner) as tasks:
        rows.gate.clear()
        adding = asyncio.create_task(tasks.add(new_id(), ORDER))
        await until(lambda: bool(runner.begun))
        adding.cancel()
        await asyncio.wait([adding])
        rows.gate.set()
        await until(lambda: bool(rows.rows))
        assert tasks.counts()["RUNNING"] == 1


async def test_a_defect_fails_its_task_and_stops_no_other() -> None:
    rows, runner = FakeRows(), FakeRunner()
    runner.error = RuntimeError("a defect")
    async with table(rows, runner, most=1) as tasks:
        first, second = [await tasks.add(new_id(), ORDER) for _ in range(2)]
        runner.go.set()
        ended = await tasks.wait(first["id"], 60.0)
        assert (ended["state"], ended["failed"]) == ("FAILED", 2)
        assert ended["results"][0]["error"] == {"code": "UNKNOWN", "message": "internal error"}
        assert (await tasks.wait(second["id"], 60.0))["state"] == "FAILED"


async def test_one_that_is_cancelled_before_its_first_step_is_over() -> None:
    rows, runner = FakeRows(), FakeRunner()
    async with table(rows, runner) as tasks:
        id = new_id()
        adding = asyncio.create_task(tasks.add(id, ORDER))
        await asyncio.sleep(0)
        assert (await tasks.cancel(id))["state"] == "CANCELLED"
        assert not runner.begun
        await adding


async def test_what_is_stopped_waits_for_the_next_table() -> None:
    rows, runner = FakeRows(), FakeRunner()
    async with table(rows, runner, most=1) as tasks:
        ids = [(await tasks.add(new_id(), ORDER))["id"] for _ in range(3)]
    assert rows.written[-1] == "PENDING"
    again = FakeRunner()
    again.go.set()
    async with table(rows, again, most=1) as tasks:
        for id in ids:
            assert (await tasks.wait(id, 60.0))["state"] == "SUCCEEDED"
    assert again.begun == ids


async def test_what_ran_when_the_process_was_killed_runs_again_in_its_place() -> None:
    rows, runner = FakeRows(), FakeRunner()
    async with table(rows, runner, most=1) as tasks:
        ids = [(await tasks.add(new_id(), ORDER))["id"] for _ in range(3)]
        await until(lambda: "RUNNING" in rows.written)
        left = FakeRows()
        left.rows = dict(rows.rows)  # as a kill leaves them
    again = FakeRunner()
    async with table(left, again, most=1) as tasks:
        await until(lambda: again.begun == ids[:1])
        found = tasks.counts()
        assert (found["RUNNING"], found["PENDING"], sum(found.values())) == (1, 2, 3)
        again.go.set()
        for id in ids:
            assert (await tasks.wait(id, 60.0))["state"] == "SUCCEEDED"
    assert again.begun == ids


async def test_a_table_that_drains_cancels_and_takes_but_starts_nothing() -> None:
    rows, runner = FakeRows(), FakeRunner()
    async with table(rows, runner) as tasks:
        first = await tasks.add(new_id(), ORDER)
        tasks.drain()
        await until(lambda: tasks.counts()["PENDING"] == 1)
        second = await tasks.add(new_id(), ORDER)
        assert (await tasks.cancel(first["id"]))["state"] == "CANCELLED"
        assert second["state"] == "PENDING"
        assert len(runner.begun) == 1


async def test_old_ones_are_forgotten_with_their_rows() -> None:
    rows, runner, wall = FakeRows(), FakeRunner(), FakeClock()
    runner.go.set()
    async with table(rows, runner, wall) as tasks:
        old = await tasks.add(new_id(), ORDER)
        await tasks.wait(old["id"], 60.0)
        wall.advance(KEEP_SECONDS + 1)
        new = await tasks.add(new_id(), ORDER)
        await tasks.wait(new["id"], 60.0)
        with pytest.raises(TaskUnknown):
            await tasks.get(old["id"])
    assert list(rows.rows) == [new["id"]]
    wall.advance(KEEP_SECONDS + 1)
    async with table(rows, runner, wall) as tasks:
        assert (await tasks.newest(None, 10))["tasks"] == []
    assert not rows.rows


async def test_there_is_an_end_to_what_may_wait() -> None:
    rows, runner = FakeRows(), FakeRunner()
    async with table(rows, runner, most=0) as tasks:
        some = await tasks.add(new_id(), ORDER)
        [task] = tasks._pending.values()
        tasks._pending |= {str(number): task for number in range(MAX_WAITING - 1)}
        with pytest.raises(QueueFull):
            await tasks.add(new_id(), ORDER)
        assert await tasks.add(some["id"], ORDER) == some  # it is there already


@pytest.mark.parametrize("id", ["", "1", "x" * 16, "0" * 17, "0" * 15 + "\n"])
async def test_an_id_that_nobody_gives_is_refused(id: str) -> None:
    async with table(FakeRows(), FakeRunner()) as tasks:
        with pytest.raises(RequestInvalid):
            await tasks.add(id, ORDER)
