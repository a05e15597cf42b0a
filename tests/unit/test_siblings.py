"""Workers of one supervisor speak for one another, the living and the dead."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.metrics import Metrics
from proxy.seat import Seat
from proxy.web.siblings import Siblings


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short one: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pp-") as path:
        yield Path(path)


class Worker:
    """A worker that has answered so many requests."""

    def __init__(self, directory: Path, number: int, requests: int) -> None:
        self.metrics = Metrics()
        self.metrics.http_inflight.set(1)
        self.is_ready = True
        self.answered(requests)
        seat = Seat(number, 2, (), (), directory, (-1, -1))
        self.siblings = Siblings(seat, metrics=self._render, is_ready=lambda: self.is_ready)

    def answered(self, requests: int) -> None:
        self.metrics.http_requests.labels("blob", "GET", "200", "hit").inc(requests)

    async def _render(self) -> bytes:
        return self.metrics.render()

    async def sums(self) -> tuple[float, float]:
        """Requests answered, and under way, by all."""
        text = (await self.siblings.metrics()).decode()
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return found["pullpool_http_requests_total"], found["pullpool_http_requests_inflight"]


@contextlib.asynccontextmanager
async def worker(directory: Path, number: int, requests: int) -> AsyncIterator[Worker]:
    one = Worker(directory, number, requests)
    async with one.siblings:
        yield one


async def test_either_worker_tells_the_sum_of_both(directory: Path) -> None:
    async with worker(directory, 0, 3) as one, worker(directory, 1, 4) as other:
        assert await one.sums() == await other.sums() == (7, 2)


async def test_whoever_asks_at_the_same_time_is_told_the_same(directory: Path) -> None:
    """Two Prometheus servers, say: each worker writes down for one after the other."""
    async with worker(directory, 0, 3) as one, worker(directory, 1, 4) as other:
        for _ in range(20):
            asked = (each.sums() for each in (one, other, one, other))
            assert await asyncio.gather(*asked) == [(7, 2)] * 4


async def test_the_counts_of_the_dead_stay_and_their_gauges_go(directory: Path) -> None:
    async with worker(directory, 0, 3) as one:
        for _ in range(3):
            async with worker(directory, 1, 4):
                before = await one.sums()
            assert await one.sums() == (before[0], 1)
        async with worker(directory, 1, 4) as heir:
            assert await heir.sums() == await one.sums() == (3 + 4 * 4, 2)
            heir.answered(1)
            assert await one.sums() == (3 + 4 * 4 + 1, 2)


async def test_all_are_ready_when_each_is(directory: Path) -> None:
    async with worker(directory, 0, 0) as one:
        assert not await one.siblings.are_ready()
        async with worker(directory, 1, 0) as other:
            assert await one.siblings.are_ready()
            other.is_ready = False
            assert not await one.siblings.are_ready()
            assert not await other.siblings.are_ready()
        assert not await one.siblings.are_ready()
