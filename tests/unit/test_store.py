"""The store as its users see it: fills, leases, manifests, links and tags."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import DigestMismatch, StoreFailed
from proxy.oci.manifest import Descriptor, Manifest
from proxy.store.store import Link, NoRoom, Store
from tests.unit.proxy_kit import until
from tests.unit.store_kit import (
    blob,
    count,
    files_under,
    name,
    opened,
    roomy,
    staging_files,
    stored_files,
)

A, B, C = blob(1, 1000), blob(2, 1000), blob(3, 1000)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with opened(tmp_path) as store:
        yield store


# Fills


async def test_a_fill_becomes_a_blob_under_its_digest(store: Store, tmp_path: Path) -> None:
    fill = await store.create(name(A), len(A))
    await fill.append([A[:10], A[10:300]])
    assert fill.mark == fill.verifier.count == 300
    assert not fill.verified()
    assert store.size_of(name(A)) is None
    assert stored_files(tmp_path) == set()
    await fill.append([A[300:]])
    assert fill.verified()
    await fill.commit()
    assert store.size_of(name(A)) == len(A)
    assert stored_files(tmp_path) == {str(name(A))}
    assert staging_files(tmp_path) == []
    assert await store.read(name(A)) == A


async def test_a_fill_of_unknown_size_and_of_sha512_works_as_well(store: Store) -> None:
    digest = Digest.of(A, "sha512")
    fill = await store.create(digest, None)
    await fill.append([A])
    await fill.commit()
    assert await store.read(digest) == A


async def test_an_empty_blob_can_be_stored(store: Store) -> None:
    await store.put(name(b""), b"")
    assert store.size_of(name(b"")) == 0
    assert await store.read(name(b"")) == b""


async def test_many_small_chunks_and_empty_ones_arrive_in_order(store: Store) -> None:
    chunks = [bytes([n % 251]) * (n % 3) for n in range(5000)]
    whole = b"".join(chunks)
    fill = await store.create(name(whole), len(whole))
    await fill.append(chunks)
    await fill.append([])
    await fill.commit()
    assert await store.read(name(whole)) == whole


async def test_a_disk_that_takes_little_at_a_time_loses_nothing(tmp_path: Path) -> None:
    disk = replace(roomy(), write=lambda fd, buffers, at: os.pwrite(fd, buffers[0][:7], at))
    async with opened(tmp_path, disk=disk) as store:
        fill = await store.create(name(A), len(A))
        await fill.append([A[:500], A[500:]])
        await fill.commit()
        assert await store.read(name(A)) == A


async def test_wrong_bytes_cannot_be_committed(store: Store, tmp_path: Path) -> None:
    fill = await store.create(name(A), len(A))
    await fill.append([B])
    assert not fill.verified()
    with pytest.raises(StoreFailed, match="not right"):
        await fill.commit()
    await fill.discard()
    assert files_under(tmp_path / "blobs") == []
    assert store.size_of(name(A)) is None


async def test_right_bytes_of_another_size_than_announced_are_not_verified(store: Store) -> None:
    fill = await store.create(name(A), len(A) + 1)
    await fill.append([A])
    assert fill.verifier.matches()
    assert not fill.verified()
    await fill.discard()


async def test_two_fills_of_one_digest_do_not_share_a_file(store: Store, tmp_path: Path) -> None:
    first, second = await store.create(name(A), len(A)), await store.create(name(A), None)
    assert len(staging_files(tmp_path)) == 2
    await first.append([A[:500]])
    await second.append([A])
    await second.commit()
    await first.append([A[500:]])
    await first.commit()
    assert store.state().bytes == len(A)
    assert await store.read(name(A)) == A


async def test_ending_a_fill_twice_does_nothing(store: Store) -> None:
    fill = await store.create(name(A), len(A))
    await fill.append([A])
    await fill.commit()
    await fill.commit()
    await fill.discard()
    assert store.size_of(name(A)) == len(A)
    other = await store.create(name(B), len(B))
    await other.discard()
    await other.discard()
    with pytest.raises(StoreFailed, match="dropped"):
        await other.append([B])
    with pytest.raises(StoreFailed, match="dropped"):
        await other.commit()


async def test_a_discarded_fill_gives_its_room_back(tmp_path: Path) -> None:
    async with opened(tmp_path, max_size=1000) as store:
        fill = await store.create(name(A), 1000)
        with pytest.raises(NoRoom):
            await store.create(name(B), 1000)
        await fill.discard()
        assert staging_files(tmp_path) == []
        await (await store.create(name(B), 1000)).discard()


# Readers


async def test_a_reader_of_a_growing_file_keeps_it_through_commit_and_discard(
    store: Store,
) -> None:
    kept, dropped = await store.create(name(A), len(A)), await store.create(name(B), len(B))
    await kept.append([A])
    await dropped.append([B[:400]])
    with kept.lease() as one, dropped.lease() as other:
        assert (one.size, other.size) == (1000, 400)
        await kept.commit()
        await dropped.discard()
        assert os.pread(one.fileno(), 2000, 0) == A
        assert os.pread(other.fileno(), 2000, 0) == B[:400]
    with pytest.raises(StoreFailed, match="ended"):
        kept.lease()


async def test_readers_see_the_same_file_that_the_fill_writes(store: Store) -> None:
    fill = await store.create(name(A), len(A))
    with fill.lease() as lease:
        assert lease.size == 0
        await fill.append([A[:100]])
        assert os.pread(lease.fileno(), 1000, 0) == A[:100]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(lease.fileno(), b"x", 0)
    await fill.discard()


async def test_a_stored_blob_is_leased_with_its_size(store: Store) -> None:
    await store.put(name(A), A)
    lease = await store.lease(name(A))
    assert lease is not None
    assert lease.size == len(A)
    assert os.pread(lease.fileno(), 2000, 0) == A
    lease.close()
    lease.close()
    assert "closed" in repr(lease)


async def test_what_is_not_held_has_no_lease(store: Store) -> None:
    assert await store.lease(name(A)) is None
    assert await store.read(name(A)) is None
    assert store.size_of(name(A)) is None


async def test_a_file_that_vanished_is_no_longer_held(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        store._shelf.layout.blob(name(A)).unlink()
        assert await store.lease(name(A)) is None
        assert store.size_of(name(A)) is None
        assert store.state().blobs == 0
        await store.put(name(A), A)
        assert await store.read(name(A)) == A


async def test_a_file_that_was_cut_is_dropped_and_removed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        os.truncate(store._shelf.layout.blob(name(A)), 10)
        assert await store.lease(name(A)) is None
        assert store.size_of(name(A)) is None
        assert files_under(tmp_path / "blobs") == []


async def test_a_small_blob_that_rotted_is_not_given_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        with store._shelf.layout.blob(name(A)).open("r+b") as file:
            file.write(b"?")
        assert await store.read(name(A)) is None
        assert store.size_of(name(A)) is None
        assert files_under(tmp_path / "blobs") == []


# Manifests and small blobs


async def test_putting_twice_is_one_blob(store: Store) -> None:
    await asyncio.gather(*[store.put(name(A), A) for _ in range(5)])
    await store.put(name(A), A)
    assert (store.state().blobs, store.state().bytes) == (1, len(A))


async def test_bytes_that_are_not_their_digest_are_not_put(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch):
        await store.put(name(A), B)
    assert files_under(tmp_path / "staging") == []
    assert store.state().blobs == 0


def manifest_of(*children: bytes, media_type: str = "application/x") -> Manifest:
    raw = b"manifest of " + b" ".join(str(name(child)).encode() for child in children)
    described = tuple(Descriptor("layer", name(child), len(child)) for child in children)
    return Manifest(media_type, raw, name(raw), described, is_index=False, subject=None)


async def test_a_manifest_keeps_its_type_and_its_children_over_a_restart(tmp_path: Path) -> None:
    manifest = manifest_of(A)
    async with opened(tmp_path, max_size=2500) as store:
        await store.put(name(A), A)
        await store.put_manifest(manifest)
        await store.put_manifest(manifest)
        await store.put(name(B), B)
        assert await store.manifest_type(manifest.digest) == "application/x"
        assert await store.manifest_type(name(A)) is None
    async with opened(tmp_path, max_size=2500) as store:
        assert await store.manifest_type(manifest.digest) == "application/x"
        assert await store.read(manifest.digest) == manifest.raw
        store.touch(manifest.digest)
        await store.put(name(C), C)  # B is the oldest now, A is used by the image
        assert store.size_of(name(B)) is None
        assert store.size_of(name(A)) == len(A)


async def test_an_evicted_manifest_has_no_type_any_more(tmp_path: Path) -> None:
    manifest = manifest_of(A)
    async with opened(tmp_path, max_size=1000) as store:
        await store.put_manifest(manifest)
        await store.put(name(B), B)
        assert await store.manifest_type(manifest.digest) is None


# Links and tags


async def test_links_are_by_upstream_and_repository(store: Store) -> None:
    await store.link("up", "team/app", [(name(A), 10), (name(B), None)])
    link = await store.linked("up", "team/app", name(A))
    assert link is not None
    assert link.size == 10
    assert await store.linked("up", "team/other", name(A)) is None
    assert await store.linked("other", "team/app", name(A)) is None
    await store.link("up", "team/app", [(name(A), None)])
    assert await store.linked("up", "team/app", name(A)) == link
    await store.unlink("up", "team/app", name(A))
    assert await store.linked("up", "team/app", name(A)) is None


async def test_what_memory_knows_of_a_link_is_what_the_index_would_say(store: Store) -> None:
    await until(lambda: store.link_in_memory("up", "team/app", name(A))[0])  # all links are read
    assert store.link_in_memory("up", "team/app", name(A)) == (True, None)
    await store.link("up", "team/app", [(name(A), 10)])
    assert store.link_in_memory("up", "team/app", name(A)) == (True, Link(10))
    # Another repository has it: of this one only the index can tell.
    assert store.link_in_memory("up", "team/other", name(A)) == (False, None)
    await store.unlink("up", "team/app", name(A))
    assert store.link_in_memory("up", "team/app", name(A)) == (False, None)


async def test_links_and_tags_survive_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.link("up", "team/app", [(name(A), 10)])
        await store.put_tag("up", "team/app", "v1", name(A), 12.5)
        await store.put_tag("up", "team/app", "v2", name(A), 12.5)
        await store.drop_tag("up", "team/app", "v2")
    async with opened(tmp_path) as store:
        link = await store.linked("up", "team/app", name(A))
        assert link is not None
        assert link.size == 10
        row = await store.tag("up", "team/app", "v1")
        assert row is not None
        assert (row.digest, row.checked_at) == (name(A), 12.5)
        assert await store.tag("up", "team/app", "v2") is None


async def test_a_link_taken_back_while_it_is_looked_up_is_not_remembered(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.link("up", "app", [(name(A), 10)])
    async with opened(tmp_path) as store:
        looking = asyncio.create_task(store.linked("up", "app", name(A)))
        await asyncio.sleep(0)
        await asyncio.gather(looking, store.unlink("up", "app", name(A)))
        assert await store.linked("up", "app", name(A)) is None


async def test_an_index_that_fails_costs_no_pull(tmp_path: Path) -> None:
    metrics = Metrics()
    async with opened(tmp_path, metrics=metrics) as store:
        await store._index.run(lambda connection: connection.execute("DROP TABLE blob"))
        await store._index.run(lambda connection: connection.execute("DROP TABLE tag"))
        await store.put(name(A), A)
        assert await store.read(name(A)) == A
        assert await store.tag("up", "app", "v1") is None
    assert count(metrics, "pullpool_store_errors_total", op="index", errno="sqlite") >= 2
    async with opened(tmp_path) as store:  # begun anew, and the file adopted
        await store.recovered()
        assert await store.read(name(A)) == A


async def test_the_state_shows_bytes_limit_and_blobs(store: Store) -> None:
    await store.put(name(A), A)
    state = store.state()
    assert (state.bytes, state.limit, state.blobs) == (1000, 64 << 20, 1)
    assert "1 blobs" in repr(store)
