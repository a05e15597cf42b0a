"""Rings: bytes come out as they went in, and none is overwritten while it is in use."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.upstream.ring import Ring, Rings

SIZE = 4096
SOURCE = bytes(n % 251 for n in range(60 * SIZE))
STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, 2 * SIZE)), max_size=60)


@settings(deadline=None)
@given(STEPS)
def test_bytes_come_out_in_order_and_what_is_lent_stays(steps: list[tuple[bool, int]]) -> None:
    ring, came, went = Ring(SIZE), 0, 0
    lent, expected = memoryview(b""), b""
    for receives, count in steps:
        if receives:
            space = ring.space(count)
            assert len(space) <= min(count, SIZE - ring.used)
            assert len(space) or ring.used == SIZE
            space[:] = SOURCE[came : came + len(space)]
            ring.received(len(space))
            came += len(space)
        else:
            lent = ring.lend(count)
            expected = SOURCE[went : went + len(lent)]
            went += len(lent)
            assert len(lent) or not ring.unread
        assert lent == expected
        assert ring.unread == came - went
        assert ring.unread + len(lent) == ring.used <= SIZE


def test_what_was_lent_is_freed_by_the_next_loan_or_at_once() -> None:
    ring = Ring(SIZE)
    ring.received(len(ring.space(SIZE)))
    assert len(ring.space(SIZE)) == 0
    assert len(ring.lend(1000)) == 1000
    assert len(ring.space(SIZE)) == 0
    ring.free()
    assert len(ring.space(SIZE)) == 1000


def test_a_few_rings_are_kept_and_come_back_empty() -> None:
    rings = Rings(SIZE, spare=1)
    first, second = rings.take(), rings.take()
    first.received(10)
    rings.give(first)
    rings.give(second)
    assert rings.take() is first
    assert first.used == 0
    assert rings.take() is not second
