"""The order of turns: examples of fairness, and a queue that is compared with a naive one."""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from proxy.upstream.turns import (
    MAX_WEIGHT,
    NOBODY,
    SMALL_BLOB,
    STREAK,
    Ticket,
    TurnClass,
    TurnQueue,
    TurnTimes,
    class_for_blob,
)

METADATA, SMALL, BLOB, SEGMENT, ABANDONED = TurnClass
ALL = frozenset(TurnClass)


def queue_of(*tickets: Ticket) -> TurnQueue:
    queue = TurnQueue()
    for ticket in tickets:
        queue.add(ticket)
    return queue


def taken(queue: TurnQueue, allowed: Collection[TurnClass] = ALL) -> list[Ticket]:
    """Everything that may go, in its order."""
    order = []
    while (ticket := queue.take(allowed)) is not None:
        order.append(ticket)
    return order


def tickets(turn_class: TurnClass, *clients: str) -> list[Ticket]:
    """One ticket for each."""
    return [Ticket(turn_class, [client]) for client in clients]


def classes(order: Iterable[Ticket]) -> str:
    """Initials, such as "mmmb"."""
    return "".join(ticket.turn_class[0] for ticket in order)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, SMALL), (SMALL_BLOB, SMALL), (SMALL_BLOB + 1, BLOB), (None, BLOB)],
)
def test_a_blob_of_unknown_size_counts_as_large(size: int | None, expected: TurnClass) -> None:
    assert class_for_blob(size) is expected


def test_one_client_is_served_in_the_order_of_its_requests() -> None:
    asked = tickets(BLOB, "a", "a", "a")
    assert taken(queue_of(*asked)) == asked


def test_clients_take_turns_whatever_each_of_them_has_asked_for() -> None:
    a1, a2, a3, b1, c1, c2 = asked = tickets(BLOB, "a", "a", "a", "b", "c", "c")
    assert taken(queue_of(*asked)) == [a1, b1, c1, a2, c2, a3]


def images(client: str, *names: str) -> list[Ticket]:
    """One ticket of the client for each image."""
    return [Ticket(BLOB, [client], image=name) for name in names]


def test_the_images_of_a_client_take_turns_whatever_is_asked_for_of_each() -> None:
    x1, x2, x3, y1, z1, z2 = asked = images("a", *"xxxyzz")
    assert taken(queue_of(*asked)) == [x1, y1, z1, x2, z2, x3]


def test_many_images_are_no_more_turns_for_their_client() -> None:
    x1, y1, z1 = asked = images("a", *"xyz")
    b1, b2, b3 = others = tickets(BLOB, "b", "b", "b")
    assert taken(queue_of(*asked, *others)) == [x1, b1, y1, b2, z1, b3]


def test_a_shared_ticket_costs_only_that_clients_image_its_turn() -> None:
    shared = Ticket(BLOB, ["a", "b"], image="x")
    [ax, ay], [bx, by] = images("a", *"xy"), images("b", *"xy")
    # By a's turn, so a's next is of y; with b it is still the turn of x.
    assert taken(queue_of(shared, ax, ay, bx, by)) == [shared, bx, ay, by, ax]


def test_an_image_that_comes_back_stands_behind_those_that_wait() -> None:
    x1, y1, y2 = images("a", *"xyy")
    queue = queue_of(x1, y1, y2)
    assert queue.take(ALL) is x1
    [x2] = images("a", "x")
    queue.add(x2)
    assert taken(queue) == [y1, x2, y2]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), max_size=60))
def test_no_image_of_a_client_is_served_twice_while_another_waits_for_its_first(
    asked: list[tuple[str, str]],
) -> None:
    queue = queue_of(*(Ticket(BLOB, [client], image=image) for client, image in asked))
    order = [(next(iter(t.clients)), t.image) for t in taken(queue)]
    assert sorted(order) == sorted(asked)
    for client in "ab":
        mine = [image for name, image in order if name == client]
        for place in range(len(mine)):
            seen, left = mine[: place + 1], set(mine[place + 1 :])
            assert all(seen.count(mine[place]) - seen.count(other) <= 1 for other in left)


