"""Who holds a body up: told by how the time is spent, and on pieces of which size."""

from contextlib import suppress

import pytest

from proxy.pull.pace import LARGE, Pace
from proxy.testing import FakeClock


def after_the_first(clock: FakeClock) -> Pace:
    pace = Pace(clock)
    with pace.taking(1):
        pass
    return pace


def spent(pace: Pace, clock: FakeClock, *, waiting: float, taking: float, size: int) -> None:
    clock.advance(waiting)
    with pace.taking(size):
        clock.advance(taking)


@pytest.mark.parametrize(
    ("waiting", "taking", "size", "outrun"),
    [
        (1, 3, LARGE, True),
        (1, 1, LARGE, True),
        (3, 1, LARGE, False),  # it is waited for
        (1, 3, LARGE // 2, False),  # slow to take, and yet no more has come meanwhile
    ],
)
def test_a_body_outruns_us_when_large_pieces_take_most_of_the_time(
    waiting: float, taking: float, size: int, outrun: bool
) -> None:
    clock = FakeClock()
    pace = after_the_first(clock)
    spent(pace, clock, waiting=waiting, taking=taking, size=size)
    assert pace.is_outrun() is outrun


def test_it_is_told_since_the_last_time() -> None:
    clock = FakeClock()
    pace = after_the_first(clock)
    spent(pace, clock, waiting=9, taking=1, size=LARGE)
    assert pace.is_outrun() is False
    spent(pace, clock, waiting=1, taking=9, size=LARGE)
    assert pace.is_outrun() is True
    clock.advance(1)
    assert pace.is_outrun() is False  # nothing has come


def test_a_first_piece_tells_only_that_it_is_waited_for() -> None:
    clock = FakeClock()
    pace = Pace(clock)
    assert pace.is_outrun() is None  # no time has passed
    with pace.taking(LARGE * 9):
        clock.advance(1)
        assert pace.is_outrun() is None
        clock.advance(1)
    with pace.taking(LARGE):
        clock.advance(1)
        assert pace.is_outrun() is True  # the one that is under way counts
    pace = Pace(clock)
    with pace.taking(LARGE):
        clock.advance(1)
    clock.advance(2)
    assert pace.is_outrun() is False


def test_what_fails_in_between_ends_it_too() -> None:
    clock = FakeClock()
    pace = Pace(clock)
    with suppress(OSError), pace.taking(LARGE):
        clock.advance(1)
        raise OSError("disk")
    clock.advance(2)
    assert pace.is_outrun() is False
