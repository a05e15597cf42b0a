"""A fill goes on where the process before has left it, and only from bytes that are right."""

import asyncio
import os
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.pull.segments import Segment, Segments
from proxy.store.blobs import StoreFull
from proxy.store.counted import STEP, count_file, read_count
from proxy.store.remains import read_staging_name, staging_name
from proxy.store.store import Store
from tests.unit.store_kit import (
    MIB,
    blob,
    count,
    name,
    roomy,
    silent,
    staging_files,
    stored_files,
)

DATA = blob(3, 3 * MIB)


async def opened(directory: Path, *, resume: bool = True, metrics: Metrics | None = None) -> Store:
    return await Store.open(
        directory,
        max_size=64 * MIB,
        metrics=metrics or Metrics(),
        log=silent(),
        disk=roomy(),
        resume=resume,
    )


async def leave(directory: Path, *chunks: bytes, size: int | None = len(DATA)) -> Path:
    """What a process leaves that hands its one fill over; its file."""
    store = await opened(directory, resume=False)
    fill = await store.create(name(DATA), size)
    for chunk in chunks:
        await fill.append([chunk])
    store.hand_over()
    await store.close()
    [file] = await asyncio.to_thread(staging_files, directory)
    return file


@pytest.mark.parametrize("size", [len(DATA), None])
async def test_a_fill_goes_on_at_the_byte(tmp_path: Path, size: int | None) -> None:
    await leave(tmp_path, DATA[:MIB], DATA[MIB : 2 * MIB + 7], size=size)
    store = await opened(tmp_path)
    fill = await store.go_on(name(DATA))
    assert fill is not None
    assert (fill.mark, fill.size, fill.verifier.count) == (2 * MIB + 7, size, 2 * MIB + 7)
    assert await store.go_on(name(DATA)) is None  # it has one owner
    await fill.append([DATA[2 * MIB + 7 :]])
    await fill.commit()
    assert await store.read(name(DATA)) == DATA
    assert store._ledger.reserved == 0
    await store.close()
    assert await asyncio.to_thread(stored_files, tmp_path) == {str(name(DATA))}
    assert await asyncio.to_thread(staging_files, tmp_path) == []


async def test_what_was_left_is_removed_by_a_store_that_does_not_resume(tmp_path: Path) -> None:
    await leave(tmp_path, DATA[:MIB])
    metrics = Metrics()
    store = await opened(tmp_path, resume=False, metrics=metrics)
    assert await store.go_on(name(DATA)) is None
    assert await asyncio.to_thread(staging_files, tmp_path) == []
    assert count(metrics, "pullpool_store_recovered_temp_total") == 1
    await store.close()


async def test_what_nobody_goes_on_with_is_removed_at_the_end(tmp_path: Path) -> None:
    await leave(tmp_path, DATA[:MIB])
    store = await opened(tmp_path)
    assert len(await asyncio.to_thread(staging_files, tmp_path)) == 1
    await store.close()
    assert await asyncio.to_thread(staging_files, tmp_path) == []


async def test_bytes_after_a_hole_do_not_count(tmp_path: Path) -> None:
    file = await leave(tmp_path, DATA[:MIB])

    def punch() -> None:
        with file.open("r+b") as opened_file:
            opened_file.seek(2 * MIB)
            opened_file.write(DATA[2 * MIB :])

    await asyncio.to_thread(punch)
    store = await opened(tmp_path)
    fill = await store.go_on(name(DATA))
    assert fill is not None
    assert fill.mark == MIB
    assert (await asyncio.to_thread(file.stat)).st_size == MIB
    await store.close()


async def scattered(directory: Path, *parts: tuple[int, int]) -> Path:
    """What a process leaves that brought these ranges, in this order; its file."""
    store = await opened(directory, resume=False)
    fill = await store.create(name(DATA), len(DATA))
    plan = Segments(len(DATA), least=1)
    for start, stop in parts:
        write = fill.append if start == fill.mark else partial(fill.put, start)
        await write([DATA[start:stop]])
        plan.wrote(Segment(start, stop), stop - start)
        await fill.advance(plan.contiguous)
    store.hand_over()
    await store.close()
    [file] = [f for f in await asyncio.to_thread(staging_files, directory) if not f.suffix]
    return file


@pytest.mark.parametrize(
    ("parts", "mark"),
    [
        # The gap is less than a block of the disk: for the file system there is none.
        (((0, MIB), (MIB + 100, 2 * MIB)), MIB),
        (((0, MIB), (2 * MIB, 3 * MIB - 1), (MIB, 2 * MIB)), 3 * MIB - 1),
        (((0, MIB), (2 * MIB, 3 * MIB)), MIB),
    ],
)
async def test_of_what_was_written_out_of_order_only_the_hashed_bytes_count(
    tmp_path: Path, parts: tuple[tuple[int, int], ...], mark: int
) -> None:
    file = await scattered(tmp_path, *parts)
    store = await opened(tmp_path)
    fill = await store.go_on(name(DATA))
    assert fill is not None
    assert mark - STEP < fill.mark <= mark
    assert await asyncio.to_thread(read_count, file) is None
    await fill.append([DATA[fill.mark :]])
    await fill.commit()
    assert await store.read(name(DATA)) == DATA
    await store.close()
    assert await asyncio.to_thread(staging_files, tmp_path) == []


