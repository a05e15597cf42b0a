"""How bytes reach clients when the disk has no room: through a window that never stands still."""

import asyncio
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.errors import (
    DigestMismatch,
)
from proxy.pull.flight import Flight, State
from proxy.pull.reader import (
    FileSpan,
)
from proxy.store.store import Disk
from tests.unit.flight_kit import (
    KIB,
    ScriptedSource,
    Sipper,
    a_while,
    drink,
    ended,
    flying,
    opened_blobs,
    until,
)
from tests.unit.store_kit import FullDisk, blob, roomy

DATA = blob(1, 400 * KIB + 7)
WINDOW = 64 * KIB
FAR = 32 * KIB


def full_after(room: int) -> Disk:
    return Disk(free=roomy().free, write=FullDisk(room).write)


def fastest(flight: Flight) -> int:
    return max(reader.position for reader in flight.readers)


async def at_rest(source: ScriptedSource) -> None:
    """Until no turn is under way, nor begins when what came last is where it belongs."""
    turns = -1
    while turns != len(source.turns):
        turns = len(source.turns)
        await a_while()
        await until(lambda: source.active == 0)


# -- without room on the disk --------------------------------------------------------------------


NO_DISK = [(64 << 20, 150 * KIB), (64 << 20, 0), (100 * KIB, 1 << 30)]


@pytest.mark.parametrize(("max_size", "room"), NO_DISK)
@pytest.mark.parametrize("serves_ranges", [True, False])
@pytest.mark.parametrize("says_size", [True, False])
async def test_without_room_everybody_is_served_exactly_and_nothing_is_kept(
    tmp_path: Path, max_size: int, room: int, serves_ranges: bool, says_size: bool
) -> None:
    source = ScriptedSource(DATA, serves_ranges=serves_ranges, says_size=says_size)
    disk = full_after(room)
    async with flying(tmp_path, window=WINDOW, max_size=max_size, disk=disk) as rig:
        readers = [rig.join(source, f"client {n}") for n in range(8)]
        got = await asyncio.gather(*[drink(reader) for reader in readers])
        assert got == [DATA] * 8
        assert rig.flights.find(source.digest) in (None, readers[0].flight)
        await ended(readers[0].flight)
        assert rig.store.size_of(source.digest) is None
        assert rig.staging() == 0


