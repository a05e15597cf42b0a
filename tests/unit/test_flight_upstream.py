"""Flights over real sockets: a registry that misbehaves, the gate, the store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, DigestMismatch
from proxy.pull.reader import Reader
from proxy.store.store import Disk
from proxy.testing import Answer, Corrupt, Cut, FakeRegistry, Fault, IgnoreRange, Reset, Stall
from proxy.upstream.blob import BlobSource
from tests.unit.flight_kit import KIB, Rig, drink, ended, flying, until
from tests.unit.store_kit import FullDisk, blob, roomy
from tests.unit.upstream_kit import Puller

NAME = "team/app"
DATA = blob(5, 3 << 20)


@dataclass
class Stack:
    """A registry, the upstream client in front of it, and flights over that."""

    registry: FakeRegistry
    puller: Puller
    rig: Rig
    digest: Digest

    def join(self, client: str = "alice", *, repository: str = NAME, named: bool = True) -> Reader:
        source = BlobSource(self.puller.client, repository, self.digest)
        reader, _ = self.rig.flights.join(source, client, size=None, named=named)
        self.rig.readers.append(reader)
        return reader

    async def pull(self, client: str = "alice", start: int = 0, stop: int | None = None) -> bytes:
        reader = self.join(client)
        try:
            return await drink(reader, start, stop)
        finally:
            reader.close()

    @property
    def sent(self) -> int:
        return self.registry.counters.bytes_by_digest[self.digest]


@asynccontextmanager
async def stacked(
    directory: Path,
    *faults: Fault,
    cap: int = 2,
    data: bytes = DATA,
    on_abandon: str = "finish",
    window: int = 512 * KIB,
    far: int = 1 << 20,
    disk: Disk | None = None,
) -> AsyncIterator[Stack]:
    async with (
        FakeRegistry(limit=cap) as registry,
        Puller(registry, cap=cap) as puller,
        flying(directory, on_abandon=on_abandon, window=window, far=far, disk=disk) as rig,
    ):
        digest = registry.put_blob(NAME, data)
        registry.script(*faults)
        yield Stack(registry, puller, rig, digest)
        assert registry.counters.refused == 0
        assert registry.counters.peak_sockets <= cap


async def test_a_crowd_costs_one_fetch(tmp_path: Path) -> None:
    async with stacked(tmp_path, cap=1) as stack:
        got = await asyncio.gather(*[stack.pull(f"client {n}") for n in range(30)])
        assert got == [DATA] * 30
        assert stack.sent == len(DATA)
        assert stack.registry.counters.gets[stack.digest] == 1


@pytest.mark.parametrize("fault", [Cut(300 * KIB), Reset(300 * KIB)])
async def test_ten_breaks_go_on_at_their_byte(tmp_path: Path, fault: Cut | Reset) -> None:
    async with stacked(tmp_path, Fault(fault, kind="blob", times=10)) as stack:
        got = await asyncio.gather(*[stack.pull() for _ in range(3)])
        assert got == [DATA] * 3
        assert stack.registry.counters.gets[stack.digest] == 11
        ranges = [seen.headers["Range"] for seen in stack.registry.counters.seen]
        starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges]
        assert starts == sorted(starts)  # never a byte again that was taken in


async def test_a_registry_without_range_is_restarted_and_skipped(tmp_path: Path) -> None:
    faults = [Fault(Cut(n * 700 * KIB), kind="blob") for n in (1, 2, 3)]
    async with stacked(tmp_path) as stack:
        stack.registry.script(*faults, Fault(IgnoreRange(), kind="blob", times=None))
        assert await stack.pull() == DATA


async def test_wrong_bytes_never_end_cleanly(tmp_path: Path) -> None:
    async with stacked(tmp_path, Fault(Corrupt(-1), kind="blob")) as stack:
        with pytest.raises(DigestMismatch):
            await stack.pull()
        assert stack.rig.store.size_of(stack.digest) is None
        assert await stack.pull() == DATA


async def test_a_denial_is_one_repositorys_alone(tmp_path: Path) -> None:
    fault = Fault(Answer(403), repository="secret/app", times=None)
    async with stacked(tmp_path, fault) as stack:
        refused = stack.join(repository="secret/app", named=False)
        served = stack.join()
        with pytest.raises(Denied):
            await drink(refused)
        assert await drink(served) == DATA


async def test_cancelling_an_abandoned_body_closes_its_socket(tmp_path: Path) -> None:
    fault = Fault(Stall(900 * KIB), kind="blob")
    async with stacked(tmp_path, fault, on_abandon="cancel") as stack:
        reader = stack.join()
        await stack.registry.stalls.arrived()
        await until(lambda: reader.flight.mark > 0)
        reader.close()
        await ended(reader.flight)
        await until(lambda: stack.registry.counters.sockets_now == 0)
        assert stack.puller.origin.state().active == 0


async def test_a_far_range_does_not_wait_for_a_stalled_fill(tmp_path: Path) -> None:
    fault = Fault(Stall(100 * KIB), kind="blob")
    async with stacked(tmp_path, fault) as stack:
        whole = asyncio.create_task(stack.pull("whole"))
        await stack.registry.stalls.arrived()
        start, stop = len(DATA) - 100 * KIB, len(DATA)
        assert await stack.pull("range", start, stop) == DATA[start:]
        stack.registry.release()
        assert await whole == DATA


@pytest.mark.parametrize("cap", [1, 2])
@pytest.mark.parametrize("serves_ranges", [True, False])
async def test_a_full_disk_is_served_through(tmp_path: Path, cap: int, serves_ranges: bool) -> None:
    disk = Disk(free=roomy().free, write=FullDisk(1 << 20).write)
    async with stacked(tmp_path, cap=cap, disk=disk) as stack:
        if not serves_ranges:
            stack.registry.script(Fault(IgnoreRange(), kind="blob", times=None))
        got = await asyncio.gather(*[stack.pull(f"client {n}") for n in range(5)])
        assert got == [DATA] * 5
        assert stack.rig.store.size_of(stack.digest) is None
