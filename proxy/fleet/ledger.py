"""What one node may believe about its leases of one origin: pure, the safe half of ``leases.py``.

A ledger is a value; every call and every answer makes another one. ``allowed`` is how many sockets
the node may have at a moment, and is never more than what the directory has written down for it at
that moment, whatever was lost, late or answered twice:

* Before a call leaves, ``allowed`` falls to what the call claims. So the directory, which writes
  down the claim and what it adds, never knows less than the node takes.
* Only the answer to the latest call counts. Calls are numbered, and the directory ignores one that
  comes behind a later one.
* A lease is counted from before the call was sent, by the node's own clock, and ends a margin
  before the directory's does: time to abort sockets, for a loop that runs late, and for clocks that
  do not run at the same speed.

The *reserve* is apart from that: sockets that are never leased. The directory makes this node their
owner for a long time (``hold``), and gives them to nobody else before that is over, so it does not
matter how long ago the news of it came. They may be used while the directory is *gone*: a call has
failed, and the last answer is a lease time old. When it is back, what uses them may end its turn.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Terms:
    """How long things hold, in seconds; the same on all nodes."""

    lease: float = 10.0
    #: A node's leases end so much earlier for itself than for the directory.
    margin: float = 2.0
    #: How long an owner of a part of the reserve owns it after it was last heard of.
    hold: float = 1800.0
    #: By so much a server may be behind that takes over from another (``min-replicas-max-lag``).
    lag: float = 2.0
    #: A lease that others wait for is not taken back sooner: about one turn.
    quantum: float = 2.0
    #: A node that holds leases, or waits for some, calls so often at most.
    poll: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.margin < self.lease <= self.hold:
            raise ValueError(f"expected 0 < margin < lease <= hold, got {self}")

    @property
    def renewal(self) -> float:
        """The longest time between two calls of a node that holds leases."""
        return self.lease / 3

    @property
    def tick(self) -> float:
        """The most that the directory's clock of leases moves on between two calls. Half a margin:
        a server whose time is set forward ends leases so much too early, and no more."""
        return self.margin / 2

    @property
    def slow_tick(self) -> float:
        """The same of its clock of the reserve. A node's part ends so much earlier for itself."""
        return min(60.0, self.hold / 4)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Times are monotonic seconds of the node's own clock."""

    terms: Terms = field(default_factory=Terms)
    seq: int = 0  # of the latest call
    sent_at: float = _NEVER
    most: int = 0  # leases
    until: float = _NEVER
    answered_at: float = _NEVER  # when the latest call that was answered had been sent
    has_failed: bool = False  # since then
    owned: frozenset[int] = frozenset()  # parts of the reserve
    owned_until: float = _NEVER
    is_engaged: bool = False  # is the reserve in use?

    def leased(self, now: float) -> int:
        """Leases that have not ended."""
        return self.most if now < self.until else 0

    def _reserve(self, now: float) -> int:
        return len(self.owned) if now < self.owned_until else 0

    def allowed(self, now: float) -> int:
        """Sockets that this node may have."""
        return self.leased(now) + (self._reserve(now) if self.is_engaged else 0)

    def is_gone(self, now: float) -> bool:
        """Is the directory gone, so that the reserve may be used?"""
        return self.has_failed and now >= self.answered_at + self.terms.lease

    def grantable(self, now: float) -> int:
        """Sockets that turns may begin on: the reserve only while the directory is gone."""
        return self.allowed(now) if self.is_gone(now) else self.leased(now)

    def ends_at(self, now: float) -> float | None:
        """When ``allowed`` falls next by itself."""
        ends = [self.until] if self.leased(now) else []
        if self.is_engaged and self._reserve(now):
            ends.append(self.owned_until)
        return min(ends, default=None)

    def claim(self, now: float, held: int) -> int:
        """What a node with ``held`` sockets claims as leases: those that are not the reserve's."""
        spared = self._reserve(now) if self.is_engaged else 0
        return max(0, min(self.leased(now), held - spared))

    def claims_reserve(self, now: float) -> Collection[int]:
        return sorted(self.owned) if self._reserve(now) else ()

    def asking(self, now: float, held: int) -> Ledger:
        """A call is about to be sent by a node with ``held`` sockets."""
        most = self.claim(now, held)
        return replace(self, seq=self.seq + 1, sent_at=now, most=most)

    def answered(self, seq: int, most: int, owned: Collection[int]) -> Ledger:
        """The directory's answer to call ``seq``."""
        if seq != self.seq:
            return self
        terms = self.terms
        return replace(
            self,
            most=most,
            until=self.sent_at + terms.lease - terms.margin,
            answered_at=self.sent_at,
            has_failed=False,
            owned=frozenset(owned),
            owned_until=self.sent_at + terms.hold - terms.slow_tick - terms.margin,
            is_engaged=self.is_engaged and bool(owned),
        )

    def failed(self, now: float) -> Ledger:
        """The latest call brought no answer."""
        failed = replace(self, has_failed=True)
        return replace(failed, is_engaged=self.is_engaged or bool(failed._engages(now)))

    def _engages(self, now: float) -> bool:
        return self.is_gone(now) and self._reserve(now) > 0

    def settled(self, now: float, held: int) -> Ledger:
        """This ledger, now that the node has ``held`` sockets: is the reserve needed any more?"""
        if self.is_engaged and not self.is_gone(now) and held <= self.leased(now):
            return replace(self, is_engaged=False)
        return self
