"""Manifests over HTTP: one question for all, permission, and what is refused of an upstream."""

import asyncio
import json
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.testing import Answer as Scripted
from proxy.testing import (
    Corrupt,
    Fault,
    Oversize,
    WrongDigestHeader,
    make_image,
)
from tests.unit.proxy_kit import (
    IMAGE,
    NAME,
    UPSTREAM,
    Served,
    blob_path,
    manifest_path,
    pulling,
    until,
)

MIB = 1 << 20


class TestOneQuestion:
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("reference", ["v1", str(IMAGE.digest)])
    async def test_a_crowd_is_one_question(
        self, served: Served, method: str, reference: str
    ) -> None:
        pool, fake = served
        with fake.hold(kind="manifest") as hold:
            crowd = [
                asyncio.create_task(pool.ask(method, manifest_path(reference))) for _ in range(9)
            ]
            await hold.arrived()
            await until(lambda: pool.proxy.puller.questions == 9)
        answers = await asyncio.gather(*crowd)
        assert {answer.status for answer in answers} == {200}
        assert sorted(str(answer.word) for answer in answers) == ["joined"] * 8 + ["miss"]
        assert fake.counters.count("manifest") == 1
        assert pool.count("coalesced_requests_total", kind="manifest") == 8

    async def test_who_leaves_does_not_take_the_answer_from_the_others(
        self, served: Served
    ) -> None:
        pool, fake = served
        with fake.hold(kind="manifest") as hold:
            first = asyncio.create_task(pool.get(manifest_path("v1")))
            await hold.arrived()
            second = asyncio.create_task(pool.get(manifest_path("v1")))
            await until(lambda: pool.proxy.puller.questions == 2)
            first.cancel()
            await until(lambda: pool.proxy.puller.questions == 1)
        assert (await second).body == IMAGE.manifest
        assert fake.counters.manifests == 1

    async def test_a_question_that_nobody_waits_for_is_dropped(self, served: Served) -> None:
        pool, fake = served
        with fake.hold(kind="manifest") as hold:
            only = asyncio.create_task(pool.get(manifest_path("v1")))
            await hold.arrived()
            only.cancel()
            await until(lambda: hold.waiting == 0)
        assert pool.access_log[-1]["status"] == 499

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("status", [500, 502, 503, 429])
    async def test_a_failure_that_passes_fails_no_pull(
        self, served: Served, method: str, status: int
    ) -> None:
        pool, fake = served
        fake.script(Fault(Scripted(status), times=2))
        assert (await pool.ask(method, manifest_path("v1"))).status == 200
        assert len(fake.counters.seen) == 3

    async def test_an_upstream_that_asks_for_a_long_pause_is_left_alone(
        self, served: Served
    ) -> None:
        pool, fake = served
        fake.script(Fault(Scripted(429, {"Retry-After": "60"}), times=None))
        answer = await pool.get(manifest_path("v1"), User_Agent="containerd/2.1.0")
        assert (answer.status, answer.code) == (503, "TOOMANYREQUESTS")
        assert answer.headers["Retry-After"] == "60"
        assert len(fake.counters.seen) == 1
        again = await pool.get(manifest_path("v1"), User_Agent="skopeo/1.9.3")
        assert (again.status, again.headers["Retry-After"]) == (429, "60")

    async def test_after_a_head_the_get_asks_by_digest(self, served: Served) -> None:
        """containerd's way: HEAD by tag, then GET by digest."""
        pool, fake = served
        digest = (await pool.head(manifest_path("v1"))).headers["Docker-Content-Digest"]
        assert (await pool.get(manifest_path(digest))).body == IMAGE.manifest
        assert (await pool.get(manifest_path("v1"))).word == "hit"
        assert len(fake.counters.seen) == 2


