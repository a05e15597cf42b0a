"""Flights that somebody wants stored and does not read: where they stand, and when they end."""

import asyncio
from pathlib import Path

import pytest

from proxy.oci.errors import Denied, ShuttingDown
from proxy.pull.flight import State
from proxy.upstream.turns import TurnClass
from tests.unit.flight_kit import KIB, Act, ScriptedSource, a_while, ended, flying, until
from tests.unit.upstream_kit import noise

DATA = noise(40 * KIB)


@pytest.fixture
def source() -> ScriptedSource:
    return ScriptedSource(DATA, turn_bytes=10 * KIB)


async def test_a_backed_flight_is_stored_behind_everybody_in_its_backers_names(
    tmp_path: Path, source: ScriptedSource
) -> None:
    async with flying(tmp_path) as rig:
        flight = rig.flights.back(source, "task 1")
        assert rig.flights.back(source, "task 2") is flight
        await ended(flight)
        flight.unback("task 1")
        flight.unback("task 2")
        assert flight.state is State.LANDED
        assert await rig.kept(source.digest) == DATA
        assert {turn.turn_class for turn in source.turns} == {TurnClass.ABANDONED}
        assert {turn.clients for turn in source.turns} == {frozenset({"task 1", "task 2"})}


async def test_while_somebody_reads_it_stands_for_him_alone(
    tmp_path: Path, source: ScriptedSource
) -> None:
    source.queue.clear()
    async with flying(tmp_path) as rig:
        flight = rig.flights.back(source, "task 1")
        ticket = flight.ticket
        reader = rig.join(source, "alice", size=len(DATA))
        assert (set(ticket.clients), ticket.turn_class) == ({"alice"}, TurnClass.SMALL)
        assert rig.flights.back(source, "task 2") is flight
        assert (set(ticket.clients), ticket.turn_class) == ({"alice"}, TurnClass.SMALL)
        reader.close()
        assert (set(ticket.clients), ticket.turn_class) == (
            {"task 1", "task 2"},
            TurnClass.ABANDONED,
        )
        flight.unback("task 2")
        assert set(ticket.clients) == {"task 1"}
        source.queue.set()
        await ended(flight)
        flight.unback("task 1")
        assert await rig.kept(source.digest) == DATA


@pytest.mark.parametrize("on_abandon", ["finish", "cancel"])
@pytest.mark.parametrize("begun_by", ["reader", "prefetch", "backer"])
async def test_when_nobody_wants_it_any_more_the_rule_is_that_of_whoever_wanted_it(
    tmp_path: Path, source: ScriptedSource, on_abandon: str, begun_by: str
) -> None:
    """A task's own flight ends with it; what others began ends or goes on as without the task."""
    source.valve.limit = 5 * KIB
    async with flying(tmp_path, on_abandon=on_abandon) as rig:
        readers = [rig.join(source)] if begun_by == "reader" else []
        if begun_by == "prefetch":
            assert rig.flights.begin(source) is not None
        flight = rig.flights.back(source, "task 1")
        await until(lambda: flight.received > 0)
        for reader in readers:
            reader.close()
        assert flight.state is State.FILLING
        flight.unback("task 1")
        goes_on = on_abandon == "finish" and begun_by != "backer"
        assert flight.state is (State.FILLING if goes_on else State.ABANDONED)
        source.valve.open()
        await ended(flight)
        assert (await rig.kept(source.digest) == DATA) is goes_on


async def test_one_that_backs_it_twice_has_to_let_it_go_twice(
    tmp_path: Path, source: ScriptedSource
) -> None:
    source.valve.limit = 5 * KIB
    async with flying(tmp_path) as rig:
        flight = rig.flights.back(source, "task 1")
        rig.flights.back(source, "task 1")
        await until(lambda: flight.received > 0)
        flight.unback("task 1")
        flight.stop_unread()  # as the drain does it: not what a task wants
        assert (flight.state, set(flight.ticket.clients)) == (State.FILLING, {"task 1"})
        flight.unback("task 1")
        assert flight.state is State.ABANDONED
        await ended(flight)


async def test_a_client_that_leaves_for_good_takes_no_backed_flight_with_him(
    tmp_path: Path, source: ScriptedSource
) -> None:
    source.queue.clear()
    async with flying(tmp_path, on_abandon="cancel") as rig:
        reader = rig.join(source)
        flight = rig.flights.back(source, "task 1")
        reader.give_up()
        assert flight.state is State.WAITING
        source.queue.set()
        await ended(flight)
        flight.unback("task 1")
        assert await rig.kept(source.digest) == DATA


async def test_without_room_there_is_nothing_to_go_on_with(
    tmp_path: Path, source: ScriptedSource
) -> None:
    async with flying(tmp_path, max_size=len(DATA) - 1) as rig:
        flight = rig.flights.back(source, "task 1")
        await ended(flight)
        assert flight.state is State.ABANDONED
        flight.unback("task 1")
        assert await rig.kept(source.digest) is None


async def test_a_refusal_reaches_the_backer(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=Denied())])
    async with flying(tmp_path) as rig:
        flight = rig.flights.back(source, "task 1")
        await ended(flight)
        assert isinstance(flight.error, Denied)
        flight.unback("task 1")  # when it is over that changes nothing
        assert flight.state is State.FAILED


async def test_after_the_end_nothing_is_backed(tmp_path: Path, source: ScriptedSource) -> None:
    async with flying(tmp_path) as rig:
        await rig.flights.close()
        with pytest.raises(ShuttingDown):
            rig.flights.back(source, "task 1")
        await a_while()
        assert not source.turns
        await asyncio.sleep(0)