def test_a_client_that_comes_back_stands_behind_those_who_wait() -> None:
    a1, b1, b2 = tickets(BLOB, "a", "b", "b")
    queue = queue_of(a1, b1, b2)
    assert queue.take(ALL) is a1
    a2 = Ticket(BLOB, ["a"])
    queue.add(a2)
    assert taken(queue) == [b1, a2, b2]


def test_a_shared_ticket_goes_at_the_earliest_turn_of_its_clients() -> None:
    a1, a2, b1 = tickets(BLOB, "a", "a", "b")
    shared = Ticket(BLOB, ["a", "c"])
    queue = queue_of(a1, a2, b1, shared)
    assert taken(queue) == [a1, b1, shared, a2]


def test_a_shared_ticket_costs_only_the_client_whose_turn_it_took() -> None:
    shared = Ticket(BLOB, ["a", "b"])
    a1, b1 = tickets(BLOB, "a", "b")
    assert taken(queue_of(shared, a1, b1)) == [shared, b1, a1]


def test_who_joins_a_waiting_ticket_brings_a_turn_along() -> None:
    a1, a2, a3 = tickets(BLOB, "a", "a", "a")
    queue = queue_of(a1, a2, a3)
    a3.join("b")
    assert taken(queue) == [a1, a3, a2]


def test_who_leaves_a_waiting_ticket_takes_the_turn_away_again() -> None:
    a1, a2, a3 = tickets(BLOB, "a", "a", "a")
    queue = queue_of(a1, a2, a3)
    a3.join("b")
    a3.leave("b")
    assert taken(queue) == [a1, a2, a3]


def test_a_ticket_whose_clients_all_left_waits_on_behalf_of_nobody() -> None:
    ticket, other = tickets(BLOB, "a", "a")
    queue = queue_of(ticket, other)
    ticket.leave("a")
    assert list(ticket.clients) == [NOBODY]
    assert queue.depth(BLOB) == 2
    assert taken(queue) == [other, ticket]


def test_joining_twice_or_leaving_what_one_never_joined_changes_nothing() -> None:
    a1, a2 = tickets(BLOB, "a", "b")
    queue = queue_of(a1, a2)
    a1.join("a")
    a1.leave("z")
    assert taken(queue) == [a1, a2]


@pytest.mark.parametrize("waits", [True, False])
def test_who_comes_or_goes_is_one_place_more_or_less_and_the_others_are_not_copied(
    waits: bool,
) -> None:
    ticket = Ticket(BLOB, ["a", "b"])
    queue = queue_of(*[ticket] * waits)
    clients = ticket.clients
    ticket.join("c")
    assert list(clients) == ["a", "b", "c"]
    ticket.leave("a")
    assert list(clients) == ["b", "c"]
    assert queue.images(BLOB) == 2 * waits


def test_a_better_class_goes_first() -> None:
    blob, small, metadata = Ticket(BLOB), Ticket(SMALL), Ticket(METADATA)
    assert taken(queue_of(blob, small, metadata)) == [metadata, small, blob]


def test_a_class_takes_three_of_four_while_a_lower_one_waits() -> None:
    queue = queue_of(*(Ticket(METADATA) for _ in range(8)), *(Ticket(BLOB) for _ in range(3)))
    assert classes(taken(queue)) == "mmmbmmmbmmb"


def test_three_classes_share_by_the_same_rule() -> None:
    waiting = [Ticket(turn_class) for turn_class in (METADATA, SMALL, BLOB) for _ in range(30)]
    order = classes(taken(queue_of(*waiting)))
    assert order.startswith("mmmsmmmsmmmsmmmbmmms")


def test_a_row_is_longer_while_turns_of_a_lower_class_last_longer() -> None:
    times = TurnTimes()
    for _ in range(50):
        times.ended(SMALL, 0.1)
        times.ended(BLOB, 0.4)
    assert times.row(SMALL, BLOB) == 4 * STREAK
    queue = TurnQueue(row=times.row)
    for ticket in tickets(SMALL, *"abcdefghijklmno") + tickets(BLOB, *"xy"):
        queue.add(ticket)
    assert classes(taken(queue)) == "s" * 12 + "b" + "s" * 3 + "b"


