"""The pump takes every piece before it asks for the next one, and leaves nothing behind."""

import asyncio
from collections.abc import Iterable

import pytest

from proxy.oci.digest import Chunk
from proxy.oci.errors import SizeMismatch, UpstreamUnavailable
from proxy.pull.pump import pump
from tests.unit.flight_kit import until

MIB = 1 << 20


class Body:
    """Gives its chunks one by one, then ends, breaks, or hangs."""

    def __init__(self, chunks: Iterable[bytes], *, then: BaseException | str = "end") -> None:
        self.chunks = list(chunks)
        self.then = then
        self.given = 0
        self.hangs = asyncio.Event()

    async def borrow(self) -> Chunk:
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
        self.batches: list[list[Chunk]] = []
        self.taken = b""
        self.active = 0
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.error = error
        self.cancelled = 0
        if not held:
            self.go.set()

    async def take(self, chunks: list[Chunk]) -> None:
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
    assert await pump(Body(chunks), sink.take)
    assert sink.taken == b"".join(chunks)


async def test_an_empty_body_takes_nothing() -> None:
    sink = Sink()
    assert await pump(Body([]), sink.take)
    assert sink.batches == []


async def test_the_first_bytes_are_written_at_once() -> None:
    sink = Sink()
    body = Body([b"first"], then="hang")
    task = asyncio.create_task(pump(body, sink.take))
    await body.hangs.wait()
    await until(lambda: sink.taken == b"first")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nothing_is_borrowed_while_a_piece_is_being_written() -> None:
    sink = Sink(held=True)
    body = Body([b"a", b"b"])
    task = asyncio.create_task(pump(body, sink.take))
    await sink.begun.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert body.given == 1
    sink.go.set()
    assert await task
    assert sink.batches == [[b"a"], [b"b"]]


async def test_a_body_that_breaks_is_taken_up_to_where_it_broke() -> None:
    sink = Sink()
    with pytest.raises(UpstreamUnavailable, match="broke"):
        await pump(Body([b"a", b"b", b"c"], then=UpstreamUnavailable("broke")), sink.take)
    assert sink.taken == b"abc"


async def test_a_body_that_is_cut_is_taken_up_to_the_cut() -> None:
    sink = Sink()
    body = Body([b"a", b"b", b"c", b"d"])
    assert not await pump(body, sink.take, lambda: body.given == 2)
    assert sink.taken == b"ab"


@pytest.mark.parametrize("then", ["end", UpstreamUnavailable("broke")])
async def test_a_write_that_fails_is_what_the_caller_hears(then: BaseException | str) -> None:
    sink = Sink(error=SizeMismatch(1, 2))
    with pytest.raises(SizeMismatch):
        await pump(Body([b"a", b"b", b"c"], then=then), sink.take)
    assert not sink.batches


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancellation_waits_for_the_write_under_way(steps: int) -> None:
    sink = Sink(held=True)
    chunks = [bytes(MIB)] * 6
    task = asyncio.create_task(pump(Body(chunks), sink.take))
    await sink.begun.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (sink.active, sink.cancelled) == (0, 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}
