"""What a pursuit asks its owner to do; and what that is when the directory is no help."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.fleet.claims import ANY_RANK, Giver, View, Wish
from proxy.fleet.patience import LAST_LOOK
from proxy.fleet.stripes import Span, Standing, givers, to_fill


@dataclass(frozen=True, slots=True)
class Ask:
    """A stripe to be asked of a giver without a grant, since the directory is gone."""

    stripe: int
    giver: Giver
    rank: int


@dataclass(frozen=True, slots=True)
class Fresh:
    """Hashes to publish as the filler, from stripe `first` on, and who published each at first."""

    first: int
    hashes: tuple[bytes, ...]
    by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now; nothing of it again before something has happened.

    `drop`: this generation is wrong. `lead`: ask to become the filler. `publish`: as the filler.
    `hold`: say what this node has. `wishes`, `room`, `avoid`: take these. `asks`: ask these without
    a grant. `fill`: bring these stripes from the upstream, or from the node named in it. `stop`:
    end the fill that is under way, another node does it. `saves`: grants that have ended may be
    given back together with the next that are taken. `wait`: seconds until the next look.
    """

    drop: str | None = None
    lead: bool = False
    publish: Fresh | None = None
    hold: bool = False
    wishes: tuple[Wish, ...] = ()
    room: int = 0
    avoid: frozenset[str] = frozenset()
    asks: tuple[Ask, ...] = ()
    fill: Span | None = None
    stop: bool = False
    saves: bool = False
    wait: float = LAST_LOOK


def alone(standing: Standing, view: View, *, is_filling: bool) -> Step:
    """Known givers for what is published, and the upstream for what none of them has."""
    holdings = {
        holding.giver.node: holding
        for holding in view.holdings
        if holding.giver.node not in standing.avoid
    }
    asks: list[Ask] = []
    orphans = []
    for stripe in standing.missing(standing.count):
        limit = standing.limits.get(stripe, ANY_RANK)
        known = givers(standing, tuple(holdings.values()), stripe, limit)
        if not known or stripe >= view.published:
            orphans.append(stripe)
        elif len(asks) < standing.room:
            best = holdings[known[0]]
            asks.append(Ask(stripe, best.giver, (best.rank(stripe) or 0) + 1))
    fill = None
    if not is_filling:
        fill = to_fill(standing, standing.count, orphans) if standing.count else Span(0, 1)
    return Step(asks=tuple(asks), fill=fill)
