"""One fetch for everybody: who gets the bytes, who is refused, and what is kept."""

import asyncio
import errno
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.errors import (
    DigestMismatch,
    InternalError,
    ShuttingDown,
)
from proxy.pull.flight import State
from proxy.store.store import Disk
from proxy.upstream.turns import TurnClass
from tests.unit.flight_kit import (
    KIB,
    ScriptedSource,
    Sipper,
    a_while,
    drink,
    ended,
    flying,
    until,
)
from tests.unit.store_kit import blob, count, roomy

DATA = blob(1, 100 * KIB + 7)


# -- one fetch, many readers ---------------------------------------------------------------------


async def test_one_fetch_serves_everybody_and_is_kept(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        got = await asyncio.gather(*[rig.pull(source, f"client {n}") for n in range(50)])
        assert got == [DATA] * 50
        assert (source.sent, len(source.turns)) == (len(DATA), 1)
        assert count(rig.metrics, "pullpool_coalesced_requests_total", kind="blob") == 49
        await until(lambda: rig.flights.find(source.digest) is None)
        assert await rig.kept(source.digest) == DATA
        link = await rig.store.linked("hub.example.com", "team/app", source.digest)
        assert link is not None
        assert link.size == len(DATA)


async def test_an_empty_blob_is_a_blob(tmp_path: Path) -> None:
    source = ScriptedSource(b"")
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == b""
        await until(lambda: not len(rig.flights))
        assert rig.store.size_of(source.digest) == 0


@pytest.mark.parametrize("serves_ranges", [True, False])
async def test_a_blob_whose_size_nobody_says_is_read_to_its_end(
    tmp_path: Path, serves_ranges: bool
) -> None:
    source = ScriptedSource(DATA, says_size=False, serves_ranges=serves_ranges, turn_bytes=30 * KIB)
    async with flying(tmp_path) as rig:
        reader = rig.join(source)
        assert await drink(reader) == DATA
        assert reader.flight.size == len(DATA)
        assert source.sent == len(DATA)


async def test_an_empty_blob_whose_size_nobody_says(tmp_path: Path) -> None:
    source = ScriptedSource(b"", says_size=False, serves_ranges=False)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == b""


async def test_a_reader_who_joins_late_gets_every_byte(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(60 * KIB)
    async with flying(tmp_path) as rig:
        first = rig.join(source, "first")
        await until(lambda: first.flight.mark == 60 * KIB)
        second = asyncio.create_task(rig.pull(source, "second"))
        await a_while()
        source.valve.open()
        assert await drink(first) == await second == DATA
        assert len(source.turns) == 1


async def test_a_slow_reader_slows_nobody(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        slow = Sipper(rig.join(source, "slow"))
        assert await slow.sip()
        assert await rig.pull(source, "fast") == DATA
        await until(lambda: rig.store.size_of(source.digest) is not None)
        assert await slow.rest() == DATA


async def test_a_reader_who_starts_after_the_blob_was_stored_still_gets_it(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        tardy = rig.join(source, "tardy")  # its response headers are slow
        await ended(tardy.flight)
        assert tardy.flight.state is State.LANDED
        assert await drink(tardy) == DATA


async def test_the_fill_outlives_the_client_that_began_it(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(10 * KIB)
    async with flying(tmp_path) as rig:
        first = rig.join(source, "first")
        second = asyncio.create_task(rig.pull(source, "second"))
        await until(lambda: first.flight.mark > 0)
        first.close()
        source.valve.open()
        assert await second == DATA
        assert len(source.turns) == 1


async def test_the_ticket_belongs_to_every_client_that_waits(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.queue.clear()
    async with flying(tmp_path) as rig:
        alice, bob, bob_again = (rig.join(source, name) for name in ("alice", "bob", "bob"))
        ticket = alice.flight.ticket
        assert set(ticket.clients) == {"alice", "bob"}
        bob.close()
        assert set(ticket.clients) == {"alice", "bob"}
        bob_again.close()
        alice.close()
        alice.close()
        assert ticket.turn_class is TurnClass.ABANDONED


# -- abandonment ---------------------------------------------------------------------------------


async def test_an_abandoned_fill_goes_on_behind_the_others_and_is_kept(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, turn_bytes=20 * KIB)
    source.valve.open(30 * KIB)
    async with flying(tmp_path) as rig:
        reader = rig.join(source)
        await until(lambda: len(source.turns) == 2)
        reader.close()
        source.valve.open()
        await ended(reader.flight)
        classes = [turn.turn_class for turn in source.turns]
        assert classes == [TurnClass.BLOB, TurnClass.SMALL] + [TurnClass.ABANDONED] * 4
        assert await rig.kept(source.digest) == DATA
        labels = {"action": "finish"}
        assert count(rig.metrics, "pullpool_fills_abandoned_total", **labels) == 1


async def test_a_reader_who_comes_back_brings_the_fill_back_to_its_class(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, turn_bytes=20 * KIB)
    source.valve.open(30 * KIB)
    async with flying(tmp_path) as rig:
        first = rig.join(source)
        await until(lambda: len(source.turns) == 2)
        first.close()
        assert first.flight.ticket.turn_class is TurnClass.ABANDONED
        second = rig.join(source, "bob")
        assert second.flight is first.flight
        assert second.flight.ticket.turn_class is TurnClass.SMALL
        assert set(second.flight.ticket.clients) == {"bob"}
        source.valve.open()
        assert await drink(second) == DATA


async def test_a_flight_that_waits_is_abandoned_too(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.queue.clear()
    async with flying(tmp_path) as rig:
        reader = rig.join(source)
        await until(lambda: source.waiting == 1)
        reader.close()
        source.queue.set()
        await ended(reader.flight)
        assert await rig.kept(source.digest) == DATA


async def test_cancel_stops_at_once_and_aborts_the_body(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(30 * KIB)
    async with flying(tmp_path, on_abandon="cancel") as rig:
        reader = rig.join(source)
        await until(lambda: reader.flight.mark > 0)
        reader.close()
        assert rig.flights.find(source.digest) is None
        await ended(reader.flight)
        assert reader.flight.state is State.ABANDONED
        assert not source.active
        assert not source.turns[0].at_end
        assert rig.staging() == 0
        assert rig.store.size_of(source.digest) is None
        assert not count(rig.metrics, "pullpool_fill_failures_total", reason="shutting_down")


async def test_cancel_leaves_the_queue_at_once(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.queue.clear()
    async with flying(tmp_path, on_abandon="cancel") as rig:
        reader = rig.join(source)
        await until(lambda: source.waiting == 1)
        reader.close()
        await until(lambda: source.waiting == 0)
        assert not source.turns


async def test_whoever_joins_in_the_loop_turn_of_an_abandonment_gets_a_flight_of_his_own(
    tmp_path: Path,
) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(30 * KIB)
    async with flying(tmp_path, on_abandon="cancel") as rig:
        first = rig.join(source)
        await until(lambda: first.flight.mark > 0)
        first.close()
        second = rig.join(source)
        assert second.flight is not first.flight
        source.valve.open()
        assert await drink(second) == DATA
        await until(lambda: rig.store.size_of(source.digest) is not None)
        assert await rig.kept(source.digest) == DATA


async def test_joining_and_leaving_in_one_loop_turn_leaves_nothing(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, on_abandon="cancel") as rig:
        reader = rig.join(source)
        reader.close()  # before the fill's first step
        await ended(reader.flight)
        assert not source.turns
        assert await rig.pull(source) == DATA


# -- wrong bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("says_size", [True, False])
@pytest.mark.parametrize("chunk", [64 * KIB, 1 << 20])
async def test_of_wrong_bytes_nobody_gets_the_last_one_and_nothing_is_kept(
    tmp_path: Path, says_size: bool, chunk: int
) -> None:
    digest = Digest.of(b"what was asked for")
    source = ScriptedSource(
        DATA, digest=digest, says_size=says_size, serves_ranges=says_size, chunk=chunk
    )
    async with flying(tmp_path) as rig:
        sippers = [Sipper(rig.join(source)) for _ in range(3)]
        for sipper in sippers:
            with pytest.raises(DigestMismatch):
                await sipper.rest()
            assert len(sipper.got) < len(DATA)
        assert rig.flights.find(digest) is None
        await ended(sippers[0].reader.flight)
        assert rig.store.size_of(digest) is None
        assert rig.staging() == 0
        assert count(rig.metrics, "pullpool_digest_mismatch_total", source="upstream") == 1


async def test_the_next_one_after_wrong_bytes_asks_anew(tmp_path: Path) -> None:
    wrong = ScriptedSource(blob(2, len(DATA)), digest=Digest.of(DATA))
    async with flying(tmp_path) as rig:
        with pytest.raises(DigestMismatch):
            await rig.pull(wrong)
        assert await rig.pull(ScriptedSource(DATA)) == DATA


async def test_the_last_bytes_wait_for_the_digest_but_not_for_the_disk(tmp_path: Path) -> None:
    synced = asyncio.Event()
    loop = asyncio.get_running_loop()

    def sync(_fd: int) -> None:
        asyncio.run_coroutine_threadsafe(synced.wait(), loop).result()

    source = ScriptedSource(DATA)
    async with flying(tmp_path, disk=Disk(free=roomy().free, sync=sync)) as rig:
        reader = rig.join(source)
        assert await drink(reader) == DATA
        assert str(reader.flight.state) == "verified"
        assert await rig.pull(source) == DATA  # from the same flight
        synced.set()
        await ended(reader.flight)
        assert str(reader.flight.state) == "landed"
        assert len(source.turns) == 1


# -- a disk that fails at the end ----------------------------------------------------------------


async def test_a_commit_that_fails_still_serves_everybody(tmp_path: Path) -> None:
    def sync(_fd: int) -> None:
        raise OSError(errno.EIO, "no")

    source = ScriptedSource(DATA)
    async with flying(tmp_path, disk=Disk(free=roomy().free, sync=sync)) as rig:
        slow = Sipper(rig.join(source))
        assert await slow.sip()
        assert await rig.pull(source) == DATA
        await ended(slow.reader.flight)
        assert rig.staging() == 0
        assert await slow.rest() == DATA
        assert rig.store.size_of(source.digest) is None
        assert await rig.pull(source) == DATA  # by a flight of its own
        assert len(source.turns) == 2


async def test_a_defect_reaches_the_readers_instead_of_hanging_them(tmp_path: Path) -> None:
    class Broken(ScriptedSource):
        @property
        def turn_bytes(self) -> int:
            raise ZeroDivisionError

        @turn_bytes.setter
        def turn_bytes(self, _value: int) -> None:
            pass

    async with flying(tmp_path) as rig:
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            await rig.pull(Broken(DATA))


# -- shutdown ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 30 * KIB])
async def test_closing_stops_every_fill_and_says_so(tmp_path: Path, limit: int) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(limit)
    async with flying(tmp_path) as rig:
        reading = asyncio.create_task(rig.pull(source))
        gone = rig.join(source)
        await until(lambda: source.active == 1 and gone.flight.received == limit)
        gone.close()
        await rig.flights.close()
        with pytest.raises(ShuttingDown):
            await reading
        with pytest.raises(ShuttingDown):
            rig.join(source)
        assert not source.active


async def test_closing_before_a_fill_had_its_first_step_hangs_nobody(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        reader = rig.join(source)
        await rig.flights.close()
        with pytest.raises(ShuttingDown):
            await drink(reader)
        assert not source.turns


async def test_reprs_tell_what_they_are(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path, pause=lambda _: 0.0) as rig:
        reader = rig.join(source)
        assert repr(reader) == f"<Reader of {source.digest} at 0 for alice>"
        assert "waiting 0/None, 1 readers, 1 sources" in repr(reader.flight)
        assert repr(rig.flights) == "<Flights 1 in the air>"
        assert list(rig.flights.all()) == [reader.flight]
