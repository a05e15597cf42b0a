"""The gate of one process: conformance, what only it can do, and random lives of its waiters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from aiolimiter import AsyncLimiter
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy.observe.metrics import Metrics
from proxy.oci.errors import QueueFull
from proxy.testing import FakeClock
from proxy.upstream.gate import MAKES_WAY, RESERVE_FROM, Gate, Slot, Slots
from proxy.upstream.leases import RateLimit
from proxy.upstream.turns import USUAL, Ticket, TurnClass
from tests.unit.slots_conformance import Crowd, SlotsConformance, crowd, until, waiting

METADATA, SMALL, BLOB, SEGMENT, ABANDONED = TurnClass


def nothing(_number: int) -> bool:
    return False


def make_gate(
    capacity: int,
    *,
    clock: FakeClock | None = None,
    metrics: Metrics | None = None,
    max_waiting: int = 1000,
    rate: RateLimit | None = None,
    is_open: Callable[[int], bool] = nothing,
    is_warm: Callable[[int], bool] = nothing,
) -> Gate:
    return Gate(
        "harbor.example.com",
        capacity=capacity,
        metrics=metrics or Metrics(),
        clock=clock or FakeClock(),
        max_waiting=max_waiting,
        rate=rate,
        is_open=is_open,
        is_warm=is_warm,
    )


class TestGateAsSlots(SlotsConformance):
    """The in-process gate keeps the rules of ``Slots``."""

    @contextlib.asynccontextmanager
    async def make(self, limit: int, *, max_waiting: int = 1000) -> AsyncIterator[Slots]:
        yield make_gate(limit, max_waiting=max_waiting)


async def test_a_gate_is_full_for_blobs_when_only_the_kept_slot_is_left() -> None:
    gate = make_gate(4)
    async with crowd(gate) as people:
        for number in range(3):
            assert not gate.is_full(BLOB)
            await people.ask(f"blob {number}", Ticket(BLOB))
        assert gate.is_full(BLOB)
        assert gate.is_full(SEGMENT)
        assert not gate.is_full(METADATA)
        await people.ask("manifest", Ticket(METADATA))
        assert gate.is_full(METADATA)


def test_a_gate_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        make_gate(0)


@pytest.mark.parametrize("spare", [SEGMENT, ABANDONED])
async def test_between_two_turns_of_a_flight_nobody_gets_its_slot_who_waits_for_all_others(
    spare: TurnClass,
) -> None:
    gate = make_gate(1)
    async with crowd(gate) as people:
        lead = Ticket(BLOB)
        slot = await gate.acquire(lead)
        await people.ask("spare", Ticket(spare))
        gate.release(slot)
        slot = await gate.acquire(lead)  # in the same step of the loop
        await asyncio.sleep(0)
        assert not people.held
        gate.release(slot)
        await people.granted(1)
        assert gate.state().active == 1


async def test_what_would_be_granted_in_the_next_step_is_not_after_the_end() -> None:
    gate = make_gate(1)
    async with crowd(gate) as people:
        slot = await gate.acquire(Ticket(BLOB))
        await people.ask("spare", Ticket(SEGMENT))
        gate.release(slot)
        gate.close()
        await asyncio.sleep(0)
        assert not people.held


async def test_turns_that_nobody_else_wanted_make_way_before_others_do() -> None:
    gate = make_gate(2)
    async with crowd(gate) as people:
        await people.ask("blob", Ticket(BLOB))
        await people.ask("segment", Ticket(SEGMENT))
        await people.ask("rival", Ticket(BLOB))
        assert not gate.has_rival(people.held["blob"])
        assert gate.has_rival(people.held["segment"])
        people.release("segment")
        await people.granted(3)
        await people.ask("another", Ticket(BLOB))
        assert gate.has_rival(people.held["blob"])


@pytest.mark.parametrize("spare", [SEGMENT, ABANDONED])
async def test_a_turn_that_does_not_make_way_in_its_time_keeps_no_other_from_being_cut(
    spare: TurnClass,
) -> None:
    clock = FakeClock()
    gate = make_gate(2, clock=clock)
    async with crowd(gate) as people:
        await people.ask("blob", Ticket(BLOB))
        await people.ask("spare", Ticket(spare))
        await people.ask("rival", Ticket(BLOB))
        clock.advance(MAKES_WAY)
        assert not gate.has_rival(people.held["blob"])  # so long nobody had to be cut
        clock.advance(MAKES_WAY - 1)
        assert not gate.has_rival(people.held["blob"])
        clock.advance(1)
        assert gate.has_rival(people.held["blob"])
        people.release("spare")
        await people.granted(3)
        people.release("rival")
        await people.ask("spare", Ticket(spare))
        await people.ask("rival", Ticket(BLOB))
        assert not gate.has_rival(people.held["blob"])  # the time of a turn, not of its slot


async def test_a_paused_class_keeps_its_places_and_lets_the_others_pass() -> None:
    clock = FakeClock()
    gate = make_gate(1, clock=clock)
    async with crowd(gate) as people:
        assert gate.pause({METADATA, SMALL}, 60.0) == 60.0
        assert gate.pause({METADATA}, 10.0) == 0.0  # a shorter pause does not end a longer one
        assert gate.pauses() == {"metadata": 60.0, "small": 60.0}
        await people.ask("first", Ticket(METADATA))
        await people.ask("second", Ticket(SMALL))
        await people.ask("bulk", Ticket(BLOB))
        assert list(people.held) == ["bulk"]
        assert not gate.has_rival(people.held["bulk"])
        people.release("bulk")
        assert not people.held
        clock.advance(60.0)
        gate.limit = 1  # any event is a reason to look again
        await until(lambda: "first" in people.held)
        people.release("first")
        await until(lambda: "second" in people.held)
    gate.close()


async def test_the_end_of_a_pause_is_noticed_without_any_other_event() -> None:
    loop = asyncio.get_running_loop()
    gate = Gate("hub", capacity=1, metrics=Metrics(), clock=loop.time)
    gate.pause({METADATA}, 0.05)
    began = loop.time()
    gate.release(await gate.acquire(Ticket(METADATA)))
    assert loop.time() - began >= 0.04
    gate.pause({METADATA}, 3600.0)
    waiting_for = asyncio.create_task(gate.acquire(Ticket(METADATA)))
    await asyncio.sleep(0)
    waiting_for.cancel()
    await asyncio.wait([waiting_for])
    gate.close()
    assert gate.state().active == 0


async def test_a_lower_limit_takes_effect_as_turns_end() -> None:
    gate = make_gate(3)
    async with crowd(gate) as people:
        for name in "abcd":
            await people.ask(name, Ticket(BLOB))
        gate.limit = 1
        people.release("a")
        people.release("b")
        assert gate.state().active == 1
        assert waiting(gate) == 1
        people.release("c")
        await until(lambda: "d" in people.held)


async def test_a_higher_limit_takes_effect_at_once() -> None:
    gate = make_gate(8)
    gate.limit = 1
    async with crowd(gate) as people:
        for number in range(4):
            await people.ask(str(number), Ticket(BLOB))
        assert gate.state().active == 1
        gate.limit = 3
        await until(lambda: len(people.held) == 3)
        assert waiting(gate) == 1


@pytest.mark.parametrize(("asked", "expected"), [(0, 1), (-3, 1), (2, 2), (99, 4)])
async def test_the_limit_stays_between_one_and_the_number_of_slots(
    asked: int, expected: int
) -> None:
    gate = make_gate(4)
    gate.limit = asked
    assert gate.limit == expected == gate.state().limit


async def test_a_slot_whose_socket_can_be_used_goes_first() -> None:
    warm: set[int] = set()
    gate = make_gate(4, is_warm=warm.__contains__)
    held = [await gate.acquire(Ticket(METADATA)) for _ in range(4)]
    for slot in held:
        gate.release(slot)
    warm.update({held[0].number, held[1].number})
    ticket = Ticket(METADATA)
    assert (await gate.acquire(ticket)).number == held[1].number  # the one given back later
    assert (await gate.acquire(ticket)).number == held[0].number
    assert (await gate.acquire(ticket)).number == held[3].number


async def test_idle_sockets_are_those_of_slots_that_nobody_holds() -> None:
    gate = make_gate(3, is_open=lambda number: number != 2)
    assert gate.state().idle == 2
    slot = await gate.acquire(Ticket(BLOB))
    assert slot.number == 0
    assert gate.state().idle == 1


async def test_waiting_is_measured_for_the_ticket_and_its_class() -> None:
    clock, metrics = FakeClock(), Metrics()
    gate = make_gate(1, clock=clock, metrics=metrics)
    ticket = Ticket(BLOB, ["a"])
    async with crowd(gate) as people:
        await people.ask("holder", Ticket(BLOB))
        await people.ask("mine", ticket)
        clock.advance(1.5)
        people.release("holder")
        await people.granted(2)
        assert ticket.waited == 1.5
        assert people.held["mine"].since == clock()
    name, labels = "pullpool_queue_wait_seconds_sum", {"upstream": gate.name, "class": "blob"}
    assert metrics.registry.get_sample_value(name, labels) == 1.5


async def test_who_leaves_the_queue_is_counted() -> None:
    metrics = Metrics()
    gate = make_gate(1, metrics=metrics)
    async with crowd(gate) as people:
        await people.ask("holder", Ticket(BLOB))
        await people.ask("leaver", Ticket(SMALL))
    name, labels = "pullpool_queue_abandoned_total", {"upstream": gate.name, "class": "small"}
    assert metrics.registry.get_sample_value(name, labels) == 1


class ShutLimiter:
    """A rate limit that is used up."""

    max_rate = time_period = 1.0

    def __init__(self) -> None:
        self.refilled = asyncio.Event()
        self.amounts: list[float] = []

    async def acquire(self, amount: float = 1) -> None:
        self.amounts.append(amount)
        await self.refilled.wait()


async def test_the_rate_is_asked_for_under_the_slot_and_the_turn_begins_after_it() -> None:
    clock, limiter = FakeClock(), ShutLimiter()
    gate = make_gate(1, clock=clock, rate=limiter)
    task = asyncio.create_task(gate.acquire(Ticket(BLOB)))
    await until(lambda: bool(limiter.amounts))
    assert gate.state().active == 1
    clock.advance(9)
    limiter.refilled.set()
    slot = await task
    assert slot.since == clock()
    assert limiter.amounts == [1]
    gate.release(slot)
    assert gate.state().active == 0


async def test_who_is_cancelled_while_the_rate_is_used_up_gives_its_slot_back() -> None:
    limiter = ShutLimiter()
    gate = make_gate(1, rate=limiter)
    leaver = asyncio.create_task(gate.acquire(Ticket(BLOB)))
    stayer = asyncio.create_task(gate.acquire(Ticket(BLOB)))
    await until(lambda: len(limiter.amounts) == 1)
    leaver.cancel()
    await until(lambda: len(limiter.amounts) == 2)
    limiter.refilled.set()
    gate.release(await stayer)
    assert leaver.cancelled()
    assert gate.state().active == 0


async def test_a_slot_that_was_not_used_says_nothing_of_how_long_turns_last() -> None:
    gate = make_gate(1)
    slot = await gate.acquire(Ticket(BLOB))
    waiter = asyncio.create_task(gate.acquire(Ticket(BLOB, ["client"], image="one")))
    await until(lambda: gate.state().depth[BLOB] == 1)
    assert gate.round_seconds == USUAL[BLOB]
    gate.release(slot, was_used=False)
    slot = await waiter
    waiter = asyncio.create_task(gate.acquire(Ticket(BLOB, ["client"], image="one")))
    await until(lambda: gate.state().depth[BLOB] == 1)
    assert gate.round_seconds == USUAL[BLOB]
    gate.release(slot)  # it was used, for no time at all
    slot = await waiter
    waiter = asyncio.create_task(gate.acquire(Ticket(BLOB, ["client"], image="one")))
    await until(lambda: gate.state().depth[BLOB] == 1)
    assert gate.round_seconds < USUAL[BLOB]
    gate.release(slot)
    gate.release(await waiter)


async def test_the_real_limiter_fits() -> None:
    gate = make_gate(2, rate=AsyncLimiter(100, 1))
    gate.release(await gate.acquire(Ticket(METADATA)))
    assert gate.state().active == 0


async def test_a_ticket_that_waits_already_is_refused_and_goes_on_waiting() -> None:
    gate = make_gate(1)
    ticket = Ticket(BLOB)
    async with crowd(gate) as people:
        await people.ask("holder", Ticket(BLOB))
        await people.ask("mine", ticket)
        with pytest.raises(ValueError, match="waits already"):
            await gate.acquire(ticket)
        assert await people.serve(2) == ["holder", "mine"]


class GateMachine(RuleBasedStateMachine):
    """Waiters that come, change, are cancelled at any point, and limits that move."""

    CAPACITY = 6
    MAX_WAITING = 8

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.gate = make_gate(self.CAPACITY, max_waiting=self.MAX_WAITING)
        self.people = Crowd(self.gate)
        self.tickets: dict[str, Ticket] = {}
        self.most = self.CAPACITY  # what may be in use: a lower limit waits for turns to end
        self.promoted = 0  # segments that began to count as waiting after they had been let in
        self.count = 0

    def settle(self, rounds: int) -> None:
        """Let the loop take this many turns."""

        async def turns() -> None:
            for _ in range(rounds):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def pick(self, names: list[str], place: int) -> str | None:
        return names[place % len(names)] if names else None

    @rule(turn_class=st.sampled_from(TurnClass), client=st.sampled_from("abc"))
    def ask(self, turn_class: TurnClass, client: str) -> None:
        self.count += 1
        name = str(self.count)
        self.tickets[name] = Ticket(turn_class, [client])
        acquire = self.people._wait(name, self.tickets[name])
        self.people.tasks[name] = self.loop.create_task(acquire)

    @rule(place=st.integers(0, 20))
    def cancel(self, place: int) -> None:
        running = [name for name, task in self.people.tasks.items() if not task.done()]
        if (name := self.pick(running, place)) is not None:
            self.people.tasks[name].cancel()

    @rule(place=st.integers(0, 20))
    def release(self, place: int) -> None:
        if (name := self.pick(list(self.people.held), place)) is not None:
            self.give_back(name)

    def give_back(self, name: str) -> None:
        """In a step of the loop: who takes only what nobody else wants is granted in the next."""

        async def step() -> None:
            self.people.release(name)

        self.loop.run_until_complete(step())

    @rule(place=st.integers(0, 20), turn_class=st.sampled_from(TurnClass))
    def move(self, place: int, turn_class: TurnClass) -> None:
        if (name := self.pick(list(self.tickets), place)) is not None:
            ticket = self.tickets[name]
            counted_not = ticket.is_queued and ticket.turn_class is TurnClass.SEGMENT
            self.promoted += counted_not and turn_class is not TurnClass.SEGMENT
            ticket.move(turn_class)

    @rule(place=st.integers(0, 20), client=st.sampled_from("abc"), joins=st.booleans())
    def share(self, place: int, client: str, joins: bool) -> None:
        if (name := self.pick(list(self.tickets), place)) is not None:
            ticket = self.tickets[name]
            (ticket.join if joins else ticket.leave)(client)

    @rule(limit=st.integers(1, CAPACITY))
    def set_limit(self, limit: int) -> None:
        self.gate.limit = limit

    @rule(rounds=st.integers(1, 3))
    def run(self, rounds: int) -> None:
        self.settle(rounds)

    @invariant()
    def the_limit_holds(self) -> None:
        active = self.gate.state().active
        assert active <= max(self.most, self.gate.limit)
        self.most = max(active, self.gate.limit)

    @invariant()
    def nobody_waits_while_a_slot_it_may_have_is_free(self) -> None:
        state = self.gate.state()
        free = state.limit - state.active
        if free <= 0:
            return
        assert state.depth["metadata"] == 0
        if sum(state.depth.values()):
            assert state.limit >= RESERVE_FROM
            assert free == 1

    @invariant()
    def slots_are_held_by_one_each(self) -> None:
        numbers = [slot.number for slot in self.people.held.values()]
        assert len(set(numbers)) == len(numbers)
        assert all(0 <= number < self.CAPACITY for number in numbers)

    @invariant()
    def no_more_wait_than_may(self) -> None:
        """Segments do not count, and nobody who waits is sent away for standing elsewhere."""
        segments = self.gate.state().depth["segment"]
        assert waiting(self.gate) - segments <= self.MAX_WAITING + self.promoted

    def teardown(self) -> None:
        try:
            self.settle(5)
            self.gate.limit = self.CAPACITY
            while self.people.held or waiting(self.gate):
                for name in list(self.people.held):
                    self.give_back(name)
                self.settle(5)
            for task in self.people.tasks.values():
                assert task.done()
                assert task.cancelled() or isinstance(task.exception(), QueueFull | None)
            assert self.gate.state().active == 0
            self.every_slot_is_there()
        finally:
            self.loop.close()

    def every_slot_is_there(self) -> None:
        async def all_of_them() -> list[Slot]:
            return [await self.gate.acquire(Ticket(METADATA)) for _ in range(self.CAPACITY)]

        slots = self.loop.run_until_complete(all_of_them())
        assert {slot.number for slot in slots} == set(range(self.CAPACITY))


TestRandomLivesOfWaiters = GateMachine.TestCase
