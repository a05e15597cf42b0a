"""A flight that takes several turns at once, while there are slots that nobody else needs (D9)."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, DigestMismatch, InternalError, UpstreamBusy
from proxy.pull.pace import LARGE
from proxy.pull.spread import TRIES
from proxy.store.files import Disk
from proxy.upstream.turns import Ticket, TurnClass
from tests.unit.flight_kit import (
    KIB,
    Act,
    Rig,
    ScriptedBody,
    ScriptedSource,
    Sipper,
    Turn,
    Valve,
    a_while,
    drink,
    ended,
    flying,
    until,
)
from tests.unit.proxy_kit import Pauses
from tests.unit.store_kit import FullDisk, blob, count, roomy, staging_files

DATA = blob(3, 200 * KIB)
#: What the first of several turns is asked for: an equal cut would be less.
LEAST = 20 * KIB
BUSY = UpstreamBusy(message="too many")


def source_of(data: bytes = DATA, *, segments: int = 4, **changes: object) -> ScriptedSource:
    return ScriptedSource(data, segments=segments, **changes)  # type: ignore[arg-type]


def of_class(source: ScriptedSource, turn_class: TurnClass) -> list[tuple[int, int | None]]:
    return [(turn.start, turn.length) for turn in source.turns if turn.turn_class is turn_class]


def outcomes(rig: Rig) -> dict[str, float]:
    name = "pullpool_upstream_segments_total"
    found = {
        outcome: count(rig.metrics, name, upstream="hub.example.com", outcome=outcome)
        for outcome in ("done", "broken", "distrusted")
    }
    return {outcome: value for outcome, value in found.items() if value}


async def test_several_turns_bring_a_blob_at_once_and_each_byte_once(tmp_path: Path) -> None:
    source = source_of()
    source.valve.open(0)
    async with flying(tmp_path) as rig:
        task = asyncio.create_task(rig.pull(source))
        await until(lambda: source.active == 4)
        starts = [turn.start for turn in source.turns]
        assert starts == sorted(starts)
        assert [turn.turn_class for turn in source.turns[1:]] == [TurnClass.SEGMENT] * 3
        source.valve.open()
        assert await task == DATA
        await ended(rig.readers[0].flight)
        assert await rig.kept(source.digest) == DATA
        assert source.sent == len(DATA)
        assert outcomes(rig).keys() == {"done"}


async def test_nothing_is_begun_beside_the_first_turn_until_its_answer_has_come(
    tmp_path: Path,
) -> None:
    source = source_of()
    source.queue.clear()
    async with flying(tmp_path) as rig:
        task = asyncio.create_task(rig.pull(source))
        await until(lambda: source.waiting == 1)
        await a_while()
        assert source.waiting == 1
        source.queue.set()
        assert await task == DATA


@pytest.mark.parametrize(("arriving", "writing"), [(0.0, 1.0), (1.0, 0.0)])
async def test_there_are_no_further_turns_while_bytes_wait_for_us(
    tmp_path: Path, arriving: float, writing: float
) -> None:
    """It is looked at again and again, and each time tells by what time has passed for."""
    clock = Pauses()

    def write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        clock.now += writing
        return os.pwritev(fd, buffers, offset)

    class Arrival(Valve):
        def allowed(self, position: int, length: int) -> int:
            clock.now += arriving
            return super().allowed(position, length)

    data = blob(4, 8 * LARGE)
    source = source_of(data, chunk=LARGE, turn_bytes=len(data))
    source.valve = Arrival()
    disk = Disk(write=write)
    async with flying(tmp_path, disk=disk, clock=clock, segment_bytes=LARGE, gather=1e-6) as rig:
        assert await rig.pull(source) == data
        assert source.sent == len(data)
        assert bool(of_class(source, TurnClass.SEGMENT)) is (writing == 0.0)


async def test_a_turn_that_others_may_yet_join_is_no_longer_than_what_has_come(
    tmp_path: Path,
) -> None:
    """A longer one would keep readers to its rate when others bring what lies beyond it."""
    clock = Pauses()

    def write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        clock.now += 1.0  # so bytes wait for us
        return os.pwritev(fd, buffers, offset)

    data = blob(4, 8 * LARGE)
    source = source_of(data, chunk=LARGE, turn_bytes=len(data))
    disk = Disk(write=write)
    async with flying(tmp_path, disk=disk, clock=clock, segment_bytes=LARGE, gather=1e-6) as rig:
        assert await rig.pull(source) == data
        assert [turn.length for turn in source.turns] == [2 * LARGE, 2 * LARGE, 4 * LARGE]


class LateAnswers(ScriptedSource):
    """Gives all slots to further turns at once, and an answer when ``answers`` is set."""

    answers: asyncio.Event

    @asynccontextmanager
    async def open(
        self, start: int, length: int | None, ticket: Ticket
    ) -> AsyncIterator[ScriptedBody]:
        if ticket.turn_class is TurnClass.SEGMENT:
            self.spare = 0
            ticket.grants += 1
            await self.answers.wait()
        async with super().open(start, length, ticket) as body:
            yield body


async def test_a_turn_beside_others_that_are_not_answered_yet_is_cut_as_if_they_were(
    tmp_path: Path,
) -> None:
    source = LateAnswers(DATA, segments=4)
    source.answers = asyncio.Event()
    source.valve.open(0)
    async with flying(tmp_path) as rig:
        task = asyncio.create_task(rig.pull(source))
        await until(lambda: source.spare == 0)
        source.valve.open()
        await until(lambda: len(source.turns) == 2)
        assert source.turns[1].length == LEAST
        source.answers.set()
        assert await task == DATA
        assert source.sent == len(DATA)


async def test_readers_follow_in_order_while_later_parts_are_there_already(tmp_path: Path) -> None:
    source = source_of()
    async with flying(tmp_path) as rig:
        reader = rig.join(source)
        source.is_overdue = lambda _turn: False
        valve = source.valve
        valve.open(8 * KIB)  # holds everything from there on but what has begun beyond it
        allowed = valve.allowed
        valve.allowed = lambda position, length: (  # type: ignore[method-assign]
            length if position >= 50 * KIB else allowed(position, length)
        )
        sipper = Sipper(reader)
        while len(sipper.got) < 8 * KIB:
            assert await sipper.sip()
        await until(lambda: bool(outcomes(rig)))
        assert reader.flight.mark == 8 * KIB
        assert bytes(sipper.got) == DATA[: 8 * KIB]
        valve.open()
        assert await sipper.rest() == DATA
        assert source.sent == len(DATA)


async def test_turns_that_share_one_slot_bring_each_byte_once(tmp_path: Path) -> None:
    source = source_of(slots=asyncio.Semaphore(1))
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert source.sent == len(DATA)


class Busy(ScriptedSource):
    """Gives no slot to what is no flight's own turn."""

    @asynccontextmanager
    async def open(
        self, start: int, length: int | None, ticket: Ticket
    ) -> AsyncIterator[ScriptedBody]:
        if ticket.turn_class is TurnClass.SEGMENT:
            await asyncio.Event().wait()
        async with super().open(start, length, ticket) as body:
            yield body


