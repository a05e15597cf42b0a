"""What a sharing says to the directory: a take whose answer is of another generation."""

import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from proxy.fleet.board import Board
from proxy.fleet.claims import Giver, Grant, Outcome, Taken, View, Wish
from proxy.fleet.local_claims import LocalClaims
from proxy.fleet.pursuit import Pursuit
from proxy.fleet.shunned import Shunned
from proxy.fleet.steps import Fresh, Step
from proxy.fleet.stripes import Span
from proxy.oci.digest import Digest
from proxy.oci.errors import DirectoryDown
from proxy.pull.claiming import Claiming
from proxy.testing import FakeClock
from tests.unit.claims_conformance import giver, hash_of
from tests.unit.sharing_kit import sailing

DIGEST = Digest.of(b"a blob")
MIB = 1 << 20
SIZE = 4 * MIB


class Changing(LocalClaims):
    """A directory to which something happens before it answers, once each."""

    def __init__(self, board: Board, one: Giver) -> None:
        super().__init__(board, one)
        self.before_take: Callable[[], None] | None = None
        self.before_look: Callable[[], None] | None = None
        self.ended: list[tuple[Grant, Outcome]] = []

    async def look(self, digest: Digest, known: int = 0) -> View:
        happens, self.before_look = self.before_look, None
        if happens is not None:
            happens()
        return await super().look(digest, known)

    async def take(
        self,
        digest: Digest,
        wishes: Sequence[Wish],
        room: int,
        known: int = 0,
        avoid: Collection[str] = (),
        ended: Sequence[tuple[Grant, Outcome]] = (),
    ) -> Taken:
        self.ended += ended
        happens, self.before_take = self.before_take, None
        if happens is not None:
            happens()
        return await super().take(digest, wishes, room, known, avoid, ended)


class Scene:
    """A node that knows the hashes of one generation, and asks for stripe 0."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.board = Board(clock=self.clock, rng=random.Random(1))
        self.claims = Changing(self.board, giver(1))
        self.pursuit = Pursuit(giver(1), shunned=Shunned(), rng=random.Random(1), size=SIZE)

    async def begin(self, directory: Path) -> Claiming:
        await self.publish(salt=1)
        async with sailing(directory, 1, claims=lambda _: self.claims) as fleet:
            claiming = Claiming(fleet.nodes[0].fellows, self.pursuit, DIGEST, SIZE)
        await claiming.look(0)
        assert self.pursuit.expected(0) == hash_of(0, 1)
        return claiming

    async def publish(self, salt: int) -> None:
        """Another generation, of another filler."""
        self.forget()
        filler = LocalClaims(self.board, giver(2 + salt))
        await filler.fill(DIGEST, SIZE)
        await filler.publish(DIGEST, SIZE, 0, [hash_of(0, salt), hash_of(1, salt)])

    def forget(self) -> None:
        self.board.forget()

    def later(self, seconds: float) -> None:
        self.clock.advance(seconds)


def step() -> Step:
    return Step(wishes=(Wish(0),), room=1)


def republishing(scene: Scene, salt: int) -> Callable[[], None]:
    """The same, for where nothing can be awaited."""

    def happens() -> None:
        with pytest.raises(StopIteration):
            scene.publish(salt).send(None)

    return happens


async def test_stripes_of_another_generation_are_held_against_its_own_hashes(
    tmp_path: Path,
) -> None:
    scene = Scene()
    claiming = await scene.begin(tmp_path)
    scene.claims.before_take = republishing(scene, 2)
    (grant,) = await claiming.take(step())
    assert grant.generation == scene.pursuit.generation
    assert scene.pursuit.expected(0) == hash_of(0, 2)
    assert scene.pursuit.ended(0, None, 0.0) is Outcome.DONE


async def test_grants_of_a_generation_that_is_over_are_given_back(tmp_path: Path) -> None:
    scene = Scene()
    claiming = await scene.begin(tmp_path)
    scene.claims.before_take = republishing(scene, 2)
    scene.claims.before_look = republishing(scene, 3)
    assert await claiming.take(step()) == []
    assert not scene.pursuit.receiving
    (again,) = await claiming.take(step())
    assert scene.pursuit.expected(0) == hash_of(0, 3)
    assert [outcome for _, outcome in scene.claims.ended] == [Outcome.FAILED]
    assert again.generation == scene.pursuit.generation


async def test_grants_whose_hashes_cannot_be_asked_for_are_given_back(tmp_path: Path) -> None:
    scene = Scene()
    claiming = await scene.begin(tmp_path)

    def goes() -> None:
        raise DirectoryDown

    scene.claims.before_take = republishing(scene, 2)
    scene.claims.before_look = goes
    with pytest.raises(DirectoryDown):
        await claiming.take(step())
    assert not scene.pursuit.receiving
    await claiming.give_back()
    assert [outcome for _, outcome in scene.claims.ended] == [Outcome.FAILED]


@pytest.mark.parametrize("salt", [1, 2])
async def test_a_filler_that_was_late_learns_what_another_one_has_published_meanwhile(
    tmp_path: Path, salt: int
) -> None:
    """It lost its lease, the other one filled and gave that up, and it renews none the wiser."""
    scene = Scene()
    claiming = await scene.begin(tmp_path)
    scene.later(scene.board.terms.filler)
    await claiming.lead()
    scene.later(scene.board.terms.filler)
    other = LocalClaims(scene.board, giver(5))
    await other.fill(DIGEST, SIZE)
    await other.publish(DIGEST, SIZE, 2, [hash_of(2, salt), hash_of(3, salt)])
    await other.settle(DIGEST)
    await claiming.lead()
    pursuit = scene.pursuit
    pursuit.begun(Span(2, 4))
    assert pursuit.published == 2
    assert pursuit.filled(2, hash_of(2, 1))
    fresh = Fresh(2, (hash_of(2, 1),), (giver(1).node,))
    assert not await claiming.publish(fresh)
    assert pursuit.published == 4
    assert pursuit.expected(2) == hash_of(2, salt)
    assert bool(pursuit.have >> 2 & 1) is (salt == 1)  # else the digest will tell who was right
    assert pursuit.is_filler