class TestPermission:
    async def test_a_manifest_of_another_repository_is_proved_first(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        fake.put_blob("team/other", b"x")
        answer = await pool.get(manifest_path(IMAGE.digest, "team/other"))
        assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")
        fake.retag("team/third", "v1", IMAGE)
        answer = await pool.get(manifest_path(IMAGE.digest, "team/third"))
        assert (answer.word, answer.body) == ("revalidated", IMAGE.manifest)
        assert fake.counters.manifests == 1
        assert (await pool.get(manifest_path(IMAGE.digest, "team/third"))).word == "hit"

    async def test_what_a_manifest_names_its_repository_may_have(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        await pool.get(blob_path())
        await pool.stored()
        fake.retag("team/third", "v1", IMAGE)
        await pool.get(manifest_path("v1", "team/third"))
        answer = await pool.get(blob_path(name="team/third"))
        assert answer.word == "hit"
        assert fake.counters.count("blob") == 1


class TestUpstreamsManifests:
    async def test_beyond_8_mib_nothing_is_taken(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Oversize(8 * MIB + 1), method="GET", times=None))
        for _ in range(2):
            answer = await pool.get(manifest_path("v1"))
            assert (answer.status, answer.code) == (502, "SIZE_INVALID")
        assert await pool.stored() == set()

    async def test_a_large_manifest_is_taken(self, served: Served) -> None:
        pool, fake = served
        annotations = {f"k{number}": "v" * 1000 for number in range(4500)}
        document = {**json.loads(IMAGE.manifest), "annotations": annotations}
        raw = json.dumps(document).encode()
        assert len(raw) > 4 * MIB
        fake.put_manifest(NAME, raw, IMAGE.media_type, tag="large")
        for word in ("miss", "hit"):
            answer = await pool.get(manifest_path("large"))
            assert (answer.word, answer.body) == (word, raw)

    @pytest.mark.parametrize("reference", ["v1", str(IMAGE.digest)])
    async def test_wrong_bytes_are_refused(self, served: Served, reference: str) -> None:
        pool, fake = served
        fake.script(Fault(Corrupt(at=20), kind="manifest"))
        answer = await pool.get(manifest_path(reference))
        assert (answer.status, answer.code) == (502, "DIGEST_INVALID")
        assert pool.count("digest_mismatch_total", source="upstream") == 1
        assert await pool.stored() == set()
        assert (await pool.get(manifest_path(reference))).body == IMAGE.manifest

    async def test_a_lie_about_the_digest_is_refused(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(WrongDigestHeader(), method="GET"))
        assert (await pool.get(manifest_path("v1"))).code == "DIGEST_INVALID"
        fake.script(Fault(WrongDigestHeader(), method="HEAD", times=None))
        answer = await pool.head(manifest_path(IMAGE.digest))
        assert answer.headers["Docker-Content-Digest"] == str(IMAGE.digest)

    @pytest.mark.parametrize(
        "raw",
        [
            b"<html>sign in first</html>",
            b"[]",
            b"{}",
            b'{"mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": [{}]}',
            b'{"layers": [], "config": {}, "manifests": [{}]}',
        ],
    )
    async def test_what_is_no_manifest_is_refused_and_not_kept(
        self, served: Served, raw: bytes
    ) -> None:
        pool, fake = served
        fake.put_manifest(NAME, raw, "application/json", tag="odd")
        answer = await pool.get(manifest_path("odd"))
        assert (answer.status, answer.code) == (502, "MANIFEST_INVALID")
        assert await pool.stored() == set()

    async def test_a_manifest_that_the_disk_does_not_take_is_served_all_the_same(
        self, tmp_path: Path
    ) -> None:
        async with pulling(tmp_path, cache={"max_size": 100}) as (pool, _):
            for _ in range(2):
                answer = await pool.get(manifest_path("v1"))
                assert (answer.status, answer.body) == (200, IMAGE.manifest)
            assert await pool.stored() == set()
            assert pool.events("manifest_not_kept")

    async def test_without_memory_manifests_come_from_the_store(self, tmp_path: Path) -> None:
        async with pulling(tmp_path, cache={"manifest_memory": 0}) as (pool, fake):
            await pool.get(manifest_path("v1"))
            answer = await pool.get(manifest_path("v1"))
            assert (answer.word, answer.body) == ("hit", IMAGE.manifest)
            assert fake.counters.manifests == 1

    async def test_a_schema_1_manifest_is_passed_on_as_it_is(self, served: Served) -> None:
        pool, fake = served
        kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
        raw = json.dumps({"schemaVersion": 1, "name": NAME, "signatures": []}).encode()
        fake.put_manifest(NAME, raw, kind, tag="old")
        answer = await pool.get(manifest_path("old"))
        assert (answer.headers["Content-Type"], answer.body) == (kind, raw)

    async def test_an_upstream_with_a_prefix_is_asked_with_it(self, tmp_path: Path) -> None:
        prefixed = {UPSTREAM: {"repository_prefix": "cache/"}}
        async with pulling(tmp_path, upstreams=prefixed) as (pool, fake):
            fake.push(make_image("cache/team/app", "v1", layers=[], seed=6))
            answer = await pool.get(manifest_path("v1"))
            assert answer.status == 200
            assert Digest.of(answer.body) != IMAGE.digest
            assert fake.counters.seen[0].path == "/v2/cache/team/app/manifests/v1"
