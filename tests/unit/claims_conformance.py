"""What every ``Claims`` has to do, in process or in a Redis.

Subclass ``ClaimsConformance`` in a test module and say how a fleet is made. Time passes only by
``Fleet.advance``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

import pytest

from proxy.fleet.claims import (
    ANY_RANK,
    WHOLE,
    Claims,
    Giver,
    Grant,
    Outcome,
    Terms,
    View,
    Wish,
)
from proxy.oci.digest import Digest

DIGEST, OTHER = Digest.of(b"a blob"), Digest.of(b"another blob")
MIB = 1024 * 1024
SIZE = 64 * MIB


def giver(number: int, zone: str = "a") -> Giver:
    return Giver(f"{number:016x}", f"node-{number}", zone, f"http://10.0.0.{number}:5052")


def hash_of(stripe: int, salt: int = 0) -> bytes:
    return bytes([stripe, salt]) * 16


@dataclass(slots=True)
class Fleet:
    """Nodes on one directory, whose time can be moved on and whose memory can be lost."""

    make: Callable[[Giver], Claims]
    advance: Callable[[float], None]
    forget: Callable[[], Awaitable[None]]
    nodes: dict[int, Claims] = field(default_factory=dict)

    def __call__(self, number: int, zone: str = "a") -> Claims:
        if number not in self.nodes:
            self.nodes[number] = self.make(giver(number, zone))
        return self.nodes[number]

    async def settled(self, count: int) -> None:
        """A node that has published so many stripes, and fills no more."""
        await (await self.published(count)).settle(DIGEST)

    async def published(self, count: int, filler: int = 1) -> Claims:
        """The filler, when it has published so many stripes."""
        node = self(filler)
        assert await node.fill(DIGEST, SIZE) == giver(filler).node
        hashes = [hash_of(stripe) for stripe in range(count)]
        assert await node.publish(DIGEST, SIZE, 0, hashes) == count
        return node

    async def lending(self, generation: str, givers: Sequence[Giver]) -> None:
        """Each of these lends something to a node that takes stripe 1."""
        grants = [
            Grant(DIGEST, generation, 1, one, 1, f"held.{number}")
            for number, one in enumerate(givers)
        ]
        assert await self(900, "c").hold(DIGEST, generation, 0, grants)


def having(view: View, number: int) -> int | None:
    """What the view says that a node has."""
    return next((h.have for h in view.holdings if h.giver.node == giver(number).node), None)


async def one(
    node: Claims, stripe: int, limit: int = ANY_RANK, avoid: Collection[int] = ()
) -> Grant | None:
    """The grant of one wish, if there is one."""
    names = [giver(number).node for number in avoid]
    taken = await node.take(DIGEST, [Wish(stripe, limit)], 1, 0, names)
    return taken.grants[0] if taken.grants else None


class ClaimsConformance(ABC):
    TERMS = Terms(most=3, each=2, filler_most=3, filler_each=2, wholes=4, sample=30)
    SPARING = Terms(most=3, each=2, filler_most=2, filler_each=1)

    @abstractmethod
    def fleet(self, terms: Terms) -> contextlib.AbstractAsyncContextManager[Fleet]: ...

    @pytest.fixture
    async def nodes(self) -> AsyncIterator[Fleet]:
        async with self.fleet(self.TERMS) as fleet:
            yield fleet

    async def test_of_an_unknown_blob_there_is_nothing(self, nodes: Fleet) -> None:
        view = await nodes(1).look(DIGEST)
        assert view.generation
        assert (view.size, view.hashes, view.filler, view.holdings) == (None, (), None, ())

    async def test_the_first_to_ask_fills_and_the_others_learn_who(self, nodes: Fleet) -> None:
        assert await nodes(1).fill(DIGEST, None) == giver(1).node
        assert await nodes(2).fill(DIGEST, None) == giver(1).node
        assert await nodes(2).fill(OTHER, None) == giver(2).node
        assert (await nodes(3).look(DIGEST)).filler == giver(1).node

    async def test_who_fills_and_knows_the_size_tells_it(self, nodes: Fleet) -> None:
        await nodes(1).fill(DIGEST, None)
        assert (await nodes(2).look(DIGEST)).size is None
        await nodes(1).fill(DIGEST, SIZE)
        assert (await nodes(2).look(DIGEST)).size == SIZE

    async def test_a_filler_that_renews_stays_and_one_that_does_not_lapses(
        self, nodes: Fleet
    ) -> None:
        await nodes(1).fill(DIGEST, SIZE)
        for _ in range(4):
            nodes.advance(self.TERMS.filler * 0.9)
            assert await nodes(1).fill(DIGEST, SIZE) == giver(1).node
        nodes.advance(self.TERMS.filler + 0.1)
        assert (await nodes(2).look(DIGEST)).filler is None
        assert await nodes(2).fill(DIGEST, SIZE) == giver(2).node
        assert await nodes(1).fill(DIGEST, SIZE) == giver(2).node

    async def test_a_filler_that_publishes_nothing_makes_way_though_it_renews(
        self, nodes: Fleet
    ) -> None:
        await nodes(1).fill(DIGEST, SIZE)
        for _ in range(int(self.TERMS.stuck / 5)):
            nodes.advance(5)
            await nodes(1).fill(DIGEST, SIZE)
        assert await nodes(1).fill(DIGEST, SIZE) is None
        assert await nodes(2).fill(DIGEST, SIZE) == giver(2).node

    async def test_a_filler_that_publishes_now_and_then_is_not_stuck(self, nodes: Fleet) -> None:
        await nodes(1).fill(DIGEST, SIZE)
        for stripe in range(2):
            for _ in range(int(self.TERMS.stuck / 5) - 1):
                nodes.advance(5)
                assert await nodes(1).fill(DIGEST, SIZE) == giver(1).node
            assert await nodes(1).publish(DIGEST, SIZE, stripe, [hash_of(stripe)]) == stripe + 1

    async def test_what_is_settled_can_be_filled_by_another_at_once(self, nodes: Fleet) -> None:
        await nodes.published(2)
        await nodes(2).settle(DIGEST)  # it is not the filler
        assert (await nodes(2).look(DIGEST)).filler == giver(1).node
        await nodes(1).settle(DIGEST)
        assert (await nodes(2).look(DIGEST)).filler is None
        assert await nodes(2).fill(DIGEST, SIZE) == giver(2).node
        assert await nodes(2).publish(DIGEST, SIZE, 2, [hash_of(2)]) == 3
        assert await nodes(1).publish(DIGEST, SIZE, 3, [hash_of(3)]) is None

    async def test_published_hashes_come_with_who_published_them(self, nodes: Fleet) -> None:
        await nodes.published(3)
        names = [giver(7).node, giver(1).node]
        assert await nodes(1).publish(DIGEST, SIZE, 3, [hash_of(3), hash_of(4)], names) == 5
        view = await nodes(2).look(DIGEST)
        assert view.size == SIZE
        assert view.published == 5
        assert view.hashes == tuple(hash_of(stripe) for stripe in range(5))
        assert view.publishers == (*[giver(1).node] * 3, *names)
        later = await nodes(2).look(DIGEST, known=4)
        assert (later.first, later.hashes, later.published) == (4, (hash_of(4),), 5)

    async def test_hashes_that_do_not_follow_are_refused_with_what_there_is(
        self, nodes: Fleet
    ) -> None:
        await nodes.published(2)
        assert await nodes(1).publish(DIGEST, SIZE, 4, [hash_of(4)]) == 2
        assert await nodes(1).publish(DIGEST, SIZE, 0, [hash_of(9)]) == 2
        view = await nodes(2).look(DIGEST)
        assert view.hashes == (hash_of(0), hash_of(1))
        assert having(view, 1) == 0b11

    async def test_a_stripe_is_granted_of_whom_it_was_wished(self, nodes: Fleet) -> None:
        await nodes.published(3)
        grant = await one(nodes(2), 1)
        assert grant is not None
        assert (grant.digest, grant.stripe, grant.giver, grant.rank) == (DIGEST, 1, giver(1), 1)
        view = await nodes(3).look(DIGEST)
        assert {h.giver.node: (h.receiving, h.lending) for h in view.holdings} == {
            giver(1).node: ({}, 1),
            giver(2).node: ({1: 1}, 0),
        }

    async def test_nobody_is_granted_the_same_stripe_twice_at_a_time(self, nodes: Fleet) -> None:
        await nodes.published(3)
        assert await one(nodes(2), 1)
        assert await one(nodes(2), 1) is None

    async def test_a_giver_lends_a_stripe_only_so_often(self, nodes: Fleet) -> None:
        await nodes.settled(3)
        first = await one(nodes(2), 1)
        second = await one(nodes(3), 1)
        assert first
        assert second
        assert second.giver == giver(1)
        third = await one(nodes(4), 1)
        assert third
        assert third.giver in (giver(2), giver(3))
        assert third.rank == 2

    async def test_a_giver_lends_only_so_much(self, nodes: Fleet) -> None:
        await nodes.published(4)
        for stripe in range(3):
            assert await one(nodes(10 + stripe), stripe)
        assert await one(nodes(20), 3) is None
        taken = await nodes(20).take(DIGEST, [Wish(3)], 1)
        assert (taken.grants, taken.missing) == ((), frozenset())

    async def test_the_filler_lends_less_at_a_time_as_long_as_it_fills(self) -> None:
        async with self.fleet(self.SPARING) as nodes:
            await nodes.published(4)
            first, second = await one(nodes(2), 0), await one(nodes(3), 0)
            assert first
            assert second
            assert (first.giver, second.giver) == (giver(1), giver(2))
            assert await one(nodes(4), 1)
            assert await one(nodes(5), 2) is None
            await nodes(1).settle(DIGEST)
            assert await one(nodes(5), 2)

    @pytest.mark.parametrize("is_taking", [False, True])
    async def test_a_filler_that_a_taker_saw_die_has_little_time_to_show_that_it_lives(
        self, nodes: Fleet, is_taking: bool
    ) -> None:
        await nodes.published(1)
        grant = await one(nodes(2), 0)
        assert grant

        async def say(outcome: Outcome) -> None:
            if is_taking:
                await nodes(2).take(DIGEST, (), 0, ended=[(grant, outcome)])
            else:
                await nodes(2).give_back(grant, outcome)

        for outcome in (Outcome.FAILED, Outcome.LIED, Outcome.DONE):
            await say(outcome)
        nodes.advance(self.TERMS.doubted * 1.1)
        for _ in range(3):
            await say(Outcome.DIED)
            nodes.advance(self.TERMS.renewal * 2)
            assert (await nodes(3).look(DIGEST)).filler == giver(1).node
            assert await nodes(1).fill(DIGEST, SIZE) == giver(1).node
        nodes.advance(self.TERMS.doubted * 1.1)
        assert (await nodes(3).look(DIGEST)).filler == giver(1).node  # it has renewed
        await say(Outcome.DIED)
        nodes.advance(self.TERMS.doubted * 0.9)
        await say(Outcome.DIED)  # nor is it given more time
        nodes.advance(self.TERMS.doubted * 0.2)
        assert (await nodes(3).look(DIGEST)).filler is None
        assert await nodes(3).fill(DIGEST, SIZE) == giver(3).node

    async def test_that_another_giver_has_died_says_nothing_of_the_filler(
        self, nodes: Fleet
    ) -> None:
        await nodes.published(1)
        await nodes(2).hold(DIGEST, (await nodes(2).look(DIGEST)).generation, 1)
        grant = await one(nodes(3), 0, avoid=[1])
        assert grant
        assert grant.giver == giver(2)
        await nodes(3).give_back(grant, Outcome.DIED)
        nodes.advance(self.TERMS.doubted * 1.1)
        assert (await nodes(3).look(DIGEST)).filler == giver(1).node

    async def test_a_grant_that_is_given_back_makes_room_and_only_once(self, nodes: Fleet) -> None:
        await nodes.published(4)
        grants = [await one(nodes(10 + stripe), stripe) for stripe in range(3)]
        assert grants[0]
        for outcome in (Outcome.FAILED, Outcome.FAILED, Outcome.LIED):
            await nodes(10).give_back(grants[0], outcome)
        assert await one(nodes(20), 3)
        other = await one(nodes(21), 3)  # of 20, which receives it: 1 is full again
        assert other
        assert (other.giver, other.rank) == (giver(20), 2)

    async def test_what_has_ended_is_given_back_before_more_is_taken(self, nodes: Fleet) -> None:
        await nodes.published(4)
        grants = []
        for stripe in range(3):
            grant = await one(nodes(2), stripe)
            assert grant
            grants.append(grant)
        assert await one(nodes(2), 3) is None  # 1 lends all it may
        ended = [(grants[0], Outcome.DONE), (grants[1], Outcome.FAILED)]
        wishes = [Wish(1), Wish(3)]
        taken = await nodes(2).take(DIGEST, wishes, 2, ended=ended)
        assert [(grant.stripe, grant.giver) for grant in taken.grants] == [
            (3, giver(1)),
            (1, giver(1)),
        ]
        view = await nodes(3).look(DIGEST)
        assert {h.giver.node: (h.have, h.receiving, h.lending) for h in view.holdings} == {
            giver(1).node: (0b1111, {}, 3),
            giver(2).node: (0b1, {1: 1, 2: 1, 3: 1}, 0),
        }
        ended = [(grant, Outcome.DONE) for grant in (*taken.grants, grants[2])]
        assert (await nodes(2).take(DIGEST, (), 0, ended=ended)).grants == ()
        view = await nodes(3).look(DIGEST)
        assert [(h.lending, h.receiving) for h in view.holdings] == [(0, {})] * 2
        assert having(view, 2) == 0b1111

    async def test_who_lends_all_it_may_is_found_again_when_it_has_room(self, nodes: Fleet) -> None:
        await nodes.published(4)
        await nodes(1).settle(DIGEST)
        grants = [await one(nodes(10 + stripe), stripe) for stripe in range(3)]
        assert grants[0]
        assert await one(nodes(20), 3) is None
        await nodes(10).give_back(grants[0], Outcome.FAILED)
        again = await one(nodes(20), 3)
        assert again
        assert again.giver == giver(1)
        nodes.advance(self.TERMS.grant + 0.1)
        assert await one(nodes(21), 2)  # nobody gave back what has ended by itself

    async def test_who_has_received_a_stripe_has_it(self, nodes: Fleet) -> None:
        await nodes.published(12)
        for stripe in (9, 2):
            grant = await one(nodes(2), stripe)
            assert grant
            await nodes(2).give_back(grant, Outcome.DONE)
        assert having(await nodes(3).look(DIGEST), 2) == 1 << 9 | 1 << 2
        again = await one(nodes(3), 9)
        assert again
        assert (again.giver, again.rank) == (giver(2), 1)

    @pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.DIED, Outcome.LIED])
    async def test_who_has_failed_has_nothing_and_may_try_again(
        self, nodes: Fleet, outcome: Outcome
    ) -> None:
        await nodes.published(1)
        grant = await one(nodes(2), 0)
        assert grant
        await nodes(2).give_back(grant, outcome)
        assert having(await nodes(3).look(DIGEST), 2) == 0
        assert await one(nodes(2), 0)

    async def test_a_grant_ends_by_itself_unless_it_is_renewed(self, nodes: Fleet) -> None:
        await nodes.published(1)
        await nodes(1).settle(DIGEST)
        grants = [await one(nodes(number), 0) for number in (2, 3)]
        assert grants[0]
        assert grants[1]
        nodes.advance(self.TERMS.grant * 0.7)
        generation = (await nodes(3).look(DIGEST)).generation
        assert await nodes(3).hold(DIGEST, generation, 0, [grants[1]])
        nodes.advance(self.TERMS.grant * 0.7)
        view = await nodes(4).look(DIGEST)
        assert [h.lending for h in view.holdings if h.giver == giver(1)] == [1]
        assert {h.giver.node: h.receiving for h in view.holdings} == {
            giver(1).node: {},
            giver(2).node: {},
            giver(3).node: {0: 1},
        }

    async def test_ranks_grow_along_a_chain_of_receivers(self, nodes: Fleet) -> None:
        await nodes.published(1)
        ranks = []
        for number in (2, 3, 4):
            grant = await one(nodes(number), 0, avoid=range(1, number - 1))
            assert grant
            assert grant.giver == giver(number - 1)
            ranks.append(grant.rank)
        assert ranks == [1, 2, 3]

    async def test_a_ring_of_receivers_cannot_close(self, nodes: Fleet) -> None:
        await nodes.published(1)
        two, three = await one(nodes(2), 0), await one(nodes(3), 0)
        assert two
        assert three
        await nodes(2).give_back(two, Outcome.FAILED)
        again = await one(nodes(2), 0, limit=two.rank)
        assert again
        assert again.giver == giver(1)  # not of 3, which receives it of 2

    async def test_a_limit_is_kept_though_nobody_else_could_give(self, nodes: Fleet) -> None:
        await nodes.settled(1)
        for number in (2, 3):
            assert await one(nodes(number), 0)
        assert await one(nodes(4), 0, limit=1) is None
        assert await one(nodes(4), 0, limit=2)

    async def test_own_zone_is_asked_first(self, nodes: Fleet) -> None:
        await nodes.settled(1)
        grant = await one(nodes(2, "b"), 0)
        assert grant
        await nodes(2).give_back(grant, Outcome.DONE)
        there = await one(nodes(3, "b"), 0)
        here = await one(nodes(4, "a"), 0)
        assert there
        assert here
        assert (there.giver, here.giver) == (giver(2, "b"), giver(1))

    async def test_other_zones_are_asked_when_nobody_of_the_own_one_has_room(self) -> None:
        async with self.fleet(Terms(most=1, each=1, filler_most=1, filler_each=1)) as nodes:
            await nodes.settled(2)
            generation = (await nodes(2).look(DIGEST)).generation
            here = [1, *range(3, 11)]  # nine, more than are looked at
            for number in here[1:]:
                assert await nodes(number).hold(DIGEST, generation, 0b11)
            assert await nodes(50, "b").hold(DIGEST, generation, 0b11)
            for number in range(100, 108):  # eight of them lend all they may, by another stripe
                grant = await one(nodes(number), 1)
                assert grant
                assert grant.giver.zone == "a"
            ninth = await one(nodes(20), 0)
            assert ninth
            assert ninth.giver.zone == "a"
            there = await one(nodes(21), 0, avoid=[20])
            assert there
            assert there.giver == giver(50, "b")

    async def test_other_zones_are_seen_behind_a_crowd_of_the_own_one_and_a_busy_node(self) -> None:
        async with self.fleet(Terms(most=1, each=1, filler_most=1, filler_each=1)) as nodes:
            await nodes.settled(2)
            generation = (await nodes(2).look(DIGEST)).generation
            assert await nodes(50, "b").hold(DIGEST, generation, 0b11)
            crowd = range(3, 45)  # more than are looked at for those of other zones
            for number in crowd:
                assert await nodes(number).hold(DIGEST, generation, 0b11)
            assert await nodes(51, "b").hold(DIGEST, generation, 0b11)
            await nodes.lending(generation, [giver(1), *map(giver, crowd), giver(50, "b")])
            found = [await one(nodes(number), 0) for number in (100, 101)]
            assert giver(51, "b") in [grant.giver for grant in found if grant]

    async def test_who_has_all_is_asked_when_the_own_zone_has_no_room(self) -> None:
        async with self.fleet(Terms(most=1, each=1, filler_most=1, filler_each=1)) as nodes:
            await nodes.settled(2)
            generation = (await nodes(2).look(DIGEST)).generation
            crowd = range(3, 45)
            for number in crowd:
                assert await nodes(number).hold(DIGEST, generation, 0b11)
            assert await nodes(50, "b").hold(DIGEST, generation, 0b11)
            assert await nodes(60, "b").hold(DIGEST, "", WHOLE)
            await nodes.lending(generation, [giver(1), *map(giver, crowd), giver(50, "b")])
            grant = await one(nodes(100), 0)
            assert grant
            assert grant.giver == giver(60, "b")

    async def test_a_crowd_of_one_zone_waits_for_its_own(self) -> None:
        async with self.fleet(Terms(most=1, each=1, filler_most=1, filler_each=1)) as nodes:
            await nodes.settled(2)
            generation = (await nodes(2).look(DIGEST)).generation
            for number in range(3, 11):
                assert await nodes(number).hold(DIGEST, generation, 0b11)
            for number in range(100, 109):
                assert await one(nodes(number), 1)
            taken = await nodes(20).take(DIGEST, [Wish(0)], 1)
            assert (taken.grants, taken.missing) == ((), frozenset())

    async def test_of_some_the_one_that_lends_least_is_asked(self, nodes: Fleet) -> None:
        await nodes.settled(3)
        generation = (await nodes(2).look(DIGEST)).generation
        assert await nodes(2).hold(DIGEST, generation, 0b111)
        grants = [await one(nodes(10 + stripe), stripe) for stripe in range(3)]
        assert [grant.giver for grant in grants if grant] == [giver(1), giver(2), giver(1)]

    async def test_who_has_a_stripe_is_asked_rather_than_who_receives_it(
        self, nodes: Fleet
    ) -> None:
        await nodes.settled(2)
        first, second = await one(nodes(2), 0), await one(nodes(3), 0)
        assert first
        assert second
        assert (second.giver, second.rank) == (giver(1), 1)

    async def test_the_filler_is_asked_only_for_what_nobody_else_can_give(
        self, nodes: Fleet
    ) -> None:
        await nodes.published(2)
        assert await one(nodes(2), 0)
        other = await one(nodes(3), 0)
        assert other
        assert (other.giver, other.rank) == (giver(2), 2)
        left = await one(nodes(4), 0, avoid=(2, 3))
        assert left
        assert left.giver == giver(1)

    async def test_what_fewest_have_is_granted_first_but_for_what_is_urgent(
        self, nodes: Fleet
    ) -> None:
        await nodes.published(3)
        for number, stripe in ((2, 0), (3, 1), (4, 1)):
            assert await one(nodes(number), stripe)
        wishes = [Wish(1), Wish(0), Wish(2)]
        taken = await nodes(5).take(DIGEST, wishes, 2)
        assert [grant.stripe for grant in taken.grants] == [2, 0]
        urgent = [Wish(2), Wish(0), Wish(1, is_urgent=True)]
        taken = await nodes(6).take(DIGEST, urgent, 1)
        assert [grant.stripe for grant in taken.grants] == [1]

    async def test_a_crowd_is_served_through_one_another(self, nodes: Fleet) -> None:
        await nodes.published(1)
        grants = [await one(nodes(number), 0) for number in range(2, 18)]
        assert all(grants)
        assert max(grant.rank for grant in grants if grant) <= 5

    async def test_no_more_are_granted_than_there_is_room_for(self, nodes: Fleet) -> None:
        await nodes.published(3)
        wishes = [Wish(stripe) for stripe in (0, 2, 1)]
        taken = await nodes(2).take(DIGEST, wishes, 2)
        assert [grant.stripe for grant in taken.grants] == [0, 2]
        assert taken.view.published == 3

    async def test_what_is_not_published_yet_may_be_wished_and_is_not_missing(
        self, nodes: Fleet
    ) -> None:
        await nodes.published(2)
        generation = (await nodes(2).look(DIGEST)).generation
        assert await nodes(2).hold(DIGEST, generation, WHOLE)
        wishes = [Wish(2, is_urgent=True), Wish(1), Wish(3)]
        taken = await nodes(3).take(DIGEST, wishes, 3)
        assert [grant.stripe for grant in taken.grants] == [1]
        assert not taken.missing
        assert await nodes(1).publish(DIGEST, SIZE, 2, [hash_of(2)]) == 3
        taken = await nodes(3).take(DIGEST, wishes, 3)
        assert [grant.stripe for grant in taken.grants] == [2]
        assert not taken.missing

    async def test_a_stripe_is_missing_when_nobody_has_it_any_more(self, nodes: Fleet) -> None:
        await nodes.published(2)
        await nodes(2).hold(DIGEST, (await nodes(2).look(DIGEST)).generation, 0b10)
        assert not (await nodes(3).take(DIGEST, [Wish(0)], 0)).missing
        await nodes(1).withdraw(DIGEST)
        taken = await nodes(3).take(DIGEST, [Wish(0), Wish(1)], 4)
        assert taken.missing == {0}
        assert [(grant.stripe, grant.giver) for grant in taken.grants] == [(1, giver(2))]

    async def test_who_stands_behind_many_that_have_left_is_not_passed_over(
        self, nodes: Fleet
    ) -> None:
        await nodes.settled(1)
        generation = (await nodes(2).look(DIGEST)).generation
        for number in range(2, 12):
            assert await nodes(number).hold(DIGEST, generation, 0b1)
        for number in range(1, 11):
            await nodes(number).withdraw(DIGEST)
        found = [await nodes(20).take(DIGEST, [Wish(0)], 1) for _ in range(2)]
        assert {taken.missing for taken in found} == {frozenset()}
        assert [grant.giver for taken in found for grant in taken.grants] == [giver(11)]

    async def test_what_only_those_have_not_that_lend_all_they_may_is_missing(
        self, nodes: Fleet
    ) -> None:
        await nodes.settled(4)
        failed = await one(nodes(2), 3)
        assert failed
        generation = (await nodes(2).look(DIGEST)).generation
        await nodes(2).give_back(failed, Outcome.FAILED)
        assert await nodes(2).hold(DIGEST, generation, 0b111)
        await nodes(1).withdraw(DIGEST)
        for stripe in range(3):
            assert await one(nodes(10 + stripe), stripe)
        taken = await nodes(20).take(DIGEST, [Wish(3)], 1)
        assert (taken.grants, taken.missing) == ((), frozenset({3}))

    async def test_what_only_nodes_to_avoid_have_is_missing(self, nodes: Fleet) -> None:
        await nodes.published(2)
        await nodes(2).hold(DIGEST, (await nodes(2).look(DIGEST)).generation, 0b10)
        await nodes(5).hold(OTHER, "", WHOLE)
        avoid = [giver(1).node]
        taken = await nodes(3).take(DIGEST, [Wish(0), Wish(1)], 4, 0, avoid)
        assert taken.missing == {0}
        assert [(grant.stripe, grant.giver) for grant in taken.grants] == [(1, giver(2))]
        assert not (await nodes(4).take(DIGEST, [Wish(0)], 0)).missing

    async def test_a_part_is_forgotten_unless_it_is_renewed(self, nodes: Fleet) -> None:
        generation = (await nodes(1).look(DIGEST)).generation
        for number in (1, 2):
            assert await nodes(number).hold(DIGEST, generation, 0b1)
        nodes.advance(self.TERMS.part * 0.7)
        assert await nodes(2).hold(DIGEST, generation, 0b101)
        nodes.advance(self.TERMS.part * 0.7)
        view = await nodes(3).look(DIGEST)
        assert (having(view, 1), having(view, 2)) == (None, 0b101)

    async def test_news_of_another_generation_is_refused(self, nodes: Fleet) -> None:
        await nodes.published(1)
        assert not await nodes(2).hold(DIGEST, "another", 0b1)
        assert having(await nodes(3).look(DIGEST), 2) is None

    async def test_who_has_the_whole_blob_is_listed_up_to_a_number(self, nodes: Fleet) -> None:
        listed = [await nodes(number).hold(DIGEST, "", WHOLE) for number in range(1, 7)]
        assert listed == [True] * 4 + [False] * 2
        assert await nodes(1).hold(DIGEST, "", WHOLE)
        view = await nodes(9).look(DIGEST)
        assert [holding.have for holding in view.holdings] == [WHOLE] * 4
        nodes.advance(self.TERMS.whole + 1)
        assert await nodes(6).hold(DIGEST, "", WHOLE)

    async def test_who_has_the_whole_blob_gives_every_stripe(self, nodes: Fleet) -> None:
        await nodes.published(2)
        assert await nodes(1).hold(DIGEST, "", WHOLE)
        for number, stripe in ((2, 0), (3, 1)):
            grant = await one(nodes(number), stripe)
            assert grant
            assert (grant.giver, grant.rank) == (giver(1), 1)
            await nodes(number).give_back(grant, Outcome.DONE)
        assert having(await nodes(9).look(DIGEST), 1) == WHOLE

    async def test_who_was_not_listed_is_known_by_its_part_for_a_while(self, nodes: Fleet) -> None:
        await nodes.published(1, filler=9)
        for number in range(1, 5):
            await nodes(number).hold(DIGEST, "", WHOLE)
        assert not await nodes(9).hold(DIGEST, "", WHOLE)
        assert having(await nodes(8).look(DIGEST), 9) == 0b1

    async def test_what_is_withdrawn_is_gone(self, nodes: Fleet) -> None:
        await nodes(1).hold(DIGEST, "", WHOLE)
        await nodes(1).withdraw(DIGEST)
        view = await nodes(2).look(DIGEST)
        assert (view.holdings, view.nodes) == ((), 0)

    async def test_a_wrong_blob_is_forgotten_and_its_publisher_may_not_fill_it(
        self, nodes: Fleet
    ) -> None:
        await nodes.published(2)
        await nodes(5).hold(DIGEST, "", WHOLE)
        grant = await one(nodes(2), 0)
        assert grant
        await nodes(2).drop(DIGEST, grant.generation)
        view = await nodes(3).look(DIGEST)
        assert view.generation != grant.generation
        assert (view.published, view.filler) == (0, None)
        assert [holding.have for holding in view.holdings] == [WHOLE]
        assert await nodes(1).fill(DIGEST, SIZE) is None
        assert await nodes(2).fill(DIGEST, SIZE) == giver(2).node
        assert await nodes(1).fill(DIGEST, SIZE) == giver(2).node
        await nodes(2).settle(DIGEST)
        nodes.advance(self.TERMS.ban + 1)
        assert await nodes(1).fill(DIGEST, SIZE) == giver(1).node

    async def test_who_finds_its_own_blob_wrong_is_not_banned(self, nodes: Fleet) -> None:
        filler = await nodes.published(2)
        await filler.drop(DIGEST, (await filler.look(DIGEST)).generation)
        assert await filler.fill(DIGEST, SIZE) == giver(1).node

    async def test_a_late_drop_leaves_the_next_generation_alone(self, nodes: Fleet) -> None:
        await nodes.published(2)
        generation = (await nodes(3).look(DIGEST)).generation
        await nodes(3).drop(DIGEST, generation)
        await nodes(2).fill(DIGEST, SIZE)
        await nodes(2).publish(DIGEST, SIZE, 0, [hash_of(0, 1)])
        await nodes(4).drop(DIGEST, generation)
        assert (await nodes(3).look(DIGEST)).hashes == (hash_of(0, 1),)

    async def test_grants_of_an_earlier_generation_say_nothing_of_the_next(
        self, nodes: Fleet
    ) -> None:
        await nodes.published(2)
        grants = [await one(nodes(number), 0) for number in (2, 3)]
        assert grants[0]
        assert grants[1]
        await nodes(4).drop(DIGEST, grants[0].generation)
        await nodes(4).fill(DIGEST, SIZE)
        await nodes(4).publish(DIGEST, SIZE, 0, [hash_of(0, 1)])
        await nodes(4).settle(DIGEST)
        await nodes(2).give_back(grants[0], Outcome.DONE)
        view = await nodes(5).look(DIGEST)
        assert having(view, 2) in (None, 0)
        again = await one(nodes(2), 0)
        assert again
        assert again.generation == view.generation
        taken = await nodes(3).take(DIGEST, [Wish(0)], 1)
        assert [grant.giver for grant in taken.grants] == [giver(4)]

    async def test_a_directory_that_lost_everything_is_told_again(self, nodes: Fleet) -> None:
        await nodes.published(2)
        grant = await one(nodes(2), 0)
        assert grant
        await nodes.forget()
        assert await nodes(1).publish(DIGEST, SIZE, 2, [hash_of(2)]) is None
        assert await nodes(1).fill(DIGEST, SIZE) == giver(1).node
        assert await nodes(1).publish(DIGEST, SIZE, 2, [hash_of(2)]) == 0
        assert await nodes(1).publish(DIGEST, SIZE, 0, [hash_of(s) for s in range(3)]) == 3
        assert not await nodes(2).hold(DIGEST, grant.generation, 0, [grant])
        generation = (await nodes(2).look(DIGEST)).generation
        assert await nodes(2).hold(DIGEST, generation, 0b10, [grant])
        view = await nodes(3).look(DIGEST)
        assert {h.giver.node: (h.have, h.receiving, h.lending) for h in view.holdings} == {
            giver(1).node: (0b111, {}, 1),
            giver(2).node: (0b10, {0: 1}, 0),
        }

    async def test_a_view_is_a_sample_with_the_filler_in_it(self, nodes: Fleet) -> None:
        await nodes.published(1, filler=99)
        generation = (await nodes(1).look(DIGEST)).generation
        for number in range(1, 61):
            await nodes(number, "ab"[number % 2]).hold(DIGEST, generation, 0)
        for _ in range(5):
            view = await nodes(1).look(DIGEST)
            assert view.nodes == 61
            assert having(view, 99) == 1
            assert 10 < len(view.holdings) <= 31
            assert giver(1).node not in {holding.giver.node for holding in view.holdings}