async def test_a_window_moves_with_the_fastest_reader_and_holds_no_slot(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, turn_bytes=WINDOW // 2)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        fast, slow = (Sipper(rig.join(source, name)) for name in ("fast", "slow"))
        flight = fast.reader.flight
        while await fast.sip():
            await at_rest(source)  # without any reader moving
            assert flight.received <= fastest(flight) + WINDOW
            assert flight.intake.window is not None
            assert flight.intake.window.end - flight.intake.window.start <= WINDOW
        assert bytes(fast.got) == DATA
        assert source.sent == len(DATA)
        assert await slow.rest() == DATA


async def test_one_who_falls_out_goes_on_with_turns_of_its_own(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        fast, slow = (Sipper(rig.join(source, name)) for name in ("fast", "slow"))
        assert await slow.sip()
        await until(lambda: fast.reader.flight.intake.window is not None)
        for _ in range(40):
            assert await fast.sip()
        assert fast.reader.flight.intake.has_lost(slow.reader.position + len(slow.got))
        assert await slow.sip()
        assert any(turn.clients == {"slow"} for turn in source.turns)
        assert await asyncio.gather(*[fast.rest(), slow.rest()]) == [DATA] * 2


async def test_a_late_reader_of_a_window_gets_every_byte(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        first = Sipper(rig.join(source, "first"))
        for _ in range(60):
            assert await first.sip()
        late = asyncio.create_task(rig.pull(source, "late"))
        assert await asyncio.gather(*[first.rest(), late]) == [DATA] * 2


async def test_what_is_in_the_file_is_read_from_there_after_the_disk_is_full(
    tmp_path: Path,
) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(50 * KIB)
    async with flying(tmp_path, window=WINDOW, disk=full_after(150 * KIB)) as rig:
        slow = Sipper(rig.join(source, "slow"))
        assert await slow.sip()
        source.valve.open()
        flight = slow.reader.flight
        await until(lambda: flight.intake.window is not None)
        assert await slow.sip()
        assert isinstance(slow.piece, FileSpan)
        assert len(source.turns) == 1
        assert await slow.rest() == DATA
        assert opened_blobs(tmp_path)  # the file stays open for its readers …
        slow.reader.close()
        await ended(flight)
        assert not opened_blobs(tmp_path)  # … and no longer


async def test_of_wrong_bytes_a_window_does_not_give_the_last_one_either(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, digest=Digest.of(b"another"))
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        fast, slow = (Sipper(rig.join(source, name)) for name in ("fast", "slow"))
        assert await slow.sip()
        with pytest.raises(DigestMismatch):
            await fast.rest()
        with pytest.raises(DigestMismatch):
            await slow.rest()
        assert len(fast.got) < len(DATA)
        assert len(slow.got) < len(DATA)


async def test_the_last_reader_of_a_window_takes_the_fill_with_it(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, disk=full_after(100 * KIB)) as rig:
        readers = [Sipper(rig.join(source)) for _ in range(2)]
        flight = readers[0].reader.flight
        await until(lambda: flight.intake.window is not None)
        for sipper in readers:
            await sipper.sip()
            await sipper.leave()
        assert rig.flights.find(source.digest) is None
        await ended(flight)
        assert flight.state is State.ABANDONED
        assert source.active == 0


async def test_a_full_disk_stops_what_nobody_reads(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(50 * KIB)
    async with flying(tmp_path, window=WINDOW, disk=full_after(100 * KIB)) as rig:
        first = rig.join(source)
        await until(lambda: first.flight.mark == 50 * KIB)
        first.close()
        source.valve.open()
        await until(lambda: first.flight.state is State.ABANDONED)
        second = rig.join(source)
        assert second.flight is not first.flight
        assert await drink(second) == DATA
        assert await rig.kept(source.digest) is None


async def test_no_room_and_nobody_reads_any_more(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.queue.clear()
    async with flying(tmp_path, max_size=KIB) as rig:
        reader = rig.join(source)
        await until(lambda: source.waiting == 1)
        reader.close()
        source.queue.set()
        await ended(reader.flight)
        assert reader.flight.state is State.ABANDONED


# -- what must not stand still -------------------------------------------------------------------


async def test_a_reader_that_has_all_it_wants_holds_no_window_back(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        content = Sipper(rig.join(source, "content"), 0, 10)
        assert await content.rest() == DATA[:10]  # and it does not leave
        assert await rig.pull(source, "whole") == DATA


async def test_a_reader_that_wants_little_does_not_pull_the_rest(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, turn_bytes=WINDOW // 2)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        assert await rig.pull(source, stop=10) == DATA[:10]
        assert source.sent <= WINDOW


async def test_a_fill_that_nobody_needs_goes_on_when_somebody_does(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        content = Sipper(rig.join(source, "content"), 0, 10)
        assert await content.rest() == DATA[:10]
        await at_rest(source)
        assert content.reader.flight.received <= WINDOW
        whole = rig.join(source, "whole")
        assert whole.flight is content.reader.flight
        assert await drink(whole) == DATA


async def test_readers_whose_headers_are_slow_stop_nobody(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        tardy = rig.join(source, "tardy")
        late_range = rig.join(source, "range")
        assert await rig.pull(source, "fast") == DATA
        assert await drink(tardy) == DATA
        assert await drink(late_range, 300 * KIB, len(DATA)) == DATA[300 * KIB :]


async def test_only_a_reader_whose_headers_are_slow(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, turn_bytes=WINDOW // 2)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        tardy = rig.join(source, "tardy")
        await a_while()
        assert tardy.flight.received <= WINDOW
        assert await drink(tardy) == DATA
        assert source.sent == len(DATA)


@pytest.mark.parametrize("start", [70 * KIB, 200 * KIB, 399 * KIB])
@pytest.mark.parametrize("far", [FAR, 1 << 30])
async def test_a_range_far_ahead_of_a_window_comes_to_its_end(
    tmp_path: Path, start: int, far: int
) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, far=far, max_size=KIB) as rig:
        stalled = Sipper(rig.join(source, "stalled"))
        assert await stalled.sip()
        assert await rig.pull(source, start=start, stop=len(DATA)) == DATA[start:]
        assert await stalled.rest() == DATA


async def test_when_all_have_fallen_out_the_fill_waits_for_them(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        fast = Sipper(rig.join(source, "fast"))
        slow = [Sipper(rig.join(source, name)) for name in ("slow", "slower")]
        for sipper in slow:
            assert await sipper.sip()
        for _ in range(60):
            assert await fast.sip()
        await fast.leave()
        await at_rest(source)
        assert slow[0].reader.flight.received < len(DATA)
        assert await asyncio.gather(*[sipper.rest() for sipper in slow]) == [DATA] * 2


@pytest.mark.parametrize("serves_ranges", [True, False])
async def test_with_a_single_slot_nobody_waits_for_ever(
    tmp_path: Path, serves_ranges: bool
) -> None:
    source = ScriptedSource(
        DATA, serves_ranges=serves_ranges, slots=asyncio.Semaphore(1), chunk=KIB
    )
    async with flying(tmp_path, window=WINDOW, patience=0.0, max_size=KIB) as rig:
        fast, slow = (Sipper(rig.join(source, name)) for name in ("fast", "slow"))
        assert await slow.sip()
        while not fast.reader.flight.intake.has_lost(len(slow.got)):
            assert await fast.sip()
        # `fast` stalls now; `slow` needs a turn of its own, and the only slot for it.
        assert await slow.rest() == DATA
        assert await fast.rest() == DATA


async def test_with_a_single_slot_and_without_range_the_leaver_frees_the_slot(
    tmp_path: Path,
) -> None:
    source = ScriptedSource(DATA, serves_ranges=False, slots=asyncio.Semaphore(1), chunk=KIB)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        fast, slow = (Sipper(rig.join(source, name)) for name in ("fast", "slow"))
        assert await slow.sip()
        while not fast.reader.flight.intake.has_lost(len(slow.got)):
            assert await fast.sip()
        rest = asyncio.create_task(slow.rest())
        await fast.leave()
        assert await rest == DATA


async def test_a_promise_of_a_blob_whose_size_nobody_says_holds_no_window_back(
    tmp_path: Path,
) -> None:
    source = ScriptedSource(DATA, says_size=False, serves_ranges=False)
    async with flying(tmp_path, window=WINDOW, max_size=KIB) as rig:
        reader = rig.join(source, size=len(DATA))
        assert await drink(reader, 0, len(DATA)) == DATA


@pytest.mark.parametrize("window", [2, 3, 100])
async def test_even_the_smallest_window_comes_to_its_end(tmp_path: Path, window: int) -> None:
    data = blob(3, 700)
    source = ScriptedSource(data, chunk=64)
    async with flying(tmp_path, window=window, max_size=100) as rig:
        assert await rig.pull(source) == data