def test_a_row_is_never_shorter_than_three_and_never_endless() -> None:
    times = TurnTimes()
    for _ in range(50):
        times.ended(METADATA, 9.0)
        times.ended(SMALL, 0.0)
        times.ended(BLOB, 1e6)
    assert times.row(METADATA, SMALL) == STREAK
    assert times.row(SMALL, BLOB) == STREAK * MAX_WEIGHT


def test_a_turn_of_a_lower_class_ends_the_row_of_a_better_one() -> None:
    queue = queue_of(Ticket(BLOB), Ticket(BLOB), Ticket(METADATA), Ticket(METADATA))
    assert classes(taken(queue, {METADATA})) == "mm"
    assert queue.take({BLOB}) is not None
    for _ in range(4):
        queue.add(Ticket(METADATA))
    assert classes(taken(queue)) == "mmmbm"


def test_turns_that_only_metadata_may_have_count_but_are_not_given_up() -> None:
    queue = queue_of(*(Ticket(METADATA) for _ in range(6)), Ticket(BLOB))
    granted = [queue.take({METADATA}) for _ in range(STREAK + 2)]
    assert None not in granted
    assert classes(taken(queue)) == "bm"


def test_abandoned_flights_go_when_nobody_else_waits() -> None:
    queue = queue_of(Ticket(ABANDONED), *(Ticket(BLOB, ["a"]) for _ in range(9)))
    assert classes(taken(queue)) == "b" * 9 + "a"


def test_further_turns_of_a_flight_go_before_abandoned_ones_and_after_everybody_else() -> None:
    queue = queue_of(Ticket(ABANDONED), Ticket(SEGMENT), *(Ticket(BLOB, ["a"]) for _ in range(9)))
    assert classes(taken(queue)) == "b" * 9 + "sa"


def test_further_turns_of_one_clients_flights_take_turns() -> None:
    one, two = (
        [Ticket(SEGMENT, ["a"], image=digest) for _ in range(3)] for digest in ("one", "two")
    )
    assert taken(queue_of(*one, *two)) == [one[0], two[0], one[1], two[1], one[2], two[2]]


def test_an_urgent_ticket_stands_before_its_class_and_no_other() -> None:
    a1, b1, urgent = tickets(BLOB, "a", "b", "a")
    urgent.urgent = True
    metadata = Ticket(METADATA)
    assert taken(queue_of(a1, b1, urgent, metadata)) == [metadata, urgent, a1, b1]


def test_a_ticket_that_changes_class_stands_at_the_end_there() -> None:
    first, second = tickets(BLOB, "a", "a")
    small = Ticket(SMALL, ["a"])
    queue = queue_of(first, second, small)
    first.move(SMALL)
    assert queue.depths() == {"metadata": 0, "small": 2, "blob": 1, "segment": 0, "abandoned": 0}
    assert taken(queue) == [small, first, second]


def test_nobody_waits_in_two_places() -> None:
    ticket = Ticket(BLOB)
    queue = queue_of(ticket)
    with pytest.raises(ValueError, match="waits already"):
        queue.add(ticket)
    with pytest.raises(ValueError, match="waits already"):
        TurnQueue().add(ticket)
    TurnQueue().discard(ticket)  # another queue's business
    assert queue.take(ALL) is ticket
    assert not ticket.is_queued


def test_nothing_waits_in_an_empty_queue() -> None:
    queue = TurnQueue()
    assert queue.take(ALL) is None
    assert len(queue) == 0
    assert "empty" in repr(queue)


@pytest.mark.parametrize(
    ("holder", "waiting", "expected"),
    [
        (BLOB, METADATA, True),
        (BLOB, BLOB, True),
        (SMALL, BLOB, False),
        (BLOB, ABANDONED, False),
        (ABANDONED, ABANDONED, True),
        (BLOB, SEGMENT, False),
        (SEGMENT, SMALL, True),
        (SEGMENT, SEGMENT, False),
        (ABANDONED, SEGMENT, True),
    ],
)
def test_a_rival_is_one_of_the_same_or_a_better_class(
    holder: TurnClass, waiting: TurnClass, expected: bool
) -> None:
    assert queue_of(Ticket(waiting)).has_rival(holder) is expected
    assert not TurnQueue().has_rival(holder)


