"""Who holds a body up: told by how the time is spent, and on pieces of which size."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from proxy.pull.pace import FAST, LARGE, Pace
from proxy.testing import FakeClock


def after_the_first(clock: FakeClock, stack: ExitStack) -> Pace:
    pace = Pace(clock)
    stack.enter_context(pace.body())
    with pace.taking(1):
        pass
    return pace


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def spent(pace: Pace, clock: FakeClock, *, waiting: float, taking: float, size: int) -> None:
    """In two pieces of ``size``."""
    for _ in range(2):
        clock.advance(waiting / 2)
        with pace.taking(size):
            clock.advance(taking / 2)


@pytest.mark.parametrize(
    ("waiting", "taking", "size", "outrun"),
    [
        (1, 3, LARGE, True),
        (1, 1, LARGE, True),
        (3, 1, LARGE, False),  # it is waited for
        (1, 3, LARGE // 2, False),  # slow to take, and yet no more has come meanwhile
        (0.006, 0.002, 0.0041 * FAST, True),  # it is waited for, and yet brings enough
        (0.006, 0.002, 0.0039 * FAST, False),
    ],
)
def test_a_body_outruns_us_when_large_pieces_take_most_of_the_time_or_it_is_fast(
    waiting: float, taking: float, size: float, outrun: bool, stack: ExitStack
) -> None:
    clock = FakeClock()
    pace = after_the_first(clock, stack)
    spent(pace, clock, waiting=waiting, taking=taking, size=int(size))
    assert pace.is_outrun() is outrun


def test_what_was_longer_ago_counts_for_less(stack: ExitStack) -> None:
    clock = FakeClock()
    pace = after_the_first(clock, stack)
    spent(pace, clock, waiting=1, taking=9, size=LARGE)
    assert pace.is_outrun() is True
    clock.advance(3)
    spent(pace, clock, waiting=0, taking=0, size=LARGE)
    assert pace.is_outrun() is True  # a moment in which nothing came
    clock.advance(4)
    assert pace.is_outrun() is False


def test_it_can_be_told_of_what_comes_from_now_on(stack: ExitStack) -> None:
    clock = FakeClock()
    pace = after_the_first(clock, stack)
    spent(pace, clock, waiting=0, taking=100, size=LARGE)
    pace.forget()
    spent(pace, clock, waiting=1, taking=0.9, size=LARGE)
    assert pace.is_outrun() is False


def test_the_time_between_two_bodies_is_nobodys() -> None:
    clock = FakeClock()
    pace = Pace(clock)
    for _ in range(2):
        clock.advance(100)
        with pace.body(), pace.taking(1):
            clock.advance(1)
        clock.advance(100)
    with pace.body():
        with pace.taking(1):  # the first piece of each says nothing
            clock.advance(1)
        spent(pace, clock, waiting=0, taking=1, size=LARGE)
        assert pace.is_outrun() is True


def test_few_pieces_tell_only_that_they_are_waited_for() -> None:
    clock = FakeClock()
    pace = Pace(clock)
    assert pace.is_outrun() is None  # no time has passed
    with pace.body():
        with pace.taking(LARGE * 9):
            clock.advance(1)
            assert pace.is_outrun() is None
            clock.advance(1)
        with pace.taking(1):
            clock.advance(1)
            assert pace.is_outrun() is None
        with pace.taking(2 * LARGE):
            clock.advance(1)
            assert pace.is_outrun() is True  # the one that is under way counts
    pace = Pace(clock)
    with pace.body():
        with pace.taking(LARGE):
            clock.advance(1)
        clock.advance(2)
        assert pace.is_outrun() is False


def test_what_fails_in_between_ends_it_too() -> None:
    clock = FakeClock()
    pace = Pace(clock)
    with pace.body():
        with suppress(OSError), pace.taking(LARGE):
            clock.advance(1)
            raise OSError("disk")
        clock.advance(2)
        assert pace.is_outrun() is False
