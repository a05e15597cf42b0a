"""Do two turns bring more than one? What a trial makes of lines, of limits, and of bad luck."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.pull.segments import Segment
from proxy.pull.trial import (
    LEAST,
    LEAST_LEAD,
    LEAST_TURN,
    LOOK_BOTH_BYTES,
    MIB,
    Lead,
    lead_of_trial,
    left_for_trial,
    try_two,
)


class Further:
    """The turn beside the lead's."""

    def __init__(self, start: int, stop: int, *, answered_at: float) -> None:
        self.segment = Segment(start, stop)
        self.answered_at = answered_at
        self.has_begun = False
        self.has_broken = False

    @property
    def is_over(self) -> bool:
        return self.has_broken or self.segment.at == self.segment.stop


class Play:
    """A lead of ``size`` bytes on a clock that goes on when somebody sleeps. ``rates``: what the
    lead gets by itself, and what each of two gets."""

    def __init__(
        self, size: int, rates: tuple[float, tuple[float, float]], *, answer: float = 0.05
    ) -> None:
        self.now = 0.0
        self.lead = Segment(0, size)
        self.size = size
        self.alone, self.both = rates
        self.answer = answer
        self.further: Further | None = None
        self.meanwhile: Callable[[Play], None] = lambda _: None

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        further = self.further
        if further is not None and self.now >= further.answered_at:
            further.has_begun = True
        if further is None or not further.has_begun or further.is_over:
            self._move(self.lead, self.alone * seconds)
        else:
            self._move(self.lead, self.both[0] * seconds)
            self._move(further.segment, self.both[1] * seconds)
        self.meanwhile(self)

    @staticmethod
    def _move(segment: Segment, count: float) -> None:
        assert segment.stop is not None
        segment.at = min(segment.stop, segment.at + int(count))

    def begin(self, count: int) -> Further | None:
        start = self.size + 16 * MIB - count
        self.further = Further(start, start + count, answered_at=self.now + self.answer)
        return self.further

    async def run(self, begin: Callable[[int], Further | None] | None = None) -> bool | None:
        return await try_two(
            Lead(self.lead, lambda: self.lead.at == self.size),
            begin or self.begin,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


#: From the slowest that is tried, whose lead is longer than its turns, to one beyond most.
RATES = [LEAST_TURN / 2, 3e6, 8e6, 20e6, 40e6]


def lead_of(rate: float) -> int:
    """Bytes of the lead's turn on a line of this rate."""
    return lead_of_trial(64 * MIB, min(64 * MIB, int(2 * rate)))


@pytest.mark.parametrize("rate", RATES)
async def test_where_each_connection_has_a_limit_two_bring_more(rate: float) -> None:
    assert await Play(lead_of(rate), (rate, (rate, rate))).run() is True


@pytest.mark.parametrize("rate", RATES)
async def test_where_the_line_is_the_limit_two_bring_no_more(rate: float) -> None:
    assert await Play(lead_of(rate), (rate, (rate / 2, rate / 2))).run() is False


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("others", [1, 2])
async def test_a_line_that_one_or_two_others_use_is_taken_for_the_limit_too(
    rate: float, others: int
) -> None:
    """Though of such a line two have more than one."""
    alone, both = 1 / (others + 1), 1 / (others + 2)
    play = Play(lead_of(rate * alone), (rate * alone, (rate * both, rate * both)))
    assert await play.run() is not True


async def test_one_that_starves_beside_the_lead_brings_no_more() -> None:
    """As TCP has it where a queue is full: the lead ends before it does."""
    play = Play(12 * MIB, (8e6, (7.8e6, 0.2e6)))
    assert await play.run() is False
    assert play.further is not None
    assert not play.further.is_over


async def test_a_trial_of_a_slow_line_is_short() -> None:
    play = Play(lead_of(1e6), (1e6, (0.5e6, 0.5e6)))
    assert play.size == LEAST_LEAD
    assert await play.run() is False
    assert play.further is not None
    assert play.further.segment.at - play.further.segment.start == LOOK_BOTH_BYTES


async def test_a_turn_that_ends_too_soon_shows_nothing() -> None:
    play = Play(2 * MIB, (20e6, (20e6, 20e6)))
    assert await play.run() is None
    assert play.further is None


async def test_a_further_turn_without_a_slot_shows_nothing() -> None:
    assert await Play(48 * MIB, (8e6, (8e6, 8e6))).run(lambda _: None) is None


async def test_a_further_turn_that_waits_until_the_lead_has_ended_shows_nothing() -> None:
    assert await Play(16 * MIB, (8e6, (8e6, 8e6)), answer=60.0).run() is None


async def test_a_further_turn_that_breaks_shows_nothing() -> None:
    play = Play(48 * MIB, (8e6, (8e6, 8e6)))

    def break_it(play: Play) -> None:
        further = play.further
        if further is not None and further.segment.at - further.segment.start > 2 * MIB:
            further.has_broken = True

    play.meanwhile = break_it
    assert await play.run() is None


@pytest.mark.parametrize(
    ("hole", "left"), [(LEAST - 1, 0), (LEAST, LEAST // 4), (64 * MIB, 16 * MIB)]
)
def test_the_lead_leaves_a_quarter_of_what_is_worth_a_trial(hole: int, left: int) -> None:
    assert left_for_trial(hole) == left
