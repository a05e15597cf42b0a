"""Stripes: how long they are, which to ask for next and of whom, and which the upstream brings.

Pure: what a node knows goes in, what it should ask for comes out. `pursuit.py` keeps what it knows.

The order is made so that a cold crowd works with all its uplinks at once. The stripe that readers
need next comes first; then those that fewest others have, and among equals each node has an order
of its own. Who gives is chosen by the directory (`claims.py`), and here only while that is gone: a
giver costs what it lends already, since its uplink is shared by as many; one that is itself still
receiving the stripe costs, for each hop from one that has it, the piece it is behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from proxy.fleet.claims import ANY_RANK, WHOLE, Holding, View, Wish

MIB = 1024 * 1024
PIECE = 256 * 1024
LARGEST = 16 * MIB
#: Smaller blobs have so many stripes that there are enough of them to share: what a crowd loses is
#: a stripe's time at the beginning, and another at the end.
ENOUGH = 64
#: But they are 1 MiB at least. If a blob of more than that had fewer than so many, they are halved,
#: down to a piece: of layers of two or three stripes a crowd has too little to pass on at a time.
FEWEST = 4
#: How many stripes from the first missing one on are thought about at once.
WINDOW = 256
#: How many more stripes are named than may be received, as alternatives.
SPARE_WISHES = 4
#: How many bytes the upstream is asked for in one go: a turn's worth.
SPAN = 64 * MIB


def stripe_size(size: int) -> int:
    """How long the stripes of a blob of `size` bytes are; the last one may be shorter."""
    whole = min(LARGEST, max(1, -(-size // (ENOUGH * MIB))) * MIB)
    while size > MIB and whole > PIECE and whole * FEWEST > size:
        whole //= 2
    return whole


def stripe_count(size: int) -> int:
    """How many stripes a blob of `size` bytes has; an empty one has one, of no bytes."""
    return max(1, -(-size // stripe_size(size)))


def stripe_length(size: int, stripe: int) -> int:
    """How many bytes this stripe of a blob of `size` bytes has."""
    whole = stripe_size(size)
    return min(whole, size - stripe * whole)


@dataclass(frozen=True, slots=True)
class Standing:
    """What one node has of a blob and may ask for.

    `busy`: stripes that it is receiving or filling. `room`: how many more it may receive. `limits`:
    the rank that it had for a stripe, and may not exceed. `order`: its own order of stripes, a
    number for each. `need`: what its readers wait for. `hop`: what a hop costs, in grants.
    `span`: how many stripes the upstream is asked for in one go.
    """

    zone: str
    have: int
    count: int
    busy: Collection[int]
    room: int
    limits: Mapping[int, int]
    order: Sequence[float]
    need: int = 0
    hop: float = 1.0
    span: int = 1
    avoid: frozenset[str] = frozenset()

    def lacks(self, stripe: int) -> bool:
        return not self.have >> stripe & 1 and stripe not in self.busy

    def missing(self, end: int) -> list[int]:
        """The stripes before `end` to ask for: those that readers need, and on from the first."""
        first = lowest_zero(self.have)
        window = range(first, min(end, first + WINDOW))
        found = [stripe for stripe in window if self.lacks(stripe)]
        if self.need not in window and self.need < end and self.lacks(self.need):
            found.append(self.need)
        return found


def lowest_zero(mask: int) -> int:
    """The position of the lowest bit that is not set."""
    return (~mask & (mask + 1)).bit_length() - 1


def wishes(standing: Standing, view: View, ahead: int = 0) -> tuple[Wish, ...]:
    """Stripes to ask for, most wanted first; as many as to have alternatives. Behind those that are
    published so many of the next: they may be by the time that the directory is asked."""
    stripes = standing.missing(min(view.published + ahead, standing.count))
    if standing.room <= 0 or not stripes:
        return ()
    masks = [holding.have for holding in view.holdings]

    def urgency(stripe: int) -> tuple[bool, bool, float, float]:
        if stripe >= view.published:
            return True, True, stripe, 0.0
        rarity = sum([have >> stripe & 1 for have in masks])
        return False, stripe != standing.need, rarity, standing.order[stripe]

    chosen = sorted(stripes, key=urgency)[: standing.room + SPARE_WISHES]
    limits = standing.limits
    return tuple(
        Wish(stripe, limits.get(stripe, ANY_RANK), stripe == standing.need) for stripe in chosen
    )


def givers(
    standing: Standing, holdings: Sequence[Holding], stripe: int, limit: int
) -> tuple[str, ...]:
    """Who may be asked for the stripe, best first: own zone, then whoever can bring it soonest."""
    found = []
    for holding in holdings:
        rank = holding.rank(stripe)
        if rank is None or rank >= limit:
            continue
        cost = holding.lending + rank * standing.hop
        found.append((holding.giver.zone != standing.zone, cost, holding.giver.node))
    return tuple(node for _, _, node in sorted(found))


def source(standing: Standing, view: View) -> str | None:
    """The best that has the whole blob."""
    found = [
        (holding.giver.zone != standing.zone, holding.lending, holding.giver.node)
        for holding in view.holdings
        if holding.have == WHOLE and holding.giver.node not in standing.avoid
    ]
    return min(found)[-1] if found else None


@dataclass(frozen=True, slots=True)
class Span:
    """Stripes from `first` to before `last` that are to come in one go; `of` is a node id of one
    that has the whole blob, or None: the upstream."""

    first: int
    last: int
    of: str | None = None


def to_fill(
    standing: Standing, published: int, lost: Collection[int], of: str | None = None
) -> Span | None:
    """What the filler brings next: published stripes that nobody has any more, then what follows.

    A node that has the whole blob, `of`, stands in for the upstream as long as there is one.
    """
    wanted = sorted(stripe for stripe in lost if standing.lacks(stripe))
    if not wanted:
        beyond = range(published, standing.count)
        wanted = list(itertools.islice(filter(standing.lacks, beyond), standing.span))
    if not wanted:
        return None
    last = wanted[0] + 1
    while last in wanted and last - wanted[0] < standing.span:
        last += 1
    return Span(wanted[0], last, of)
