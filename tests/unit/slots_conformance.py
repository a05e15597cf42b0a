"""What every ``Slots`` has to do, in process or across a fleet.

Subclass ``SlotsConformance`` in a test module and say how one is made. Nothing here waits for time:
a test waits until the state says that its tickets stand in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import pytest

from proxy.oci.errors import QueueFull
from proxy.upstream.gate import RESERVE_FROM, Slot, Slots
from proxy.upstream.turns import Ticket, TurnClass

METADATA, SMALL, BLOB, SEGMENT, ABANDONED = TurnClass


def waiting(slots: Slots) -> int:
    """Tickets in the queue."""
    return sum(slots.state().depth.values())


async def until(condition: Callable[[], bool]) -> None:
    """Let everybody else run until it is true."""
    while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
        await asyncio.sleep(0)


class Crowd:
    """Tickets that wait at once, the order they were granted in, and the slots they hold."""

    def __init__(self, slots: Slots, is_settled: Callable[[], bool] = lambda: True) -> None:
        self.slots = slots
        self.is_settled = is_settled
        self.order: list[str] = []
        self.held: dict[str, Slot] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def _wait(self, name: str, ticket: Ticket) -> None:
        self.held[name] = await self.slots.acquire(ticket)
        self.order.append(name)

    async def ask(self, name: str, ticket: Ticket) -> None:
        """Wait for a turn under this name; returns when it is queued or granted."""
        task = self.tasks[name] = asyncio.create_task(self._wait(name, ticket))
        await until(lambda: task.done() or ticket.is_queued)
        await until(lambda: task.done() or (ticket.is_queued and self.is_settled()))

    async def granted(self, count: int) -> None:
        await until(lambda: len(self.order) >= count)

    async def serve(self, count: int) -> list[str]:
        """Give back one slot after the other until ``count`` in all were granted; the order."""
        while len(self.order) < count:
            before = len(self.order)
            self.release(next(iter(self.held)))
            await self.granted(before + 1)
        return self.order

    def release(self, name: str) -> None:
        self.slots.release(self.held.pop(name))

    async def leave(self) -> None:
        """Cancel who waits, give everything back."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        for name in list(self.held):
            self.release(name)


@contextlib.asynccontextmanager
async def crowd(
    slots: Slots, is_settled: Callable[[], bool] = lambda: True
) -> AsyncIterator[Crowd]:
    """People that wait for ``slots``; it is settled who may go when ``is_settled`` says so."""
    people = Crowd(slots, is_settled)
    try:
        yield people
    finally:
        await people.leave()


