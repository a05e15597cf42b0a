"""A chain of receivers whose head dies must not close into a ring, whoever forgot what."""

from __future__ import annotations

import random

import pytest

from proxy.fleet.claims import Grant
from proxy.fleet.local_claims import Board, LocalClaims
from proxy.fleet.pursuit import Pursuit
from proxy.fleet.shunned import Shunned, Why
from proxy.fleet.stripes import MIB
from proxy.oci.digest import Digest
from proxy.testing import FakeClock
from tests.unit.claims_conformance import giver
from tests.unit.fleet_kit import at_once

DIGEST = Digest.of(b"a blob")
SIZE = 2 * MIB


class One:
    def __init__(self, board: Board, number: int) -> None:
        self.claims = LocalClaims(board, giver(number))
        self.pursuit = Pursuit(
            giver(number), shunned=Shunned(), rng=random.Random(number), size=SIZE
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
