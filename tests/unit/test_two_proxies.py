"""Two proxies in one process share nothing: metrics, logs, caches, clocks, loops' leftovers."""

import asyncio
from pathlib import Path

from proxy.testing import FakeRegistry, make_image
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    blob_path,
    manifest_path,
    pulling,
    running,
)


async def test_two_proxies_side_by_side_keep_apart(tmp_path: Path) -> None:
    other = make_image(NAME, "v1", layers=[1000], seed=50, tarred=False)
    async with FakeRegistry() as left_fake, FakeRegistry() as right_fake:
        left_fake.push(IMAGE)
        right_fake.push(other)
        async with (
            running(tmp_path / "left", left_fake.url) as left,
            running(tmp_path / "right", right_fake.url) as right,
        ):
            answers = await asyncio.gather(
                *(pool.get(manifest_path("v1")) for pool in (left, right) for _ in range(3))
            )
            assert [a.body for a in answers] == [IMAGE.manifest] * 3 + [other.manifest] * 3
            await left.get(blob_path())
            assert (await right.get(blob_path())).status == 404
            assert str(LAYER.digest) in await left.stored()
            assert str(LAYER.digest) not in await right.stored()
            labels = {"kind": "manifest", "method": "GET", "code": "200"}
            for pool in (left, right):
                assert len(pool.access_log) == 4
                served = [
                    pool.count("http_requests_total", cache=word, **labels)
                    for word in ("miss", "joined")
                ]
                assert served == [1, 2]
            right.proxy.drain()
            assert (await right.get("/v2/")).status == 503
            assert (await left.get("/v2/")).status == 200
        # One has gone; another takes its directory.
        async with running(tmp_path / "left", left_fake.url) as again:
            assert (await again.get(blob_path())).word == "hit"


async def test_one_proxy_behind_another_serves_the_same_bytes(tmp_path: Path) -> None:
    async with pulling(tmp_path / "first") as (first, fake):
        chained = {UPSTREAM: {"url": first.proxy.url}}
        async with running(tmp_path / "second", "", upstreams=chained) as second:
            answer = await second.get(manifest_path("v1"))
            assert answer.body == IMAGE.manifest
            for blob in IMAGE.blobs:
                assert (await second.get(blob_path(blob.digest))).body == blob.data
            missing = await second.get(manifest_path("none"))
            assert (missing.status, missing.code) == (404, "MANIFEST_UNKNOWN")
            await second.stored()
        await first.stored()
        assert fake.counters.gets[LAYER.digest] == 1


async def test_a_restart_keeps_what_was_stored(tmp_path: Path) -> None:
    async with pulling(tmp_path) as (pool, fake):
        await pool.get(manifest_path("v1"))
        await pool.get(blob_path())
        await pool.stored()
    async with pulling(tmp_path) as (pool, fake):
        assert (await pool.get(blob_path())).word == "hit"
        assert (await pool.get(manifest_path(IMAGE.digest))).word == "hit"
        assert not fake.counters.seen
