"""A full gate: so many waiting, and what one turn costs then."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry

from proxy.loop import loop_factory
from proxy.observe.metrics import Metrics
from proxy.upstream.gate import Gate, Slot
from proxy.upstream.turns import Ticket, TurnClass

CAPACITY = 8
BULK = CAPACITY - 1  # one slot is kept for metadata
CLIENTS = 100


class FullGate:
    """A gate with `waiting` tickets of a hundred clients before it. For one running loop."""

    def __init__(self, waiting: int) -> None:
        self._gate = Gate(
            "bench",
            capacity=CAPACITY,
            metrics=Metrics(CollectorRegistry()),
            clock=time.monotonic,
            max_waiting=2 * waiting + CAPACITY,
        )
        self._granted: asyncio.Queue[Slot] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = waiting
        self._number = 0

    async def __aenter__(self) -> FullGate:
        for _ in range(self._waiting + BULK):
            self._come()
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._gate.close()

    def __repr__(self) -> str:
        return repr(self._gate)

    def _come(self) -> None:
        """One more that waits: of one of the clients, for an image of its own."""
        self._number += 1
        ticket = Ticket(
            TurnClass.BLOB, [f"client-{self._number % CLIENTS}"], image=self._number % 1000
        )
        task = asyncio.create_task(self._wait(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wait(self, ticket: Ticket) -> None:
        self._granted.put_nowait(await self._gate.acquire(ticket))

    async def turn(self) -> float:
        """One turn ends and another begins, while as many wait as before: the CPU seconds of it."""
        slot = await self._granted.get()
        began = time.thread_time()
        self._gate.release(slot)
        took = time.thread_time() - began
        self._come()
        await asyncio.sleep(0)
        return took


def seconds_a_turn(waiting: int, turns: int) -> float:
    """The mean over so many turns, on the loop that the proxy has."""
    with asyncio.Runner(loop_factory=loop_factory(fast_transport=True)) as runner:
        return runner.run(_turns(waiting, turns))


async def _turns(waiting: int, turns: int) -> float:
    async with FullGate(waiting) as gate:
        took = [await gate.turn() for _ in range(turns)]
    return sum(took) / turns - _clock_seconds(turns)


def _clock_seconds(looks: int) -> float:
    """What the clock takes for itself, which asks the kernel: in the mean of so many looks."""
    took = 0.0
    for _ in range(looks):
        began = time.thread_time()
        took += time.thread_time() - began
    return took / looks
