"""Claims of nodes in one process: for tests, simulations, and as the plainest form of the rules.

Nothing here suspends, so every method is as atomic as a script of the directory's server is.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from proxy.fleet.board import ANY_ZONE, Blob, Board, Node, Pool
from proxy.fleet.claims import WHOLE, Giver, Grant, Holding, Outcome, Taken, View, Wish
from proxy.oci.digest import Digest

#: How many of a queue of a stripe's givers are looked at for one wish.
LOOKS = 8
#: Of so many that could give it the best is chosen.
CHOICES = 4
#: What the filler costs more than all others.
LAST = 1000
#: Among how many in a queue those of other zones are looked for.
FAR = 32


@dataclass(slots=True)
class _Search:
    """For somebody to give a stripe. `is_known`: somebody can, who is not to be avoided; `busy`:
    how many of a queue could but lend enough."""

    wish: Wish
    avoid: Collection[str]
    is_known: bool = False
    busy: int = 0


@dataclass(frozen=True, slots=True)
class _Offer:
    """A node that may give a stripe, its rank for it, and what it costs to ask it."""

    node: str
    rank: int
    cost: int


def _better(one: _Offer | None, other: _Offer | None) -> _Offer | None:
    """The one that costs less, the first of two that cost the same."""
    return other if one is None or (other is not None and other.cost < one.cost) else one


def bits(mask: int) -> Iterator[int]:
    """The positions of the bits that are set, from the lowest on."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


