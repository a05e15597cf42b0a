"""A board: what a directory's server is to the nodes of a fleet, in one process.

Data and its expiry; the rules of who gets what are in `local_claims.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from proxy.fleet.claims import WHOLE, Giver, Grant, Holding, Terms
from proxy.oci.digest import Digest

ANY_ZONE = "*"


class Pool:
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
class Node:
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
class Blob:
    """What is known of one blob."""

    generation: str
    size: int | None = None
    hashes: list[bytes] = field(default_factory=list)
    publishers: list[str] = field(default_factory=list)
    filler: str | None = None
    until: float = 0.0  # the filler's lease
    news: float = 0.0  # when it last published, or began
    banned: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    wholes: Pool = field(default_factory=Pool)
    parts: Pool = field(default_factory=Pool)
    zones: dict[str, Pool] = field(default_factory=dict)
    queues: dict[tuple[int, str], dict[str, None]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Blob {len(self.hashes)} published, {len(self.nodes)} nodes, by {self.filler}>"

    def enter(self, node: Node) -> None:
        name = node.giver.node
        self.nodes[name] = node
        whole = node.have == WHOLE
        (self.wholes if whole else self.parts).add(name)
        (self.parts if whole else self.wholes).discard(name)
        self.zones.setdefault(node.giver.zone, Pool()).add(name)

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

    def alive(self, name: str, now: float) -> Node | None:
        """The node's entry with all that has ended taken out; None when nothing is left of it."""
        node = self.nodes.get(name)
        if node is None:
            return None
        if node.until <= now:
            self.remove(name)
            return None
        node.expire(now)
        return node


class Board:
    """What a directory's server is to the nodes of a fleet: all blobs, one clock."""

    def __init__(
        self, *, clock: Callable[[], float], rng: random.Random, terms: Terms | None = None
    ) -> None:
        self.terms = terms or Terms()
        self.clock = clock
        self.rng = rng
        self._blobs: dict[Digest, Blob] = {}
        self._count = 0

    def __repr__(self) -> str:
        return f"<Board of {len(self._blobs)} blobs>"

    def number(self) -> str:
        """Never the same twice, nor after `forget`."""
        self._count += 1
        return str(self._count)

    def blob(self, digest: Digest) -> Blob:
        """A blob's entry, without a filler whose lease has ended."""
        blob = self._blobs.get(digest)
        if blob is None:
            blob = self._blobs[digest] = Blob(self.number())
        now = self.clock()
        if blob.filler and blob.news + self.terms.stuck <= now:
            blob.banned[blob.filler] = now + self.terms.stuck
            blob.filler = None
        if blob.until <= now:
            blob.filler = None
        return blob

    def renew(self, digest: Digest, generation: str) -> Blob:
        """The blob without its stripes, in another generation; who has all of it stays."""
        old, blob = self._blobs[digest], Blob(generation)
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
