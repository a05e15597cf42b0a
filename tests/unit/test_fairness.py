"""The fairness that issue and design promise, by a real gate on a clock of its own (D2, D3).

Turns last as long as their bytes take at a steady pace, and time goes on to the next end of a turn
as soon as everybody waits: no byte moves, and nothing depends on the machine.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from proxy.observe.metrics import Metrics
from proxy.testing import FakeClock
from proxy.upstream.gate import Gate
from proxy.upstream.origin import MAX_TURN_BYTES, TURN_SECONDS
from proxy.upstream.turns import Ticket, TurnClass, class_for_blob

pytestmark = pytest.mark.one_loop  # nothing but the gate, and no socket

MIB = 1 << 20
GIB = 1 << 30
#: Bytes a second on each connection: the largest turn lasts as long as one is meant to.
PACE = MAX_TURN_BYTES / TURN_SECONDS
#: Seconds that any request takes, however small its answer.
LATENCY = 0.005


class Upstream:
    """A gate whose turns take virtual time."""

    def __init__(self, cap: int) -> None:
        self.clock = FakeClock()
        self.gate = Gate("hub", capacity=cap, metrics=Metrics(), clock=self.clock)
        self.waits: list[float] = []
        self._ends: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def turn(self, ticket: Ticket, size: float) -> None:
        slot = await self.gate.acquire(ticket)
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        at = self.clock() + LATENCY + size / PACE
        heapq.heappush(self._ends, (at, next(self._count), end))
        await end
        self.gate.release(slot)

    async def pull(self, client: str, size: int, *, known: bool = True) -> None:
        """A blob as a flight fetches it: turn by turn, with a ticket of its own."""
        began = self.clock()
        ticket = Ticket(class_for_blob(size if known else None), [client])
        for start in range(0, size, MAX_TURN_BYTES):
            await self.turn(ticket, min(MAX_TURN_BYTES, size - start))
        self.waits.append(self.clock() - began)

    async def ask(self, client: str) -> None:
        """A manifest."""
        began = self.clock()
        await self.turn(Ticket(TurnClass.METADATA, [client]), 1000)
        self.waits.append(self.clock() - began)

    async def settle(self) -> None:
        """Everybody goes as far as they can without time."""
        for _ in range(8):
            await asyncio.sleep(0)

    async def pass_time(self, until: float) -> None:
        """Go on for so many seconds."""
        end = self.clock() + until
        await self.settle()
        while self._ends and self._ends[0][0] <= end:
            await self.step()
        self.clock.advance(end - self.clock())

    async def step(self) -> None:
        """To the next end of a turn."""
        at, _, future = heapq.heappop(self._ends)
        self.clock.advance(at - self.clock())
        future.set_result(None)
        await self.settle()

    async def finish(self, count: int) -> list[float]:
        """Until ``count`` waits have ended; all of them, and everybody else is sent away."""
        await self.settle()
        while len(self.waits) < count:
            await self.step()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return self.waits[:count]


def p95(waits: list[float]) -> float:
    return sorted(waits)[int(len(waits) * 0.95)]


async def fifty(cap: int, *, beside: bool, arrive: float, known: bool, asks: bool) -> float:
    """The p95 of fifty clients with 1 MiB each, perhaps beside one with 500 x 64 MiB."""
    upstream = Upstream(cap)
    if beside:
        for _ in range(500):
            upstream.start(upstream.pull("heavy", 64 * MIB))
    await upstream.pass_time(arrive)
    upstream.waits.clear()

    async def small(client: str) -> None:
        began = upstream.clock()
        if asks:
            await upstream.turn(Ticket(TurnClass.METADATA, [client]), 1000)
        ticket = Ticket(class_for_blob(MIB if known else None), [client])
        await upstream.turn(ticket, MIB)
        ended.append(upstream.clock() - began)
        if len(ended) == 50:
            upstream.waits = list(ended)

    ended: list[float] = []
    for number in range(50):
        upstream.start(small(f"client {number}"))
    await upstream.settle()
    while len(ended) < 50:
        await upstream.step()
    await upstream.finish(0)
    return p95(ended)


ARRIVALS = (0.0, 0.1, 1.0, 1.9, 7.3)


@pytest.mark.parametrize("cap", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("known", [True, False], ids=["small", "size unknown"])
@pytest.mark.parametrize("asks", [False, True], ids=["blobs", "manifests first"])
async def test_fifty_with_little_wait_one_turn_more_beside_one_with_much(
    cap: int, *, known: bool, asks: bool
) -> None:
    for arrive in ARRIVALS:
        alone = await fifty(cap, beside=False, arrive=arrive, known=known, asks=asks)
        beside = await fifty(cap, beside=True, arrive=arrive, known=known, asks=asks)
        # Of unknown size they stand among bulk, where the other client's turn in the ring comes
        # once before theirs.
        turns = 1 if known else 2
        assert beside <= alone + turns * (TURN_SECONDS + LATENCY) + 2 * LATENCY, arrive


@pytest.mark.parametrize("cap", [1, 2, 3, 4, 8])
async def test_eight_huge_layers_delay_a_cold_manifest_by_one_turn_at_most(cap: int) -> None:
    chance = random.Random(cap)
    for _ in range(5):
        upstream = Upstream(cap)
        for number in range(8):
            upstream.start(upstream.pull(f"client {number}", 20 * GIB))
        await upstream.pass_time(chance.uniform(0, 60))
        upstream.start(upstream.ask("cold"))
        [wait] = await upstream.finish(1)
        assert wait <= LATENCY + TURN_SECONDS + LATENCY
        if cap >= 4:
            assert wait <= 2 * LATENCY  # there is a slot kept for it


async def test_bulk_goes_on_beside_an_endless_crowd_with_little() -> None:
    """It has a quarter of the slots' time, or close to it."""
    upstream = Upstream(8)
    moved = 0

    async def heavy() -> None:
        nonlocal moved
        while True:
            await upstream.turn(Ticket(TurnClass.BLOB, ["heavy"]), 64 * MIB)
            moved += 64 * MIB

    async def light(client: str) -> None:
        while True:
            await upstream.turn(Ticket(TurnClass.SMALL, [client]), MIB)

    for _ in range(20):
        upstream.start(heavy())
    for number in range(50):
        upstream.start(light(f"client {number}"))
    await upstream.pass_time(120.0)
    share = moved / (7 * 120.0 * PACE)  # one slot is kept
    assert 0.2 <= share <= 0.4
    await upstream.finish(0)