async def test_a_flight_does_not_wait_for_a_part_that_waits_for_a_slot(tmp_path: Path) -> None:
    source = Busy(DATA, segments=4)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert source.sent == len(DATA)
        assert of_class(source, TurnClass.SEGMENT) == []


@pytest.mark.parametrize("long", [1 << 30, 10 * KIB])
async def test_with_no_slot_to_spare_only_the_first_turn_is_short(
    tmp_path: Path, long: int
) -> None:
    source = Busy(DATA, segments=4, turn_bytes=90 * KIB)
    source.spare = 0
    async with flying(tmp_path, long_segment=long) as rig:
        assert await rig.pull(source) == DATA
        assert [turn.length for turn in source.turns] == [40 * KIB, 90 * KIB, 70 * KIB]


@pytest.mark.parametrize(("size", "first"), [(None, 2 * LEAST), (200 * KIB, 50 * KIB)])
async def test_the_first_turn_is_cut_by_what_a_manifest_says(
    tmp_path: Path, size: int | None, first: int
) -> None:
    source = source_of()
    async with flying(tmp_path) as rig:
        assert await drink(rig.join(source, size=size)) == DATA
        assert source.turns[0].length == first


@pytest.mark.parametrize("size", [LEAST // 2, 3 * LEAST])
async def test_a_blob_that_one_turn_brings_is_asked_for_as_ever(tmp_path: Path, size: int) -> None:
    source = source_of(DATA[:size])
    async with flying(tmp_path) as rig:
        assert await drink(rig.join(source, size=size)) == DATA[:size]
        assert [turn.length for turn in source.turns] == [source.turn_bytes]


@asynccontextmanager
async def one_long_turn(directory: Path, source: ScriptedSource) -> AsyncIterator[Rig]:
    """A flight with one slot, and at 44 KiB of a turn that is to bring all from 40 KiB on."""
    source.slots, source.spare = asyncio.Semaphore(1), 0
    source.valve.open(44 * KIB)
    async with flying(directory, long_segment=40 * KIB) as rig:
        rig.join(source)
        await until(lambda: len(source.turns) == 2 and source.turns[1].sent > 0)
        assert source.turns[1].length == 160 * KIB
        yield rig


@pytest.mark.parametrize("chunk", [4 * KIB, 7 * KIB])
async def test_a_long_turn_is_helped_as_soon_as_there_is_a_slot(tmp_path: Path, chunk: int) -> None:
    source = source_of(chunk=chunk)
    async with one_long_turn(tmp_path, source) as rig:
        source.spare = 2
        for _ in range(3):
            source.slots.release()
        await until(lambda: source.active == 4)
        source.valve.open()
        assert await drink(rig.readers[0]) == DATA
        _first, long, *others = source.turns
        assert not long.at_end
        assert {turn.turn_class for turn in others} == {TurnClass.SEGMENT}
        spilt = source.sent - len(DATA)
        assert 0 <= spilt < chunk * sum(not turn.at_end for turn in source.turns)
        await ended(rig.readers[0].flight)
        assert await rig.kept(source.digest) == DATA


async def test_a_long_turn_goes_on_where_its_helper_breaks(tmp_path: Path) -> None:
    source = source_of(acts=[Act(), Act(), Act(breaks=0), Act(breaks=8 * KIB)])
    async with one_long_turn(tmp_path, source) as rig:
        source.slots.release()
        source.valve.open()
        assert await drink(rig.readers[0]) == DATA
        assert source.sent == len(DATA)


@pytest.mark.parametrize("hauls", [False, True])
async def test_a_long_turn_that_nobody_could_help_brings_all_it_asked_for(
    tmp_path: Path, hauls: bool
) -> None:
    """A thread that finds more of it stops at the end that the turn was given, and asks."""
    source = source_of()
    source.hauls = hauls
    async with one_long_turn(tmp_path, source) as rig:
        assert source.waiting == 1
        source.valve.open()
        assert await drink(rig.readers[0]) == DATA
        assert source.turns[1].at_end
        assert source.sent == len(DATA)
        assert len(source.turns) == 2
        assert bool(source.hauled) is hauls


async def test_a_turn_is_not_shortened_while_a_thread_may_take_all_of_it(tmp_path: Path) -> None:
    source, writes, go = source_of(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= 44 * KIB:
            loop.call_soon_threadsafe(writes.set)
            go.wait()
        return os.pwritev(fd, buffers, offset)

    source.valve.open(40 * KIB)
    source.slots, source.spare = asyncio.Semaphore(1), 0
    async with flying(tmp_path, long_segment=40 * KIB, disk=replace(roomy(), write=write)) as rig:
        reader = rig.join(source)
        await until(lambda: source.waiting == 1)
        source.segments = 1  # nobody helps the second turn, until the thread is on its way
        source.valve.open(44 * KIB)
        await until(lambda: len(source.turns) == 2 and source.turns[1].sent > 0)
        source.hauls = True
        source.valve.open()
        try:
            await writes.wait()
            source.segments = 4
            rig.join(source, "bob")
            await a_while()
            assert source.waiting == 0
        finally:
            go.set()
        assert await drink(reader) == DATA
        assert source.hauled
        assert source.sent == len(DATA)


async def test_a_source_may_be_meant_to_be_read_by_one_turn_after_the_other(tmp_path: Path) -> None:
    source = source_of(segments=1, turn_bytes=30 * KIB)
    most = 0

    def look(_turn: object) -> bool:
        nonlocal most
        most = max(most, source.active)
        return False

    source.is_overdue = look
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert most == 1
        assert outcomes(rig) == {}


@pytest.mark.parametrize("breaks", [0, 5 * KIB])
async def test_a_part_that_breaks_is_brought_on_from_its_byte(tmp_path: Path, breaks: int) -> None:
    source = source_of(acts=[Act(), Act(breaks=breaks), Act(), Act(breaks=breaks)])
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert source.sent == len(DATA)
        assert outcomes(rig)["broken"] == 2


async def test_a_first_turn_that_breaks_is_brought_on_though_others_are_ahead(
    tmp_path: Path,
) -> None:
    source = source_of(acts=[Act(breaks=3 * KIB)])
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert source.sent == len(DATA)


async def test_further_turns_that_always_fail_end_and_fail_nobody(tmp_path: Path) -> None:
    class Limited(ScriptedSource):
        """Answers a second request at a time with an overload."""

        refused = 0

        @asynccontextmanager
        async def open(
            self, start: int, length: int | None, ticket: Ticket
        ) -> AsyncIterator[ScriptedBody]:
            if ticket.turn_class is TurnClass.SEGMENT:
                self.refused += 1
                raise BUSY
            async with super().open(start, length, ticket) as body:
                yield body

    source = Limited(DATA, segments=4, turn_bytes=LEAST)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert source.sent == len(DATA)
        assert TRIES <= source.refused <= TRIES + 2
        assert not source.is_distrusted


async def test_a_part_that_is_answered_with_the_whole_body_ends_all_ranges(tmp_path: Path) -> None:
    class Forgetful(ScriptedSource):
        """Knows Range once."""

        @asynccontextmanager
        async def open(
            self, start: int, length: int | None, ticket: Ticket
        ) -> AsyncIterator[ScriptedBody]:
            self.serves_ranges = not self.turns
            async with super().open(start, length, ticket) as body:
                yield body

    source = Forgetful(DATA, segments=4)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        await ended(rig.readers[0].flight)
        assert await rig.kept(source.digest) == DATA
        assert source.is_distrusted
        assert outcomes(rig)["distrusted"] >= 1


async def test_a_part_of_a_blob_of_another_size_ends_all_ranges(tmp_path: Path) -> None:
    source = source_of(acts=[Act(), Act(), Act(total=len(DATA) + 1)])
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert source.is_distrusted
        assert [turn.start for turn in source.turns if turn.is_open] == []


async def test_a_whole_body_in_the_middle_of_a_plan_is_what_the_flight_goes_on_with(
    tmp_path: Path,
) -> None:
    source = Busy(DATA, segments=4)

    def forget_ranges(_turn: object) -> bool:
        source.serves_ranges = False
        return False

    source.is_overdue = forget_ranges
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert not source.ranged
        assert len(source.turns) == 2


async def test_parts_that_do_not_make_up_the_blob_fail_it_and_end_ranges(tmp_path: Path) -> None:
    source = source_of(digest=Digest.of(b"another"))
    async with flying(tmp_path) as rig:
        with pytest.raises(DigestMismatch):
            await rig.pull(source)
        assert source.is_distrusted
        await ended(rig.readers[0].flight)
        assert rig.staging() == 0


async def test_a_wrong_blob_that_came_in_one_piece_says_nothing_of_ranges(tmp_path: Path) -> None:
    source = source_of(segments=1, digest=Digest.of(b"another"))
    async with flying(tmp_path) as rig:
        with pytest.raises(DigestMismatch):
            await rig.pull(source)
        assert not source.is_distrusted


@pytest.mark.parametrize("room", [0, 10 * KIB, 70 * KIB, 150 * KIB])
async def test_a_disk_that_is_full_in_the_middle_ends_the_parts_and_fails_nobody(
    tmp_path: Path, room: int
) -> None:
    source = source_of()
    disk = replace(roomy(), write=FullDisk(room).write)
    async with flying(tmp_path, disk=disk) as rig:
        assert await rig.pull(source) == DATA
        await ended(rig.readers[0].flight)
        assert await rig.kept(source.digest) is None
        assert source.turns[-1].turn_class is not TurnClass.SEGMENT


async def test_a_disk_that_does_not_give_back_what_it_took_fails_the_flight(tmp_path: Path) -> None:
    source = source_of()
    async with flying(tmp_path) as rig:
        source.valve.open(0)
        reader = rig.join(source)
        await until(lambda: source.active == 4)

        def cut(turn: Turn) -> bool:  # not before the file is there: nothing has come yet
            return turn.start > 0 and any(file.write_bytes(b"") for file in staging_files(tmp_path))

        source.is_overdue = cut
        allowed = source.valve.allowed
        source.valve.allowed = lambda position, length: (  # type: ignore[method-assign]
            length if position >= 60 * KIB else allowed(position, length)
        )
        source.valve.open(60 * KIB)
        with pytest.raises(InternalError):
            await drink(reader)


async def test_a_defect_in_a_further_turn_is_told_and_hangs_nobody(tmp_path: Path) -> None:
    class Defective(ScriptedSource):
        @asynccontextmanager
        async def open(
            self, start: int, length: int | None, ticket: Ticket
        ) -> AsyncIterator[ScriptedBody]:
            if ticket.turn_class is TurnClass.SEGMENT:
                raise LookupError("a defect")
            async with super().open(start, length, ticket) as body:
                yield body

    source = Defective(DATA, segments=4)
    async with flying(tmp_path) as rig:
        with pytest.raises(InternalError, match="LookupError"):
            await rig.pull(source)


async def test_a_flight_that_nobody_waits_for_gets_no_further_turns(tmp_path: Path) -> None:
    source = source_of(slots=asyncio.Semaphore(2))
    source.valve.open(0)
    async with flying(tmp_path) as rig:
        reader = rig.join(source)
        await until(lambda: source.active == 2 and source.waiting >= 1)
        reader.close()
        await until(lambda: source.waiting == 0)
        before = len(of_class(source, TurnClass.SEGMENT))
        source.valve.open()
        await ended(reader.flight)
        assert await rig.kept(source.digest) == DATA
        assert source.sent == len(DATA)
        assert len(of_class(source, TurnClass.SEGMENT)) == before


@pytest.mark.parametrize("turns", [0, 1, 2, 4])
async def test_an_end_at_any_point_ends_every_turn(tmp_path: Path, turns: int) -> None:
    source = source_of()
    source.valve.open(30 * KIB)
    async with flying(tmp_path, on_abandon="cancel") as rig:
        reader = rig.join(source)
        await until(lambda: len(source.turns) >= turns)
        reader.close()
        await ended(reader.flight)
        assert source.active == 0
        assert source.waiting == 0


async def test_a_client_that_joins_has_a_share_in_the_turns_that_wait(tmp_path: Path) -> None:
    source = source_of(slots=asyncio.Semaphore(2))
    source.valve.open(0)
    async with flying(tmp_path) as rig:
        first = rig.join(source, "alice")
        await until(lambda: source.active == 2 and source.waiting >= 1)
        second = rig.join(source, "bob")
        first.close()
        source.valve.open()
        assert await drink(second) == DATA
        assert source.turns[-1].clients == {"bob"}


@asynccontextmanager
async def parts_ahead(directory: Path, source: ScriptedSource) -> AsyncIterator[Rig]:
    """A flight that is held at 8 KiB while parts from 50 KiB on come in."""
    allowed = source.valve.allowed
    source.valve.open(8 * KIB)
    source.valve.allowed = lambda position, length: (  # type: ignore[method-assign]
        length if position >= 50 * KIB else allowed(position, length)
    )
    async with flying(directory, far=4 * KIB) as rig:
        rig.join(source, "alice")
        yield rig


async def test_a_range_far_ahead_is_read_from_the_part_that_holds_it(tmp_path: Path) -> None:
    source = source_of(says_size=True)
    async with parts_ahead(tmp_path, source) as rig:
        await until(lambda: bool(outcomes(rig)))
        first = source.turns[2].start + 10
        assert (
            await drink(rig.join(source, "bob"), first, first + 9 * KIB)
            == (DATA[first : first + 9 * KIB])
        )
        assert rig.readers[0].flight.mark == 8 * KIB
        source.valve.open()
        assert await drink(rig.readers[0]) == DATA
        assert source.sent == len(DATA)


async def test_a_range_far_ahead_waits_for_the_part_that_is_about_to_bring_it(
    tmp_path: Path,
) -> None:
    source = source_of()
    source.valve.open(0)
    async with flying(tmp_path, far=4 * KIB) as rig:
        reader = rig.join(source, "alice")
        await until(lambda: source.active == 4)
        first = source.turns[3].start + 3 * KIB
        far = asyncio.create_task(drink(rig.join(source, "bob"), first, first + 5 * KIB))
        await a_while()
        assert source.active == 4
        source.valve.open()
        assert await far == DATA[first : first + 5 * KIB]
        assert await drink(reader) == DATA
        assert source.sent == len(DATA)


async def test_a_range_far_ahead_whose_part_breaks_takes_a_turn_of_its_own(tmp_path: Path) -> None:
    source = source_of(acts=[Act(), Act(), Act(), Act(breaks=0)])
    source.valve.open(0)
    async with flying(tmp_path, far=4 * KIB, pause=lambda _: 3600.0) as rig:
        rig.join(source, "alice")
        await until(lambda: source.active == 4)
        first = source.turns[3].start + 3 * KIB
        far = asyncio.create_task(drink(rig.join(source, "bob"), first, first + 2 * KIB))
        await a_while()
        allowed = source.valve.allowed
        source.valve.allowed = lambda position, length: (  # type: ignore[method-assign]
            length if position >= first else allowed(position, length)
        )
        source.valve.open(0)
        assert await far == DATA[first : first + 2 * KIB]
        assert source.turns[-1].clients == {"bob"}


async def test_a_repository_that_is_denied_is_asked_for_no_further_part(tmp_path: Path) -> None:
    class Revoked(ScriptedSource):
        """Denies the flight's second turn."""

        asked = 0

        @asynccontextmanager
        async def open(
            self, start: int, length: int | None, ticket: Ticket
        ) -> AsyncIterator[ScriptedBody]:
            if ticket.turn_class is not TurnClass.SEGMENT:
                self.asked += 1
                if self.asked == 2:
                    raise Denied("no more")
            async with super().open(start, length, ticket) as body:
                yield body

    first = Revoked(DATA, segments=2, repository="team/secret", acts=[Act(breaks=5 * KIB)])
    other = source_of(repository="team/open", segments=1, turn_bytes=1 << 20)
    first.valve.open(0)
    async with flying(tmp_path) as rig:
        denied = rig.join(first, "alice")
        await until(lambda: first.active == 2)
        granted = rig.join(other, "bob")
        first.valve.open(5 * KIB)  # the lead breaks there; the other part is held
        with pytest.raises(Denied):
            await drink(denied)
        first.valve.open()
        assert await drink(granted) == DATA
        assert len(first.turns) == 2
        assert first.sent + other.sent == len(DATA)
