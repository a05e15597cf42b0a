"""Claims of nodes in one process: for tests, simulations, and as the plainest form of the rules.

Nothing here suspends, so every method is as atomic as a script of the directory's server is.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from proxy.fleet.claims import WHOLE, Giver, Grant, Holding, Outcome, Taken, Terms, View, Wish
from proxy.oci.digest import Digest

ANY_ZONE = "*"
#: How many of a queue of a stripe's givers are looked at for one wish.
LOOKS = 8


class _Pool:
    """A set that some of can be drawn at random, without looking at the rest."""

    def __init__(self) -> None:
        self._items: list[str] = []
        self._places: dict[str, int] = {}

    def add(self, item: str) -> None:
        if item not in self._places:
            self._places[item] = len(self._items)
            self._items.append(item)

    def discard(self, item: str) -> None:
        place = self._places.pop(item, None)
        if place is None:
            return
        last = self._items.pop()
        if last != item:
            self._items[place] = last
            self._places[last] = place

    def draw(self, most: int, rng: random.Random) -> list[str]:
        return list(self._items) if len(self) <= most else rng.sample(self._items, most)

    def __contains__(self, item: str) -> bool:
        return item in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._items))

    def __len__(self) -> int:
        return len(self._items)


@dataclass(slots=True)
class _Node:
    """What one node has and receives of a blob, and what it lends."""

    giver: Giver
    have: int = 0
    until: float = 0.0
    receiving: dict[int, tuple[Grant, float]] = field(default_factory=dict)
    lent: dict[str, tuple[int, float]] = field(default_factory=dict)  # token: stripe, until
    soonest: float = math.inf  # nothing of all that ends before

    def __repr__(self) -> str:
        return f"<{self.giver.name} have={self.have:b} {len(self.lent)} lent>"

    def expire(self, now: float) -> None:
        if now < self.soonest:
            return
        self.receiving = {s: pair for s, pair in self.receiving.items() if pair[1] > now}
        self.lent = {token: pair for token, pair in self.lent.items() if pair[1] > now}
        ends = (until for _, until in (*self.receiving.values(), *self.lent.values()))
        self.soonest = min(ends, default=math.inf)

    def receives(self, grant: Grant, until: float) -> None:
        self.receiving[grant.stripe] = grant, until
        self.soonest = min(self.soonest, until)

    def lends(self, grant: Grant, until: float) -> None:
        self.lent[grant.token] = grant.stripe, until
        self.soonest = min(self.soonest, until)

    def rank(self, stripe: int) -> int | None:
        if self.have >> stripe & 1:
            return 0
        received = self.receiving.get(stripe)
        return received[0].rank if received else None

    def may_lend(self, stripe: int, most: int, each: int) -> bool:
        if len(self.lent) >= most:
            return False
        return [lent for lent, _ in self.lent.values()].count(stripe) < each

    def holding(self) -> Holding:
        ranks = {stripe: grant.rank for stripe, (grant, _) in self.receiving.items()}
        return Holding(self.giver, self.have, ranks, len(self.lent))


@dataclass(slots=True)
class _Search:
    """For somebody to give a stripe. `is_known`: somebody can, who is not to be avoided; `busy`:
    how many of a queue could but lend enough."""

    wish: Wish
    avoid: Collection[str]
    is_known: bool = False
    busy: int = 0


@dataclass(slots=True)
class _Blob:
    generation: str
    size: int | None = None
    hashes: list[bytes] = field(default_factory=list)
    publishers: list[str] = field(default_factory=list)
    filler: str | None = None
    until: float = 0.0  # the filler's lease
    news: float = 0.0  # when it last published, or began
    banned: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, _Node] = field(default_factory=dict)
    wholes: _Pool = field(default_factory=_Pool)
    parts: _Pool = field(default_factory=_Pool)
    zones: dict[str, _Pool] = field(default_factory=dict)
    queues: dict[tuple[int, str], dict[str, None]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<_Blob {len(self.hashes)} published, {len(self.nodes)} nodes, by {self.filler}>"

    def enter(self, node: _Node) -> None:
        name = node.giver.node
        self.nodes[name] = node
        whole = node.have == WHOLE
        (self.wholes if whole else self.parts).add(name)
        (self.parts if whole else self.wholes).discard(name)
        self.zones.setdefault(node.giver.zone, _Pool()).add(name)

    def remove(self, name: str) -> None:
        node = self.nodes.pop(name, None)
        if node is None:
            return
        self.wholes.discard(name)
        self.parts.discard(name)
        pool = self.zones[node.giver.zone]
        pool.discard(name)
        if not pool:
            del self.zones[node.giver.zone]

    def line_up(self, giver: Giver, stripe: int) -> None:
        """Enter it among those who can be asked for the stripe, behind the others."""
        for zone in (giver.zone, ANY_ZONE):
            self.queues.setdefault((stripe, zone), {}).setdefault(giver.node)

    def alive(self, name: str, now: float) -> _Node | None:
        """The node's entry with all that has ended taken out; None when nothing is left of it."""
        node = self.nodes.get(name)
        if node is None:
            return None
        if node.until <= now:
            self.remove(name)
            return None
        node.expire(now)
        return node


