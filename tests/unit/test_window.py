"""The window is bounded, exact, and says who has fallen out."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.pull.window import LEAST, Window, WindowBudget


def test_windows_share_a_budget_and_nobody_waits_for_one() -> None:
    largest = 16 << 20
    budget = WindowBudget(largest)
    taken = [budget.take() for _ in range(60)]
    assert taken[:3] == [largest] * 3
    assert min(taken) == LEAST
    assert sum(taken) <= 5 * largest
    for capacity in taken:
        budget.give(capacity)
    assert budget.take() == largest


def test_a_window_that_is_given_back_holds_nothing() -> None:
    window = Window(0, 8)
    window.append(b"abcd")
    window.clear()
    assert (window.start, window.end) == (4, 4)


def test_a_new_window_is_empty_and_lets_readers_wait_at_its_end() -> None:
    window = Window(100, 10)
    assert (window.start, window.end) == (100, 100)
    assert window.holds(100)
    assert not window.holds(99)
    assert not window.holds(101)


def test_what_lies_beyond_capacity_is_given_up_in_front() -> None:
    window = Window(0, 6)
    for data in (b"abcd", b"efgh"):
        window.append(data)
    assert (window.start, window.end) == (2, 8)
    assert not window.holds(1)
    assert window.piece(2) == b"cd"
    assert window.piece(4) == b"efgh"
    assert window.piece(7) == b"h"


def test_a_piece_larger_than_the_window_leaves_its_own_end() -> None:
    window = Window(0, 4)
    window.append(b"0123456789")
    assert (window.start, window.end) == (6, 10)
    assert window.piece(6) == b"6789"


def test_nothing_is_added_by_an_empty_piece() -> None:
    window = Window(0, 4)
    window.append(b"")
    assert (window.start, window.end) == (0, 0)


@pytest.mark.parametrize("position", [-1, 1, 8, 100])
def test_asking_for_a_byte_outside_is_an_error(position: int) -> None:
    window = Window(0, 6)
    window.append(b"abcdefgh")
    with pytest.raises(ValueError, match="not in <Window 2-8"):
        window.piece(position)


def test_a_window_needs_room_for_a_turn_and_for_readers_to_differ() -> None:
    with pytest.raises(ValueError, match="at least two bytes"):
        Window(0, 1)


@given(
    start=st.integers(0, 1 << 40),
    capacity=st.integers(2, 40),
    sizes=st.lists(st.integers(0, 30), max_size=30),
)
def test_it_always_holds_exactly_the_last_bytes(
    start: int, capacity: int, sizes: list[int]
) -> None:
    body = bytes(n % 251 for n in range(sum(sizes)))
    window = Window(start, capacity)
    for stop, size in zip(accumulate(sizes), sizes, strict=True):
        window.append(body[stop - size : stop])
        assert window.end == start + stop
        assert window.end - window.start == min(capacity, stop)
        position = window.start
        while position < window.end:
            piece = window.piece(position)
            assert piece == body[position - start : position - start + len(piece)]
            position += len(piece)
        assert position == window.end