class SlotsConformance(ABC):
    """Tests for one implementation."""

    @abstractmethod
    def make(
        self, limit: int, *, max_waiting: int = 1000
    ) -> contextlib.AbstractAsyncContextManager[Slots]:
        """Slots that nobody holds."""

    def crowd(self, slots: Slots) -> contextlib.AbstractAsyncContextManager[Crowd]:
        """People that wait for ``slots``."""
        return crowd(slots)

    async def order_of(
        self,
        tickets: Sequence[Ticket],
        *,
        limit: int = 1,
        holder: TurnClass = BLOB,
        before: Sequence[TurnClass] = (),
    ) -> list[int]:
        """In which order tickets that wait for one slot get it, after turns ``before`` of no
        length."""
        async with self.make(limit) as slots, self.crowd(slots) as people:
            for turn_class in before:
                slots.release(await slots.acquire(Ticket(turn_class)))
            await people.ask("holder", Ticket(holder, ["somebody else"]))
            for number, ticket in enumerate(tickets):
                await people.ask(str(number), ticket)
            order = await people.serve(len(tickets) + 1)
            return [int(name) for name in order[1:]]

    @pytest.mark.parametrize("limit", [1, 2, 3, 8])
    async def test_no_more_slots_are_held_than_the_limit(self, limit: int) -> None:
        async with self.make(limit) as slots, self.crowd(slots) as people:
            for number in range(limit + 3):
                # Metadata, because no slot is kept from it.
                await people.ask(str(number), Ticket(METADATA, [f"client {number}"]))
            await people.granted(limit)
            assert waiting(slots) == 3
            assert slots.state().active == limit == slots.limit
            assert len({slot.number for slot in people.held.values()}) == limit
            await people.serve(limit + 3)
            assert waiting(slots) == 0

    async def test_a_slot_says_what_it_was_granted_for(self) -> None:
        async with self.make(1) as slots:
            slot = await slots.acquire(Ticket(SMALL, ["a"]))
            assert slot.turn_class is SMALL
            assert slots.state().active == 1
            slots.release(slot)
            assert slots.state().active == 0

    async def test_a_slot_that_is_not_held_cannot_be_given_back(self) -> None:
        async with self.make(2) as slots:
            slot = await slots.acquire(Ticket(BLOB))
            slots.release(slot)
            with pytest.raises(ValueError, match="not held"):
                slots.release(slot)
            assert slots.state().active == 0

    async def test_a_ticket_can_be_used_for_one_turn_after_the_other(self) -> None:
        async with self.make(1) as slots:
            ticket = Ticket(BLOB, ["a"])
            for _ in range(3):
                slots.release(await slots.acquire(ticket))

    async def test_clients_take_turns_and_each_is_served_in_its_order(self) -> None:
        tickets = [Ticket(BLOB, [client]) for client in "aaabcc"]
        assert await self.order_of(tickets) == [0, 3, 4, 1, 5, 2]

    async def test_a_shared_ticket_goes_at_the_earliest_turn_of_its_clients(self) -> None:
        tickets = [Ticket(BLOB, clients) for clients in ("a", "a", "b", "ac")]
        assert await self.order_of(tickets) == [0, 2, 3, 1]

    async def test_classes_share_three_to_one_and_abandoned_flights_go_last(self) -> None:
        """Where turns of both last as long as each other."""
        tickets = [Ticket(kind) for kind in [ABANDONED, BLOB, *[METADATA] * 5]]
        order = await self.order_of(tickets, before=[METADATA, BLOB] * 40)
        assert order == [2, 3, 4, 1, 5, 6, 0]

    async def test_an_urgent_ticket_stands_before_its_class(self) -> None:
        tickets = [Ticket(kind, ["a"]) for kind in (BLOB, BLOB, METADATA)]
        tickets[1].urgent = True
        assert await self.order_of(tickets) == [2, 1, 0]

    async def test_tickets_change_while_they_wait(self) -> None:
        async with self.make(1) as slots, self.crowd(slots) as people:
            tickets = {name: Ticket(BLOB, ["a"]) for name in ("one", "two", "three")}
            await people.ask("holder", Ticket(BLOB))
            for name, ticket in tickets.items():
                await people.ask(name, ticket)
            tickets["one"].move(ABANDONED)
            tickets["three"].move(METADATA)
            tickets["two"].join("b")
            assert slots.state().depth == {
                "metadata": 1,
                "small": 0,
                "blob": 1,
                "segment": 0,
                "abandoned": 1,
            }
            assert await people.serve(4) == ["holder", "three", "two", "one"]

    @pytest.mark.parametrize("limit", range(1, RESERVE_FROM + 3))
    async def test_from_four_slots_on_one_is_kept_for_metadata(self, limit: int) -> None:
        kept = 1 if limit >= RESERVE_FROM else 0
        async with self.make(limit) as slots, self.crowd(slots) as people:
            for number in range(limit + 1):
                await people.ask(f"blob {number}", Ticket(BLOB))
            await people.granted(limit - kept)
            assert slots.state().active == limit - kept
            assert waiting(slots) == 1 + kept
            await people.ask("manifest", Ticket(METADATA))
            assert ("manifest" in people.held) == bool(kept)

    async def test_who_turns_into_metadata_while_waiting_may_have_the_kept_slot(self) -> None:
        async with self.make(RESERVE_FROM) as slots, self.crowd(slots) as people:
            for number in range(RESERVE_FROM - 1):
                await people.ask(f"blob {number}", Ticket(BLOB))
            ticket = Ticket(BLOB)
            await people.ask("manifest", ticket)
            assert waiting(slots) == 1
            ticket.move(METADATA)
            await until(lambda: "manifest" in people.held)

    async def test_the_kept_slot_can_be_had_though_the_queue_is_full(self) -> None:
        async with self.make(RESERVE_FROM, max_waiting=1) as slots, self.crowd(slots) as people:
            for number in range(RESERVE_FROM):
                await people.ask(f"blob {number}", Ticket(BLOB))
            assert waiting(slots) == 1
            await people.ask("manifest", Ticket(METADATA))
            assert "manifest" in people.held

    @pytest.mark.parametrize(("limit", "spare"), [(1, 1), (3, 3), (RESERVE_FROM, 3), (8, 7)])
    async def test_spare_is_what_blobs_could_have_while_nobody_waits(
        self, limit: int, spare: int
    ) -> None:
        async with self.make(limit) as slots, self.crowd(slots) as people:
            for number in range(spare):
                assert slots.spare == spare - number
                await people.ask(f"blob {number}", Ticket(SEGMENT))
            assert slots.spare == 0
            await people.ask("waits", Ticket(SEGMENT))
            people.release("blob 0")
            assert slots.spare == 0
            await people.granted(spare + 1)
            people.release("waits")
            assert slots.spare == 1

    async def test_a_waiter_of_any_class_leaves_nothing_spare(self) -> None:
        async with self.make(RESERVE_FROM) as slots, self.crowd(slots) as people:
            for number in range(RESERVE_FROM):
                await people.ask(f"blob {number}", Ticket(BLOB))
            assert waiting(slots) == 1
            assert slots.spare == 0

    async def test_further_turns_of_flights_take_nobodys_place_in_the_queue(self) -> None:
        async with self.make(1, max_waiting=1) as slots, self.crowd(slots) as people:
            await people.ask("holder", Ticket(BLOB))
            for number in range(5):
                await people.ask(f"segment {number}", Ticket(SEGMENT))
            await people.ask("one", Ticket(BLOB))
            with pytest.raises(QueueFull):
                await slots.acquire(Ticket(BLOB))

    async def test_a_full_queue_refuses_at_once_and_keeps_who_waits(self) -> None:
        async with self.make(1, max_waiting=2) as slots, self.crowd(slots) as people:
            for name in ("holder", "one", "two"):
                await people.ask(name, Ticket(BLOB, ["a"]))
            with pytest.raises(QueueFull) as refusal:
                await slots.acquire(Ticket(BLOB, ["b"]))
            assert refusal.value.retry_after
            assert waiting(slots) == 2 == slots.state().queue_limit
            assert await people.serve(3) == ["holder", "one", "two"]

    async def test_who_leaves_the_queue_is_gone_at_once(self) -> None:
        async with self.make(1) as slots, self.crowd(slots) as people:
            for name in ("holder", "leaver", "stayer"):
                await people.ask(name, Ticket(BLOB, ["a"]))
            people.tasks["leaver"].cancel()
            await asyncio.wait([people.tasks["leaver"]])
            assert waiting(slots) == 1
            assert await people.serve(2) == ["holder", "stayer"]

    async def test_a_slot_granted_to_who_is_being_cancelled_goes_to_the_next(self) -> None:
        async with self.make(1) as slots, self.crowd(slots) as people:
            for name in ("holder", "leaver", "stayer"):
                await people.ask(name, Ticket(BLOB, ["a"]))
            people.release("holder")
            people.tasks["leaver"].cancel()  # before its task has run
            await until(lambda: "stayer" in people.held or "leaver" in people.held)
            assert "leaver" not in people.held
            assert slots.state().active == 1

    async def test_a_slot_is_not_granted_to_who_was_cancelled_before(self) -> None:
        async with self.make(1) as slots, self.crowd(slots) as people:
            for name in ("holder", "leaver", "stayer"):
                await people.ask(name, Ticket(BLOB, ["a"]))
            people.tasks["leaver"].cancel()
            people.release("holder")  # before the leaver's task has run
            await until(lambda: "stayer" in people.held)
            assert slots.state().active == 1
            assert waiting(slots) == 0

    async def test_who_is_cancelled_before_it_ran_never_waited(self) -> None:
        async with self.make(1) as slots:
            task = asyncio.create_task(slots.acquire(Ticket(BLOB)))
            task.cancel()
            await asyncio.wait([task])
            assert slots.state().active == 0
            assert waiting(slots) == 0

    async def test_a_holder_learns_of_rivals(self) -> None:
        async with self.make(1) as slots, self.crowd(slots) as people:
            slot = await slots.acquire(Ticket(BLOB))
            assert not slots.has_rival(slot)
            await people.ask("abandoned", Ticket(ABANDONED))
            assert not slots.has_rival(slot)
            mine = Ticket(BLOB)
            await people.ask("blob", mine)
            assert slots.has_rival(slot)
            await people.ask("manifest", Ticket(METADATA))
            assert slots.ahead_of(mine) == 1
            slots.release(slot)

    async def test_a_random_crowd_is_served_to_the_last_within_the_limit(self) -> None:
        chance = random.Random(3)
        async with self.make(5) as slots:
            at_once: list[int] = []
            numbers: set[int] = set()

            async def pull(turn_class: TurnClass, client: str, steps: int) -> None:
                slot = await slots.acquire(Ticket(turn_class, [client]))
                try:
                    assert slot.number not in numbers
                    numbers.add(slot.number)
                    at_once.append(slots.state().active)
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    numbers.discard(slot.number)
                    slots.release(slot)

            pulls = [
                asyncio.create_task(
                    pull(
                        chance.choice(list(TurnClass)), chance.choice("abcdef"), chance.randrange(9)
                    )
                )
                for _ in range(400)
            ]
            for leaver in chance.sample(pulls, 80):
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
                leaver.cancel()
            outcomes = await asyncio.gather(*pulls, return_exceptions=True)
            assert served(outcomes) >= 320
            assert max(at_once) <= 5
            assert slots.state().active == 0
            assert waiting(slots) == 0


def served(outcomes: Iterable[object]) -> int:
    """How many ended well; the others may only have been cancelled."""
    count = 0
    for outcome in outcomes:
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
        count += outcome is None
    return count
