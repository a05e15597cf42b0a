"""Blobs that were stored before are told to the fleet: which first, how fast, and anew when the
directory has forgotten them."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.announcer import AGAIN, ALL, BLOCK, ONE, Announcer, in_order, pause
from proxy.fleet.board import Board
from proxy.fleet.claims import WHOLE, Giver, Grant, Terms
from proxy.fleet.keeper import Keeper
from proxy.fleet.local_claims import LocalClaims
from proxy.oci.digest import Digest
from tests.unit.store_kit import silent
from tests.unit.test_keeper import Spied
from tests.unit.virtual import run_virtually

BLOBS = [Digest.of(b"%d" % number) for number in range(40)]


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        run_virtually(test(), grace=0)

    del run.__wrapped__  # pytest would take it for a coroutine
    return run


@dataclass
class Turning:
    """Members of a fleet whose directory turns when a test says so."""

    count: int = 1
    epoch: str = ""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def turned(self, epoch: str) -> str:
        while self.epoch in ("", epoch):
            self.news.clear()
            await self.news.wait()
        return self.epoch

    def turn(self, epoch: str) -> None:
        self.epoch = epoch
        self.news.set()


@dataclass
class Stored:
    """What a store has."""

    blobs: list[Digest]
    doubtful: list[Digest] = field(default_factory=list)
    judged: asyncio.Event = field(default_factory=asyncio.Event)

    async def recent(self, most: int) -> Sequence[Digest]:
        return [*self.blobs, *self.doubtful][:most]

    def has(self, digest: Digest) -> bool:
        return digest in self.blobs or (self.judged.is_set() and digest in self.doubtful)

    async def recovered(self) -> None:
        await self.judged.wait()


@asynccontextmanager
async def telling(
    claims: Spied, stored: Stored, members: Turning, most: int = 100
) -> AsyncIterator[Keeper]:
    stored.judged.set()
    async with (
        Keeper(claims, log=silent(), most=most) as keeper,
        Announcer(keeper, stored, members, log=silent(), rng=random.Random(1), most=most),
    ):
        yield keeper


async def said(claims: Spied, count: int) -> list[Digest]:
    while len(claims.held) < count:
        await claims.next()
    return claims.held


def judged(blobs: list[Digest]) -> Stored:
    stored = Stored(blobs)
    stored.judged.set()
    return stored


class TestOrder:
    def test_of_few_nodes_each_begins_with_what_was_used_last(self) -> None:
        assert in_order(BLOBS, 1, random.Random(1)) == BLOBS
        assert in_order(BLOBS, 2, random.Random(1)) == BLOBS

    @given(st.integers(1, 60), st.integers(0, 1 << 30))
    def test_all_are_said_once_and_blocks_keep_their_order(self, nodes: int, seed: int) -> None:
        found = in_order(BLOBS, nodes, random.Random(seed))
        assert sorted(found, key=str) == sorted(BLOBS, key=str)
        if nodes > 2:
            size = BLOCK * nodes
            for at in range(0, len(BLOBS), size):
                assert set(found[at : at + size]) == set(BLOBS[at : at + size])

    def test_a_thousand_nodes_with_the_same_blobs_soon_have_said_each(self) -> None:
        blobs = [Digest.of(b"%d" % number) for number in range(8000)]
        known: set[Digest] = set()
        for seed in range(1000):
            known.update(in_order(blobs, 1000, random.Random(seed))[: 5 * BLOCK])
        assert len(known) > 0.99 * len(blobs)

    @given(st.integers(1, 20_000), st.floats(0, 1))
    def test_all_nodes_together_say_no_more_than_the_directory_bears(
        self, nodes: int, chance: float
    ) -> None:
        mean = (pause(nodes, 0) + pause(nodes, 1)) / 2
        assert nodes / mean <= max(ALL, nodes * ONE) * 1.001
        assert nodes / mean <= ALL * 1.001 or nodes < ALL / ONE
        assert pause(nodes, 0) <= pause(nodes, chance) <= pause(nodes, 1)


@in_virtual_time
async def test_nothing_is_said_before_the_directory_is_known() -> None:
    claims, members = Spied(), Turning()
    async with telling(claims, Stored(BLOBS[:3]), members):
        await asyncio.sleep(60)
        assert claims.held == []
        members.turn("first")
        assert await said(claims, 3) == BLOBS[:3]


@in_virtual_time
async def test_what_was_said_is_kept_and_said_no_more_in_that_round() -> None:
    claims, members = Spied(), Turning(epoch="first")
    async with telling(claims, Stored(BLOBS[:3]), members) as keeper:
        await said(claims, 3)
        await asyncio.sleep(60)
        assert claims.held == BLOBS[:3]
        assert all(digest in keeper for digest in BLOBS[:3])


@in_virtual_time
async def test_a_directory_that_has_forgotten_is_told_again() -> None:
    claims, members = Spied(), Turning(epoch="first")
    async with telling(claims, Stored(BLOBS[:3]), members):
        await said(claims, 3)
        members.turn("second")
        assert (await said(claims, 6))[3:] == BLOBS[:3]


@in_virtual_time
async def test_a_round_begins_anew_when_the_directory_turns_in_the_middle() -> None:
    claims, members = Spied(), Turning(epoch="first")
    async with telling(claims, Stored(BLOBS), members):
        await said(claims, 10)
        members.turn("second")
        before = len(claims.held)
        found = await said(claims, before + len(BLOBS))
        assert found[before:] == BLOBS
        await asyncio.sleep(60)
        assert len(claims.held) == before + len(BLOBS)


@in_virtual_time
async def test_what_the_directory_does_not_enter_is_not_kept() -> None:
    claims, members = Spied(), Turning(epoch="first")
    claims.enters = False
    async with telling(claims, Stored(BLOBS[:3]), members) as keeper:
        await said(claims, 3)
        await asyncio.sleep(60)
        assert (len(keeper), len(claims.held)) == (0, 3)


@in_virtual_time
async def test_and_is_said_again_when_those_may_have_gone_who_were_listed_for_it() -> None:
    claims, members = Spied(), Turning(epoch="first")
    claims.enters = False
    stored = Stored(BLOBS[:3])
    async with telling(claims, stored, members) as keeper:
        await said(claims, 3)
        claims.enters = True
        keeper.keep(BLOBS[0], "1")
        stored.blobs.append(BLOBS[3])  # nor was it known then
        await asyncio.sleep(AGAIN / 4)
        assert claims.held == BLOBS[:3]
        await asyncio.sleep(2 * AGAIN)
        assert all(digest in keeper for digest in BLOBS[:4])


@in_virtual_time
async def test_what_is_kept_is_left_to_the_keeper() -> None:
    claims, members = Spied(), Turning(epoch="first")
    async with telling(claims, Stored(BLOBS[:3]), members):
        await asyncio.sleep(10 * AGAIN)
        assert len(claims.held) <= 3 + 3 * (10 * AGAIN / (Terms().whole / 3) + 1)


@in_virtual_time
async def test_a_new_directory_does_not_wait_until_something_is_said_again() -> None:
    claims, members = Spied(), Turning(epoch="first")
    async with telling(claims, Stored(BLOBS[:3]), members):
        await said(claims, 3)
        await asyncio.sleep(AGAIN / 4)
        members.turn("second")
        await asyncio.sleep(1)
        assert claims.held[3:6] == BLOBS[:3]


@in_virtual_time
async def test_a_directory_that_is_down_is_waited_for() -> None:
    claims, members = Spied(), Turning(epoch="first")
    claims.is_gone = True
    async with telling(claims, Stored(BLOBS[:3]), members):
        await asyncio.sleep(20)
        assert claims.held == []
        claims.is_gone = False
        assert await said(claims, 3) == BLOBS[:3]


@in_virtual_time
async def test_what_a_crash_left_in_doubt_is_said_when_it_is_judged() -> None:
    claims, members = Spied(), Turning(epoch="first")
    stored = Stored(BLOBS[:2], doubtful=BLOBS[2:4])
    async with telling(claims, stored, members):
        stored.judged.clear()
        await said(claims, 2)
        await asyncio.sleep(60)
        assert claims.held == BLOBS[:2]
        stored.judged.set()
        assert await said(claims, 4) == BLOBS[:4]


@in_virtual_time
async def test_what_has_gone_meanwhile_is_not_said() -> None:
    claims, members = Spied(), Turning(epoch="first")
    stored = Stored(BLOBS[:3])
    async with telling(claims, stored, members):
        await said(claims, 1)
        stored.blobs.remove(BLOBS[1])
        await asyncio.sleep(60)
        assert claims.held == [BLOBS[0], BLOBS[2]]


@in_virtual_time
async def test_after_a_restart_of_all_a_blob_is_listed_when_the_former_nodes_have_ended() -> None:
    """Each has another id then, and what it said before stands for a while, in all places."""
    clock = asyncio.get_running_loop().time
    board = Board(clock=clock, terms=Terms(wholes=1), rng=random.Random(1))
    former = LocalClaims(board, Giver("f" * 16, "node-0", "", "http://node-0"))
    claims = LocalClaims(board, Giver("0" * 16, "node-0", "", "http://node-0"))
    assert await former.hold(BLOBS[0], "", WHOLE)
    async with (
        Keeper(claims, log=silent()) as keeper,
        Announcer(keeper, judged(BLOBS[:1]), Turning(epoch="first"), log=silent()),
    ):
        await asyncio.sleep(60)
        assert len(keeper) == 0
        await asyncio.sleep(3 * Terms().whole)
        view = await former.look(BLOBS[0])
        assert [one.giver.node for one in view.holdings] == ["0" * 16]


class Slow(Spied):
    """Takes its time to enter anything."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def hold(
        self, digest: Digest, generation: str, have: int, grants: Sequence[Grant] = ()
    ) -> bool:
        self.said.set()
        await self.gate.wait()
        return await super().hold(digest, generation, have, grants)


@in_virtual_time
async def test_what_goes_while_it_is_being_said_is_withdrawn() -> None:
    claims, members = Slow(), Turning(epoch="first")
    async with telling(claims, Stored(BLOBS[:1]), members) as keeper:
        await claims.said.wait()
        keeper.gone(BLOBS[:1])
        await asyncio.sleep(1)
        claims.gate.set()
        await asyncio.sleep(1)
        # Once more after it was said: the directory may have heard the first one before that.
        assert claims.withdrawn == 2 * BLOBS[:1]
        assert len(keeper) == 0


@in_virtual_time
async def test_what_came_meanwhile_is_kept_before_what_was_there() -> None:
    claims, members = Spied(), Turning(epoch="first")
    async with telling(claims, Stored(BLOBS[:5]), members, most=3) as keeper:
        keeper.keep(BLOBS[20], "1")
        await asyncio.sleep(60)
        assert BLOBS[20] in keeper
        assert len(keeper) == 3
        keeper.keep(BLOBS[21], "1")
        assert {BLOBS[20], BLOBS[21]} <= {one for one in BLOBS if one in keeper}