def test_a_ticket_is_told_how_many_may_go_before_it() -> None:
    mine = Ticket(SMALL, ["a"])
    queue = queue_of(Ticket(METADATA), Ticket(SMALL), Ticket(BLOB), mine)
    assert queue.ahead_of(mine) == 2
    assert queue.ahead_of(Ticket(BLOB)) == 4


@given(st.lists(st.sampled_from("abcd"), max_size=60))
def test_no_client_is_served_twice_while_another_waits_for_its_first(clients: list[str]) -> None:
    order = [next(iter(t.clients)) for t in taken(queue_of(*tickets(BLOB, *clients)))]
    assert sorted(order) == sorted(clients)
    seen: dict[str, int] = {}
    for place, client in enumerate(order):
        seen[client] = seen.get(client, 0) + 1
        waiting = set(order[place + 1 :])
        assert all(seen[client] - seen.get(other, 0) <= 1 for other in waiting)


class NaiveQueue:
    """The same rules, said as sorting: everything is a time stamp, the oldest goes first."""

    def __init__(self) -> None:
        self.time = 0
        self.waiting: dict[Ticket, TurnClass] = {}
        self.urgent: dict[Ticket, int] = {}
        self.stood: dict[tuple[Ticket, str], int] = {}  # in a client's line since
        self.served: dict[tuple[TurnClass, str], int] = {}  # a client's turn, or its line's start
        self.shown: dict[tuple[TurnClass, str, Hashable], int] = {}  # the same of its images
        self.history: list[tuple[TurnClass, bool]] = []  # grants, and whether they were contested

    def now(self) -> int:
        self.time += 1
        return self.time

    def line(self, turn_class: TurnClass, client: str) -> list[Ticket]:
        standing = [t for t, c in self.stood if c == client and self.waiting.get(t) is turn_class]
        return sorted(standing, key=lambda ticket: self.stood[ticket, client])

    def line_up(self, ticket: Ticket, client: str) -> None:
        turn_class = self.waiting[ticket]
        line = self.line(turn_class, client)
        if not line:
            self.served[turn_class, client] = self.now()
        if ticket.image not in {other.image for other in line}:
            self.shown[turn_class, client, ticket.image] = self.now()
        self.stood[ticket, client] = self.now()

    def add(self, ticket: Ticket) -> None:
        self.waiting[ticket] = ticket.turn_class
        if ticket.urgent:
            self.urgent[ticket] = self.now()
        for client in ticket.clients:
            self.line_up(ticket, client)

    def remove(self, ticket: Ticket) -> None:
        self.waiting.pop(ticket, None)
        self.urgent.pop(ticket, None)
        self.stood = {key: at for key, at in self.stood.items() if key[0] is not ticket}

    def row(self, turn_class: TurnClass) -> int:
        """Contested grants of the class since it, or one of lower standing, had another kind."""
        count = 0
        for granted, contested in reversed(self.history):
            if granted is turn_class and contested:
                count += 1
            elif granted is turn_class or better(turn_class, granted):
                break
        return count

    def choose(self, allowed: Collection[TurnClass]) -> TurnClass | None:
        present = [c for c in TurnClass if c in self.waiting.values()]
        able = [c for c in present if c in allowed]

        def must_wait(turn_class: TurnClass) -> bool:
            return self.row(turn_class) >= STREAK and any(better(turn_class, c) for c in able)

        chosen = next((c for c in able if not must_wait(c)), None)
        if chosen is not None:
            self.history.append((chosen, any(better(chosen, c) for c in present)))
        return chosen

    def take(self, allowed: Collection[TurnClass]) -> Ticket | None:
        chosen = self.choose(allowed)
        if chosen is None:
            return None
        urgent = [ticket for ticket in self.urgent if self.waiting[ticket] is chosen]
        if urgent:
            ticket = min(urgent, key=self.urgent.__getitem__)
        else:
            clients = {c for t, c in self.stood if self.waiting[t] is chosen}
            client = min(clients, key=lambda name: self.served[chosen, name])
            line = self.line(chosen, client)
            image = min((t.image for t in line), key=lambda name: self.shown[chosen, client, name])
            ticket = next(ticket for ticket in line if ticket.image == image)
            self.served[chosen, client] = self.shown[chosen, client, image] = self.now()
        self.remove(ticket)
        return ticket


