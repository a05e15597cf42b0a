"""When garbage is collected: never while a crowd comes or goes, and never too late."""

import asyncio
import gc
import weakref

from proxy.process import FEW_ROUNDS, collecting, is_full_round_due
from tests.unit.virtual import VirtualLoop


def test_without_clients_a_full_round_is_due_as_often_as_ever() -> None:
    assert not is_full_round_due(FEW_ROUNDS - 1, 0)
    assert is_full_round_due(FEW_ROUNDS, 0)


def test_what_a_crowd_brings_with_it_makes_no_round_due() -> None:
    assert not is_full_round_due(110, 5000)  # so many are counted while as many come
    assert is_full_round_due(200, 5000)  # but there is an end to waiting
    assert not is_full_round_due(200, 10_000)


class Knot:
    """Refers to itself, so that only the collector finds it."""

    def __init__(self) -> None:
        self.me = self


def test_what_nobody_uses_any_more_goes_when_the_crowd_has_gone() -> None:
    crowd = 5000

    async def play() -> None:
        nonlocal crowd
        before = gc.get_threshold()
        async with collecting(lambda: crowd):
            await asyncio.sleep(1.5)
            knot = Knot()
            gc.collect(1)  # it is old now: rounds over the young ones do not see it
            gone = weakref.ref(knot)
            del knot
            for _ in range(FEW_ROUNDS):
                gc.collect(1)
            await asyncio.sleep(10)
            assert gone() is not None
            crowd = 0
            await asyncio.sleep(10)
            assert gone() is not None  # they may still be going
            await asyncio.sleep(600)
            assert gone() is None
        assert gc.get_threshold() == before

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        try:
            runner.run(play())
        finally:
            gc.unfreeze()
