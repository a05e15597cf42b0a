"""The pump receives and writes at the same time, and leaves nothing behind however it ends."""

import asyncio
from collections.abc import Iterable

import pytest

from proxy.oci.errors import SizeMismatch, UpstreamUnavailable
from proxy.pull.pump import MAX_PENDING, Pump
from tests.unit.flight_kit import until

MIB = 1 << 20


class Body:
    """Gives its chunks one by one, then ends, breaks, or hangs."""

    def __init__(self, chunks: Iterable[bytes], *, then: BaseException | str = "end") -> None:
        self.chunks = list(chunks)
        self.then = then
        self.given = 0
        self.hangs = asyncio.Event()

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if self.given < len(self.chunks):
            self.given += 1
            return self.chunks[self.given - 1]
        if isinstance(self.then, BaseException):
            raise self.then
        if self.then == "hang":
            self.hangs.set()
            await asyncio.Event().wait()
        return b""


class Sink:
    """Takes batches, each one when ``go`` lets it."""

    def __init__(self, *, held: bool = False, error: Exception | None = None) -> None:
        self.batches: list[list[bytes]] = []
        self.taken = b""
        self.active = 0
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.error = error
        self.cancelled = 0
        if not held:
            self.go.set()

    async def take(self, chunks: list[bytes]) -> None:
        assert not self.active, "two writes at once"
        self.active += 1
        self.begun.set()
        try:
            await self.go.wait()
            if self.error is not None:
                raise self.error
            self.batches.append(chunks)
            self.taken += b"".join(chunks)
        except asyncio.CancelledError:
            self.cancelled += 1
            await asyncio.sleep(0)  # as a thread's call that has to end first
            raise
        finally:
            self.active -= 1


async def test_a_body_arrives_whole_and_in_order() -> None:
    sink = Sink()
    chunks = [bytes([n]) * n for n in range(1, 50)]
    assert await Pump(sink.take).run(Body(chunks))
    assert sink.taken == b"".join(chunks)


async def test_an_empty_body_takes_nothing() -> None:
    sink = Sink()
    assert await Pump(sink.take).run(Body([]))
    assert sink.batches == []


async def test_the_first_bytes_are_written_at_once() -> None:
    sink = Sink()
    body = Body([b"first"], then="hang")
    task = asyncio.create_task(Pump(sink.take).run(body))
    await body.hangs.wait()
    await until(lambda: sink.taken == b"first")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_comes_in_during_a_write_is_one_batch() -> None:
    sink = Sink(held=True)
    body = Body([b"a", b"b", b"c", b"d"])
    task = asyncio.create_task(Pump(sink.take).run(body))
    await until(lambda: body.given == 4)
    sink.go.set()
    assert await task
    assert sink.batches == [[b"a"], [b"b", b"c", b"d"]]


async def test_a_body_that_stalls_holds_nothing_back() -> None:
    sink = Sink(held=True)
    body = Body([b"a", b"b", b"c"], then="hang")
    task = asyncio.create_task(Pump(sink.take).run(body))
    await body.hangs.wait()
    sink.go.set()
    await until(lambda: sink.taken == b"abc")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_body_that_outruns_the_disk_is_not_read_any_more() -> None:
    sink = Sink(held=True)
    body = Body([bytes(MIB)] * 20)
    task = asyncio.create_task(Pump(sink.take).run(body))
    await sink.begun.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert body.given * MIB <= MAX_PENDING + 2 * MIB
    sink.go.set()
    assert await task
    assert len(sink.taken) == 20 * MIB


async def test_a_body_that_breaks_is_taken_up_to_where_it_broke() -> None:
    sink = Sink(held=True)
    body = Body([b"a", b"b", b"c"], then=UpstreamUnavailable("broke"))
    task = asyncio.create_task(Pump(sink.take).run(body))
    await until(lambda: body.given == 3)
    sink.go.set()
    with pytest.raises(UpstreamUnavailable, match="broke"):
        await task
    assert sink.taken == b"abc"


async def test_a_body_that_is_cut_is_taken_up_to_the_cut() -> None:
    sink = Sink()
    body = Body([b"a", b"b", b"c", b"d"])
    assert not await Pump(sink.take).run(body, lambda: body.given == 2)
    assert sink.taken == b"ab"


@pytest.mark.parametrize("then", ["end", UpstreamUnavailable("broke")])
async def test_a_write_that_fails_is_what_the_caller_hears(then: BaseException | str) -> None:
    sink = Sink(error=SizeMismatch(1, 2))
    with pytest.raises(SizeMismatch):
        await Pump(sink.take).run(Body([b"a", b"b", b"c"], then=then))
    assert not sink.batches


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancellation_waits_for_the_write_under_way(steps: int) -> None:
    sink = Sink(held=True)
    chunks = [bytes(MIB)] * 6
    task = asyncio.create_task(Pump(sink.take).run(Body(chunks)))
    await sink.begun.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (sink.active, sink.cancelled) == (0, 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_even_cancelled_twice_it_waits_for_the_write_under_way() -> None:
    go, ended = asyncio.Event(), asyncio.Event()

    async def take(_chunks: list[bytes]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await go.wait()
            ended.set()

    body = Body([b"a"], then="hang")
    task = asyncio.create_task(Pump(take).run(body))
    await body.hangs.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_write_that_failed_unseen_makes_no_noise_when_cancelled() -> None:
    sink = Sink(error=SizeMismatch(1, 2))
    body = Body([b"a"], then="hang")
    task = asyncio.create_task(Pump(sink.take).run(body))
    await body.hangs.wait()
    await until(lambda: sink.begun.is_set() and not sink.active)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
