"""Bodies that break go on at their byte, seen from both ends of a whole proxy (DESIGN D8)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import shutil
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.loop import loop_factory
from proxy.oci.digest import Digest
from proxy.testing import Corrupt, Cut, FakeClock, FakeRegistry, Fault, Reset, Stall
from proxy.testing.faults import Action
from proxy.testing.pattern import Pattern, digests
from tests.unit.proxy_kit import NAME, UPSTREAM, Pullpool, RawClient, blob_path, running, until
from tests.unit.upstream_kit import MIB, noise, tls

GIB = 1 << 30
#: What one break may cost in bytes that were sent and never used.
PER_BREAK = 4 * MIB


async def digest_of(pool: Pullpool, digest: Digest) -> Digest:
    """Pull it as a client does that keeps nothing in memory; the digest of what came."""
    hashed = hashlib.sha256()
    async with pool.session.get(f"{pool.proxy.url}{blob_path(digest)}") as response:
        assert response.status == 200
        async for data in response.content.iter_any():
            hashed.update(data)
    return Digest.parse(f"sha256:{hashed.hexdigest()}")


def breaks(count: int, within: int, seed: int) -> list[Fault]:
    """Cuts and resets at random bytes, for the next ``count`` answers."""
    chance = random.Random(seed)
    kinds: Sequence[type[Cut] | type[Reset]] = (Cut, Reset)
    actions: list[Action] = [chance.choice(kinds)(chance.randrange(within)) for _ in range(count)]
    return [Fault(action, kind="blob", method="GET") for action in actions]


@contextlib.asynccontextmanager
async def broken(
    directory: Path,
    *,
    segments: int = 1,
    tls_server: ssl.SSLContext | None = None,
    **registry: Any,
) -> AsyncIterator[tuple[Pullpool, FakeRegistry]]:
    """A registry with room for trouble, and a proxy in front of it."""
    async with FakeRegistry(ssl_context=tls_server, **registry) as fake:
        changes: dict[str, Any] = {"segments": segments}
        if tls_server is not None:
            ca_file = directory / "ca.pem"
            await asyncio.to_thread(ca_file.write_bytes, tls().authority)
            changes["ca_file"] = str(ca_file)
        upstreams = {UPSTREAM: changes}
        async with running(directory / "cache", fake.url, upstreams=upstreams) as pool:
            yield pool, fake


def test_a_gibibyte_that_breaks_ten_times_arrives_whole(tmp_path: Path) -> None:
    """On the loop that serves, without a debugger's help: this one is about size."""

    async def main() -> None:
        async with broken(tmp_path, segments=8) as (pool, fake):
            [digest] = fake.put_patterns(NAME, GIB, 1)
            fake.script(*breaks(10, within=4 * MIB, seed=3))
            assert await digest_of(pool, digest) == digest
            resumes = pool.count("upstream_resumes_total", upstream=UPSTREAM)
            broken_off = {"upstream": UPSTREAM, "outcome": "broken"}
            assert resumes + pool.count("upstream_segments_total", **broken_off) == 10
            assert GIB <= fake.counters.bytes_by_digest[digest] <= GIB + 10 * PER_BREAK
            assert str(digest) in await pool.stored()

    with asyncio.Runner(loop_factory=loop_factory(fast_transport=True)) as runner:
        runner.run(main())
    shutil.rmtree(tmp_path)  # pytest would keep it for three runs


