"""The fake registry, asked over real sockets: others lean on it, so it has to be right itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from proxy.oci.digest import Digest
from proxy.testing import (
    FakeRegistry,
    make_image,
    make_index,
)
from tests.unit.fake_kit import (
    IMAGE,
    LAYER,
    blob_url,
    error_code,
    manifest_url,
)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        yield registry


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


class TestContent:
    async def test_ping_says_which_api_it_is(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        async with client.get(f"{registry.url}/v2/") as answer:
            assert answer.status == 200
            assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"

    @pytest.mark.parametrize("reference", ["v1", str(IMAGE.digest)])
    async def test_a_manifest_comes_by_tag_and_by_digest(
        self, registry: FakeRegistry, client: aiohttp.ClientSession, reference: str
    ) -> None:
        async with client.get(manifest_url(registry, reference)) as answer:
            assert await answer.read() == IMAGE.manifest
            assert answer.headers["Docker-Content-Digest"] == str(IMAGE.digest)
            assert answer.headers["Content-Type"] == IMAGE.media_type

    async def test_head_announces_the_length_and_sends_nothing(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        for url, size in [
            (manifest_url(registry), len(IMAGE.manifest)),
            (blob_url(registry), LAYER.size),
        ]:
            async with client.head(url) as answer:
                assert answer.status == 200
                assert answer.headers["Content-Length"] == str(size)
        assert registry.counters.bytes_sent == 0
        assert registry.counters.heads == 2

    @pytest.mark.parametrize("tags", ['"{}"', 'W/"{}"', '"x", "{}"', "*"])
    async def test_an_unchanged_manifest_is_a_304(
        self, registry: FakeRegistry, client: aiohttp.ClientSession, tags: str
    ) -> None:
        wanted = {"If-None-Match": tags.format(IMAGE.digest)}
        async with client.get(manifest_url(registry), headers=wanted) as answer:
            assert answer.status == 304
            assert answer.headers["ETag"] == f'"{IMAGE.digest}"'
            assert await answer.read() == b""

    async def test_a_changed_manifest_is_sent(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        other = make_image("team/app", "v1", layers=[5], seed=9)
        registry.retag("team/app", "v1", other)
        wanted = {"If-None-Match": f'"{IMAGE.digest}"'}
        async with client.get(manifest_url(registry), headers=wanted) as answer:
            assert await answer.read() == other.manifest

    @pytest.mark.parametrize(
        ("path", "status", "code"),
        [
            ("/v2/no/such/manifests/v1", 404, "NAME_UNKNOWN"),
            ("/v2/team/app/manifests/v9", 404, "MANIFEST_UNKNOWN"),
            (f"/v2/team/app/blobs/{Digest.of(b'')}", 404, "BLOB_UNKNOWN"),
            ("/v2/team/app/blobs/sha256:abc", 400, "DIGEST_INVALID"),
            ("/v2/team/app/tags/list?n=x", 400, "UNSUPPORTED"),
            ("/v2/_catalog", 404, "UNSUPPORTED"),
        ],
    )
    async def test_what_is_not_there_is_an_oci_error(
        self,
        registry: FakeRegistry,
        client: aiohttp.ClientSession,
        path: str,
        status: int,
        code: str,
    ) -> None:
        async with client.get(registry.url + path) as answer:
            assert answer.status == status
            assert await error_code(answer) == code

    async def test_writing_is_not_allowed(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        async with client.delete(manifest_url(registry)) as answer:
            assert answer.status == 405
            assert answer.headers["Allow"] == "GET, HEAD"

    async def test_a_blob_is_only_in_repositories_that_have_it(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.put_blob("other/app", b"something")
        async with client.get(blob_url(registry, name="other/app")) as answer:
            assert answer.status == 404

    async def test_an_index_brings_its_images(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        index = make_index("team/multi", "v1", [IMAGE])
        registry.push(index)
        async with client.get(manifest_url(registry, name="team/multi")) as answer:
            assert await answer.read() == index.manifest
        async with client.get(blob_url(registry, name="team/multi")) as answer:
            assert await answer.read() == LAYER.data

    @pytest.mark.parametrize("reference", ["v1", IMAGE.digest, None])
    async def test_what_was_removed_is_gone(
        self, registry: FakeRegistry, client: aiohttp.ClientSession, reference: str | Digest | None
    ) -> None:
        registry.remove("team/app", reference)
        async with client.get(manifest_url(registry)) as answer:
            assert answer.status == 404

    async def test_a_removed_blob_is_gone_and_the_manifest_stays(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.remove("team/app", LAYER.digest)
        async with client.get(blob_url(registry)) as answer:
            assert answer.status == 404
        async with client.get(manifest_url(registry)) as answer:
            assert answer.status == 200


class TestLists:
    async def test_tags_come_in_pages_that_link_to_the_next(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        for tag in ("v4", "v2", "v3"):
            registry.retag("team/app", tag, IMAGE)
        url = f"{registry.url}/v2/team/app/tags/list?n=3"
        seen = []
        while url:
            async with client.get(url) as answer:
                seen.append((await answer.json())["tags"])
                url = str(answer.links["next"]["url"]) if "next" in answer.links else ""
        assert seen == [["v1", "v2", "v3"], ["v4"]]

    async def test_referrers_are_filtered_and_paged(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(page_size=1) as registry:
            registry.push(IMAGE)
            for kind in ("a/signature", "a/sbom", "a/signature2"):
                registry.put_manifest("team/app", _referrer(kind), "application/json")
            url = f"{registry.url}/v2/team/app/referrers/{IMAGE.digest}"
            async with client.get(url) as answer:
                assert len((await answer.json(content_type=None))["manifests"]) == 1
                assert "next" in answer.links
            async with client.get(url, params={"artifactType": "a/sbom"}) as answer:
                (entry,) = (await answer.json(content_type=None))["manifests"]
                assert entry["artifactType"] == "a/sbom"
                assert answer.headers["OCI-Filters-Applied"] == "artifactType"
                assert "Link" not in answer.headers


def _referrer(artifact_type: str) -> bytes:
    subject = {"mediaType": IMAGE.media_type, "digest": str(IMAGE.digest)}
    return json.dumps({"artifactType": artifact_type, "subject": subject}).encode()


class TestRanges:
    @pytest.mark.parametrize(
        ("header", "start", "stop"),
        [
            ("bytes=0-0", 0, 1),
            ("bytes=10-", 10, LAYER.size),
            ("bytes=-7", LAYER.size - 7, LAYER.size),
            ("bytes=5-99999999", 5, LAYER.size),
            ("bytes=-99999999", 0, LAYER.size),
        ],
    )
    async def test_one_range_is_a_206(
        self,
        registry: FakeRegistry,
        client: aiohttp.ClientSession,
        header: str,
        start: int,
        stop: int,
    ) -> None:
        async with client.get(blob_url(registry), headers={"Range": header}) as answer:
            assert answer.status == 206
            assert await answer.read() == LAYER.data[start:stop]
            assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{LAYER.size}"
        assert registry.counters.bytes_sent == stop - start

    @pytest.mark.parametrize("header", [f"bytes={LAYER.size}-", "bytes=-0"])
    async def test_a_range_beyond_the_end_is_a_416(
        self, registry: FakeRegistry, client: aiohttp.ClientSession, header: str
    ) -> None:
        async with client.get(blob_url(registry), headers={"Range": header}) as answer:
            assert answer.status == 416
            assert answer.headers["Content-Range"] == f"bytes */{LAYER.size}"

    @pytest.mark.parametrize("header", ["bytes=0-1,3-4", "lines=1-2", "bytes=4-2", "bytes=-"])
    async def test_what_is_not_one_range_is_the_whole(
        self, registry: FakeRegistry, client: aiohttp.ClientSession, header: str
    ) -> None:
        async with client.get(blob_url(registry), headers={"Range": header}) as answer:
            assert answer.status == 200
            assert await answer.read() == LAYER.data

    async def test_if_range_of_other_bytes_gives_the_whole(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        headers = {"Range": "bytes=1-2", "If-Range": '"other"'}
        async with client.get(blob_url(registry), headers=headers) as answer:
            assert answer.status == 200

    async def test_a_registry_without_ranges_ignores_them(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with FakeRegistry(ranges=False) as registry:
            registry.push(IMAGE)
            async with client.get(blob_url(registry), headers={"Range": "bytes=1-2"}) as answer:
                assert answer.status == 200
                assert "Accept-Ranges" not in answer.headers


class TestPace:
    async def test_a_rate_is_kept_for_each_connection(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(rate=7_000_000) as registry:
            registry.push(IMAGE)
            loop = asyncio.get_running_loop()
            start = loop.time()
            async with client.get(blob_url(registry)) as first:
                assert await first.read() == LAYER.data
            # 0.1 s of bytes, less the burst that is allowed and the last piece, which needs no wait
            assert loop.time() - start > 0.05

    async def test_latency_comes_before_the_headers(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(latency=0.02) as registry:
            loop = asyncio.get_running_loop()
            start = loop.time()
            async with client.get(f"{registry.url}/v2/") as answer:
                assert answer.status == 200
            assert loop.time() - start >= 0.02
