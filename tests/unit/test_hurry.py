"""One question at a URL that has others besides it: when it leaves, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from proxy.observe.metrics import Metrics
from proxy.oci.errors import NotFound, UpstreamTimeout
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.hurry import GRACE, HASTE, WHOLE, Hurry, MovedOn, share
from proxy.upstream.origin import Origin, Turn
from proxy.upstream.stall import StallLimit
from proxy.upstream.turns import Ticket, TurnClass
from tests.unit.virtual import now, run_virtually


def stays(_waited: float) -> None:
    """Nothing is wrong with the URL."""


def virtually(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_virtually(work(), grace=0)


class Used:
    """A turn that is held for as long as the block lasts; no socket is made."""

    def __init__(self, stall: StallLimit | None = None) -> None:
        settings = OriginSettings(stall=stall or StallLimit())
        key = OriginKey("http", "registry.test", 80)
        clock = asyncio.get_running_loop().time
        self._turn = Origin(key, settings, metrics=Metrics(), clock=clock).turn(
            Ticket(TurnClass.METADATA)
        )

    async def __aenter__(self) -> Turn:
        return await self._turn.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        await self._turn.__aexit__(*exc)


def test_it_looks_now_and_then_and_leaves_with_what_it_is_told() -> None:
    async def work() -> None:
        looks = []

        def leave(waited: float) -> Exception | None:
            looks.append(waited)
            return MovedOn() if waited >= 2 * HASTE else None

        hurry = Hurry("up", leave)
        with pytest.raises(MovedOn):
            async with hurry.bounded():
                await asyncio.sleep(1000)
        assert (now(), looks) == (2 * HASTE, [HASTE, 2 * HASTE])

    virtually(work)


def test_what_was_asked_is_answered_in_time_or_left_whatever_is_said_of_the_url() -> None:
    async def work() -> None:
        hurry = Hurry("up", lambda _: MovedOn())

        async def question(turn: Turn) -> None:
            async with hurry.bounded():
                await asyncio.sleep(1)
                hurry.asked(turn)
                hurry.look()  # it is too late to move on: the answer may be on its way
                assert repr(hurry) == "<Hurry up asked>"
                await asyncio.sleep(1000)

        async with Used() as turn:
            with pytest.raises(UpstreamTimeout, match=r"^up: no answer in 5 s$"):
                await question(turn)
            assert now() == 1 + HASTE

    virtually(work)


def test_a_later_hop_has_what_is_left_and_a_body_a_short_window() -> None:
    async def work() -> None:
        hurry = Hurry("up", stays)
        async with Used(StallLimit(100, 30)) as turn, hurry.bounded():
            hurry.asked(turn)
            assert turn.patience == HASTE - GRACE
            await asyncio.sleep(3)
            hurry.asked(turn)
            assert turn.patience == pytest.approx(HASTE - GRACE - 3)
            assert turn.stall == StallLimit(100, HASTE)
        async with Used(StallLimit(100, 1)) as turn:
            hurry.asked(turn)
            assert turn.stall == StallLimit(100, 1)  # the operator's is shorter

    virtually(work)


def test_an_answer_takes_its_time_and_a_second_request_begins_anew() -> None:
    async def work() -> None:
        hurry = Hurry("up", lambda _: MovedOn())

        async def question(turn: Turn) -> None:
            async with hurry.bounded():
                hurry.asked(turn)
                hurry.answered()
                hurry.look()
                await asyncio.sleep(100)
                hurry.waits()
                await asyncio.sleep(HASTE / 2)
                hurry.waits()  # it does already
                hurry.asked(turn)
                await asyncio.sleep(1000)

        async with Used() as turn:
            with pytest.raises(UpstreamTimeout):
                await question(turn)
            assert now() == 100 + HASTE / 2 + HASTE

    virtually(work)


def test_cancelled_from_outside_in_the_same_moment_it_is_cancelled() -> None:
    async def work() -> None:
        hurry = Hurry("up", lambda _: MovedOn())

        async def question() -> None:
            async with hurry.bounded():
                await asyncio.sleep(1000)

        asking = asyncio.create_task(question())
        await asyncio.sleep(0)
        hurry.look()
        hurry.look()  # once is enough
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    virtually(work)


def test_an_answer_that_comes_in_the_moment_of_leaving_counts() -> None:
    async def work() -> None:
        hurry = Hurry("up", lambda _: MovedOn())
        async with hurry.bounded():
            hurry.look()
        await asyncio.sleep(0)
        with pytest.raises(NotFound):
            async with Hurry("up", stays).bounded():
                raise NotFound("manifest")
        with pytest.raises(TimeoutError):
            async with Hurry("up", stays).bounded():
                raise TimeoutError  # somebody else's

    virtually(work)


@pytest.mark.parametrize("others", range(1, 11))
def test_all_urls_but_the_last_share_the_whole(others: int) -> None:
    spent = 0.0
    for left in range(others, 0, -1):
        assert share(spent, left) <= HASTE
        spent += share(spent, left)
    assert spent <= WHOLE
    assert share(0.0, 3) == HASTE
    assert share(WHOLE + 100, 10) == WHOLE / 10  # it stood in a queue for long
