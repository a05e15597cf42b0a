"""One call for leases and its answer: what goes to the directory's script, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from proxy.fleet.ledger import Terms

#: From this cap on one lease is kept for nodes where metadata waits (D3).
KEEPS_FROM = 4
#: Seconds without any call after which the directory forgets an origin.
FORGET = 86_400.0


def reserve_of(cap: int) -> int:
    """How many of ``cap`` sockets are never leased."""
    return 0 if cap < 4 else max(1, cap // 16)


@dataclass(frozen=True, slots=True)
class CapNews:
    """What a node has to say about the shared cap: what it is based on, and what came of it.

    ``went_well``: requests that went well at a full cap since then; ``needed``: how many of them
    let the cap grow by one.
    """

    base: int = 0
    limit: int = 1
    ceiling: int | None = None
    is_changed: bool = False
    went_well: int = 0
    needed: int = 1


@dataclass(frozen=True, slots=True)
class Call:
    """What a node tells of itself. ``held`` are the leases that it claims, ``want`` the sockets it
    could use, ``metadata`` those among them that short questions wait for or use."""

    node: str
    seq: int
    cap: int
    reserve: int
    held: int
    want: int
    metadata: int
    news: CapNews
    owned: Collection[int] = ()
    may_own: bool = False
    permits: int = 0
    rate: float = 0.0  # requests a second for all nodes; 0: as many as there are
    burst: float = 0.0
    leaves: bool = False

    def encoded(self, terms: Terms) -> str:
        news = self.news
        return json.dumps(
            {
                "node": self.node,
                "seq": self.seq,
                "cap": self.cap,
                "reserve": self.reserve,
                "held": self.held,
                "want": self.want,
                "metadata": self.metadata,
                "owned": list(self.owned),
                "may_own": self.may_own,
                "permits": self.permits,
                "rate": self.rate,
                "burst": self.burst,
                "leaves": self.leaves,
                "law": {
                    "base": news.base,
                    "limit": news.limit,
                    "ceiling": news.ceiling or 0,
                    "changed": news.is_changed,
                    "went_well": news.went_well,
                    "needed": news.needed,
                },
                "keeps_from": KEEPS_FROM,
                "lease": _ms(terms.lease),
                "lag": _ms(terms.lag),
                "tick": _ms(terms.tick),
                "slow_tick": _ms(terms.slow_tick),
                "quantum": _ms(terms.quantum),
                "poll": _ms(terms.poll),
                "hold": _ms(terms.hold),
                "forget": _ms(FORGET),
            }
        )


@dataclass(frozen=True, slots=True)
class Granted:
    """The directory's answer. Times in seconds."""

    most: int  # leases
    bulk: int  # those among them that may be used for anything but metadata
    keep: int  # those among them that others do not wait for
    free: int  # leases that nobody holds
    free_bulk: int  # those among them that are not kept for metadata
    rivals: int  # other nodes that want more than they have
    again: float  # when to call next, if there is something to wait for
    calm: float  # until anything is granted, in a new epoch
    version: int
    limit: int
    ceiling: int | None
    owned: frozenset[int]
    permits: int

    @classmethod
    def decoded(cls, text: bytes | str) -> Granted | None:
        """``None`` for a call that a later one has overtaken."""
        answer: dict[str, Any] = json.loads(text)
        if answer["stale"]:
            return None
        return cls(
            most=int(answer["most"]),
            bulk=int(answer["bulk"]),
            keep=int(answer["keep"]),
            free=int(answer["free"]),
            free_bulk=int(answer["free_bulk"]),
            rivals=int(answer["rivals"]),
            again=answer["again"] / 1000,
            calm=answer["calm"] / 1000,
            version=int(answer["version"]),
            limit=int(answer["limit"]),
            ceiling=int(answer["ceiling"]) or None,
            owned=frozenset(int(number) for number in answer["owned"]),
            permits=int(answer["permits"]),
        )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
