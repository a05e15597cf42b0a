"""What a power cut does to blobs that were not synced, and that none of it is ever served."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.observe.metrics import Metrics
from proxy.store.durability import Durability, is_marked, settle
from proxy.store.files import Disk, Layout
from tests.unit.store_kit import blob, count, name, opened, roomy, stored_files

A, B, C = blob(1, 3000), blob(2, 3000), blob(3, 3000)
FIRST, SECOND = (lambda: "first boot"), (lambda: "second boot")


class Syncs:
    """A disk that notes what was synced, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def disk(self) -> Disk:
        def sync(fd: int) -> None:
            self.calls.append("file")
            os.fsync(fd)

        def rename(source: Path, target: Path) -> None:
            self.calls.append("name")
            source.replace(target)

        def sync_directory(_directory: Path) -> None:
            self.calls.append("directory")

        return replace(roomy(), sync=sync, rename=rename, sync_directory=sync_directory)


def file_of(directory: Path, data: bytes) -> Path:
    return Layout(directory).blob(name(data))


@pytest.mark.parametrize(
    ("durability", "calls"),
    [
        (Durability.FULL, ["file", "name", "directory"]),
        (Durability.FILE, ["file", "name"]),
        (Durability.NONE, ["name"]),
    ],
)
async def test_each_level_syncs_what_it_says(
    tmp_path: Path, durability: Durability, calls: list[str]
) -> None:
    syncs = Syncs()
    async with opened(tmp_path, disk=syncs.disk(), durability=durability) as store:
        await store.put(name(A), A)
        assert await store.read(name(A)) == A
    assert syncs.calls == calls
    assert is_marked(file_of(tmp_path, A).stat().st_mode) == (durability is Durability.NONE)


async def written(directory: Path, *blobs: bytes, boot: Callable[[], str | None] = FIRST) -> None:
    """A process that stores these without syncing, and whose start has proved all it found."""
    async with opened(directory, durability=Durability.NONE, boot=boot) as store:
        await store.recovered()
        for data in blobs:
            await store.put(name(data), data)


async def test_after_a_power_cut_only_what_is_whole_is_served(tmp_path: Path) -> None:
    await written(tmp_path, A, B, C)
    file_of(tmp_path, A).write_bytes(bytes(len(A)))  # its size, and none of its bytes
    os.truncate(file_of(tmp_path, B), 100)
    metrics = Metrics()
    async with opened(tmp_path, boot=SECOND, metrics=metrics) as store:
        assert [store.size_of(name(data)) for data in (A, B, C)] == [None] * 3
        await store.recovered()
        assert [store.size_of(name(data)) for data in (A, B, C)] == [None, None, len(C)]
        assert await store.read(name(C)) == C
        assert stored_files(tmp_path) == {str(name(C))}
        assert {row[0] for row in (await store._index.load()).blobs} == {str(name(C))}
    assert count(metrics, "pullpool_digest_mismatch_total", source="store") == 2


async def test_an_old_row_does_not_vouch_for_a_newer_file(tmp_path: Path) -> None:
    """A stored blob is evicted and fetched again without a sync; the power cut takes the deletion
    of its row, and of the new file the bytes."""
    async with opened(tmp_path, durability=Durability.FULL, boot=FIRST) as store:
        await store.recovered()
        await store.put(name(A), A)
        rows = await store._index.load()
        await store._shelf.examine(name(A), lambda: False, "gone")
    await written(tmp_path, A)
    file_of(tmp_path, A).write_bytes(bytes(len(A)))
    async with opened(tmp_path, boot=SECOND) as store:
        assert (await store._index.load()).blobs[0][:2] == rows.blobs[0][:2]
        assert store.size_of(name(A)) is None
        await store.recovered()
        assert store.size_of(name(A)) is None


async def test_a_process_that_only_died_has_lost_nothing(tmp_path: Path) -> None:
    await written(tmp_path, A)
    async with opened(tmp_path, durability=Durability.NONE, boot=FIRST) as store:
        assert store.size_of(name(A)) == len(A)


async def test_what_was_proved_once_is_not_doubted_again(tmp_path: Path) -> None:
    await written(tmp_path, A)
    async with opened(tmp_path, boot=SECOND) as store:
        await store.recovered()
    assert not is_marked(file_of(tmp_path, A).stat().st_mode)
    async with opened(tmp_path, boot=lambda: "third boot") as store:
        assert store.size_of(name(A)) == len(A)


async def test_a_start_that_was_cut_short_leaves_the_doubt_to_the_next(tmp_path: Path) -> None:
    await written(tmp_path, A, B)
    async with opened(tmp_path, boot=SECOND) as store:
        store._shelf.is_closing = True  # before the first of them was looked at
        await store.recovered()
        store._shelf.is_closing = False
    file_of(tmp_path, A).write_bytes(bytes(len(A)))
    async with opened(tmp_path, boot=SECOND) as store:
        assert store.size_of(name(A)) is None
        await store.recovered()
        assert store.size_of(name(A)) is None
        assert store.size_of(name(B)) == len(B)


async def test_a_setting_that_was_changed_back_does_not_end_the_doubt(tmp_path: Path) -> None:
    await written(tmp_path, A)
    async with opened(tmp_path, durability=Durability.FULL, boot=FIRST) as store:
        await store.recovered()
        await store.put(name(B), B)
    async with opened(tmp_path, durability=Durability.FULL, boot=SECOND) as store:
        assert store.size_of(name(A)) is None
        assert store.size_of(name(B)) == len(B)


async def test_without_a_boot_to_know_everything_unsynced_is_doubted(tmp_path: Path) -> None:
    await written(tmp_path, A, boot=lambda: None)
    async with opened(tmp_path, boot=lambda: None) as store:
        assert store.size_of(name(A)) is None
        await store.recovered()
        assert store.size_of(name(A)) == len(A)


async def test_a_torn_note_of_the_boot_means_doubt(tmp_path: Path) -> None:
    await written(tmp_path, A)
    (tmp_path / "BOOT").write_bytes(b"\xff\x00")
    async with opened(tmp_path, boot=FIRST) as store:
        assert store.size_of(name(A)) is None


async def test_a_file_system_that_keeps_no_mark_is_synced(tmp_path: Path) -> None:
    syncs = Syncs()
    async with opened(tmp_path, disk=syncs.disk(), durability=Durability.NONE) as store:
        fill = await store.create(name(A), len(A))
        os.fchmod(fill.file.writer, 0o644)
        await fill.append([A])
        await fill.commit()
    assert syncs.calls == ["file", "name"]


def test_a_mark_goes_and_all_else_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for mode in (0o700, 0o744, 0o600):
        file.chmod(mode)
        settle(file)
        assert file.stat().st_mode & 0o777 == mode & ~0o100