async def test_a_body_over_tls_that_breaks_ten_times_arrives_whole(tmp_path: Path) -> None:
    size = 32 * MIB
    async with broken(tmp_path, tls_server=tls().server) as (pool, fake):
        [digest] = fake.put_patterns(NAME, size, 1)
        fake.script(*breaks(10, within=size // 16, seed=4))
        assert await digest_of(pool, digest) == digest
        assert size <= fake.counters.bytes_by_digest[digest] <= size + 10 * PER_BREAK
        assert fake.counters.peak_sockets == 1
        assert str(digest) in await pool.stored()


EDGES = [Cut(0), Reset(0), Cut(1), Cut(MIB - 1), Reset(MIB - 1), Cut(MIB)]


@pytest.mark.parametrize("action", EDGES, ids=repr)
async def test_a_body_may_break_at_its_first_and_at_its_last_byte(
    tmp_path: Path, action: Action
) -> None:
    async with broken(tmp_path) as (pool, fake):
        digest = fake.put_blob(NAME, noise(MIB))
        fake.script(Fault(action, kind="blob", times=3))
        answer = await pool.get(blob_path(digest))
        assert (answer.status, answer.body) == (200, noise(MIB))
        assert fake.counters.bytes_by_digest[digest] <= 2 * MIB + 16
        assert str(digest) in await pool.stored()


async def test_an_upstream_without_range_gives_all_of_it_again(tmp_path: Path) -> None:
    """And the client gets each byte once."""
    size = 8 * MIB
    async with broken(tmp_path, ranges=False) as (pool, fake):
        digest = fake.put_blob(NAME, noise(size))
        fake.script(*(Fault(Cut(after), kind="blob") for after in (MIB, 3 * MIB, size - 1)))
        answer = await pool.get(blob_path(digest))
        assert answer.body == noise(size)
        sent = MIB + 3 * MIB + size - 1 + size
        assert fake.counters.bytes_by_digest[digest] == sent
        assert pool.count("upstream_without_range_total", upstream=fake.netloc) == 1
        assert str(digest) in await pool.stored()


async def test_wrong_bytes_after_a_break_are_a_reset_and_nothing_is_kept(tmp_path: Path) -> None:
    async with broken(tmp_path) as (pool, fake):
        digest = fake.put_blob(NAME, noise(MIB))
        fake.script(Fault(Cut(MIB // 2), kind="blob"), Fault(Corrupt(at=7), kind="blob"))
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path(digest))
            assert await client.ending() == "RST"
        assert len(client.body) < MIB
        assert await pool.stored() == set()
        assert pool.count("digest_mismatch_total", source="upstream") == 1
        assert (await pool.get(blob_path(digest))).body == noise(MIB)


async def test_a_client_that_leaves_after_a_break_leaves_a_fill_that_ends(tmp_path: Path) -> None:
    async with broken(tmp_path) as (pool, fake):
        [digest] = fake.put_patterns(NAME, 24 * MIB, 1)
        fake.script(Fault(Cut(MIB), kind="blob"), Fault(Stall(MIB), kind="blob"))
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path(digest))
            await fake.stalls.arrived()
        await until(lambda: pool.count("fills_abandoned_total", action="finish") == 1)
        fake.release()
        assert str(digest) in await pool.stored()
        assert fake.counters.bytes_by_digest[digest] == 24 * MIB


# -- signed URLs -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def redirected(
    directory: Path, clock: FakeClock
) -> AsyncIterator[tuple[Pullpool, FakeRegistry, FakeRegistry]]:
    """A registry whose blobs lie elsewhere, behind URLs that are good for a minute."""
    async with (
        FakeRegistry(clock=clock) as cdn,
        FakeRegistry(clock=clock, redirect_blobs_to=cdn, signed_url_ttl=60.0) as fake,
        running(directory, fake.url, upstreams={UPSTREAM: {"segments": 1}}) as pool,
    ):
        yield pool, fake, cdn


def statuses(registry: FakeRegistry) -> list[int | None]:
    return [seen.status for seen in registry.counters.seen]


async def test_a_signed_url_that_expires_between_two_turns_is_renewed(tmp_path: Path) -> None:
    clock, size = FakeClock(), 66 * MIB  # a turn and a bit
    async with redirected(tmp_path, clock) as (pool, fake, cdn):
        [digest] = fake.put_patterns(NAME, size, 1)
        cdn.script(Fault(Stall(MIB)))
        asking = asyncio.create_task(digest_of(pool, digest))
        await cdn.stalls.arrived()
        clock.advance(61.0)
        cdn.release()
        assert await asking == digest
        assert statuses(fake) == [307, 307]
        assert statuses(cdn) == [206, 403, 206]
        assert cdn.counters.bytes_by_digest[digest] == size
        assert cdn.counters.authorization_leaks == 0
        assert pool.count("upstream_resumes_total", upstream=UPSTREAM) == 0


async def test_a_signed_url_is_used_again_while_it_is_good(tmp_path: Path) -> None:
    async with redirected(tmp_path, FakeClock()) as (pool, fake, cdn):
        [digest] = fake.put_patterns(NAME, 66 * MIB, 1)
        assert await digest_of(pool, digest) == digest
        assert (statuses(fake), statuses(cdn)) == ([307], [206, 206])


async def test_a_break_after_expiry_is_resumed_by_a_new_url(tmp_path: Path) -> None:
    clock = FakeClock()
    async with redirected(tmp_path, clock) as (pool, fake, cdn):
        digest = fake.put_blob(NAME, noise(4 * MIB))
        cdn.script(Fault(Stall(MIB)), Fault(Cut(MIB)), Fault(Cut(MIB)))
        asking = asyncio.create_task(pool.get(blob_path(digest)))
        await cdn.stalls.arrived()
        clock.advance(61.0)
        await cdn.drop_connections()
        assert (await asking).body == noise(4 * MIB)
        assert statuses(fake) == [307] * 4
        assert cdn.counters.bytes_by_digest[digest] <= 4 * MIB + 3 * PER_BREAK


# -- the pattern itself ------------------------------------------------------------------------


def test_a_pattern_is_the_same_bytes_however_it_is_cut() -> None:
    pattern = Pattern(3 * MIB + 11, 5)
    whole = bytes(pattern)
    assert len(whole) == len(pattern) == 3 * MIB + 11
    assert b"".join(pattern.pieces()) == whole
    chance = random.Random(6)
    for _ in range(200):
        start, stop = sorted((chance.randrange(len(whole) + 1), chance.randrange(len(whole) + 1)))
        assert bytes(pattern[start:stop]) == whole[start:stop]
        assert bytes(pattern[start:][: stop - start]) == whole[start:stop]
    assert (pattern[0], pattern[-1]) == (whole[0], whole[-1])
    assert whole[:MIB] != whole[MIB : 2 * MIB]


def test_the_digests_of_patterns_are_those_of_their_bytes() -> None:
    size = 2 * MIB + 3
    expected = [Digest.of(bytes(Pattern(size, number))) for number in range(3)]
    assert digests(size, 3) == expected
    assert all(one != other for one, other in itertools.combinations(expected, 2))


def test_a_pattern_without_room_for_its_number_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        Pattern(7)


async def test_a_break_reaches_the_client_when_the_upstream_does_not_come_back(
    tmp_path: Path,
) -> None:
    """By FIN, so that a client that can go on does (D7)."""
    async with broken(tmp_path) as (pool, fake):
        digest = fake.put_blob(NAME, noise(MIB))
        fake.script(Fault(Cut(MIB // 2), kind="blob"), Fault(Cut(0), kind="blob", times=None))
        with pytest.raises(aiohttp.ClientPayloadError):
            await pool.get(blob_path(digest))
        assert pool.access_log[-1]["reason"] == "upstream_unavailable"
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path(digest))
            assert await client.ending() == "FIN"
        assert await pool.stored() == set()
