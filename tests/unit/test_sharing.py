"""Flights of several nodes that share one blob: who brings what, and what becomes of liars."""

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import pytest

from proxy.fleet.board import Board
from proxy.fleet.claims import WHOLE, Giver, Grant, Outcome, Taken, View, Wish
from proxy.fleet.local_claims import LocalClaims
from proxy.fleet.protocol import StripeAsk
from proxy.fleet.stripes import stripe_count
from proxy.oci.digest import Digest
from proxy.oci.errors import DigestMismatch, DirectoryDown, InternalError, SizeMismatch, StoreFailed
from proxy.pull.flight import Flights
from proxy.pull.giving import OpenStripe
from proxy.pull.sharing import PATIENCE
from proxy.pull.spread import FIRST
from proxy.pull.stripes import FleetShelf
from proxy.pull.trial import Turn
from proxy.upstream.turns import Ticket, TurnClass, TurnQueue
from tests.unit.flight_kit import Act, ScriptedBody, ScriptedSource, Valve, a_while, drink, until
from tests.unit.sharing_kit import Fleet, everything, sailing

MIB = 1 << 20
SIZE = 5 * MIB + 123
DATA = os.urandom(SIZE)
DIGEST = Digest.of(DATA)

Noted = TypeVar("Noted", bound=LocalClaims)


def source(data: bytes = DATA) -> ScriptedSource:
    return ScriptedSource(data, digest=DIGEST, chunk=64 << 10, turn_bytes=8 * MIB)


def noted(
    kind: Callable[[Board, Giver], Noted], board: Board
) -> tuple[Callable[[Giver], Noted], list[Noted]]:
    """What makes each node's claims, and those it has made."""
    made: list[Noted] = []

    def claims(giver: Giver) -> Noted:
        made.append(kind(board, giver))
        return made[-1]

    return claims, made


class Gone(LocalClaims):
    """No directory."""

    async def look(self, digest: Digest, known: int = 0) -> View:
        raise DirectoryDown

    async def fill(self, digest: Digest, size: int | None) -> str | None:
        raise DirectoryDown


async def pull(fleet: Fleet, number: int, upstream: ScriptedSource) -> bytes:
    reader = fleet.nodes[number].rig.join(upstream, size=SIZE)
    try:
        return await drink(reader, 0, SIZE)
    finally:
        reader.close()


async def test_two_nodes_that_want_one_blob_at_once_fetch_it_once(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2) as fleet:
        sources = [source(), source()]
        found = await asyncio.gather(*(pull(fleet, n, sources[n]) for n in range(2)))
        assert found == [DATA, DATA]
        assert sum(each.sent for each in sources) == SIZE