def better(one: TurnClass, other: TurnClass) -> bool:
    """Does ``one`` go before ``other``, and has to let it pass now and then?"""
    order = list(TurnClass)
    return other not in (SEGMENT, ABANDONED) and order.index(one) < order.index(other)


class QueueMachine(RuleBasedStateMachine):
    """Does the queue what the naive one does, whatever happens to tickets meanwhile?"""

    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.queue = TurnQueue()
        self.naive = NaiveQueue()

    @rule(
        target=waiting,
        turn_class=st.sampled_from(TurnClass),
        clients=st.lists(st.sampled_from("abc"), max_size=3),
        image=st.sampled_from("xyz"),
        urgent=st.booleans(),
    )
    def add(self, turn_class: TurnClass, clients: list[str], image: str, urgent: bool) -> Ticket:
        ticket = Ticket(turn_class, clients, image=image)
        ticket.urgent = urgent
        self.queue.add(ticket)
        self.naive.add(ticket)
        return ticket

    @rule(ticket=consumes(waiting))
    def discard(self, ticket: Ticket) -> None:
        self.queue.discard(ticket)
        self.naive.remove(ticket)

    @rule(ticket=waiting, client=st.sampled_from("abc"))
    def join(self, ticket: Ticket, client: str) -> None:
        had = list(ticket.clients)
        ticket.join(client)
        if not ticket.is_queued or client in had:
            return
        if had == [NOBODY]:
            self.naive.remove(ticket)
            self.naive.add(ticket)
        else:
            self.naive.line_up(ticket, client)

    @rule(ticket=waiting, client=st.sampled_from("abc"))
    def leave(self, ticket: Ticket, client: str) -> None:
        had = list(ticket.clients)
        ticket.leave(client)
        if not ticket.is_queued or client not in had:
            return
        if list(ticket.clients) == [NOBODY]:
            self.naive.remove(ticket)
            self.naive.add(ticket)
        else:
            del self.naive.stood[ticket, client]

    @rule(ticket=waiting, turn_class=st.sampled_from(TurnClass))
    def move(self, ticket: Ticket, turn_class: TurnClass) -> None:
        changes = ticket.turn_class is not turn_class
        ticket.move(turn_class)
        if ticket.is_queued and changes:
            self.naive.remove(ticket)
            self.naive.add(ticket)

    @rule(allowed=st.sampled_from([ALL, frozenset({METADATA})]))
    def take(self, allowed: frozenset[TurnClass]) -> None:
        ticket = self.queue.take(allowed)
        assert ticket is self.naive.take(allowed)
        assert ticket is None or not ticket.is_queued

    @rule(ticket=waiting)
    def ask(self, ticket: Ticket) -> None:
        present = list(self.naive.waiting.values())
        order = list(TurnClass)
        rank = order.index(ticket.turn_class)
        before = [c for c in present if order.index(c) <= rank]
        assert self.queue.ahead_of(ticket) == len(before) - ticket.is_queued
        rivals = [c for c in before if not (c is ticket.turn_class is SEGMENT)]
        assert self.queue.has_rival(ticket.turn_class) == bool(rivals)

    @invariant()
    def counts_agree(self) -> None:
        present = list(self.naive.waiting.values())
        assert len(self.queue) == len(present)
        for turn_class in TurnClass:
            assert self.queue.depth(turn_class) == operator.countOf(present, turn_class)
            lines = {(c, t.image) for t, c in self.naive.stood if t.turn_class is turn_class}
            assert self.queue.images(turn_class) == len(lines)

    def teardown(self) -> None:
        while self.naive.waiting:
            self.take(ALL)
        assert self.queue.take(ALL) is None


TestQueueAgainstTheNaiveOne = QueueMachine.TestCase
