"""How long stripes are, and which are asked for next, of whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.claims import WHOLE, Giver, Holding, View, Wish
from proxy.fleet.stripes import (
    ENOUGH,
    FEWEST,
    LARGEST,
    MIB,
    PIECE,
    SPARE_WISHES,
    WINDOW,
    Span,
    Standing,
    givers,
    lowest_zero,
    stripe_count,
    stripe_length,
    stripe_size,
    to_fill,
    wishes,
)

SPAN = 4  # stripes that the upstream is asked for in one go


def standing(**fields: object) -> Standing:
    usual = Standing(
        zone="a",
        have=0,
        count=8,
        busy=(),
        room=2,
        limits={},
        order=tuple(range(1000)),
        hop=0.25,
        span=SPAN,
    )
    return replace(usual, **fields)  # type: ignore[arg-type]  # any of its fields


def holding(
    name: str, have: int = 0, zone: str = "a", lending: int = 0, **receiving: int
) -> Holding:
    ranks = {int(stripe.removeprefix("s")): rank for stripe, rank in receiving.items()}
    return Holding(Giver(name, name, zone, f"http://{name}"), have, ranks, lending)


def view(*holdings: Holding, published: int = 8) -> View:
    return View("1", 8 * MIB, 0, (b"",) * published, (), None, holdings, len(holdings))


def stripes(standing: Standing, seen: View) -> list[int]:
    return [wish.stripe for wish in wishes(standing, seen)]


@pytest.mark.parametrize(
    ("size", "length", "count"),
    [
        (0, MIB, 1),
        (1, MIB, 1),
        (MIB, MIB, 1),
        (MIB + 1, PIECE, 5),
        (2 * MIB - 1, PIECE, 8),
        (2 * MIB, MIB // 2, 4),
        (FEWEST * MIB - 1, MIB // 2, 8),
        (FEWEST * MIB, MIB, FEWEST),
        (ENOUGH * MIB, MIB, ENOUGH),
        (ENOUGH * MIB + 1, 2 * MIB, ENOUGH // 2 + 1),
        (ENOUGH * LARGEST, LARGEST, ENOUGH),
        (10 * ENOUGH * LARGEST, LARGEST, 10 * ENOUGH),
    ],
)
def test_there_are_enough_stripes_to_share_and_none_is_too_long(
    size: int, length: int, count: int
) -> None:
    assert (stripe_size(size), stripe_count(size)) == (length, count)


@given(st.integers(0, 1 << 44))
def test_the_stripes_make_up_the_blob(size: int) -> None:
    count, whole = stripe_count(size), stripe_size(size)
    assert whole % PIECE == 0
    assert size <= MIB or count >= FEWEST
    last = stripe_length(size, count - 1)
    assert (count - 1) * whole + last == size
    assert 0 < last <= whole or size == 0


@given(st.integers(0, 1 << 200))
def test_the_lowest_zero_is_the_first_stripe_that_lacks(mask: int) -> None:
    at = lowest_zero(mask)
    assert not mask >> at & 1
    assert mask & ((1 << at) - 1) == (1 << at) - 1


def test_what_readers_need_comes_first_then_the_rarest_then_ones_own_order() -> None:
    seen = view(holding("x", 0b11111111), holding("y", 0b00001111), holding("z", 0b00111111))
    order = [0, 1, 2, 3, 5, 4, 7, 6, *range(8, 1000)]
    assert stripes(standing(need=2, order=order), seen) == [2, 7, 6, 5, 4, 0]


def test_what_is_there_or_on_its_way_or_not_published_is_not_wished() -> None:
    seen = view(holding("x", 0b11111111), published=5)
    assert stripes(standing(have=0b1, busy=(2,)), seen) == [1, 3, 4]


def test_no_room_no_wishes() -> None:
    assert wishes(standing(room=0), view(holding("x", WHOLE))) == ()
    assert wishes(standing(have=0xFF), view(holding("x", WHOLE))) == ()


def test_a_few_more_are_named_than_there_is_room_for() -> None:
    seen = view(holding("x", WHOLE), published=100)
    assert len(wishes(standing(count=100, room=3), seen)) == 3 + SPARE_WISHES


def test_of_a_huge_blob_a_window_is_thought_about_and_what_readers_need() -> None:
    huge = standing(count=10_000, need=9_000, have=0b11, order=tuple(range(10_000)))
    missing = huge.missing(10_000)
    assert missing == [*range(2, 2 + WINDOW), 9_000]
    assert huge.missing(9_000)[-1] == 1 + WINDOW


def test_the_own_zone_is_asked_before_any_other() -> None:
    seen = (holding("far", WHOLE, "b"), holding("near", WHOLE, "a", lending=5))
    assert givers(standing(), seen, 0, 99) == ("near", "far")


def test_who_lends_least_is_asked_first_and_a_hop_costs_a_part_of_a_grant() -> None:
    seen = (
        holding("lends", WHOLE, lending=1),
        holding("second", s0=2),
        holding("fifth", s0=5),
        holding("has not"),
    )
    assert givers(standing(), seen, 0, 99) == ("second", "lends", "fifth")


def test_who_is_not_nearer_to_the_bytes_than_oneself_is_not_asked() -> None:
    seen = (holding("second", s0=2), holding("third", s0=3), holding("has", 0b1, lending=3))
    assert givers(standing(), seen, 0, 3) == ("second", "has")
    assert givers(standing(), seen, 0, 1) == ("has",)


def test_a_wish_says_how_near_a_giver_has_to_be_and_whether_readers_wait() -> None:
    seen = view(holding("has", 0b11), published=2)
    assert wishes(standing(limits={0: 1}), seen) == (Wish(0, 1, is_urgent=True), Wish(1))


def test_the_filler_goes_on_behind_what_was_published() -> None:
    assert to_fill(standing(), 3, ()) == Span(3, 3 + SPAN)
    assert to_fill(standing(have=0b111), 7, ()) == Span(7, 8)
    assert to_fill(standing(), 8, ()) is None


def test_a_span_ends_before_what_is_there_or_on_its_way() -> None:
    assert to_fill(standing(have=0b10000), 2, ()) == Span(2, 4)
    assert to_fill(standing(busy=(3,)), 3, ()) == Span(4, 4 + SPAN)


def test_what_everybody_lost_is_brought_before_anything_else() -> None:
    assert to_fill(standing(), 5, {3, 1, 2, 7}) == Span(1, 4)
    assert to_fill(standing(have=0b10), 5, {1}) == Span(5, 8)


def test_a_node_that_has_it_all_stands_in_for_the_upstream() -> None:
    assert to_fill(standing(), 0, (), "x") == Span(0, SPAN, "x")