@pytest.mark.parametrize("torn", [b"", b"0000000000", b"-000000000000000001"])
async def test_a_count_that_was_cut_short_makes_its_file_useless(
    tmp_path: Path, torn: bytes
) -> None:
    file = await scattered(tmp_path, (0, MIB), (2 * MIB, 3 * MIB))
    await asyncio.to_thread(count_file(file).write_bytes, torn)
    store = await opened(tmp_path)
    assert await store.go_on(name(DATA)) is None
    assert await asyncio.to_thread(staging_files, tmp_path) == []
    await store.close()


async def test_killed_while_it_takes_a_file_over_the_next_process_can(tmp_path: Path) -> None:
    """The file is cut first, and its count goes after that."""
    file = await scattered(tmp_path, (0, MIB), (2 * MIB, 3 * MIB))
    await asyncio.to_thread(os.truncate, file, MIB)
    store = await opened(tmp_path)
    fill = await store.go_on(name(DATA))
    assert fill is not None
    assert fill.mark == MIB
    # In order again, and out of order once more: there is a new count.
    await fill.put(2 * MIB, [DATA[2 * MIB :]])
    assert await asyncio.to_thread(read_count, file) == MIB
    await fill.append([DATA[MIB : 2 * MIB]])
    await fill.advance(3 * MIB)
    await fill.commit()
    assert await asyncio.to_thread(read_count, file) is None
    await store.close()


async def test_what_cannot_be_counted_is_not_written_out_of_order(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    fill = await store.create(name(DATA), len(DATA))
    count = count_file(fill.file.path)
    await asyncio.to_thread(count.mkdir)
    with pytest.raises(StoreFull):
        await fill.put(MIB, [DATA[MIB:]])
    assert (await asyncio.to_thread(fill.file.path.stat)).st_size == 0
    await asyncio.to_thread(count.rmdir)
    await store.close()


async def test_a_count_without_its_file_is_removed(tmp_path: Path) -> None:
    file = await scattered(tmp_path, (0, MIB), (2 * MIB, 3 * MIB))
    await asyncio.to_thread(file.unlink)
    store = await opened(tmp_path)
    assert await asyncio.to_thread(staging_files, tmp_path) == []
    await store.close()


async def test_a_whole_file_that_is_not_the_blob_is_no_use(tmp_path: Path) -> None:
    file = await leave(tmp_path, DATA[:-1])
    await asyncio.to_thread(file.write_bytes, DATA[:-1] + b"\0")
    store = await opened(tmp_path)
    with pytest.raises(StoreFull, match="not the blob"):
        await store.go_on(name(DATA))
    assert await asyncio.to_thread(staging_files, tmp_path) == []
    assert await store.go_on(name(DATA)) is None
    assert store._ledger.reserved == 0
    await store.close()


async def test_a_file_from_before_the_machine_started_is_removed(tmp_path: Path) -> None:
    file = await leave(tmp_path, DATA[:MIB])
    await asyncio.to_thread(os.utime, file, (1.0, 1.0))
    store = await opened(tmp_path)
    assert await asyncio.to_thread(staging_files, tmp_path) == []
    await store.close()


async def test_of_two_files_the_longer_one_is_kept(tmp_path: Path) -> None:
    file = await leave(tmp_path, DATA[:MIB])
    longer = file.with_name(staging_name(name(DATA), len(DATA)))
    shorter = file.with_name(staging_name(name(DATA), len(DATA)))
    await asyncio.to_thread(longer.write_bytes, DATA[: 2 * MIB])
    await asyncio.to_thread(shorter.write_bytes, DATA[:9])
    store = await opened(tmp_path)
    assert await asyncio.to_thread(staging_files, tmp_path) == [longer]
    await store.close()


async def test_a_fill_that_is_whole_and_dropped_is_not_handed_over(tmp_path: Path) -> None:
    store = await opened(tmp_path, resume=False)
    wrong = await store.create(name(DATA), MIB)
    await wrong.append([DATA[:MIB]])
    store.hand_over()
    await wrong.discard()
    await store.close()
    assert await asyncio.to_thread(staging_files, tmp_path) == []


DIGESTS = st.builds(
    Digest.of, st.binary(max_size=8), algorithm=st.sampled_from(["sha256", "sha512"])
)


@given(DIGESTS, st.none() | st.integers(0, 2**50))
def test_a_staging_files_name_says_what_it_is_to_become(digest: Digest, size: int | None) -> None:
    assert read_staging_name(staging_name(digest, size)) == (digest, size)


@given(st.text())
def test_any_other_name_says_nothing(text: str) -> None:
    assert read_staging_name(text) is None
