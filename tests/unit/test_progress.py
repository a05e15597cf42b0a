"""Readers are told in steps and woken in lots, and none of them is forgotten."""

import asyncio
from itertools import pairwise

import pytest

from proxy.pull.progress import LOT, STEP_BYTES, Bell, Progress


class Waiters:
    """Tasks that wait for a bell or a progress, counting how often they were woken."""

    def __init__(self, bell: Bell | Progress, number: int) -> None:
        wait = bell.wait if isinstance(bell, Bell) else bell.changed
        self.woken = 0
        self._wait = wait
        self.tasks = [asyncio.create_task(self._once()) for _ in range(number)]

    async def _once(self) -> None:
        await self._wait()
        self.woken += 1

    async def __aenter__(self) -> "Waiters":
        await asyncio.sleep(0)  # now they wait
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_a_ring_wakes_everybody_who_waits() -> None:
    bell = Bell()
    async with Waiters(bell, 10) as waiters:
        bell.ring()
        await asyncio.gather(*waiters.tasks)
    assert repr(bell) == "<Bell 0 waiting, 0 waking>"


async def test_a_ring_is_not_remembered() -> None:
    bell = Bell()
    bell.ring()
    async with Waiters(bell, 1) as waiters:
        await asyncio.sleep(0)
        assert waiters.woken == 0


async def test_a_crowd_is_woken_in_lots_with_the_loop_running_in_between() -> None:
    bell = Bell()
    async with Waiters(bell, 3 * LOT + 1) as waiters:
        bell.ring()
        steps = [0]
        while waiters.woken < len(waiters.tasks):
            await asyncio.sleep(0)
            steps.append(waiters.woken)
        assert max(after - before for before, after in pairwise(steps)) <= LOT


async def test_whoever_has_more_at_hand_goes_on_in_lots_behind_those_who_are_waking() -> None:
    bell, order = Bell(), list[str]()

    async def go_on(name: str) -> None:
        await bell.pass_on()
        order.append(name)

    async with Waiters(bell, LOT + 1) as waiters:
        bell.ring()
        others = [asyncio.create_task(go_on(f"{number}")) for number in range(2 * LOT)]
        steps = [0]
        while len(order) < len(others):
            await asyncio.sleep(0)
            assert waiters.woken == len(waiters.tasks) or not order
            steps.append(waiters.woken + len(order))
        assert max(after - before for before, after in pairwise(steps)) <= LOT
        assert order == [f"{number}" for number in range(2 * LOT)]


async def test_whoever_lets_others_go_and_is_cancelled_holds_nobody_up() -> None:
    bell = Bell()
    first, second = (asyncio.create_task(bell.pass_on()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert first.cancelled()
    assert repr(bell) == "<Bell 0 waiting, 0 waking>"


async def test_rings_during_a_ring_forget_nobody() -> None:
    bell = Bell()
    async with Waiters(bell, 2 * LOT) as first:
        bell.ring()
        async with Waiters(bell, 2 * LOT) as second:
            bell.ring()
            bell.ring()
            await asyncio.gather(*first.tasks, *second.tasks)


@pytest.mark.parametrize("woken", [False, True])
async def test_a_waiter_that_is_cancelled_is_nobody_elses_concern(woken: bool) -> None:
    bell = Bell()
    async with Waiters(bell, 2 * LOT) as waiters:
        if woken:
            bell.ring()
        for task in waiters.tasks[::2]:
            task.cancel()
        bell.ring()
        await asyncio.gather(*waiters.tasks[1::2])


async def test_small_steps_are_told_together_and_none_is_kept_back() -> None:
    progress = Progress()
    progress.reach(1)  # the first one at once
    async with Waiters(progress, 1) as waiters:
        progress.reach(2)
        progress.reach(3)
        await asyncio.sleep(0)
        assert waiters.woken == 0
        await waiters.tasks[0]  # in a step's time
        assert progress.mark == 3


async def test_the_first_bytes_are_told_of_at_once_though_the_place_for_them_just_was() -> None:
    progress = Progress()
    progress.tell()  # as a fill does when it has begun
    async with Waiters(progress, 1) as waiters:
        progress.reach(1)
        await asyncio.sleep(0)
        assert waiters.woken == 1


async def test_a_large_step_is_told_at_once() -> None:
    progress = Progress()
    progress.reach(1)
    async with Waiters(progress, 1) as waiters:
        progress.reach(1 + STEP_BYTES)
        await asyncio.sleep(0)
        assert waiters.woken == 1


async def test_whoever_waits_for_the_readers_tells_them_at_once() -> None:
    progress = Progress()
    progress.reach(1)
    async with Waiters(progress, 1) as waiters:
        progress.reach(2)
        progress.reach(2, now=True)
        await asyncio.sleep(0)
        assert waiters.woken == 1


async def test_the_mark_never_goes_back_and_no_progress_tells_nobody() -> None:
    progress = Progress()
    progress.reach(7)
    async with Waiters(progress, 1) as waiters:
        progress.reach(6, now=True)
        await asyncio.sleep(0)
        assert (progress.mark, waiters.woken) == (7, 0)
    assert repr(progress) == "<Progress 7, told 7>"
