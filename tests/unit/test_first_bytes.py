"""The first bytes of a flight, which readers have before the file does: fill.py, intake.py."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.oci.errors import SizeMismatch
from proxy.pull.intake import FIRST_BYTES
from tests.unit.flight_kit import KIB, ScriptedSource, Sipper, drink, ended, flying, read, until
from tests.unit.store_kit import FullDisk, Gate, blob, roomy

DATA = blob(1, 300 * KIB)


@pytest.mark.parametrize("step", ["free", "write"])
async def test_they_come_before_the_file_is_made_or_written(tmp_path: Path, step: str) -> None:
    gate, own = Gate(), roomy()
    held = {step: gate.before(getattr(own, step))}
    disk = replace(own, **held)  # type: ignore[arg-type]  # any call
    source = ScriptedSource(DATA, chunk=64 * KIB)
    async with flying(tmp_path, disk=disk) as rig:
        try:
            client = Sipper(rig.join(source))
            assert await client.sip()
            assert client.got == DATA[:FIRST_BYTES]
            await asyncio.to_thread(gate.reached.wait)
            assert not rig.store.state().bytes
        finally:
            gate.go.set()
        assert await client.rest() == DATA
        await ended(client.reader.flight)
        assert await rig.kept(source.digest) == DATA


async def test_a_range_gets_its_own_part_of_them(tmp_path: Path) -> None:
    gate = Gate()
    disk = replace(roomy(), write=gate.before(os.pwritev))  # type: ignore[arg-type]  # any call
    async with flying(tmp_path, disk=disk) as rig:
        try:
            source = ScriptedSource(DATA, chunk=64 * KIB)
            client = Sipper(rig.join(source), 1000, 2000)
            assert await client.sip()
            assert client.got == DATA[1000:2000]
        finally:
            gate.go.set()
        assert not await client.sip()


@pytest.mark.parametrize("says_size", [True, False])
async def test_what_may_be_the_last_byte_is_none_of_them(tmp_path: Path, says_size: bool) -> None:
    gate, data = Gate(), DATA[: 8 * KIB]
    disk = replace(roomy(), write=gate.before(os.pwritev))  # type: ignore[arg-type]  # any call
    async with flying(tmp_path, disk=disk) as rig:
        try:
            source = ScriptedSource(data, chunk=64 * KIB, says_size=says_size)
            client = Sipper(rig.join(source))
            sip = asyncio.create_task(client.sip())
            await asyncio.to_thread(gate.reached.wait)
            assert client.reader.flight.mark == (0 if says_size else len(data) - 1)
        finally:
            gate.go.set()
        assert await sip
        assert await client.rest() == data


@pytest.mark.parametrize("window", [2 * KIB, 64 * KIB])
@pytest.mark.parametrize("serves_ranges", [True, False])
@pytest.mark.parametrize("stop", [10, 3 * KIB, None])
async def test_when_the_disk_does_not_take_them_nobody_misses_any(
    tmp_path: Path, window: int, serves_ranges: bool, stop: int | None
) -> None:
    disk = replace(roomy(), write=FullDisk(0).write)
    source = ScriptedSource(DATA, serves_ranges=serves_ranges)
    async with flying(tmp_path, disk=disk, window=window, patience=0.0) as rig:
        quick, slow = rig.join(source, "quick"), Sipper(rig.join(source, "slow"), 0, stop)
        assert await slow.sip()
        assert await drink(quick) == DATA
        assert await slow.rest() == DATA[:stop]
        assert await rig.kept(source.digest) is None


async def test_a_reader_who_comes_when_the_file_has_them_gets_them_from_there(
    tmp_path: Path,
) -> None:
    source = ScriptedSource(DATA, chunk=64 * KIB)
    source.valve.open(64 * KIB)
    async with flying(tmp_path) as rig:
        first = Sipper(rig.join(source))
        await first.sip()
        await until(lambda: first.reader.flight.mark == 64 * KIB)
        late = Sipper(rig.join(source))
        await late.sip()
        assert not isinstance(late.piece, bytes)
        assert read(late.piece) == DATA[: 64 * KIB]
        source.valve.open()
        assert await late.rest() == await first.rest() == DATA


async def test_a_fill_that_is_cancelled_when_they_were_shown_leaves_nothing(
    tmp_path: Path,
) -> None:
    gate, own = Gate(), roomy()
    disk = replace(own, free=gate.before(own.free))  # type: ignore[arg-type]  # any call
    async with flying(tmp_path, disk=disk, on_abandon="cancel") as rig:
        source = ScriptedSource(DATA, chunk=64 * KIB)
        client = Sipper(rig.join(source))
        await client.sip()
        await asyncio.to_thread(gate.reached.wait)
        await client.leave()
        gate.go.set()
        await ended(client.reader.flight)
        await until(lambda: not os.listdir(tmp_path / "staging"))  # its thread gives it back
        assert rig.staging() == 0


async def test_whoever_was_promised_fewer_bytes_than_those_is_refused(tmp_path: Path) -> None:
    """Else it had all it was promised, in good order, and nobody had looked at its digest."""
    gate = Gate()
    disk = replace(roomy(), write=gate.before(os.pwritev))  # type: ignore[arg-type]  # any call
    async with flying(tmp_path, disk=disk) as rig:
        try:
            source = ScriptedSource(DATA, chunk=64 * KIB, says_size=False)
            client = Sipper(rig.join(source))
            assert await client.sip()
            with pytest.raises(SizeMismatch):
                await drink(rig.join(source, "bob", size=10 * KIB))
        finally:
            gate.go.set()
        assert await client.rest() == DATA
