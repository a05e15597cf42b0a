"""No ring of receivers when a chain's head dies, whoever forgot what; how often a node asks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.fleet_time import at_once
from proxy.fleet.board import Board
from proxy.fleet.claims import Grant, Holding, Outcome, Taken, Terms, View, Wish
from proxy.fleet.local_claims import LocalClaims
from proxy.fleet.patience import LONGEST, LOOKERS, MOST_PATIENT, PEACE, PROMPT
from proxy.fleet.pursuit import LOOK_EACH, Pursuit
from proxy.fleet.shunned import Shunned, Why
from proxy.fleet.steps import Ask
from proxy.fleet.stripes import MIB, Span, stripe_count
from proxy.fleet.traffic import ALTOGETHER, WHILE_FILLING, WIDTH, Traffic
from proxy.oci.digest import Digest
from proxy.testing import FakeClock
from tests.unit.claims_conformance import giver

DIGEST = Digest.of(b"a blob")
SIZE = 2 * MIB
COUNT = stripe_count(SIZE)


class One:
    def __init__(self, board: Board, number: int, traffic: Traffic | None = None) -> None:
        self.claims = LocalClaims(board, giver(number))
        self.pursuit = Pursuit(
            giver(number),
            shunned=Shunned(),
            rng=random.Random(number),
            size=SIZE,
            traffic=traffic,
        )
        self.pursuit.saw(at_once(self.claims.look(DIGEST)))

    def take(self) -> Grant | None:
        """What it gets of the first stripe, if anything."""
        step = self.pursuit.step(0, 0.0)
        wanted = [wish for wish in step.wishes if wish.stripe == 0]
        published = self.pursuit.published
        taken = at_once(self.claims.take(DIGEST, wanted, 1, published, step.avoid))
        assert self.pursuit.took(taken)
        return taken.grants[0] if taken.grants else None


@pytest.mark.parametrize("forgets", [False, True])
def test_a_receiver_whose_giver_died_is_not_sent_to_its_own_taker(forgets: bool) -> None:
    board = Board(clock=FakeClock(), rng=random.Random(1))
    filler = LocalClaims(board, giver(1))
    at_once(filler.fill(DIGEST, SIZE))
    at_once(filler.publish(DIGEST, SIZE, 0, [b"\1" * 32]))
    two, three = One(board, 2), One(board, 3)
    first, second = two.take(), three.take()
    assert first
    assert second
    assert (first.giver, second.giver) == (giver(1), giver(2))
    if forgets:
        board.forget()
        again = One(board, 4)
        at_once(again.claims.fill(DIGEST, SIZE))
        at_once(again.claims.publish(DIGEST, SIZE, 0, [b"\1" * 32], [giver(1).node]))
        at_once(again.claims.withdraw(DIGEST))
        for one, grant in ((two, first), (three, second)):
            one.pursuit.saw(at_once(one.claims.look(DIGEST)))
            generation = one.pursuit.generation
            at_once(one.claims.hold(DIGEST, generation, 0, [grant]))
    else:
        at_once(filler.withdraw(DIGEST))
    at_once(two.claims.give_back(first, two.pursuit.ended(0, Why.DIED, 0.0)))
    assert two.take() is None
    # Nor would its taker serve it, were it asked all the same.
    assert not three.pursuit.may_pass_on(0, 1)
    assert three.pursuit.may_pass_on(0, 3)


@pytest.mark.parametrize(
    ("why", "outcome"),
    [
        (None, Outcome.DONE),
        (Why.DIED, Outcome.DIED),
        (Why.STALLED, Outcome.DIED),
        (Why.LIED, Outcome.LIED),
        (Why.BUSY, Outcome.FAILED),
        (Why.LACKED, Outcome.FAILED),
    ],
)
def test_the_directory_is_told_who_may_be_dead(why: Why | None, outcome: Outcome) -> None:
    board = Board(clock=FakeClock(), rng=random.Random(1))
    filler = LocalClaims(board, giver(1))
    at_once(filler.fill(DIGEST, SIZE))
    at_once(filler.publish(DIGEST, SIZE, 0, [b"\1" * 32]))
    two = One(board, 2)
    assert two.take()
    assert two.pursuit.ended(0, why, 0.0) is outcome


def test_grants_whose_hashes_are_not_known_are_not_taken() -> None:
    board = Board(clock=FakeClock(), rng=random.Random(1))
    old, new = LocalClaims(board, giver(1)), LocalClaims(board, giver(2))
    at_once(old.fill(DIGEST, SIZE))
    at_once(old.publish(DIGEST, SIZE, 0, [b"\1" * 32]))
    three = One(board, 3)
    board.forget()
    at_once(new.fill(DIGEST, SIZE))
    at_once(new.publish(DIGEST, SIZE, 0, [b"\2" * 32]))
    taken = at_once(three.claims.take(DIGEST, [Wish(0)], 1, three.pursuit.published))
    assert taken.grants
    assert not three.pursuit.took(taken)
    assert not three.pursuit.receiving
    assert three.pursuit.took(replace(taken, view=at_once(three.claims.look(DIGEST))))
    assert three.pursuit.expected(0) == b"\2" * 32
    assert three.pursuit.ended(0, None, 0.0) is Outcome.DONE


def test_a_filler_looks_often_enough_to_renew_its_lease_though_it_is_doubted() -> None:
    pursuit = Pursuit(giver(1), shunned=Shunned(), rng=random.Random(1), size=SIZE)
    pursuit.saw(View("1", SIZE, filler=giver(1).node, nodes=LOOKERS))
    pursuit.answered(60.0, 0.0)
    terms = Terms()
    assert terms.renewal + pursuit.step(0, 0.0).wait < terms.doubted


@pytest.mark.parametrize(("mebibytes", "stripes"), [(64, 64), (128, 32), (4096, 4)])
def test_the_upstream_is_asked_for_a_turns_worth_of_stripes(mebibytes: int, stripes: int) -> None:
    board = Board(clock=FakeClock(), rng=random.Random(1))
    claims = LocalClaims(board, giver(1))
    pursuit = Pursuit(giver(1), shunned=Shunned(), rng=random.Random(1), size=mebibytes * MIB)
    pursuit.saw(at_once(claims.look(DIGEST)))
    pursuit.led(at_once(claims.fill(DIGEST, pursuit.size)))
    assert pursuit.step(0, 0.0).fill == Span(0, stripes)


def crowd_of(nodes: int, traffic: Traffic | None = None) -> One:
    """A node that sees so many others, and all stripes published."""
    board = Board(clock=FakeClock(), rng=random.Random(1))
    filler = LocalClaims(board, giver(1))
    at_once(filler.fill(DIGEST, SIZE))
    at_once(filler.publish(DIGEST, SIZE, 0, [b"\1" * 32, b"\2" * 32]))
    one = One(board, 2, traffic)
    view = at_once(one.claims.look(DIGEST))
    one.pursuit.saw(replace(view, nodes=nodes))
    return one


def test_a_node_that_fills_one_blob_takes_one_stripe_of_each_other_at_a_time() -> None:
    traffic = Traffic()
    fills, takes = crowd_of(6, traffic).pursuit, crowd_of(6, traffic).pursuit
    assert takes.step(0, 0.0).room == WIDTH
    fills.begun(Span(0, 2))
    assert takes.step(0, 0.0).room == WHILE_FILLING
    takes.asked(Ask(100, giver(1), 1))
    step = takes.step(0, 0.0)
    assert (step.wishes, step.room) == ((), 0)
    assert not takes.is_to_look(0, 0.0)
    assert step.wait == MOST_PATIENT
    assert fills.filled(0, b"\1" * 32)
    assert not takes.step(0, 0.0).room
    assert fills.filled(1, b"\2" * 32)  # the last one
    assert takes.step(0, 0.0).room == WIDTH - 1


@pytest.mark.parametrize("how", ["ended", "wrong", "left"])
def test_who_does_not_fill_any_more_makes_room(how: str) -> None:
    traffic = Traffic()
    fills, takes = crowd_of(6, traffic).pursuit, crowd_of(6, traffic).pursuit
    fills.begun(Span(0, 2))
    fills.asked(Ask(100, giver(1), 1))
    if how == "ended":
        fills.fill_ended(None, 0.0)
    elif how == "wrong":
        fills.found_wrong()
    else:
        fills.left()
    assert takes.step(0, 0.0).room == WIDTH


def test_all_blobs_together_have_so_much_room_and_each_has_some() -> None:
    traffic = Traffic()
    first, second, third = (crowd_of(6, traffic).pursuit for _ in range(3))
    for stripe in range(100, 100 + WIDTH):
        first.asked(Ask(stripe, giver(1), 1))
    assert second.step(0, 0.0).room == WIDTH
    for stripe in range(100, 100 + ALTOGETHER - WIDTH):
        second.asked(Ask(stripe, giver(1), 1))
    assert third.step(0, 0.0).room == 1
    third.asked(Ask(100, giver(1), 1))
    assert not third.step(0, 0.0).room
    for stripe in (100, 101):
        first.ended(stripe, Why.BUSY, 0.0)
    assert third.step(0, 0.0).room == 1
    assert repr(traffic) == f"<Traffic: {ALTOGETHER - 1} stripes, 0 blobs filled>"


@pytest.mark.parametrize(("nodes", "least"), [(6, 1), (LOOKERS - 1, 1), (LOOKERS, 2), (5000, 3)])
def test_the_larger_the_crowd_the_more_stripes_are_asked_for_at_once(
    nodes: int, least: int
) -> None:
    pursuit = crowd_of(nodes).pursuit
    pursuit.asked(Ask(0, giver(1), 1))  # which readers wait for
    for stripe in range(100, 100 + WIDTH - least):
        assert pursuit.step(0, 0.0).wishes
        pursuit.asked(Ask(stripe, giver(1), 1))
    step = pursuit.step(0, 0.0)
    assert (step.wishes, step.saves) == ((), True)


def test_a_directory_that_answers_late_is_left_in_peace_for_longer_than_that() -> None:
    pursuit = crowd_of(LOOKERS).pursuit
    pursuit.answered(PROMPT, 0.0)
    assert pursuit.step(0, 0.0).wishes
    pursuit.answered(PROMPT + LONGEST / PEACE, 10.0)
    step = pursuit.step(0, 10.5)
    assert (step.wishes, step.saves) == ((), True)
    assert step.wait >= LONGEST - 0.5
    assert pursuit.step(0, 10.0 + LONGEST).wishes


def test_with_few_nodes_it_is_the_line_that_is_slow() -> None:
    pursuit = crowd_of(LOOKERS - 1).pursuit
    pursuit.answered(PROMPT + 1.0, 10.0)
    assert pursuit.step(0, 10.0).wishes


def test_who_has_something_to_take_does_not_look_first_but_now_and_then() -> None:
    pursuit = crowd_of(6).pursuit
    nothing = Taken((), frozenset(), View(pursuit.generation, first=pursuit.published, nodes=6))
    for _ in range(LOOK_EACH):
        assert not pursuit.is_to_look(0, 0.0)
        assert pursuit.took(nothing)
    assert pursuit.is_to_look(0, 0.0)
    seen = Holding(giver(3), 0b11)
    assert pursuit.saw(replace(nothing.view, holdings=(seen,)))
    assert not pursuit.is_to_look(0, 0.0)


def test_who_gets_all_that_is_left_does_not_look_meanwhile() -> None:
    pursuit = crowd_of(6).pursuit
    for stripe in range(COUNT):
        assert pursuit.step(0, 0.0).wait < MOST_PATIENT
        pursuit.asked(Ask(stripe, giver(1), 1))
    assert not pursuit.is_to_look(0, 0.0)
    assert pursuit.step(0, 0.0).wait == MOST_PATIENT
    pursuit.ended(1, Why.DIED, 0.0)
    assert pursuit.step(0, 0.0).wishes


def test_a_filler_that_gets_all_from_the_upstream_does_not_look_meanwhile() -> None:
    one = One(Board(clock=FakeClock(), rng=random.Random(1)), 2)
    pursuit = one.pursuit
    pursuit.led(at_once(one.claims.fill(DIGEST, SIZE)))
    pursuit.begun(Span(0, COUNT))
    assert not pursuit.is_to_look(0, 0.0)
    assert pursuit.step(0, 0.0).wait == MOST_PATIENT
    pursuit.gave_up()  # then another one may fill
    assert pursuit.is_to_look(0, 0.0)
    assert pursuit.step(0, 0.0).wait < MOST_PATIENT


def test_whom_the_directory_is_gone_for_looks_for_it_whatever_else_it_does() -> None:
    pursuit = crowd_of(6).pursuit
    for stripe in range(COUNT):
        pursuit.asked(Ask(stripe, giver(1), 1))
    pursuit.directory_gone(0.0)
    assert pursuit.is_to_look(0, 0.0)
    assert pursuit.step(0, 0.0).wait < MOST_PATIENT


def test_what_comes_next_is_wished_before_it_is_published() -> None:
    board = Board(clock=FakeClock(), rng=random.Random(1))
    filler = LocalClaims(board, giver(1))
    at_once(filler.fill(DIGEST, SIZE))
    one = One(board, 2)
    assert [wish.stripe for wish in one.pursuit.step(0, 0.0).wishes] == list(range(COUNT))
    assert one.take() is None
    at_once(filler.publish(DIGEST, SIZE, 0, [b"\1" * 32]))
    grant = one.take()
    assert grant
    assert one.pursuit.expected(grant.stripe) == b"\1" * 32


def test_a_filler_that_lacks_what_others_have_asks_for_it_meanwhile() -> None:
    one = crowd_of(6)
    one.pursuit.led(giver(2).node)
    one.pursuit.begun(Span(0, 1))
    assert [wish.stripe for wish in one.pursuit.step(0, 0.0).wishes] == [1]
    assert one.pursuit.step(0, 0.0).wait < MOST_PATIENT


def test_the_filler_wishes_nothing_that_it_has_to_publish_itself() -> None:
    one = One(Board(clock=FakeClock(), rng=random.Random(1)), 2)
    one.pursuit.led(at_once(one.claims.fill(DIGEST, SIZE)))
    assert one.pursuit.step(0, 0.0).wishes == ()


@pytest.mark.parametrize(("size", "is_spared_on"), [(SIZE, True), (MIB, False)])
def test_a_filler_is_spared_on_when_it_has_published_all_of_several_stripes(
    size: int, is_spared_on: bool
) -> None:
    claims = LocalClaims(Board(clock=FakeClock(), rng=random.Random(1)), giver(1))
    pursuit = Pursuit(giver(1), shunned=Shunned(), rng=random.Random(1), size=size)
    pursuit.saw(at_once(claims.look(DIGEST)))
    pursuit.led(at_once(claims.fill(DIGEST, size)))
    pursuit.begun(Span(0, pursuit.count))
    for stripe in range(pursuit.count):
        assert pursuit.filled(stripe, bytes([stripe]) * 32)
    pursuit.found_right(0.0)
    assert not pursuit.is_spared_on  # others do not know of it yet
    fresh = pursuit.step(0, 0.0).publish
    assert fresh
    pursuit.was_published(
        fresh, at_once(claims.publish(DIGEST, size, fresh.first, fresh.hashes, fresh.by))
    )
    assert pursuit.is_spared_on is is_spared_on
    pursuit.gave_up()
    assert not pursuit.is_spared_on


def test_in_a_crowd_what_readers_wait_for_is_asked_for_though_there_is_little_room() -> None:
    pursuit = crowd_of(5000).pursuit
    for stripe in range(100, 100 + WIDTH - 1):
        pursuit.asked(Ask(stripe, giver(1), 1))
    assert pursuit.step(0, 0.0).wishes[0] == Wish(0, is_urgent=True)
    pursuit.asked(Ask(0, giver(1), 1))
    pursuit.ended(100, Why.DIED, 0.0)
    assert pursuit.step(0, 0.0).wishes == ()


def test_no_wait_is_longer_than_leases_allow() -> None:
    pursuit = crowd_of(100_000).pursuit
    pursuit.answered(60.0, 0.0)
    assert pursuit.step(0, 0.0).wait <= LONGEST
