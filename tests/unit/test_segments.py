"""The plan of a blob that several turns bring: every byte is some turn's, once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.pull.segments import (
    GATHER_BYTES,
    TURN_PARTS,
    Segment,
    Segments,
    cut,
    first_cut,
    may_gather,
)

MIB = 1 << 20


def spans(plan: Segments, *, parts: int, most: int) -> list[tuple[int, int | None]]:
    """What as many turns as it takes would bring, if all began now."""
    taken = []
    while (segment := plan.take(parts=parts, most=most)) is not None:
        taken.append((segment.start, segment.stop))
    return taken


def test_turns_that_begin_at_once_get_about_equal_cuts_and_later_ones_smaller_ones() -> None:
    plan = Segments(96 * MIB, least=4 * MIB)
    lengths = [(stop or 0) - start for start, stop in spans(plan, parts=8, most=64 * MIB)]
    assert lengths[:7] == sorted(lengths[:7], reverse=True)
    assert lengths[0] == 12 * MIB
    assert min(lengths) >= 4 * MIB
    assert sum(lengths) == 96 * MIB
    assert len(lengths) <= 16


def test_no_segment_is_longer_than_its_turn_may_be_by_more_than_a_crumb() -> None:
    plan = Segments(1000 * MIB, least=4 * MIB)
    lengths = [(stop or 0) - start for start, stop in spans(plan, parts=8, most=2 * MIB)]
    assert max(lengths) <= 3 * MIB
    assert min(lengths) >= 2 * MIB


def test_beside_others_it_is_no_longer_than_a_part_of_a_turn() -> None:
    """What is behind it cannot be hashed before it has come."""
    plan = Segments(512 * MIB, least=2 * MIB)
    lengths = [(stop or 0) - start for start, stop in spans(plan, parts=8, most=64 * MIB)]
    assert max(lengths) <= 64 * MIB // TURN_PARTS + MIB
    assert min(lengths[:16]) == 64 * MIB // TURN_PARTS
    # A slow connection's turn may have less than that is worth a request.
    slow = Segments(512 * MIB, least=2 * MIB).take(parts=8, most=3 * MIB)
    assert slow is not None
    assert slow.stop == 2 * MIB


def test_the_first_turn_asks_for_little_unless_one_turn_brings_all() -> None:
    assert first_cut(None, parts=8, least=4 * MIB, most=64 * MIB) == 4 * MIB
    assert first_cut(96 * MIB, parts=8, least=4 * MIB, most=64 * MIB) == 12 * MIB
    assert first_cut(5 * MIB, parts=8, least=4 * MIB, most=64 * MIB) == 64 * MIB


def test_alone_a_turn_gets_as_much_as_it_may_have() -> None:
    plan = Segments(96 * MIB, least=4 * MIB)
    assert spans(plan, parts=1, most=64 * MIB) == [(0, 64 * MIB), (64 * MIB, 96 * MIB)]


@pytest.mark.parametrize("size", [1, 4 * MIB, 6 * MIB])
def test_a_blob_that_is_hardly_more_than_the_least_is_one_segment(size: int) -> None:
    assert spans(Segments(size, least=4 * MIB), parts=8, most=64 * MIB) == [(0, size)]


def test_what_a_broken_turn_did_not_bring_is_the_next_to_be_taken() -> None:
    plan = Segments(100, least=10)
    first = plan.take(parts=5, most=100)
    second = plan.take(parts=5, most=100)
    assert first is not None
    assert second is not None
    plan.wrote(first, 7)
    plan.give_back(first)
    plan.give_back(first)
    again = plan.take(parts=5, most=100)
    assert again is not None
    assert (again.start, again.stop) == (7, 20)
    assert plan.contiguous == 7
    assert plan.done_after(3) == 7
    assert plan.done_after(50) == 50


def test_a_plan_can_begin_with_what_is_there_and_with_a_turn_under_way() -> None:
    plan = Segments(100, least=10, done=30)
    under_way = Segment(30, None)
    plan.adopt(under_way, 500)
    assert under_way.stop == 100
    assert plan.take(parts=3, most=100) is None
    plan.give_back(under_way)
    assert plan.left == 70


def test_what_will_reach_a_position_is_the_segment_that_holds_it_or_else_the_mark() -> None:
    plan = Segments(100, least=20)
    first = plan.take(parts=5, most=100)
    second = plan.take(parts=5, most=100)
    assert first is not None
    assert second is not None
    plan.wrote(first, 5)
    plan.wrote(second, 6)
    assert plan.front(10) == 5
    assert plan.front(30) == 26
    assert plan.front(22) == 5  # written already, and so nobody's
    assert plan.front(90) == 5


def test_gaps_are_what_is_not_done_whoever_brings_it() -> None:
    plan = Segments(100, least=10, done=20)
    plan.wrote(plan.claim(40, 60), 10)
    assert list(plan.gaps(0, 100)) == [(20, 40), (50, 100)]
    assert list(plan.gaps(10, 45)) == [(20, 40)]
    assert list(plan.gaps(25, 35)) == [(25, 35)]
    assert list(plan.gaps(40, 50)) == []
    assert list(plan.gaps(45, 45)) == []


def test_a_segment_that_ends_here_brings_one_byte_more() -> None:
    plan = Segments(100, least=10)
    segment = plan.take(parts=1, most=100)
    assert segment is not None
    plan.wrote(segment, 10)
    segment.first_of([bytes(5)])
    segment.end_here()  # while five bytes are being written
    plan.wrote(segment, 5)
    assert not segment.is_cut
    assert segment.first_of([bytes(20)]) == [bytes(1)]
    plan.wrote(segment, 1)
    assert segment.is_cut
    plan.give_back(segment)
    assert list(plan.holes()) == [(16, 100)]
    last = plan.claim(90, 91)
    last.end_here()
    assert last.stop == 91


def test_the_segment_with_most_to_come_is_shortened_and_the_rest_is_a_hole() -> None:
    plan = Segments(100, least=5)
    first, second = plan.take(parts=1, most=20), plan.take(parts=1, most=80)
    assert first is not None
    assert second is not None
    plan.wrote(second, 10)
    assert second.first_of([bytes(6), bytes(4)]) == [bytes(6), bytes(4)]
    assert not plan.shorten([first, second], parts=3, long=61)
    assert plan.shorten([first, second], parts=3, long=60)  # but for what is in hand
    assert list(plan.holes()) == [(60, 100)]
    plan.wrote(second, 10)
    plan.wrote(second, 15)
    assert second.is_shortened
    assert not second.is_cut
    assert second.first_of([bytes(3), bytes(3)]) == [bytes(3), bytes(2)]
    plan.wrote(second, 5)
    assert second.is_cut


def test_a_shortened_segment_whose_rest_nobody_brings_can_go_on() -> None:
    plan = Segments(100, least=5)
    segment = plan.take(parts=1, most=100)
    assert segment is not None
    assert plan.shorten([segment], parts=2, long=10)
    rest = plan.take(parts=1, most=100)
    assert rest is not None
    assert (rest.start, rest.stop) == (50, 100)
    plan.stretch(segment, rest)
    assert segment.stop == 100
    assert not segment.is_shortened
    assert plan.left == 0


def test_what_a_trial_brings_is_the_end_of_what_may_be_cut() -> None:
    plan = Segments(100, least=5)
    plan.bounds = (0, 80)
    lead = plan.take(parts=1, most=60)
    assert lead is not None
    last = plan.take_last(10)
    assert last is not None
    assert (last.start, last.stop) == (70, 80)
    rest = plan.take_last(50)
    assert rest is not None
    assert (rest.start, rest.stop) == (60, 70)
    assert plan.take_last(1) is None
    plan.unbind()
    assert list(plan.open_holes()) == [(80, 100)]


def test_what_is_shortened_leaves_two_parts_and_is_no_fleets() -> None:
    plan = Segments(100, least=30)
    segment = plan.take(parts=1, most=100)
    assert segment is not None
    assert not plan.shorten([], parts=2, long=1)
    plan.bounds = (0, 100)
    assert not plan.shorten([segment], parts=2, long=1)
    plan.bounds = None
    plan.wrote(segment, 70)
    assert not plan.shorten([segment], parts=2, long=1)  # there would be no other part
    assert Segments(100, least=5).shorten([Segment(0, 100)], parts=2, long=1)


def test_a_segment_without_an_end_has_no_place_in_a_plan() -> None:
    plan = Segments(100, least=10)
    plan._taken.add(Segment(0, None))
    with pytest.raises(ValueError, match="no end"):
        plan.take(parts=2, most=10)


@given(
    hole=st.integers(1, 10_000),
    more=st.integers(0, 10_000),
    parts=st.integers(1, 20),
    least=st.integers(1, 500),
    most=st.integers(1, 500),
)
def test_a_cut_is_within_its_hole_and_leaves_no_crumb(
    hole: int, more: int, parts: int, least: int, most: int
) -> None:
    length = cut(hole, hole + more, parts=parts, least=least, most=most)
    assert 1 <= length <= hole
    assert length <= most + min(least, most) // 2
    assert length == hole or hole - length > min(least, most) // 2


class Blob(RuleBasedStateMachine):
    """Turns that begin, come on, break and end in any order, beside an account of each byte."""

    SIZE = 200

    def __init__(self) -> None:
        super().__init__()
        self.plan = Segments(self.SIZE, least=10)
        self.turns: list[Segment] = []
        self.in_hand: dict[Segment, int] = {}
        self.written = [0] * self.SIZE

    @rule(parts=st.integers(1, 9), most=st.integers(1, 80))
    def take(self, parts: int, most: int) -> None:
        holes = list(self.plan.holes())
        segment = self.plan.take(parts=parts, most=most)
        assert (segment is None) == (not holes)
        if segment is not None:
            assert segment.start == holes[0][0]
            assert segment.stop is not None
            assert segment.start < segment.stop <= holes[0][1]
            self.turns.append(segment)

    @precondition(lambda self: self.turns)
    @rule(place=st.integers(0, 99), share=st.floats(0, 1))
    def arrive(self, place: int, share: float) -> None:
        """A piece, perhaps of what the turn has asked for and is not to bring any more."""
        segment = self.turns[place % len(self.turns)]
        if segment not in self.in_hand:
            assert segment.asked is not None
            count = round((segment.asked - segment.at) * share)
            kept = segment.first_of([bytes(count // 2), bytes(count - count // 2)])
            self.in_hand[segment] = sum(map(len, kept))

    @precondition(lambda self: self.turns)
    @rule(place=st.integers(0, 99), ends=st.booleans())
    def come(self, place: int, ends: bool) -> None:
        segment = self.turns[place % len(self.turns)]
        count = self.in_hand.pop(segment, 0)
        for byte in range(segment.at, segment.at + count):
            self.written[byte] += 1
        self.plan.wrote(segment, count)
        if ends:
            self.turns.remove(segment)
            self.plan.give_back(segment)

    @rule(parts=st.integers(2, 9), long=st.integers(1, 80))
    def shorten(self, parts: int, long: int) -> None:
        before = self.plan.left
        assert self.plan.shorten(self.turns, parts=parts, long=long) is (self.plan.left > before)

    @rule()
    def stretch(self) -> None:
        for segment in self.turns:
            for follower in self.turns:
                has_come = follower.at > follower.start or follower in self.in_hand
                if segment.is_shortened and segment.stop == follower.start and not has_come:
                    self.plan.stretch(segment, follower)
                    self.turns.remove(follower)
                    return

    @rule(share=st.floats(0, 1))
    def reach(self, share: float) -> None:
        """What was hashed is done, which it is anyway."""
        self.plan.reach(round(self.plan.contiguous * share))

    @invariant()
    def every_byte_is_in_one_place(self) -> None:
        assert max(self.written) <= 1
        coming = [0] * self.SIZE
        for segment in self.turns:
            assert segment.stop is not None
            for byte in range(segment.at, segment.stop):
                coming[byte] += 1
        holes = [0] * self.SIZE
        for start, stop in self.plan.holes():
            assert start < stop
            for byte in range(start, stop):
                holes[byte] += 1
        assert all(sum(one) == 1 for one in zip(self.written, coming, holes, strict=True))
        assert self.plan.left == sum(holes)

    @invariant()
    def the_mark_is_where_the_first_byte_is_missing(self) -> None:
        missing = [place for place, count in enumerate(self.written) if not count]
        assert self.plan.contiguous == (missing[0] if missing else self.SIZE)
        for position in range(0, self.SIZE, 17):
            end = self.plan.done_after(position)
            assert all(self.written[position:end])
            assert end == self.SIZE or end == position or not self.written[end]


Blob.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBlob = Blob.TestCase


@pytest.mark.parametrize(
    ("at", "stop", "received", "count", "may"),
    [
        (50, 60, 40, 1, True),
        (50, None, 40, 1, True),
        (50, 60, 50 * MIB, 1, False),  # it is next: readers wait for it
        (50, 60, 40, GATHER_BYTES, False),  # it comes fast enough
        (50, 51, 40, 1, False),  # the turn, and with it a slot, would wait
    ],
)
def test_small_pieces_that_nobody_waits_for_may_gather(
    at: int, stop: int | None, received: int, count: int, may: bool
) -> None:
    """``at`` and ``stop`` in MiB."""
    segment = Segment(at * MIB, None if stop is None else stop * MIB)
    assert may_gather(segment, received, count) is may
