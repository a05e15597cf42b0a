"""Who goes next: the order in which waiting tickets get their turns (DESIGN D2, D3).

Pure bookkeeping, no clock and no loop, so that fairness can be tested by calling it.

Theory of operation
-------------------
A *ticket* asks for one turn on behalf of one or more *clients*: a flight belongs to everybody who
waits on it. Tickets stand in five classes:

1. ``metadata``   manifests, tokens, HEADs: short, and everything else waits on them
2. ``small``      blobs of at most 1 MiB
3. ``blob``       the rest
4. ``segment``    further turns of flights that have one already (D9)
5. ``abandoned``  flights that nobody waits for any more

Between classes the better one goes first, but after a *row* of grants while a lower one waits it
lets a lower one pass; ``segment`` and ``abandoned`` go only when nobody above them does. A row is
three grants, times how much longer a turn of the lower class lasts: what has to be shared is the
slots' time, and if a turn of 64 MiB counted like a manifest, fifty small blobs would wait for a
dozen of those. The gate measures how long turns last (``TurnTimes``). The gate may allow some
classes only (the slot kept for metadata): such a grant counts in the row like any other, but is not
given up, since nobody else could use it.

Inside a class it is round robin over clients, inside a client round robin over *images* (the
repository a ticket is for), and first come, first served inside an image: per class a ring of
clients, per client a ring of images, per image a line of tickets. For the kubelet's client gives an
image up that gets no byte for five minutes, however many others of its node do; with one line per
client the last of many images would wait for all layers of all the others.

A ticket stands in a line of each of its clients and goes at the earliest of their turns; granting
it takes it out of all of them, and only the client whose turn it was goes to the end of the ring,
and in that client's own ring the image. An *urgent* ticket (a broken body that goes on, D8) stands
before the ring of its class.

A ticket may change while it waits. A client that joins or leaves it changes only that client's
line; another class means the end of the line there, and so does the step between having clients and
having none.

Every entry is removed at once when its ticket leaves, so an abandoned waiter costs nothing later.
A grant costs one step per client of the granted ticket, whatever the number of tickets, images
and clients waiting. A client that joins or leaves costs one step, whatever the number of others:
thousands come to a flight at once, and leave it at once.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from enum import StrEnum


class TurnClass(StrEnum):
    """What kind of request a turn is for; better classes come first."""

    METADATA = "metadata"
    SMALL = "small"
    BLOB = "blob"
    SEGMENT = "segment"
    ABANDONED = "abandoned"


_RANK = {turn_class: rank for rank, turn_class in enumerate(TurnClass)}

#: The client of a ticket that nobody waits for.
NOBODY = ""

#: Grants in a row a class may take while a lower class waits whose turns last as long: three of
#: four (D3).
STREAK = 3
#: The most that a row may be longer than that.
MAX_WEIGHT = 64.0
#: Seconds a turn is thought to last until one has been seen.
USUAL = {
    TurnClass.METADATA: 0.1,
    TurnClass.SMALL: 0.2,
    TurnClass.BLOB: 2.0,
    TurnClass.SEGMENT: 2.0,
    TurnClass.ABANDONED: 2.0,
}
#: Classes that nobody lets pass: they take what nobody else wants, here or in other nodes.
SPARE = frozenset({TurnClass.SEGMENT, TurnClass.ABANDONED})
#: What a turn counts that lasted no time at all, in seconds.
SHORTEST = 0.001

#: A blob up to this many bytes is ``small``.
SMALL_BLOB = 1 << 20


def class_for_blob(size: int | None) -> TurnClass:
    """The class of a blob of ``size`` bytes; an unknown size counts as large."""
    return TurnClass.SMALL if size is not None and size <= SMALL_BLOB else TurnClass.BLOB


class TurnTimes:
    """How long turns of each class last, in seconds: of late ones more than of earlier ones."""

    def __init__(self) -> None:
        self._lasted = dict(USUAL)

    def ended(self, turn_class: TurnClass, seconds: float) -> None:
        """One more turn has ended."""
        lasted = self._lasted[turn_class]
        lasts = seconds if seconds > SHORTEST else SHORTEST
        self._lasted[turn_class] = lasted + (lasts - lasted) / 4

    def of(self, turn_class: TurnClass) -> float:
        """What one turn of ``turn_class`` takes."""
        return self._lasted[turn_class]

    def row(self, turn_class: TurnClass, lower: TurnClass) -> int:
        """Grants in a row that ``turn_class`` may take while ``lower`` waits."""
        weight = self._lasted[lower] / self._lasted[turn_class]
        return int(STREAK * min(MAX_WEIGHT, max(1.0, weight)))


class Ticket:
    """One party's standing request for turns; reusable, queued in at most one queue at a time."""

    __slots__ = (
        "_clients",
        "_queue",
        "grants",
        "image",
        "is_held",
        "retry",
        "turn_class",
        "urgent",
        "waited",
    )

    def __init__(
        self, turn_class: TurnClass, clients: Iterable[str] = (), *, image: Hashable = None
    ) -> None:
        """``image``: whose share of a client's turns it takes; for life."""
        self.turn_class = turn_class
        self.image = image
        self.urgent = False  # looked at when it begins to wait
        self.waited = 0.0  # seconds in queues so far
        self.is_held = False
        self.grants = 0  # turns so far
        self.retry = ""  # why its next turn is another try (an error's reason); "": a first one
        self._clients = dict.fromkeys(clients)  # ordered: one run is like the next
        self._queue: TurnQueue | None = None

    @property
    def clients(self) -> Collection[str]:
        """Everybody whose turn may be used; ``NOBODY`` stands in when there is none."""
        return self._clients.keys() or (NOBODY,)

    @property
    def is_queued(self) -> bool:
        return self._queue is not None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, another try waits until it may stand in a queue."""
        self.is_held = bool(self.retry)
        try:
            yield
        finally:
            self.is_held = False

    def join(self, client: str) -> None:
        """``client`` waits for this ticket too."""
        if client in self._clients:
            return
        if self._queue is None:
            self._clients[client] = None
        elif self._clients:
            self._queue._rings[self.turn_class].line_up(self, client)
            self._clients[client] = None
        else:
            self._stand_anew({client: None}, self.turn_class)

    def leave(self, client: str) -> None:
        """``client`` does not wait for it any more."""
        if client not in self._clients:
            return
        if self._queue is None:
            del self._clients[client]
        elif len(self._clients) > 1:
            self._queue._rings[self.turn_class].drop(self, client)
            del self._clients[client]
        else:
            self._stand_anew({}, self.turn_class)

    def move(self, turn_class: TurnClass) -> None:
        """Stand in another class from now on."""
        if turn_class != self.turn_class:
            self._stand_anew(self._clients, turn_class)

    def _stand_anew(self, clients: dict[str, None], turn_class: TurnClass) -> None:
        """Be another one: at the end of the line, where it waits in one."""
        queue = self._queue
        if queue is not None:
            queue.discard(self)
        self._clients, self.turn_class = clients, turn_class
        if queue is not None:
            queue.add(self)
            queue.on_move()

    def __repr__(self) -> str:
        where = "queued" if self.is_queued else "not queued"
        return f"<Ticket {self.turn_class} of {len(self._clients)} clients, {where}>"


_Line = OrderedDict[Ticket, None]


class _Ring:
    """One class: urgent tickets first, then the clients in turn, and the images of each."""

    __slots__ = ("clients", "count", "images", "streak", "urgent")

    def __init__(self) -> None:
        self.urgent: _Line = OrderedDict()
        self.clients: OrderedDict[str, OrderedDict[Hashable, _Line]] = OrderedDict()
        self.count = 0
        self.images = 0  # lines
        self.streak = 0

    def take(self) -> Ticket:
        """Take out the ticket whose turn it is; its client goes to the end of the ring."""
        if self.urgent:
            ticket, _ = self.urgent.popitem(last=False)
            self.drop_all(ticket)
            return ticket
        client = next(iter(self.clients))
        lines = self.clients[client]
        image = next(iter(lines))
        line = lines[image]
        ticket, _ = line.popitem(last=False)
        if line:
            lines.move_to_end(image)
        else:
            del lines[image]
            self.images -= 1
        if lines:
            self.clients.move_to_end(client)
        else:
            del self.clients[client]
        if len(ticket._clients) > 1:
            self.drop_all(ticket)
        return ticket

    def line_up(self, ticket: Ticket, client: str) -> None:
        lines = self.clients.get(client)
        if lines is None:
            lines = self.clients[client] = OrderedDict()
        line = lines.get(ticket.image)
        if line is None:
            line = lines[ticket.image] = OrderedDict()
            self.images += 1
        line[ticket] = None

    def drop_all(self, ticket: Ticket) -> None:
        """Take it out of the lines of all its clients."""
        for client in ticket.clients:
            self.drop(ticket, client)

    def drop(self, ticket: Ticket, client: str) -> None:
        lines = self.clients.get(client)
        line = None if lines is None else lines.get(ticket.image)
        if lines is None or line is None:
            return
        line.pop(ticket, None)
        if not line:
            del lines[ticket.image]
            self.images -= 1
        if not lines:
            del self.clients[client]


#: Those that each class must let pass now and then.
_YIELDS_TO = {
    turn_class: frozenset(
        lower for lower in TurnClass if _RANK[turn_class] < _RANK[lower] and lower not in SPARE
    )
    for turn_class in TurnClass
}


class TurnQueue:
    """Tickets that wait, and the order they leave in.

    ``on_move`` is called when one stands elsewhere than before: it may be able to go now. ``row``
    says how many grants in a row a class may take while a lower one waits.
    """

    def __init__(
        self,
        on_move: Callable[[], None] = lambda: None,
        row: Callable[[TurnClass, TurnClass], int] = lambda _class, _lower: STREAK,
    ) -> None:
        self.on_move = on_move
        self._row = row
        self._rings = {turn_class: _Ring() for turn_class in TurnClass}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def depth(self, turn_class: TurnClass) -> int:
        """Tickets waiting in one class."""
        return self._rings[turn_class].count

    def images(self, turn_class: TurnClass) -> int:
        """Images waiting in one class; one that two clients wait for counts twice."""
        return self._rings[turn_class].images

    def depths(self) -> dict[str, int]:
        """Tickets waiting, by the class's name."""
        return {turn_class.value: ring.count for turn_class, ring in self._rings.items()}

    def ahead_of(self, ticket: Ticket) -> int:
        """How many others stand in the same or a better class; told to users."""
        total = 0
        for turn_class, ring in self._rings.items():
            total += ring.count
            if turn_class is ticket.turn_class:
                break
        return max(0, total - (1 if ticket.is_queued else 0))

    def has_rival(self, turn_class: TurnClass, paused: Collection[TurnClass] = frozenset()) -> bool:
        """Does anybody wait whom a holder of ``turn_class`` should let pass?

        Those of a ``paused`` class could not use the slot. A segment lets no other one pass: at its
        end they take turns.
        """
        for other, ring in self._rings.items():
            if other is turn_class is TurnClass.SEGMENT:
                return False
            if ring.count and other not in paused:
                return True
            if other is turn_class:
                return False
        return False

    def add(self, ticket: Ticket) -> None:
        """Let ``ticket`` wait. It must not wait anywhere already."""
        if ticket._queue is not None:
            raise ValueError(f"{ticket!r} waits already")
        ticket._queue = self
        ring = self._rings[ticket.turn_class]
        ring.count += 1
        self._length += 1
        if ticket.urgent:
            ring.urgent[ticket] = None
        for client in ticket.clients:
            ring.line_up(ticket, client)

    def discard(self, ticket: Ticket) -> None:
        """Forget ``ticket``; nothing happens when it does not wait here."""
        if ticket._queue is not self:
            return
        ticket._queue = None
        ring = self._rings[ticket.turn_class]
        ring.count -= 1
        self._length -= 1
        if ring.urgent:
            ring.urgent.pop(ticket, None)
        ring.drop_all(ticket)

    def take(self, allowed: Collection[TurnClass]) -> Ticket | None:
        """Remove and return the ticket that goes next among the ``allowed`` classes."""
        chosen = self._choose(allowed)
        if chosen is None:
            return None
        ring = self._rings[chosen]
        ticket = ring.take()
        ring.count -= 1
        self._length -= 1
        ticket.grants += 1
        ticket._queue = None
        return ticket

    def _choose(self, allowed: Collection[TurnClass]) -> TurnClass | None:
        if not self._length:
            return None
        for only, ring in self._rings.items():
            if ring.count == self._length:  # nobody waits in another one, as mostly
                if only not in allowed:
                    return None
                self._count(only, is_contested=False)
                return only
            if ring.count:
                break
        waiting = [c for c, ring in self._rings.items() if ring.count]
        candidates = [c for c in waiting if c in allowed]
        if not candidates:
            return None
        chosen = candidates.pop()
        while candidates:
            # `chosen` goes if this class does not.
            turn_class = candidates.pop()
            is_done = self._rings[turn_class].streak >= self._row(turn_class, chosen)
            if not (is_done and chosen in _YIELDS_TO[turn_class]):
                chosen = turn_class
        self._count(chosen, is_contested=not _YIELDS_TO[chosen].isdisjoint(waiting))
        return chosen

    def _count(self, granted: TurnClass, *, is_contested: bool) -> None:
        """One more grant in a row for this class; rows of better classes end with it."""
        for turn_class, ring in self._rings.items():
            if turn_class is granted:
                ring.streak = ring.streak + 1 if is_contested else 0
                return
            ring.streak = 0

    def __repr__(self) -> str:
        parts = ", ".join(f"{count} {name}" for name, count in self.depths().items() if count)
        return f"<TurnQueue {parts or 'empty'}>"