async def test_a_filler_asks_for_all_in_one_turn_where_several_bring_no_more(
    tmp_path: Path,
) -> None:
    """Though slots are idle: others follow in order."""
    async with sailing(tmp_path, 1, segment_bytes=MIB // 4, gather=1e-6) as fleet:
        upstream = ScriptedSource(
            DATA, digest=DIGEST, chunk=64 << 10, turn_bytes=8 * MIB, segments=4
        )
        upstream.widens = False
        assert await pull(fleet, 0, upstream) == DATA
        assert [turn.length for turn in upstream.turns] == [SIZE]


async def test_a_fillers_first_turn_to_an_upstream_of_unknown_speed_is_short(
    tmp_path: Path,
) -> None:
    async with sailing(tmp_path, 1) as fleet:
        upstream = source()
        upstream.knows_rate = False
        assert await pull(fleet, 0, upstream) == DATA
        assert upstream.turns[0].length == FIRST
        assert upstream.sent == SIZE


@pytest.mark.parametrize("found", [True, False, None])
async def test_a_filler_takes_several_turns_once_a_trial_has_shown_that_they_bring_more(
    tmp_path: Path, found: bool | None
) -> None:
    data = os.urandom(20 * MIB)

    async def trial(
        _lead: Turn, begin: Callable[[int], Turn | None], *, clock: Callable[[], float]
    ) -> bool | None:
        further = begin(MIB)
        await until(lambda: further is None or further.is_over)
        return found

    async with sailing(tmp_path, 1, segment_bytes=MIB, trial=trial) as fleet:
        upstream = ScriptedSource(data, chunk=64 << 10, turn_bytes=64 * MIB, segments=4)
        upstream.widens = None
        reader = fleet.nodes[0].rig.join(upstream, size=len(data))
        assert await drink(reader) == data
        lead, scout, *others = upstream.turns
        assert (lead.start, lead.length) == (0, 15 * MIB)  # a quarter is left for the trial
        assert (scout.start, scout.length) == (19 * MIB, MIB)
        further = [turn for turn in others if turn.turn_class is TurnClass.SEGMENT]
        assert bool(further) == bool(found)
        assert upstream.widens is found
        assert upstream.sent == len(data)


@pytest.mark.parametrize("why", ["others send", "no rate", "no slot", "another turn"])
async def test_nothing_is_tried_while_a_line_may_be_shared_or_nothing_could_begin(
    tmp_path: Path, why: str
) -> None:
    async def trial(
        _lead: Turn, _begin: Callable[[int], Turn | None], *, clock: Callable[[], float]
    ) -> bool | None:
        raise ZeroDivisionError

    class Busy(ScriptedSource):
        active = 1  # another blob's

    kind = Busy if why == "another turn" else ScriptedSource
    async with sailing(tmp_path, 1, trial=trial) as fleet:
        upstream = kind(bytes(20 * MIB), chunk=64 << 10, turn_bytes=64 * MIB, segments=4)
        upstream.widens, upstream.knows_rate = None, why != "no rate"
        upstream.spare = 1 if why == "no slot" else 4
        node = fleet.nodes[0]
        node.fellows.traffic.note("another", int(why == "others send"), fills=False)
        assert await drink(node.rig.join(upstream, size=20 * MIB)) == bytes(20 * MIB)
        if why != "no rate":
            assert [turn.length for turn in upstream.turns] == [20 * MIB]
        node.fellows.traffic.forget("another")


async def test_a_trial_that_fails_by_our_fault_is_told_and_hangs_nobody(tmp_path: Path) -> None:
    async def trial(
        _lead: Turn, _begin: Callable[[int], Turn | None], *, clock: Callable[[], float]
    ) -> bool | None:
        raise ZeroDivisionError

    async with sailing(tmp_path, 1, trial=trial) as fleet:
        upstream = ScriptedSource(bytes(20 * MIB), chunk=64 << 10, turn_bytes=64 * MIB, segments=4)
        upstream.widens = None
        reader = fleet.nodes[0].rig.join(upstream, size=20 * MIB)
        with pytest.raises(InternalError):
            await drink(reader)


async def test_a_trial_ends_with_its_flight(tmp_path: Path) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def trial(
        _lead: Turn, _begin: Callable[[int], Turn | None], *, clock: Callable[[], float]
    ) -> bool | None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return None

    async with sailing(tmp_path, 1, trial=trial) as fleet:
        upstream = ScriptedSource(bytes(20 * MIB), chunk=64 << 10, turn_bytes=64 * MIB, segments=4)
        upstream.widens = None
        reader = fleet.nodes[0].rig.join(upstream, size=20 * MIB)
        assert await drink(reader) == bytes(20 * MIB)
        assert began.is_set()
        await ended.wait()


class Timed(LocalClaims):
    """Notes when it is asked."""

    def __init__(self, board: Board, giver: Giver) -> None:
        super().__init__(board, giver)
        self.asked: list[float] = []

    async def look(self, digest: Digest, known: int = 0) -> View:
        self.asked.append(asyncio.get_running_loop().time())
        return await super().look(digest, known)


async def test_a_node_of_a_very_large_fleet_waits_before_it_asks(tmp_path: Path) -> None:
    loop, pause = asyncio.get_running_loop(), 0.2
    board = Board(clock=loop.time, rng=random.Random(1))
    claims, made = noted(Timed, board)
    async with sailing(tmp_path, 1, claims=claims, before_first=lambda: pause) as fleet:
        began = loop.time()
        assert await pull(fleet, 0, source()) == DATA
        assert round(made[0].asked[0] - began, 2) >= pause  # loops count in milliseconds


async def test_and_does_not_when_there_is_no_directory_to_ask(tmp_path: Path) -> None:
    paused: list[float] = []

    def before_first() -> float:
        paused.append(0.2)
        return 0.2

    async with sailing(tmp_path, 1, is_up=lambda: False, before_first=before_first) as fleet:
        assert await pull(fleet, 0, source()) == DATA
        assert paused == []


async def test_eight_nodes_take_most_of_it_of_one_another(tmp_path: Path) -> None:
    async with sailing(tmp_path, 8) as fleet:
        sources = [source() for _ in range(8)]
        found = await asyncio.gather(*(pull(fleet, n, sources[n]) for n in range(8)))
        assert found == [DATA] * 8
        assert sum(each.sent for each in sources) == SIZE
        givers = {giver for giver, _, _ in fleet.wire.taken}
        assert len(givers) > 1  # no star


async def test_who_comes_later_gets_all_of_it_from_a_node_that_has_it(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2) as fleet:
        first, second = source(), source()
        assert await pull(fleet, 0, first) == DATA
        await landed(fleet, 0)
        assert await pull(fleet, 1, second) == DATA
        assert (first.sent, second.sent) == (SIZE, 0)


async def test_a_node_that_lies_is_shunned_and_no_reader_gets_a_wrong_byte(tmp_path: Path) -> None:
    async with sailing(tmp_path, 6) as fleet:
        liar = fleet.ids[0]
        fleet.wire.spoil[liar] = lambda piece: bytes([piece[0] ^ 1]) + piece[1:]
        sources = [source() for _ in range(6)]
        found = await asyncio.gather(*(pull(fleet, n, sources[n]) for n in range(6)))
        assert found == [DATA] * 6
        shunned = [node.fellows.shunned.liars(node.fellows.clock()) for node in fleet.nodes]
        assert frozenset().union(*shunned) == {liar}


async def test_a_giver_that_dies_in_the_middle_is_left_for_another(tmp_path: Path) -> None:
    async with sailing(tmp_path, 3) as fleet:
        sources = [source() for _ in range(3)]
        assert await pull(fleet, 0, sources[0]) == DATA
        await landed(fleet, 0)
        gate = fleet.wire.gates[fleet.ids[0]] = asyncio.Event()
        reader = asyncio.create_task(pull(fleet, 1, sources[1]))
        await until_taken(fleet, 1)
        fleet.wire.dead.add(fleet.ids[0])
        gate.set()
        assert await reader == DATA
        assert await pull(fleet, 2, sources[2]) == DATA
        assert sources[2].sent == 0


async def test_when_the_filler_leaves_another_goes_on_behind_it(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2) as fleet:
        first, second = source(), source()
        first.valve.limit = 3 * MIB
        reader = fleet.nodes[0].rig.join(first, size=SIZE)
        await until(lambda: first.sent == 3 * MIB)
        follower = asyncio.create_task(pull(fleet, 1, second))
        await until(lambda: len(fleet.wire.taken) >= 3)
        flight = fleet.nodes[0].rig.flights.find(DIGEST)
        assert flight is not None
        flight.cancel()
        reader.close()
        assert await follower == DATA
        assert second.sent <= SIZE - 2 * MIB


async def test_a_filler_that_has_all_of_it_keeps_its_lease_and_one_that_leaves_does_not(
    tmp_path: Path,
) -> None:
    async with sailing(tmp_path, 1) as fleet:
        blob, upstream = fleet.board.blob(DIGEST), source()
        upstream.valve.limit = 3 * MIB
        reader = fleet.nodes[0].rig.join(upstream, size=SIZE)
        await until(lambda: blob.filler == fleet.ids[0])
        flight = fleet.nodes[0].rig.flights.find(DIGEST)
        assert flight is not None
        flight.cancel()
        reader.close()
        await until(lambda: blob.filler is None)
        assert await pull(fleet, 0, source()) == DATA
        await landed(fleet, 0)
        assert blob.filler == fleet.ids[0]


async def test_what_the_fleet_may_not_know_of_stays_in_its_node(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2) as fleet:
        sources = [
            ScriptedSource(DATA, upstream="private.example.com", chunk=64 << 10) for _ in range(2)
        ]
        for number in range(2):
            assert await pull(fleet, number, sources[number]) == DATA
        assert [each.sent for each in sources] == [SIZE, SIZE]
        assert not fleet.wire.taken


async def test_an_upstream_without_ranges_is_read_to_its_end_by_one_node(tmp_path: Path) -> None:
    async with sailing(tmp_path, 3) as fleet:
        sources = [ScriptedSource(DATA, chunk=64 << 10, serves_ranges=False) for _ in range(3)]
        found = await asyncio.gather(*(pull(fleet, n, sources[n]) for n in range(3)))
        assert found == [DATA] * 3
        assert sum(each.sent for each in sources) == SIZE


async def test_what_comes_without_ranges_is_passed_on_while_it_comes(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2) as fleet:
        first = ScriptedSource(DATA, chunk=64 << 10, serves_ranges=False)
        second = ScriptedSource(DATA, chunk=64 << 10, serves_ranges=False)
        first.valve.limit = 3 * MIB
        filler = asyncio.create_task(pull(fleet, 0, first))
        await until(lambda: first.sent == 3 * MIB)
        follower = asyncio.create_task(pull(fleet, 1, second))
        await until(lambda: len(fleet.wire.taken) == 3)
        first.valve.open()
        assert await filler == DATA
        assert await follower == DATA
        assert second.sent == 0


async def test_without_a_directory_every_node_goes_alone(tmp_path: Path) -> None:
    board = Board(clock=lambda: 0.0, rng=random.Random(0))
    async with sailing(tmp_path, 2, claims=lambda giver: Gone(board, giver)) as fleet:
        sources = [source(), source()]
        found = await asyncio.gather(*(pull(fleet, n, sources[n]) for n in range(2)))
        assert found == [DATA, DATA]
        assert [each.sent for each in sources] == [SIZE, SIZE]


async def test_a_node_whose_disk_is_full_serves_through_a_window(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2, max_size=2 * MIB) as fleet:
        sources = [source(), source()]
        found = await asyncio.gather(*(pull(fleet, n, sources[n]) for n in range(2)))
        assert found == [DATA, DATA]


async def test_a_publisher_of_other_bytes_resets_its_takers_and_is_banned(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2) as fleet:
        wrong = bytes([DATA[0] ^ 1]) + DATA[1:]
        first, second = source(wrong), source()
        first.valve.limit = 4 * MIB
        reader = fleet.nodes[0].rig.join(first, size=SIZE)
        await until(lambda: first.sent == 4 * MIB)
        follower = asyncio.create_task(pull(fleet, 1, second))
        await until(lambda: len(fleet.wire.taken) >= 3)
        first.valve.open()
        with pytest.raises(DigestMismatch):
            await follower
        reader.close()
        assert await pull(fleet, 1, source()) == DATA


@pytest.mark.parametrize("steps", range(0, 60, 3))
async def test_a_pull_that_is_cancelled_at_any_point_leaves_nothing(
    tmp_path: Path, steps: int
) -> None:
    async with sailing(tmp_path, 2) as fleet:
        sources = [source(), source()]
        both = [asyncio.create_task(pull(fleet, n, sources[n])) for n in range(2)]
        for _ in range(steps):
            await asyncio.sleep(0)
        both[0].cancel()
        flight = fleet.nodes[0].rig.flights.find(DIGEST)
        if flight is not None:
            flight.cancel()
        assert await both[1] == DATA
        await asyncio.gather(*both, return_exceptions=True)


class Time:
    """The loop's time, which a test may move on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead


async def test_a_filler_that_waits_for_its_slot_lets_another_node_fill(tmp_path: Path) -> None:
    clock = Time()
    async with sailing(tmp_path, 2, clock=clock) as fleet:
        first, second = source(), source()
        first.queue.clear()
        waiting = asyncio.create_task(pull(fleet, 0, first))
        await until(lambda: first.waiting == 1)
        clock.ahead += PATIENCE
        assert await pull(fleet, 1, second) == DATA
        first.queue.set()
        assert await waiting == DATA


class Queued(ScriptedSource):
    """Its tickets stand in a queue until they have a slot."""

    line: TurnQueue

    @asynccontextmanager
    async def open(
        self, start: int, length: int | None, ticket: Ticket
    ) -> AsyncIterator[ScriptedBody]:
        self.line.add(ticket)
        try:
            await self.queue.wait()
        finally:
            self.line.discard(ticket)
        async with super().open(start, length, ticket) as body:
            yield body


@pytest.mark.parametrize("segments", [1, 3])
async def test_a_turn_in_a_queue_is_called_back_when_another_node_fills(
    tmp_path: Path, segments: int
) -> None:
    clock = Time()
    async with sailing(tmp_path, 2, clock=clock) as fleet:
        first, second = Queued(DATA, chunk=64 << 10, segments=segments), source()
        first.line = TurnQueue()
        first.queue.clear()
        waiting = asyncio.create_task(pull(fleet, 0, first))
        await until(lambda: len(first.line) == 1)
        clock.ahead += PATIENCE
        assert await pull(fleet, 1, second) == DATA
        assert await waiting == DATA
        assert first.sent == 0


async def test_a_turn_under_way_ends_when_another_node_fills(tmp_path: Path) -> None:
    clock = Time()
    async with sailing(tmp_path, 2, clock=clock) as fleet:
        first, second = source(), source()
        first.valve.limit = MIB // 2
        waiting = asyncio.create_task(pull(fleet, 0, first))
        await until_received(fleet, 0, MIB // 2)
        clock.ahead += PATIENCE
        assert await pull(fleet, 1, second) == DATA
        await until_it_follows(fleet, 0)
        first.valve.open()
        assert await waiting == DATA
        assert first.sent <= MIB // 2 + first.chunk


class Held(Valve):
    """Holds the thread that asks for a byte from ``at`` on until it may ``go``, and has nothing
    more for a thread then."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.is_held = False
        self.go = threading.Event()

    def allowed(self, position: int, length: int) -> int:
        if position >= self.at and threading.current_thread() is not threading.main_thread():
            if self.is_held:
                return 0
            self.is_held = True
            self.go.wait()
        return super().allowed(position, length)


async def test_a_turn_that_a_thread_takes_in_ends_when_another_node_fills(tmp_path: Path) -> None:
    clock = Time()
    async with sailing(tmp_path, 2, clock=clock) as fleet:
        first, second = source(), source()
        first.hauls = True
        first.valve = held = Held(MIB // 2)
        waiting = asyncio.create_task(pull(fleet, 0, first))
        try:
            await until(lambda: held.is_held)
            clock.ahead += PATIENCE
            assert await pull(fleet, 1, second) == DATA
            await until_it_follows(fleet, 0)
        finally:
            held.go.set()
        assert await waiting == DATA
        assert first.sent <= MIB // 2 + 3 * first.chunk


async def test_a_turn_that_is_answered_when_another_node_fills_brings_a_byte(
    tmp_path: Path,
) -> None:
    """It had its slot, so it could not be called back, and nothing of it had come."""
    clock, opened = Time(), asyncio.Event()

    class Late(ScriptedSource):
        @asynccontextmanager
        async def open(
            self, start: int, length: int | None, ticket: Ticket
        ) -> AsyncIterator[ScriptedBody]:
            async with super().open(start, length, ticket) as body:
                if ticket.turn_class is TurnClass.SEGMENT:
                    opened.set()
                    await self.valve.more()
                yield body

    async with sailing(tmp_path, 2, clock=clock) as fleet:
        part = 300 << 10
        first = Late(DATA, digest=DIGEST, chunk=64 << 10, segments=2, turn_bytes=part)
        first.valve.limit = 100 << 10
        second = source()
        waiting = asyncio.create_task(pull(fleet, 0, first))
        await opened.wait()
        await until_received(fleet, 0, 100 << 10)
        clock.ahead += PATIENCE
        assert await pull(fleet, 1, second) == DATA
        await until_it_follows(fleet, 0)
        first.valve.open()
        assert await waiting == DATA
        assert first.sent <= (100 << 10) + 2 * first.chunk


async def test_a_filler_whose_turn_brings_something_after_all_fills_on_at_once(
    tmp_path: Path,
) -> None:
    now = 0.0
    async with sailing(tmp_path, 1, clock=lambda: now) as fleet:
        upstream = source()
        upstream.valve.limit = MIB // 2
        pulling = asyncio.create_task(pull(fleet, 0, upstream))
        await until_received(fleet, 0, MIB // 2)
        blob = fleet.board.blob(DIGEST)
        assert blob.filler == fleet.ids[0]
        now += PATIENCE
        await until(lambda: blob.filler is None)
        upstream.valve.open(MIB * 3 // 4)  # and the clock stands still
        await until(lambda: blob.filler == fleet.ids[0])
        upstream.valve.open()
        assert await pulling == DATA


class Slit(Valve):
    """Lets through what is before ``limit``, and from ``start`` to ``stop``."""

    def __init__(self, limit: int, start: int, stop: int) -> None:
        super().__init__(limit)
        self.start, self.stop = start, stop

    def allowed(self, position: int, length: int) -> int:
        if self.limit is not None and self.start <= position < self.stop:
            return min(length, self.stop - position)
        return super().allowed(position, length)


@pytest.mark.parametrize("is_wrong", [False, True])
async def test_what_a_turn_brought_in_the_middle_of_a_stripe_stays_and_is_held_against_its_hash(
    tmp_path: Path, is_wrong: bool
) -> None:
    """Three turns have begun with the first stripe; the second is done when another node fills."""
    clock, part, end = Time(), 300 << 10, 100 << 10
    async with sailing(tmp_path, 2, clock=clock) as fleet:
        data = bytearray(DATA)
        data[2 * part - 1] ^= is_wrong
        first = ScriptedSource(
            bytes(data), digest=DIGEST, chunk=64 << 10, segments=3, turn_bytes=part
        )
        first.valve, second = Slit(end, part, 2 * part), source()
        pulling = asyncio.create_task(pull(fleet, 0, first))
        await until(lambda: len(first.turns) == 4)  # so the second one's bytes are in the file
        await until_received(fleet, 0, end)
        clock.ahead += PATIENCE
        assert await pull(fleet, 1, second) == DATA
        await until_it_follows(fleet, 0)
        generation = fleet.board.blob(DIGEST).generation
        first.valve.open()
        if is_wrong:
            with pytest.raises(DigestMismatch):
                await pulling
            assert fleet.board.blob(DIGEST).generation == generation  # the fleet is not to blame
        else:
            assert await pulling == DATA
            assert first.sent <= end + part + 3 * first.chunk  # a bit of each turn under way
            assert (fleet.ids[1], fleet.ids[0], 0) in fleet.wire.taken


@pytest.mark.real_seconds
async def test_who_waits_for_a_range_hears_that_its_turn_has_ended_without_a_byte(
    tmp_path: Path,
) -> None:
    """A further turn waits for a slot for what another node has come to bring."""
    clock = Time()
    async with sailing(tmp_path, 2, clock=clock) as fleet:
        slots = asyncio.Semaphore(1)
        first = ScriptedSource(DATA, chunk=64 << 10, segments=2, slots=slots, turn_bytes=MIB)
        first.valve.limit = MIB // 2
        second = source()
        one = asyncio.create_task(pull(fleet, 0, first))
        await until(lambda: first.waiting == 1)
        clock.ahead += PATIENCE
        assert await pull(fleet, 1, second) == DATA
        await until(lambda: sum(taker == fleet.ids[0] for _, taker, _ in fleet.wire.taken) == 5)
        first.valve.open()
        assert await one == DATA
        assert first.sent <= MIB


async def test_a_filler_whose_upstream_fails_lets_another_node_fill(tmp_path: Path) -> None:
    async with sailing(tmp_path, 2, clock=lambda: 0.0) as fleet:
        first, second = source(), source()
        first.valve.limit = MIB
        first.acts.append(Act(breaks=MIB))
        reader = asyncio.create_task(pull(fleet, 0, first))
        await until(lambda: len(first.turns) == 2)  # it goes on, but nothing more comes
        assert await pull(fleet, 1, second) == DATA
        first.valve.open()
        assert await reader == DATA


@pytest.mark.parametrize("wrong", [SIZE - 5, SIZE + 5, MIB, 3 * SIZE])
async def test_a_manifest_that_says_a_wrong_size_harms_no_other_reader(
    tmp_path: Path, wrong: int
) -> None:
    async with sailing(tmp_path, 1) as fleet:
        upstream, flights = source(), fleet.nodes[0].rig.flights
        upstream.valve.limit = MIB // 2
        assert flights.begin(upstream, wrong) is not None
        await asyncio.sleep(0)
        right = fleet.nodes[0].rig.join(upstream, "bob", size=SIZE)
        drinking = asyncio.create_task(drink(right, 0, SIZE))
        await until(lambda: upstream.sent == MIB // 2)
        upstream.valve.open()
        assert await drinking == DATA


async def test_the_upstream_is_believed_rather_than_the_one_manifest_that_says_a_size(
    tmp_path: Path,
) -> None:
    async with sailing(tmp_path, 1) as fleet:
        upstream, flights = source(), fleet.nodes[0].rig.flights
        assert flights.begin(upstream, SIZE + 5) is not None
        reader = fleet.nodes[0].rig.join(upstream, "bob", size=None)
        assert await drink(reader) == DATA


class HeldInThread(Valve):
    """Holds a thread that asks for more at each of these positions, until it is let go."""

    def __init__(self, *holds: int) -> None:
        super().__init__()
        self.holds = list(holds)
        self.held = 0
        self.go = threading.Semaphore(0)

    def allowed(self, position: int, length: int) -> int:
        in_thread = threading.current_thread() is not threading.main_thread()
        if in_thread and self.holds and position >= self.holds[0]:
            self.holds.pop(0)
            self.held += 1
            self.go.acquire()
        return super().allowed(position, length)


async def test_a_size_that_is_doubted_in_a_haul_is_given_to_nobody_before_the_digest(
    tmp_path: Path,
) -> None:
    """Only the upstream can say which manifest is right, and it does not say a size."""
    async with sailing(tmp_path, 1) as fleet:
        upstream, rig = source(), fleet.nodes[0].rig
        upstream.says_size, upstream.hauls = False, True
        upstream.valve = valve = HeldInThread(MIB, 2 * MIB)
        right = asyncio.create_task(drink(rig.join(upstream, size=SIZE), 0, SIZE))
        await until(lambda: valve.held == 1)
        short = 3 * MIB // 2
        wrong = asyncio.create_task(drink(rig.join(upstream, "bob", size=short), 0, short))
        valve.go.release()
        await until(lambda: valve.held == 2 or wrong.done())
        await a_while()
        valve.go.release()
        with pytest.raises(SizeMismatch):
            await wrong
        assert await right == DATA


async def test_a_size_that_is_doubted_when_all_is_there_but_hashed_costs_no_turn(
    tmp_path: Path,
) -> None:
    """Stripes came out of order, and the last of them are being hashed."""
    async with sailing(tmp_path, 3) as fleet:
        for number in range(2):
            assert await pull(fleet, number, source()) == DATA
        upstream, rig = source(), fleet.nodes[2].rig
        reader = rig.join(upstream, size=SIZE)
        flight = reader.flight
        right = asyncio.create_task(drink(reader, 0, SIZE))
        await until(lambda: flight.intake.has_place)
        staging, spread = flight.intake._staging, flight._fill._spread
        assert staging is not None
        wrong = None
        while wrong is None:
            async with staging._turn:  # in turn with those who put something, and who hashes
                await asyncio.sleep(0)
                assert spread.plan is not None
                if spread.plan.contiguous == SIZE > flight.received:
                    wrong = rig.join(upstream, "bob", size=SIZE + 5)
            await asyncio.sleep(0)
        with pytest.raises(SizeMismatch):
            await drink(wrong, 0, SIZE + 5)
        assert await right == DATA
        assert not upstream.turns


async def test_nobody_is_shunned_for_the_wrong_size_that_a_manifest_says(tmp_path: Path) -> None:
    """The first hash and the first grant come with the same answer."""
    async with sailing(tmp_path, 2) as fleet:
        first, second = source(), source()
        first.valve.limit = MIB // 2
        one = asyncio.create_task(pull(fleet, 0, first))
        await until(lambda: first.sent == MIB // 2)
        assert fleet.nodes[1].rig.flights.begin(second, SIZE + 5) is not None
        reader = fleet.nodes[1].rig.join(second, "bob", size=None)
        other = asyncio.create_task(drink(reader))
        await until(lambda: len(fleet.board.blob(DIGEST).nodes) == 1)  # it has asked in vain
        first.valve.open()
        assert await one == await other == DATA
        fellows = fleet.nodes[1].fellows
        assert not fellows.shunned.distrusted(fellows.clock())


async def test_a_directory_that_was_down_before_is_not_waited_for(tmp_path: Path) -> None:
    board = Board(clock=lambda: 0.0, rng=random.Random(0))
    stopped = sailing(
        tmp_path,
        1,
        clock=lambda: 0.0,
        claims=lambda giver: Gone(board, giver),
        is_up=lambda: False,
    )
    async with stopped as fleet:
        assert await pull(fleet, 0, source()) == DATA


class Wrong(LocalClaims):
    """A directory in which somebody has published other bytes, and which then goes."""

    async def look(self, digest: Digest, known: int = 0) -> View:
        if self.is_gone:
            raise DirectoryDown
        view = await super().look(digest, known)
        hashes = tuple(bytes([n]) * 32 for n in range(known, 6))
        return replace(view, size=SIZE, first=known, hashes=hashes, publishers=("f" * 16,) * 6)

    async def take(
        self,
        digest: Digest,
        wishes: Sequence[Wish],
        room: int,
        known: int = 0,
        avoid: Collection[str] = (),
        ended: Sequence[tuple[Grant, Outcome]] = (),
    ) -> Taken:
        missing = frozenset(wish.stripe for wish in wishes)
        return Taken((), missing, await self.look(digest, known))

    async def drop(self, digest: Digest, generation: str) -> None:
        self.is_gone = True
        raise DirectoryDown

    is_gone = False


async def test_a_directory_that_is_gone_with_wrong_hashes_holds_nobody_up(tmp_path: Path) -> None:
    board = Board(clock=lambda: 0.0, rng=random.Random(0))
    async with sailing(tmp_path, 1, claims=lambda giver: Wrong(board, giver)) as fleet:
        assert await pull(fleet, 0, source()) == DATA


async def test_hashes_of_a_blob_of_another_size_are_not_followed(tmp_path: Path) -> None:
    class Other(Wrong):
        is_asked = False

        async def take(
            self,
            digest: Digest,
            wishes: Sequence[Wish],
            room: int,
            known: int = 0,
            avoid: Collection[str] = (),
            ended: Sequence[tuple[Grant, Outcome]] = (),
        ) -> Taken:
            Other.is_asked = True
            return await super().take(digest, wishes, room, known, avoid, ended)

        async def look(self, digest: Digest, known: int = 0) -> View:
            return replace(await super().look(digest, known), size=SIZE + 1)

    board = Board(clock=lambda: 0.0, rng=random.Random(0))
    async with sailing(tmp_path, 1, claims=lambda giver: Other(board, giver)) as fleet:
        upstream = source()
        assert await pull(fleet, 0, upstream) == DATA
        assert not Other.is_asked


async def test_a_flight_that_is_just_stored_is_lent_from_the_store(tmp_path: Path) -> None:
    class Landing:
        """The file is the store's already, and the flight has not heard of it."""

        is_stored = False

        @property
        def sharing(self) -> "Landing":
            return self

        async def open(self, stripe: int, rank: int) -> OpenStripe:
            raise StoreFailed("the fill has ended")

        def find(self, digest: Digest) -> "Landing":
            return self

    async with sailing(tmp_path, 1) as fleet:
        assert await pull(fleet, 0, source()) == DATA
        await landed(fleet, 0)
        shelf = FleetShelf(cast(Flights, Landing()), fleet.nodes[0].rig.store, may_share=everything)
        stripe = await shelf.open(StripeAsk(DIGEST, 0, 1))
        assert stripe.pieces.length == MIB
        stripe.close()
        await shelf.close()


async def landed(fleet: Fleet, number: int) -> None:
    """Wait until a node has the blob in its store."""
    await until(lambda: fleet.nodes[number].rig.flights.find(DIGEST) is None)


async def until_it_follows(fleet: Fleet, number: int) -> None:
    """Wait until a node that has filled leaves that to another one."""
    flight = fleet.nodes[number].rig.flights.find(DIGEST)
    assert flight is not None
    sharing = flight.sharing
    assert sharing is not None
    await until(lambda: sharing._pursuit.filling is None)


async def until_received(fleet: Fleet, number: int, count: int) -> None:
    """Wait until a node has so many bytes in its file, and has done all that follows from it."""

    def is_there() -> bool:
        flight = fleet.nodes[number].rig.flights.find(DIGEST)
        return flight is not None and flight.intake.end >= count

    await until(is_there)
    await a_while()


async def until_taken(fleet: Fleet, number: int) -> None:
    """Wait until a node receives a stripe."""
    taker = fleet.ids[number]
    await until(lambda: any(one[1] == taker for one in fleet.wire.taken))


class Spied(LocalClaims):
    """Tells what it was told, and may be out of reach for one take that gives grants back."""

    def __init__(self, board: Board, giver: Giver) -> None:
        super().__init__(board, giver)
        self.holds = 0
        self.granted: set[str] = set()
        self.ended: dict[str, Outcome] = {}
        self.is_to_fail = False
        self.is_to_hang = False
        self.unheard: set[str] = set()

    async def hold(
        self, digest: Digest, generation: str, have: int, grants: Sequence[Grant] = ()
    ) -> bool:
        self.holds += have != WHOLE
        return await super().hold(digest, generation, have, grants)

    async def give_back(self, grant: Grant, outcome: Outcome) -> None:
        self.ended[grant.token] = outcome
        await super().give_back(grant, outcome)

    async def take(
        self,
        digest: Digest,
        wishes: Sequence[Wish],
        room: int,
        known: int = 0,
        avoid: Collection[str] = (),
        ended: Sequence[tuple[Grant, Outcome]] = (),
    ) -> Taken:
        if ended and self.is_to_fail:
            self.is_to_fail = False
            raise DirectoryDown
        if ended and self.is_to_hang:
            self.is_to_hang = False
            self.unheard = {grant.token for grant, _ in ended}
            await asyncio.Event().wait()
        taken = await super().take(digest, wishes, room, known, avoid, ended)
        self.granted.update(grant.token for grant in taken.grants)
        return taken


async def test_a_node_that_publishes_all_the_time_still_says_what_it_has(tmp_path: Path) -> None:
    clock = Time()
    board = Board(clock=clock, rng=random.Random(0))
    claims, made = noted(Spied, board)
    async with sailing(tmp_path, 1, clock=clock, claims=claims) as fleet:
        upstream = source()
        upstream.valve.limit = MIB
        reader = asyncio.create_task(pull(fleet, 0, upstream))
        for stripes in range(1, 5):
            await until(lambda n=stripes: len(board.blob(DIGEST).hashes) == n)  # type: ignore[misc]  # a default binds it
            clock.ahead += PATIENCE * 0.9
            upstream.valve.open((stripes + 1) * MIB)
        await until(lambda: made[0].holds > 0)
        upstream.valve.open()
        assert await reader == DATA


async def test_what_a_directory_did_not_hear_is_told_again(tmp_path: Path) -> None:
    board = Board(clock=asyncio.get_running_loop().time, rng=random.Random(0))
    claims, made = noted(Spied, board)
    async with sailing(tmp_path, 2, claims=claims) as fleet:
        made[1].is_to_fail = True
        both = await asyncio.gather(pull(fleet, 0, source()), pull(fleet, 1, source()))
        assert set(both) == {DATA}
        assert not made[1].is_to_fail
        assert made[1].granted
        await until(lambda: made[1].granted == set(made[1].ended))
        assert set(made[1].ended.values()) == {Outcome.DONE}


class Cut(LocalClaims):
    """Enters what it publishes the first time, and does not answer."""

    hung = False

    async def publish(
        self,
        digest: Digest,
        size: int,
        first: int,
        hashes: Sequence[bytes],
        by: Sequence[str] = (),
    ) -> int | None:
        count = await super().publish(digest, size, first, hashes, by)
        if not self.hung:
            self.hung = True
            await asyncio.Event().wait()
        return count


async def test_what_was_being_published_when_all_had_come_holds_up_nothing_behind_it(
    tmp_path: Path,
) -> None:
    board = Board(clock=asyncio.get_running_loop().time, rng=random.Random(0))
    claims, made = noted(Cut, board)
    async with sailing(tmp_path, 1, claims=claims) as fleet:
        upstream = source()
        upstream.valve.limit = 3 * MIB
        reader = asyncio.create_task(pull(fleet, 0, upstream))
        await until(lambda: made[0].hung)
        assert 0 < len(board.blob(DIGEST).hashes) < stripe_count(len(DATA)) - 1
        upstream.valve.open()
        assert await reader == DATA
        await until(lambda: len(board.blob(DIGEST).hashes) == stripe_count(len(DATA)))


class Contradicted(LocalClaims):
    """When it publishes the last stripe, the directory has lost all, and another one has published
    other hashes."""

    def __init__(self, board: Board, giver: Giver) -> None:
        super().__init__(board, giver)
        self.board = board
        self.asked_for: list[object] | None = None  # since then
        self.is_over = False

    async def publish(
        self,
        digest: Digest,
        size: int,
        first: int,
        hashes: Sequence[bytes],
        by: Sequence[str] = (),
    ) -> int | None:
        count = stripe_count(size)
        if first + len(hashes) == count and self.asked_for is None:
            self.asked_for = []
            self.board.forget()
            liar = LocalClaims(self.board, Giver("liar", "liar", "zone", "http://liar"))
            await liar.fill(digest, size)
            await liar.publish(digest, size, 0, [bytes(32)] * count)
        return await super().publish(digest, size, first, hashes, by)

    async def fill(self, digest: Digest, size: int | None) -> str | None:
        if self.asked_for is not None:
            self.asked_for.append("fill")
        return await super().fill(digest, size)

    async def take(
        self,
        digest: Digest,
        wishes: Sequence[Wish],
        room: int,
        known: int = 0,
        avoid: Collection[str] = (),
        ended: Sequence[tuple[Grant, Outcome]] = (),
    ) -> Taken:
        if self.asked_for is not None:
            self.asked_for += wishes
        return await super().take(digest, wishes, room, known, avoid, ended)

    async def hold(
        self, digest: Digest, generation: str, have: int, grants: Sequence[Grant] = ()
    ) -> bool:
        self.is_over |= have == WHOLE
        return await super().hold(digest, generation, have, grants)


async def test_a_blob_that_is_right_asks_for_no_stripe_anew_that_others_say_is_another(
    tmp_path: Path,
) -> None:
    board = Board(clock=asyncio.get_running_loop().time, rng=random.Random(0))
    claims, made = noted(Contradicted, board)
    async with sailing(tmp_path, 1, claims=claims) as fleet:
        assert await pull(fleet, 0, source()) == DATA
        await until(lambda: made[0].is_over)
    assert made[0].asked_for == []


async def test_what_was_being_told_when_a_pull_is_cancelled_is_told_at_its_end(
    tmp_path: Path,
) -> None:
    board = Board(clock=asyncio.get_running_loop().time, rng=random.Random(0))
    claims, made = noted(Spied, board)
    async with sailing(tmp_path, 2, claims=claims) as fleet:
        made[1].is_to_hang = True
        first = source()
        first.valve.limit = 3 * MIB
        pulls = [asyncio.create_task(pull(fleet, number, first)) for number in range(2)]
        await until(lambda: bool(made[1].unheard))
        await fleet.nodes[1].rig.flights.close()
        assert made[1].unheard <= set(made[1].ended)
        first.valve.open()
        await asyncio.gather(*pulls, return_exceptions=True)
