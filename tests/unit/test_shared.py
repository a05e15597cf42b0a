"""Work that is shared: done once, for as long as somebody wants it, and heard by everybody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.oci.errors import NotFound, ShuttingDown
from proxy.pull.shared import SharedWork
from proxy.upstream.turns import Ticket, TurnClass
from tests.unit.flight_kit import until


class Work:
    """A piece of work that ends when it is told to."""

    def __init__(self, result: str | Exception = "done") -> None:
        self.result = result
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.tickets: list[Ticket] = []
        self.cancelled = 0

    async def __call__(self, ticket: Ticket) -> str:
        self.tickets.append(ticket)
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Table:
    """A table of shared works and those who ask it."""

    def __init__(self) -> None:
        self.works: SharedWork[str, str] = SharedWork()
        self.asking: list[asyncio.Task[tuple[str, bool]]] = []

    def ask(
        self, work: Work, client: str = "alice", *, key: str = "k", linger: bool = False
    ) -> asyncio.Task[tuple[str, bool]]:
        until = asyncio.get_running_loop().time() + 3600 if linger else 0.0
        asking = self.works.do(key, client, work, linger=until)
        self.asking.append(asyncio.create_task(asking))
        return self.asking[-1]


@asynccontextmanager
async def sharing() -> AsyncIterator[Table]:
    before = asyncio.all_tasks()
    table = Table()
    yield table
    await table.works.close()
    await asyncio.gather(*table.asking, return_exceptions=True)
    assert not len(table.works)
    assert asyncio.all_tasks() <= before


async def test_work_is_done_once_for_everybody_who_asks() -> None:
    work = Work()
    async with sharing() as table:
        asking = [table.ask(work, f"client {n}") for n in range(10)]
        await work.begun.wait()
        work.go.set()
        outcomes = await asyncio.gather(*asking)
    assert outcomes == [("done", False)] + [("done", True)] * 9
    assert len(work.tickets) == 1


async def test_other_keys_are_other_works() -> None:
    work = Work()
    work.go.set()
    async with sharing() as table:
        first, second = table.ask(work, key="a"), table.ask(work, key="b")
        assert await first == await second == ("done", False)
    assert len(work.tickets) == 2


async def test_whoever_asks_after_the_end_starts_afresh() -> None:
    work = Work()
    work.go.set()
    async with sharing() as table:
        assert await table.ask(work) == ("done", False)
        assert await table.ask(work) == ("done", False)
    assert len(work.tickets) == 2


async def test_the_ticket_belongs_to_all_who_wait() -> None:
    work = Work()
    async with sharing() as table:
        first = table.ask(work, "alice")
        _ = table.ask(work, "bob")
        again = table.ask(work, "bob")
        await work.begun.wait()
        await until(lambda: len(work.tickets[0].clients) == 2)
        assert work.tickets[0].turn_class is TurnClass.METADATA
        first.cancel()
        again.cancel()
        await until(lambda: set(work.tickets[0].clients) == {"bob"})
        work.go.set()


async def test_an_error_goes_to_everybody() -> None:
    work = Work(NotFound("manifest"))
    async with sharing() as table:
        asking = [table.ask(work) for _ in range(3)]
        await work.begun.wait()
        work.go.set()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [NotFound] * 3


async def test_one_who_is_cancelled_takes_nobody_with_him() -> None:
    work = Work()
    async with sharing() as table:
        first, second = table.ask(work), table.ask(work)
        await work.begun.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        work.go.set()
        assert await second == ("done", True)
    assert not work.cancelled


async def test_the_last_one_to_leave_stops_the_work() -> None:
    work = Work()
    async with sharing() as table:
        asking = [table.ask(work) for _ in range(2)]
        await work.begun.wait()
        for task in asking:
            task.cancel()
        await until(lambda: work.cancelled == 1)
        assert not len(table.works)


async def test_a_work_that_lingers_goes_on_without_anybody() -> None:
    work = Work()
    async with sharing() as table:
        task = table.ask(work, linger=True)
        await work.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        later = table.ask(work)
        await asyncio.sleep(0)
        work.go.set()
        assert await later == ("done", True)
    assert (len(work.tickets), work.cancelled) == (1, 0)


async def test_one_who_wants_it_to_linger_is_enough() -> None:
    work = Work()
    async with sharing() as table:
        asking = [table.ask(work, linger=True), table.ask(work)]
        await work.begun.wait()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        work.go.set()
        await until(lambda: not len(table.works))
    assert not work.cancelled


async def test_a_lingering_work_may_fail_unheard() -> None:
    work = Work(NotFound("manifest"))
    async with sharing() as table:
        task = table.ask(work, linger=True)
        await work.begun.wait()
        task.cancel()
        work.go.set()
        await until(lambda: not len(table.works))


async def test_whoever_comes_in_the_loop_turn_of_the_last_leave_starts_afresh() -> None:
    old, new = Work("old"), Work("new")
    new.go.set()
    async with sharing() as table:
        leaving = table.ask(old)
        await old.begun.wait()
        leaving.cancel()
        coming = table.ask(new)  # runs in the same loop turn, right behind the one who leaves
        assert await coming == ("new", False)
    assert old.cancelled == 1


async def test_leaving_before_the_work_began_leaves_nothing() -> None:
    work = Work()
    async with sharing() as table:
        asking = table.works.do("k", "alice", work)
        asking.send(None)  # asked, but the work has not had its first step
        asking.close()
        assert not len(table.works)
    assert not work.tickets


async def test_closing_stops_everything_and_says_so() -> None:
    work = Work()
    async with sharing() as table:
        asking = [table.ask(work), table.ask(work, key="other", linger=True)]
        await work.begun.wait()
        await table.works.close()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ShuttingDown] * 2
        with pytest.raises(ShuttingDown):
            await table.ask(work)
    assert work.cancelled == 2


async def test_one_who_is_cancelled_while_it_closes_is_cancelled() -> None:
    work = Work()
    async with sharing() as table:
        task = table.ask(work)
        await work.begun.wait()
        closing = asyncio.create_task(table.works.close())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await closing


async def test_a_deadline_of_one_is_his_alone() -> None:
    work = Work()
    async with sharing() as table:
        other = table.ask(work)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await table.works.do("k", "hasty", work)
        work.go.set()
        assert (await other)[0] == "done"


@pytest.mark.parametrize("steps", range(8))
async def test_a_cancellation_at_any_step_leaves_nothing(steps: int) -> None:
    work = Work()
    work.go.set()
    async with sharing() as table:
        task = table.ask(work)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
