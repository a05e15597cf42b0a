"""Hauls: one way to a thread takes in what comes meanwhile, every byte of it once and right."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.oci.digest import Chunk
from proxy.pull.haul import Haul
from proxy.store.blobs import StoreFull
from proxy.store.store import Disk
from tests.unit.flight_kit import KIB, ScriptedSource, flying, until
from tests.unit.store_kit import FullDisk, blob, name, opened, roomy

A = blob(1, 1000)
DATA = blob(2, 100 * KIB + 7)


class Pieces:
    """A body that has so many pieces of 100 bytes at once."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.settled = 0

    def more(self, most: int) -> Chunk:
        if not self.left:
            return b""
        self.left -= 1
        return b"x" * min(100, most)

    def settle(self) -> None:
        self.settled += 1


async def in_a_thread(haul: Haul) -> list[int]:
    def take() -> list[int]:
        sizes = []
        while data := haul.more():
            sizes.append(len(data))
        return sizes

    return await asyncio.to_thread(take)


async def test_a_haul_tells_the_loop_of_each_piece_and_ends_where_it_should() -> None:
    told, body = [], Pieces(9)

    def went_on(count: int) -> bool:
        assert threading.current_thread() is threading.main_thread()
        told.append(count)
        return True

    assert await in_a_thread(Haul(body, 250, went_on)) == [100, 100, 50]
    assert told == [100, 100, 50]
    assert body.settled == 3


async def test_a_haul_ends_when_the_loop_says_so() -> None:
    body = Pieces(9)
    haul = Haul(body, 900, lambda _: False)
    assert haul.more()
    await asyncio.sleep(0)
    assert not haul.more()
    assert body.left == 8


async def test_a_haul_ends_when_its_task_is_cancelled() -> None:
    body = Pieces(9)

    async def cancelled() -> None:
        haul = Haul(body, 900, lambda _: True)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        assert not haul.more()
        await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(cancelled())
    assert body.left == 9


async def test_the_file_takes_all_pieces_of_a_haul(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), len(A))
        pieces, chunks = [A[300:700], A[700:]], list[Chunk]([A[:300]])
        await fill.haul(chunks, lambda: pieces.pop(0) if pieces else b"")
        assert not chunks
        assert fill.mark == fill.verifier.count == len(A)
        await fill.commit()
        assert await store.read(name(A)) == A


async def test_a_piece_that_cannot_be_written_is_left_and_what_came_before_counts(
    tmp_path: Path,
) -> None:
    full = FullDisk(room=700)
    async with opened(tmp_path, disk=replace(roomy(), write=full.write)) as store:
        fill = await store.create(name(A), len(A))
        pieces, chunks = [A[300:600], A[600:900], A[900:]], list[Chunk]([A[:300]])
        with pytest.raises(StoreFull):
            await fill.haul(chunks, lambda: pieces.pop(0) if pieces else b"")
        assert chunks == [A[600:900]]
        assert pieces == [A[900:]]
        assert fill.mark == fill.verifier.count == 600
        full.room = 10_000
        await fill.haul(chunks, lambda: pieces.pop(0) if pieces else b"")
        await fill.commit()
        assert await store.read(name(A)) == A


async def test_a_fill_of_unknown_size_takes_no_more_than_it_has_room_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), None)
        pieces = [A[300:]]
        await fill.haul([A[:300]], lambda: pieces.pop(0) if pieces else b"")
        assert fill.mark == fill.reserved == 300
        assert pieces
        await fill.discard()


async def test_a_blob_that_is_larger_than_was_said_is_hauled_no_further_than_its_room(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), 600)
        pieces = [A[300:600], A[600:800], A[800:]]
        await fill.haul([A[:300]], lambda: pieces.pop(0) if pieces else b"")
        assert fill.mark == fill.reserved == 600
        await fill.haul([pieces.pop(0)], lambda: pieces.pop(0) if pieces else b"")
        assert fill.mark == fill.reserved == 800
        await fill.discard()


async def test_a_haul_has_as_much_evicted_for_each_piece_as_it_takes(tmp_path: Path) -> None:
    """Others fill the disk as well: there is no more room than what is evicted."""
    full = FullDisk(room=10_000)

    def unlink(path: Path) -> None:
        full.room += path.stat().st_size
        path.unlink()

    disk = replace(roomy(), write=full.write, unlink=unlink)
    async with opened(tmp_path, disk=disk) as store:
        for number in range(8):
            other = blob(100 + number, 100)
            fill = await store.create(name(other), 100)
            await fill.append([other])
            await fill.commit()
        full.room = 60
        pieces = [A[50:350], A[350:600]]
        fill = await store.create(name(A), len(A))
        await fill.haul([A[:50]], lambda: pieces.pop(0) if pieces else b"")
        assert fill.mark >= 350
        await fill.haul([A[fill.mark : 600]], lambda: b"")
        assert fill.mark == 600
        await fill.discard()


async def test_a_haul_gives_its_thread_back_when_all_are_taken(tmp_path: Path) -> None:
    go = threading.Event()
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), len(A))
        threads = store._shelf.threads
        pieces, chunks = [A[300:]], list[Chunk]([A[:300]])
        waiting = [asyncio.create_task(threads.quick(go.wait)) for _ in range(5)]
        await asyncio.sleep(0)
        try:
            await fill.haul(chunks, lambda: pieces.pop(0) if pieces else b"")
        finally:
            go.set()
            await asyncio.gather(*waiting)
        assert fill.mark == 300
        assert pieces
        await fill.haul([pieces.pop()], lambda: b"")
        await fill.commit()


async def test_a_flight_hauls_and_every_byte_is_right_and_asked_for_once(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.hauls = True
    async with flying(tmp_path) as rig:
        got = await asyncio.gather(*[rig.pull(source, f"client {n}") for n in range(5)])
        assert got == [DATA] * 5
        await until(lambda: rig.flights.find(source.digest) is None)
        assert await rig.kept(source.digest) == DATA
    assert source.sent == len(DATA)
    assert source.hauled > len(DATA) // 2


async def test_a_disk_that_is_full_in_the_middle_of_a_haul_costs_no_reader_a_byte(
    tmp_path: Path,
) -> None:
    source = ScriptedSource(DATA)
    source.hauls = True
    disk = Disk(free=roomy().free, write=FullDisk(30 * KIB + 5).write)
    async with flying(tmp_path, disk=disk) as rig:
        assert await rig.pull(source) == DATA
        assert source.hauled
        assert await rig.kept(source.digest) is None
