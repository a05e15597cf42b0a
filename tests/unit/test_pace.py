"""Who holds a body up: told by how the time is spent."""

from contextlib import suppress

import pytest

from proxy.pull.pace import Pace
from proxy.testing import FakeClock


def test_the_share_of_taking_is_told_since_the_last_look() -> None:
    clock = FakeClock()
    pace = Pace(clock)
    clock.advance(3)
    with pace.taking():
        clock.advance(1)
    assert pace.share() == pytest.approx(0.25)
    with pace.taking():
        clock.advance(1)
        assert pace.share() == 1.0  # the one that is under way counts
        clock.advance(1)
    clock.advance(1)
    assert pace.share() == pytest.approx(0.5)


def test_of_no_time_nothing_is_told() -> None:
    assert Pace(FakeClock()).share() is None


def test_what_fails_in_between_ends_it_too() -> None:
    clock = FakeClock()
    pace = Pace(clock)
    with suppress(OSError), pace.taking():
        clock.advance(1)
        raise OSError("disk")
    clock.advance(1)
    assert pace.share() == pytest.approx(0.5)
