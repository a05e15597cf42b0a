"""Which answers raise the cap (DESIGN D6): a gate and its conduct, without a socket."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.observe.metrics import Metrics
from proxy.testing import FakeClock
from proxy.upstream.cap import START, Cap
from proxy.upstream.conduct import Conduct
from proxy.upstream.gate import Gate, Slot
from proxy.upstream.turns import Ticket, TurnClass


@dataclass(frozen=True)
class Asked:
    """A request for a blob, which has a slot until its body has ended."""

    slot: Slot
    sent_at: float
    full: bool


class Origin:
    """One whose requests are sent, answered and ended by hand, a moment apart."""

    def __init__(self, cap: Cap) -> None:
        self.clock = FakeClock()
        metrics = Metrics()
        self._gate = Gate("origin", capacity=cap.maximum, metrics=metrics, clock=self.clock)
        self._conduct = Conduct("origin", self._gate, cap, metrics=metrics, clock=self.clock)

    @property
    def cap(self) -> Cap:
        return self._conduct.cap

    async def ask(self) -> Asked | None:
        """A request, if there is a slot for one."""
        self.clock.advance(0.0001)
        if not self._gate.spare:
            return None
        slot = await self._gate.acquire(Ticket(TurnClass.BLOB, ["client"]))
        return Asked(slot, self.clock(), self._gate.is_full(TurnClass.BLOB))

    async def fill(self) -> list[Asked]:
        """As many as there are slots for."""
        asked = []
        while (one := await self.ask()) is not None:
            asked.append(one)
        return asked

    def answer(self, *asked: Asked) -> None:
        """The heads come."""
        for one in asked:
            self.clock.advance(0.0001)
            self._conduct.went_well(one.slot, one.sent_at, full=one.full)

    def overload(self, one: Asked) -> None:
        self._conduct.was_too_much("team/app", one.sent_at, "status 503")

    def end(self, *asked: Asked) -> None:
        """The turns are over."""
        for one in asked:
            self._conduct.leave(one.slot)
            self._gate.release(one.slot)


async def test_answers_of_before_the_cap_was_full_count_while_their_bodies_come() -> None:
    """Such is that of the lead of a blob, before it has further turns."""
    origin = Origin(Cap.starting(64))
    lead = await origin.ask()
    assert lead is not None
    origin.answer(lead)
    *others, last = await origin.fill()
    origin.answer(*others)
    assert (origin.cap.limit, origin.cap.run) == (START, 0)
    origin.answer(last)
    assert origin.cap.limit == 2 * START


async def test_and_none_counts_twice() -> None:
    origin = Origin(Cap(8, 64))
    *early, last = await origin.fill()
    origin.answer(*early[:3], last)
    assert origin.cap.run == 4
    origin.end(last)
    again = await origin.ask()
    assert again is not None
    origin.answer(again)
    assert origin.cap.run == 5


async def test_those_whose_bodies_have_ended_before_do_not() -> None:
    origin = Origin(Cap(8, 64))
    *early, _ = await origin.fill()
    origin.answer(*early)
    origin.end(*early)
    last = [await origin.ask() for _ in early][-1]
    assert last is not None
    assert last.full
    origin.answer(last)
    assert origin.cap.run == 1


async def test_nor_those_that_were_sent_when_the_cap_was_another() -> None:
    origin = Origin(Cap(8, 64))
    *early, broken, waiting = await origin.fill()
    origin.answer(*early)
    origin.overload(broken)
    origin.end(broken, *early[3:], waiting)  # the rest is all that a cap of four has slots for
    assert (origin.cap.limit, origin.cap.is_proved) == (4, False)
    origin.end(early[0])
    last = await origin.ask()
    assert last is not None
    assert last.full
    origin.answer(last)
    assert (origin.cap.limit, origin.cap.run, origin.cap.is_proved) == (4, 1, True)


@given(st.integers(4, 24), st.data())
def test_an_upstream_whose_bodies_all_stall_is_asked_for_no_more_than_twice_as_many(
    start: int, data: st.DataObject
) -> None:
    """In whatever order slots are taken and heads come."""

    async def run() -> None:
        origin, count = Origin(Cap(start, 512)), 0
        unanswered: list[Asked] = []
        while True:
            one = await origin.ask() if not unanswered or data.draw(st.booleans()) else None
            if one is not None:
                unanswered.append(one)
                count += 1
            elif unanswered:
                place = data.draw(st.integers(0, len(unanswered) - 1))
                origin.answer(unanswered.pop(place))
            else:
                break
        assert origin.cap.limit <= 2 * start
        assert count < 2 * start

    asyncio.run(run())


@pytest.mark.parametrize("wall", [2, 6, 20])
@pytest.mark.parametrize("first_byte", [0.01, 0.3])
async def test_a_crowd_with_long_bodies_stays_below_what_breaks(
    wall: int, first_byte: float
) -> None:
    """Heads come soon, and bodies take much longer: the upstream breaks beyond ``wall`` of them."""
    origin, chance, order = Origin(Cap.starting(64)), random.Random(5), itertools.count()
    start, active, broken, limits = origin.clock(), 0, [0, 0], []
    requests = [0, 0]
    coming: list[tuple[float, int, str, Asked]] = []
    while (now := origin.clock() - start) < 120:
        is_late = now > 20
        for one in await origin.fill():
            requests[is_late] += 1
            is_broken = active + 1 > wall
            broken[is_late] += is_broken
            active += not is_broken
            wait = 0.02 if is_broken else first_byte * chance.uniform(0.5, 1.5)
            what = "broken" if is_broken else "head"
            heapq.heappush(coming, (origin.clock() + wait, next(order), what, one))
        at, _, what, one = heapq.heappop(coming)
        origin.clock.advance(max(0.0, at - origin.clock()))
        if what == "head":
            origin.answer(one)
            lasts = chance.uniform(0.5, 1.5)
            heapq.heappush(coming, (origin.clock() + lasts, next(order), "end", one))
            continue
        if what == "broken":
            origin.overload(one)
        active -= what == "end"
        origin.end(one)
        if is_late:
            limits.append(origin.cap.limit)
    assert broken[0] <= 0.15 * requests[0]
    assert broken[1] <= 0.02 * requests[1]
    assert wall / 2 <= sum(limits) / len(limits) <= wall + 2