def bits(mask: int) -> Iterator[int]:
    """The positions of the bits that are set, from the lowest on."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


class Board:
    """What a directory's server is to the nodes of a fleet: all blobs, one clock."""

    def __init__(
        self, *, clock: Callable[[], float], rng: random.Random, terms: Terms | None = None
    ) -> None:
        self.terms = terms or Terms()
        self.clock = clock
        self.rng = rng
        self._blobs: dict[Digest, _Blob] = {}
        self._count = 0

    def __repr__(self) -> str:
        return f"<Board of {len(self._blobs)} blobs>"

    def number(self) -> str:
        """Never the same twice, nor after `forget`."""
        self._count += 1
        return str(self._count)

    def blob(self, digest: Digest) -> _Blob:
        """A blob's entry, without a filler whose lease has ended."""
        blob = self._blobs.get(digest)
        if blob is None:
            blob = self._blobs[digest] = _Blob(self.number())
        now = self.clock()
        if blob.filler and blob.news + self.terms.stuck <= now:
            blob.banned[blob.filler] = now + self.terms.stuck
            blob.filler = None
        if blob.until <= now:
            blob.filler = None
        return blob

    def renew(self, digest: Digest, generation: str) -> _Blob:
        """The blob without its stripes, in another generation; who has all of it stays."""
        old, blob = self._blobs[digest], _Blob(generation)
        for name in old.wholes:
            node = old.nodes[name]
            node.receiving = {}
            blob.enter(node)
        blob.banned = old.banned
        self._blobs[digest] = blob
        return blob

    def forget(self) -> None:
        """Lose everything, as a server does that is started anew."""
        self._blobs.clear()


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

    def _view(self, blob: _Blob, known: int, holdings: tuple[Holding, ...]) -> View:
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

    def _drawn(self, blob: _Blob) -> Iterator[_Node]:
        """The filler, and a third each of this zone, of those that have all, and of the others."""
        rng, share = self._board.rng, self._terms.sample // 3
        names = dict.fromkeys([blob.filler] if blob.filler else ())
        for pool in (blob.zones.get(self._giver.zone, _Pool()), blob.wholes, blob.parts):
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

    def _mine(self, blob: _Blob) -> _Node:
        """This node's entry, renewed."""
        now = self._board.clock()
        node = blob.alive(self._id, now) or _Node(self._giver)
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
        for wish in wishes:
            if len(grants) == room:
                break
            if wish.stripe in mine.receiving:
                continue
            search = _Search(wish, avoid)
            found = self._found(blob, search)
            if found is not None:
                grants.append(self._grant(digest, blob, wish.stripe, *found))
            elif not search.is_known:
                missing.add(wish.stripe)
        return Taken(tuple(grants), frozenset(missing), self._view(blob, known, ()))

    def _found(self, blob: _Blob, search: _Search) -> tuple[str, int] | None:
        """Who gives the stripe, and its rank: a wished one, else of this zone, else any."""
        for name in search.wish.givers:
            is_right, rank = self._weighed(blob, search, name)
            if is_right:
                return name, rank or 0
        for zone in (self._giver.zone, ANY_ZONE):
            found = self._first_of(blob, search, blob.queues.get((search.wish.stripe, zone), {}))
            if found is not None:
                return found
            if search.busy == LOOKS:
                return None  # there are enough in this zone, in a moment
        for name in blob.wholes.draw(LOOKS, self._board.rng):
            is_right, rank = self._weighed(blob, search, name)
            if is_right:
                return name, rank or 0
        return None

    def _first_of(
        self, blob: _Blob, search: _Search, queue: dict[str, None]
    ) -> tuple[str, int] | None:
        """Who is passed over goes to the end of the queue; who is no giver any more leaves it."""
        search.busy = 0
        looked = list(itertools.islice(queue, LOOKS))
        behind: list[str] = []
        gone: list[str] = []
        found = None
        for name in looked:
            is_right, rank = self._weighed(blob, search, name)
            if is_right:
                found = name, rank or 0  # it stays in front: it may lend once more
                break
            (gone if rank is None and name != self._id else behind).append(name)
        for name in gone:
            del queue[name]
        if found is not None or len(looked) == LOOKS:
            for name in behind:
                del queue[name]
                queue[name] = None
        return found

    def _weighed(self, blob: _Blob, search: _Search, name: str) -> tuple[bool, int | None]:
        """May it give the stripe now? And its rank for that; None if it cannot give it at all.

        What one that lends all it may has of the stripe is not looked at.
        """
        node = None if name == self._id else blob.alive(name, self._board.clock())
        if node is None:
            return False, None
        terms, is_avoided = self._terms, name in search.avoid
        limits = (terms.most, terms.each)
        if name == blob.filler:
            limits = (terms.filler_most, terms.filler_each)
        if len(node.lent) >= limits[0]:
            rank: int | None = 0
            is_right = False
        else:
            rank = node.rank(search.wish.stripe)
            if rank is None or is_avoided or rank >= search.wish.limit:
                search.is_known = search.is_known or (rank is not None and not is_avoided)
                return False, rank
            is_right = node.may_lend(search.wish.stripe, *limits)
        if is_avoided:
            return False, rank
        search.is_known = True
        search.busy += not is_right
        return is_right, rank

    def _grant(self, digest: Digest, blob: _Blob, stripe: int, name: str, rank: int) -> Grant:
        token = self._board.number()
        giver = blob.nodes[name].giver
        grant = Grant(digest, blob.generation, stripe, giver, rank + 1, token)
        self._enter(blob, grant)
        return grant

    def _enter(self, blob: _Blob, grant: Grant) -> None:
        until = self._board.clock() + self._terms.grant
        blob.nodes[self._id].receives(grant, until)
        blob.line_up(self._giver, grant.stripe)
        giver = blob.nodes.get(grant.giver.node)
        if giver is not None:
            giver.lends(grant, until)

    async def give_back(self, grant: Grant, outcome: Outcome) -> None:
        blob = self._board.blob(grant.digest)
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
        mine = blob.alive(self._id, now) or _Node(self._giver)
        mine.have, mine.until = have, now + self._terms.part
        blob.enter(mine)
        for stripe in bits(have):
            blob.line_up(self._giver, stripe)
        for grant in grants:
            self._enter(blob, grant)
        return True

    def _hold_whole(self, blob: _Blob) -> bool:
        now = self._board.clock()
        for name in blob.wholes:
            blob.alive(name, now)
        if self._id not in blob.wholes and len(blob.wholes) >= self._terms.wholes:
            return False  # what it had as a part goes on to be listed for a while
        mine = blob.alive(self._id, now) or _Node(self._giver)
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