class LocalClaims:
    """One node's access to a board."""

    def __init__(self, board: Board, giver: Giver) -> None:
        self._board = board
        self._giver = giver
        self._terms = board.terms

    def __repr__(self) -> str:
        return f"<LocalClaims of {self._giver.name} on {self._board!r}>"

    @property
    def _id(self) -> str:
        return self._giver.node

    async def look(self, digest: Digest, known: int = 0) -> View:
        blob = self._board.blob(digest)
        holdings = tuple(node.holding() for node in self._drawn(blob))
        return self._view(blob, known, holdings)

    def _view(self, blob: Blob, known: int, holdings: tuple[Holding, ...]) -> View:
        return View(
            blob.generation,
            blob.size,
            known,
            tuple(blob.hashes[known:]),
            tuple(blob.publishers[known:]),
            blob.filler,
            holdings,
            len(blob.nodes),
        )

    def _drawn(self, blob: Blob) -> Iterator[Node]:
        """The filler, and a third each of this zone, of those that have all, and of the others."""
        rng, share = self._board.rng, self._terms.sample // 3
        names = dict.fromkeys([blob.filler] if blob.filler else ())
        for pool in (blob.zones.get(self._giver.zone, Pool()), blob.wholes, blob.parts):
            names.update(dict.fromkeys(pool.draw(share, rng)))
        now = self._board.clock()
        for name in names:
            node = blob.alive(name, now)
            if node is not None and name != self._id:
                yield node

    async def fill(self, digest: Digest, size: int | None) -> str | None:
        blob, now = self._board.blob(digest), self._board.clock()
        if blob.filler not in (None, self._id) or blob.banned.get(self._id, 0.0) > now:
            return blob.filler
        if blob.filler is None:
            blob.filler, blob.news = self._id, now
        blob.size = size if blob.size is None else blob.size
        blob.until = now + self._terms.filler
        self._mine(blob)
        return self._id

    def _mine(self, blob: Blob) -> Node:
        """This node's entry, renewed."""
        now = self._board.clock()
        node = blob.alive(self._id, now) or Node(self._giver)
        node.until = max(node.until, now + self._terms.part)
        blob.enter(node)
        return node

    async def publish(
        self,
        digest: Digest,
        size: int,
        first: int,
        hashes: Sequence[bytes],
        by: Sequence[str] = (),
    ) -> int | None:
        blob, now = self._board.blob(digest), self._board.clock()
        if blob.filler != self._id:
            return None
        blob.size, blob.until = size, now + self._terms.filler
        if first == len(blob.hashes):
            blob.hashes += hashes
            blob.publishers += by or [self._id] * len(hashes)
            blob.news = now
            node = self._mine(blob)
            node.have |= ((1 << len(hashes)) - 1) << first
            for stripe in range(first, len(blob.hashes)):
                blob.line_up(self._giver, stripe)
        return len(blob.hashes)

    async def settle(self, digest: Digest) -> None:
        blob = self._board.blob(digest)
        if blob.filler == self._id:
            blob.filler = None

    async def take(
        self,
        digest: Digest,
        wishes: Sequence[Wish],
        room: int,
        known: int = 0,
        avoid: Collection[str] = (),
        ended: Sequence[tuple[Grant, Outcome]] = (),
    ) -> Taken:
        for grant, outcome in ended:
            await self.give_back(grant, outcome)
        blob = self._board.blob(digest)
        mine = self._mine(blob)
        grants: list[Grant] = []
        missing = set()
        for wish in sorted(wishes, key=lambda wish: self._order(blob, wish)):
            if len(grants) == room:
                break
            if wish.stripe in mine.receiving or wish.stripe >= len(blob.hashes):
                continue
            search = _Search(wish, avoid)
            found = self._chosen(blob, search)
            if found is not None:
                grants.append(self._grant(digest, blob, wish.stripe, found.node, found.rank))
            elif not search.is_known:
                missing.add(wish.stripe)
        return Taken(tuple(grants), frozenset(missing), self._view(blob, known, ()))

    @staticmethod
    def _order(blob: Blob, wish: Wish) -> int:
        return -1 if wish.is_urgent else len(blob.queues.get((wish.stripe, ANY_ZONE), ()))

    def _chosen(self, blob: Blob, search: _Search) -> _Offer | None:
        """Who gives the stripe: of this zone, then of others, then of those that have all of it;
        the filler after all of these."""
        stripe = search.wish.stripe
        own = blob.queues.get((stripe, self._giver.zone), {})
        everybody = blob.queues.get((stripe, ANY_ZONE), {})
        looked: list[str] | None = None
        best = self._best_of(blob, search, own)
        if best is not None and best.node != blob.filler:
            return best
        if LOOKS <= len(own) < len(everybody):
            if len(own) > LOOKS:  # those who come behind the ones that were passed over
                best = _better(best, self._best_of(blob, search, own))
                if best is not None and best.node != blob.filler:
                    return best
            looked = self._elsewhere(blob, everybody)
        elif search.busy == LOOKS:
            return best  # nobody else has it: here there are enough, in a moment
        best = _better(best, self._best_of(blob, search, everybody, looked))
        if (best is not None and best.node != blob.filler) or search.busy == LOOKS:
            return best
        for name in blob.wholes.draw(LOOKS, self._board.rng):
            offer, _ = self._offer(blob, search, name)
            if offer is not None:
                return _better(best, offer)
        return best

    def _elsewhere(self, blob: Blob, queue: dict[str, None]) -> list[str]:
        """The first in a queue that are not of this zone. When they are few, those of this zone go
        to its end, so that the next take sees others."""
        here = blob.zones.get(self._giver.zone, Pool())
        nodes = list(itertools.islice(queue, FAR))
        found = [name for name in nodes if name not in here][:LOOKS]
        if len(found) < LOOKS:
            for name in nodes:
                if name in here:
                    del queue[name]
                    queue[name] = None
        return found

    def _best_of(
        self,
        blob: Blob,
        search: _Search,
        queue: dict[str, None],
        looked: Sequence[str] | None = None,
    ) -> _Offer | None:
        """The best of these, from the queue's front. Who may not lend goes to its end; who is no
        giver any more leaves it."""
        search.busy = offers = 0
        if looked is None:
            looked = list(itertools.islice(queue, LOOKS))
        behind: list[str] = []
        gone: list[str] = []
        best: _Offer | None = None
        for name in looked:
            offer, rank = self._offer(blob, search, name)
            if offer is not None:
                best, offers = _better(best, offer), offers + 1
                if offers == CHOICES:
                    break
            else:
                (gone if rank is None and name != self._id else behind).append(name)
        for name in gone:
            del queue[name]
        if best is not None or len(looked) == LOOKS:
            for name in behind:
                del queue[name]
                queue[name] = None
        # Who comes behind those that have left is seen by the next take.
        search.is_known = search.is_known or (bool(gone) and len(looked) == LOOKS)
        return best

    def _offer(self, blob: Blob, search: _Search, name: str) -> tuple[_Offer | None, int | None]:
        """What the node offers now, if anything; and its rank, None if it cannot give the stripe at
        all. One that lends all it may stays in the queue, whatever it has."""
        node = None if name == self._id else blob.alive(name, self._board.clock())
        if node is None:
            return None, None
        terms, is_filler, is_avoided = self._terms, name == blob.filler, name in search.avoid
        limits = (terms.filler_most, terms.filler_each) if is_filler else (terms.most, terms.each)
        is_full = len(node.lent) >= limits[0]
        rank = node.rank(search.wish.stripe)
        search.is_known = search.is_known or (rank is not None and not is_avoided)
        if is_full:
            search.busy += not is_avoided
            return None, 0
        if rank is None or is_avoided or rank >= search.wish.limit:
            return None, rank
        if not node.may_lend(search.wish.stripe, *limits):
            search.busy += 1
            return None, rank
        cost = len(node.lent) + rank + (LAST if is_filler else 0)
        return _Offer(name, rank, cost), rank

    def _grant(self, digest: Digest, blob: Blob, stripe: int, name: str, rank: int) -> Grant:
        token = self._board.number()
        giver = blob.nodes[name].giver
        grant = Grant(digest, blob.generation, stripe, giver, rank + 1, token)
        self._enter(blob, grant)
        return grant

    def _enter(self, blob: Blob, grant: Grant) -> None:
        until = self._board.clock() + self._terms.grant
        blob.nodes[self._id].receives(grant, until)
        blob.line_up(self._giver, grant.stripe)
        giver = blob.nodes.get(grant.giver.node)
        if giver is not None:
            giver.lends(grant, until)

    async def give_back(self, grant: Grant, outcome: Outcome) -> None:
        blob = self._board.blob(grant.digest)
        if outcome is Outcome.DIED and grant.giver.node == blob.filler:
            blob.until = min(blob.until, self._board.clock() + self._terms.doubted)
        giver = blob.nodes.get(grant.giver.node)
        if giver is not None:
            giver.lent.pop(grant.token, None)
        if grant.generation != blob.generation:
            return
        mine = self._mine(blob)
        received = mine.receiving.get(grant.stripe)
        if received and received[0].token == grant.token:
            del mine.receiving[grant.stripe]
        if outcome is Outcome.DONE and mine.have != WHOLE:
            mine.have |= 1 << grant.stripe

    async def hold(
        self, digest: Digest, generation: str, have: int, grants: Sequence[Grant] = ()
    ) -> bool:
        blob, now = self._board.blob(digest), self._board.clock()
        if have == WHOLE:
            return self._hold_whole(blob)
        if generation != blob.generation:
            return False
        mine = blob.alive(self._id, now) or Node(self._giver)
        mine.have, mine.until = have, now + self._terms.part
        blob.enter(mine)
        for stripe in bits(have):
            blob.line_up(self._giver, stripe)
        for grant in grants:
            self._enter(blob, grant)
        return True

    def _hold_whole(self, blob: Blob) -> bool:
        now = self._board.clock()
        for name in blob.wholes:
            blob.alive(name, now)
        if self._id not in blob.wholes and len(blob.wholes) >= self._terms.wholes:
            return False  # what it had as a part goes on to be listed for a while
        mine = blob.alive(self._id, now) or Node(self._giver)
        mine.have, mine.until, mine.receiving = WHOLE, now + self._terms.whole, {}
        blob.enter(mine)
        return True

    async def withdraw(self, digest: Digest) -> None:
        self._board.blob(digest).remove(self._id)

    async def drop(self, digest: Digest, generation: str) -> None:
        blob = self._board.blob(digest)
        if blob.generation != generation:
            return
        until = self._board.clock() + self._terms.ban
        blob.banned.update(dict.fromkeys(set(blob.publishers) - {self._id}, until))
        self._board.renew(digest, self._board.number())
