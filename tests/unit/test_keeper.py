"""What a node has told the fleet that it has: renewed, forgotten, taken back."""

import asyncio
import random
from collections.abc import Sequence

from proxy.fleet.board import Board
from proxy.fleet.claims import WHOLE, Giver, Grant, Terms
from proxy.fleet.keeper import Keeper
from proxy.fleet.local_claims import LocalClaims
from proxy.oci.digest import Digest
from proxy.oci.errors import DirectoryDown
from tests.unit.store_kit import silent

GIVER = Giver("0" * 16, "node-0", "", "http://node-0")
ONE, TWO = Digest.of(b"one"), Digest.of(b"two")
QUICK = Terms(whole=0.03)


class Spied(LocalClaims):
    """Says what was said; may be gone."""

    def __init__(self) -> None:
        super().__init__(Board(clock=lambda: 0.0, rng=random.Random(0)), GIVER)
        self.held: list[Digest] = []
        self.withdrawn: list[Digest] = []
        self.is_gone = False
        self.enters = True
        self.said = asyncio.Event()

    async def hold(
        self, digest: Digest, generation: str, have: int, grants: Sequence[Grant] = ()
    ) -> bool:
        self.said.set()
        if self.is_gone:
            raise DirectoryDown
        assert have == WHOLE
        self.held.append(digest)
        return self.enters

    async def withdraw(self, digest: Digest) -> None:
        self.said.set()
        if self.is_gone:
            raise DirectoryDown
        self.withdrawn.append(digest)

    async def next(self) -> None:
        self.said.clear()
        await self.said.wait()


async def test_what_is_kept_is_said_again_and_again() -> None:
    claims = Spied()
    async with Keeper(claims, log=silent(), terms=QUICK) as keeper:
        keeper.keep(ONE, "1")
        keeper.keep(TWO, "1")
        while claims.held.count(ONE) < 2 or claims.held.count(TWO) < 2:
            await claims.next()


async def test_what_has_gone_is_withdrawn_and_not_said_again() -> None:
    claims = Spied()
    async with Keeper(claims, log=silent(), terms=QUICK) as keeper:
        keeper.keep(ONE, "1")
        keeper.gone([ONE, TWO])
        await claims.next()
        assert claims.withdrawn == [ONE]
        assert len(keeper) == 0


async def test_what_the_directory_does_not_enter_is_forgotten() -> None:
    claims = Spied()
    claims.enters = False
    async with Keeper(claims, log=silent(), terms=QUICK) as keeper:
        keeper.keep(ONE, "1")
        while ONE in keeper:
            await claims.next()


async def test_a_directory_that_is_gone_is_told_in_the_next_round() -> None:
    claims = Spied()
    claims.is_gone = True
    async with Keeper(claims, log=silent(), terms=QUICK) as keeper:
        keeper.keep(ONE, "1")
        await claims.next()
        claims.is_gone = False
        while not claims.held:
            await claims.next()
        assert ONE in keeper


async def test_no_more_are_remembered_than_there_may_be() -> None:
    async with Keeper(Spied(), log=silent(), most=1) as keeper:
        keeper.keep(ONE, "1")
        keeper.keep(TWO, "1")
        assert ONE not in keeper
        assert TWO in keeper
