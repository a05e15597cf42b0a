"""One turn of the gate, with few and with very many waiting: it must not grow with them."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.gate import FullGate
from benchmarks.micro.kit import Benchmark
from proxy.upstream.turns import Ticket, TurnClass, TurnQueue

ALL = frozenset(TurnClass)
WAITING = pytest.mark.parametrize("waiting", [10, 1_000, 10_000])


@WAITING
def test_take_the_next_ticket_and_queue_another(benchmark: Benchmark, waiting: int) -> None:
    queue = TurnQueue()
    for number in range(waiting):
        queue.add(Ticket(TurnClass.BLOB, [f"client-{number % 100}"], image=number % 1_000))

    def turn() -> None:
        ticket = queue.take(ALL)
        assert ticket is not None
        queue.add(ticket)

    benchmark(turn)
    assert len(queue) == waiting


@WAITING
def test_end_a_turn_and_begin_another_with_the_event_loop(
    benchmark: Benchmark, waiting: int
) -> None:
    with asyncio.Runner() as runner:
        gate = runner.run(_enter(waiting))
        try:
            assert benchmark(lambda: runner.run(gate.turn())) < 1
        finally:
            runner.run(gate.__aexit__())


async def _enter(waiting: int) -> FullGate:
    return await FullGate(waiting).__aenter__()
