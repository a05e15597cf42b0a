"""Whom a node does not ask for stripes, and for how long.

Only who lied is *shunned*: its bytes were not those of a published hash, or it published hashes of
bytes that were not the blob's. Who died, stalled or had no room is merely *avoided* for a moment,
longer each time it happens again, so that a flapping node costs less and less.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from proxy.fleet.claims import Outcome


class Why(enum.Enum):
    """What a giver did instead of giving a stripe: seconds without it, at first and at most."""

    LIED = (600.0, 3600.0)
    DIED = (5.0, 300.0)
    STALLED = (10.0, 300.0)
    BUSY = (0.25, 2.0)
    LACKED = (0.5, 60.0)  # it has not, or no longer, what the directory says: late news, mostly

    @property
    def first(self) -> float:
        return self.value[0]

    @property
    def most(self) -> float:
        return self.value[1]

    @property
    def outcome(self) -> Outcome:
        """How a grant has ended whose giver did that."""
        if self in (Why.DIED, Why.STALLED):
            return Outcome.DIED
        return Outcome.LIED if self is Why.LIED else Outcome.FAILED


@dataclass(frozen=True, slots=True)
class _Mark:
    why: Why
    seconds: float
    until: float


class Shunned:
    """The givers that one node leaves alone now, whatever blob they were asked for.

    Times come from the caller. Marks that have ended are kept as long again: who fails anew within
    that time is left for twice as long as before.
    """

    def __init__(self) -> None:
        self._marks: dict[str, _Mark] = {}

    def __repr__(self) -> str:
        told = ", ".join(f"{node} {mark.why.name.lower()}" for node, mark in self._marks.items())
        return f"<Shunned {told or 'nobody'}>"

    def mark(self, node: str, why: Why, now: float) -> None:
        """It failed in that way. A lie is not forgotten over a lesser fault."""
        before = self._marks.get(node)
        if before and before.why is Why.LIED and why is not Why.LIED and before.until > now:
            return
        repeated = before is not None and before.why is why
        seconds = min(why.most, 2 * before.seconds) if before and repeated else why.first
        self._marks[node] = _Mark(why, seconds, now + seconds)

    def praise(self, node: str) -> None:
        """It gave a stripe well: lesser faults are forgotten."""
        mark = self._marks.get(node)
        if mark is not None and mark.why is not Why.LIED:
            del self._marks[node]

    def avoided(self, now: float) -> frozenset[str]:
        """Node ids to leave alone at this moment."""
        over = [n for n, mark in self._marks.items() if mark.until + mark.seconds <= now]
        for node in over:
            del self._marks[node]
        return frozenset(n for n, mark in self._marks.items() if mark.until > now)

    def distrusted(self, now: float) -> frozenset[str]:
        """Those of them that have more than just no room at the moment."""
        return frozenset(
            node for node in self.avoided(now) if self._marks[node].why is not Why.BUSY
        )

    def liars(self, now: float) -> frozenset[str]:
        """Those of them that lied."""
        return frozenset(node for node in self.avoided(now) if self._marks[node].why is Why.LIED)
