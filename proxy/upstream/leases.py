"""What an origin needs of whoever shares its cap with others (DESIGN D16): two small Protocols.

A *lease* is the right to hold one socket, an idle one included, in a number that several nodes
share. The gate goes on to order its own queue; the leases say how many of its slots turns may use
(``most``, ``bulk``), how many sockets may exist (``allowed``), and whether others wait for what
turns use here (``is_contested``). Before it dials a lane asks once more. A socket's lease is given
back after the socket is closed, since what counts is what the origin ``held``. Leases that are lost
are told by ``cut``: every socket ends at once.

Without others there is nothing to ask for: ``Unshared`` allows as much as the gate has slots.
"""

from __future__ import annotations

from typing import Protocol


class RateLimit(Protocol):
    """What the gate asks of aiolimiter's ``AsyncLimiter``; only ever with an amount of one,
    because its queue lets small amounts overtake large ones."""

    max_rate: float
    time_period: float  # seconds

    async def acquire(self, amount: float = 1) -> None: ...


class Borrower(Protocol):
    """An origin, as its leases see it."""

    @property
    def held(self) -> int:
        """Sockets that are not closed, and those that a turn may yet open."""
        ...

    @property
    def busy(self) -> int:
        """Slots in use."""
        ...

    @property
    def pressing(self) -> int:
        """Slots in use, and those waited for by whom nobody else goes before."""
        ...

    @property
    def spare(self) -> int:
        """Waiters besides, who take what nobody else wants."""
        ...

    @property
    def metadata(self) -> int:
        """Slots that short questions use and wait for."""
        ...

    @property
    def cap(self) -> tuple[int, int | None]:
        """How many the upstream has shown to stand, and the least that it did not."""
        ...

    def regrant(self) -> None:
        """More, or fewer, slots may be used now."""
        ...

    async def shut_idle(self, keep: int) -> None:
        """Close idle sockets until no more than ``keep`` are held, if there are so many."""
        ...

    def cut(self) -> None:
        """Drop every socket, whatever it is doing."""
        ...

    def adopt(self, limit: int, ceiling: int | None) -> None:
        """The cap that the upstream has shown to stand, as all nodes have it."""
        ...


class Leases(Protocol):
    """An origin's part of a number of sockets."""

    @property
    def total(self) -> int:
        """How many could be had if nobody else wanted any."""
        ...

    @property
    def most(self) -> int:
        """Slots that turns may use now."""
        ...

    @property
    def bulk(self) -> int:
        """Those among them that are not kept for metadata."""
        ...

    @property
    def free(self) -> int:
        """How many more could probably be had at once."""
        ...

    @property
    def free_bulk(self) -> int:
        """Those among them that are not kept for metadata."""
        ...

    @property
    def allowed(self) -> int:
        """Sockets that may exist now."""
        ...

    @property
    def is_contested(self) -> bool:
        """Do others wait for what turns use here?"""
        ...

    @property
    def is_shared(self) -> bool:
        """Is the cap for others to decide, too?"""
        ...

    @property
    def rate(self) -> RateLimit | None: ...

    def bind(self, borrower: Borrower) -> None:
        """Work for this origin."""
        ...

    def changed(self) -> None:
        """What is wanted, or used, may have changed. Cheap: called at every turn's end."""
        ...

    def cap_changed(self) -> None:
        """This node's answers say that the cap should be another one."""
        ...

    def went_well(self, needed: int) -> None:
        """A request went well at a full cap; ``needed`` of them let the cap grow."""
        ...

    async def close(self) -> None:
        """Give everything back; there are no sockets any more."""
        ...


class LeaseSource(Protocol):
    """Where the leases of each origin come from."""

    def open(self, label: str, capacity: int, rate: RateLimit | None) -> Leases: ...


class Unshared:
    """The leases of an origin that nobody else uses."""

    is_contested = False
    is_shared = False

    def __init__(self, capacity: int, rate: RateLimit | None = None) -> None:
        # No properties: the gate looks at them several times in each turn.
        self.total = self.most = self.bulk = capacity
        self.free = self.free_bulk = self.allowed = capacity
        self.rate = rate

    def bind(self, borrower: Borrower) -> None:
        """Nothing is asked of it."""

    def changed(self) -> None:
        """Nobody needs to know."""

    def cap_changed(self) -> None:
        """The origin's own cap is the only one."""

    def went_well(self, needed: int) -> None:
        """The origin counts by itself."""

    async def close(self) -> None:
        """There is nothing to give back."""


class Alone:
    """The source where there is no fleet."""

    def open(self, label: str, capacity: int, rate: RateLimit | None) -> Leases:
        return Unshared(capacity, rate)
