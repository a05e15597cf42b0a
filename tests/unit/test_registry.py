"""The registry listener over HTTP: endpoints, headers, routing, listings, and what is refused."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web

from proxy.testing import Answer as Scripted
from proxy.testing import FakeRegistry, Fault, make_image, make_index
from proxy.web.registry import KEPT, MAX_KEPT, Parsed, Registry, origin_form, parse_request
from tests.unit.hot_kit import make_side
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    SHA512,
    UPSTREAM,
    Pullpool,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    pulling,
    running,
    until,
    waiting,
)


class TestPing:
    @pytest.mark.parametrize("path", ["/v2/", "/v2"])
    async def test_the_api_is_announced(self, served: Served, path: str) -> None:
        pool, fake = served
        answer = await pool.get(path)
        assert (answer.status, json.loads(answer.body)) == (200, {})
        assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
        assert not fake.counters.seen

    async def test_a_head_has_no_body(self, served: Served) -> None:
        answer = await served[0].head("/v2/")
        assert (answer.status, answer.body) == (200, b"")

    async def test_an_absolute_request_target_is_taken(self, served: Served) -> None:
        async with RawClient.connected(served[0].address) as client:
            await client.ask("http://proxy.example.com/v2/")
            assert "200 OK" in await client.head()

    @pytest.mark.parametrize(
        ("target", "path"),
        [
            ("/v2/?a=b", "/v2/?a=b"),
            ("http://h:1/v2/", "/v2/"),
            ("HTTPS://h/v2/?ns=x", "/v2/?ns=x"),
            ("http://h", "/"),
            ("/v2/http://h/", "/v2/http://h/"),
            ("*", "*"),
        ],
    )
    def test_request_targets(self, target: str, path: str) -> None:
        assert origin_form(target) == path

    async def test_targets_are_kept_as_they_were_parsed_but_not_without_end(
        self, tmp_path: Path
    ) -> None:
        async with pulling(tmp_path) as (pool, _):
            side = make_side(pool, hot=False, clock=time.monotonic)
            registry = side.server.request_handler
            assert isinstance(registry, Registry)

            def request(target: str) -> web.BaseRequest:
                return cast(web.BaseRequest, SimpleNamespace(raw_path=target))

            def parsed(target: str) -> Parsed:
                return registry._parse(request(target))

            first = parsed(blob_path())
            assert first == parse_request(request(blob_path()))
            assert parsed(blob_path()) is first
            for number in range(3 * KEPT):
                _ = parsed(f"/v2/team/app-{number}/tags/list")
                assert len(registry._parsed) <= KEPT
            long = "/v2/team/app/tags/list?n=" + "1" * MAX_KEPT
            assert parsed(long) is not parsed(long)
            await side.server.shutdown(1)


class TestContent:
    @pytest.mark.parametrize("image", [IMAGE, SHA512], ids=["sha256", "sha512"])
    @pytest.mark.parametrize("by", ["tag", "digest"])
    async def test_a_manifest_comes_byte_for_byte(
        self, served: Served, image: Any, by: str
    ) -> None:
        path = manifest_path(image.tag if by == "tag" else image.digest, image.name)
        for expected in ("miss", "hit"):
            answer = await served[0].get(path)
            assert (answer.status, answer.body, answer.word) == (200, image.manifest, expected)
            assert answer.headers["Content-Type"] == image.media_type
            # By tag an upstream may name a sha512 manifest by either algorithm.
            assert answer.headers["Docker-Content-Digest"] == str(image.digest)
            assert answer.headers["ETag"] == f'"{image.digest}"'
            assert answer.headers["Content-Length"] == str(len(image.manifest))

    @pytest.mark.parametrize("image", [IMAGE, SHA512], ids=["sha256", "sha512"])
    async def test_a_blob_comes_byte_for_byte(self, served: Served, image: Any) -> None:
        pool, fake = served
        layer = image.layers[0]
        path = blob_path(layer.digest, image.name)
        for expected in ("miss", "hit"):
            answer = await pool.get(path)
            assert (answer.status, answer.body, answer.word) == (200, layer.data, expected)
            assert answer.headers["Content-Type"] == "application/octet-stream"
            assert answer.headers["Docker-Content-Digest"] == str(layer.digest)
            assert answer.headers["ETag"] == f'"{layer.digest}"'
            assert answer.headers["Accept-Ranges"] == "bytes"
            assert answer.headers["Content-Length"] == str(layer.size)
            await pool.stored()
        assert fake.counters.gets[layer.digest] == 1

    @pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
    @pytest.mark.parametrize(
        ("path", "length"),
        [
            (manifest_path("v1"), len(IMAGE.manifest)),
            (manifest_path(IMAGE.digest), len(IMAGE.manifest)),
            (blob_path(), LAYER.size),
        ],
    )
    async def test_a_head_says_what_a_get_says(
        self, served: Served, path: str, length: int, warm: bool
    ) -> None:
        pool, _ = served
        if warm:
            await pool.get(path)
            await pool.stored()
        answer = await pool.head(path)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["Content-Length"] == str(length)
        full = await pool.get(path)
        for name in ("Docker-Content-Digest", "Content-Type", "ETag", "Content-Length"):
            assert answer.headers[name] == full.headers[name]

    async def test_a_head_of_an_unknown_tag_costs_no_get(self, served: Served) -> None:
        pool, fake = served
        assert (await pool.head(manifest_path("v1"))).word == "miss"
        assert (fake.counters.heads, fake.counters.manifests) == (1, 0)

    @pytest.mark.parametrize("path", [manifest_path("v1"), blob_path()])
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("form", ['"{}"', 'W/"{}"', '"other", "{}"', "{}", "*"])
    async def test_what_the_client_has_is_not_sent_again(
        self, served: Served, path: str, method: str, form: str
    ) -> None:
        pool, _ = served
        digest = (await pool.head(path)).headers["Docker-Content-Digest"]
        answer = await pool.ask(method, path, If_None_Match=form.format(digest))
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["ETag"] == f'"{digest}"'
        assert "Transfer-Encoding" not in answer.headers
        again = await pool.ask(method, path, If_None_Match='"sha256:other"')
        assert again.status == 200

    async def test_an_empty_blob_is_served(self, served: Served) -> None:
        pool, fake = served
        digest = fake.put_blob(NAME, b"")
        for _ in range(2):
            answer = await pool.get(blob_path(digest))
            assert (answer.status, answer.body) == (200, b"")
            assert answer.headers["Content-Length"] == "0"
            await pool.stored()

    async def test_the_media_type_has_no_parameters(self, served: Served) -> None:
        pool, fake = served
        kind = f"{IMAGE.media_type}; charset=utf-8"
        fake.put_manifest(NAME, IMAGE.manifest, kind, tag="parameters")
        answer = await pool.get(manifest_path("parameters"))
        assert answer.headers["Content-Type"] == IMAGE.media_type

    async def test_an_index_and_its_images_are_served(self, served: Served) -> None:
        pool, fake = served
        arm = make_image("team/multi", "arm", layers=[9], seed=3, architecture="arm64")
        amd = make_image("team/multi", "amd", layers=[9], seed=4)
        index = make_index("team/multi", "v1", [amd, arm])
        fake.push(index)
        answer = await pool.get(manifest_path("v1", index.name))
        assert (answer.body, answer.headers["Content-Type"]) == (index.manifest, index.media_type)
        for image in index.images:
            child = await pool.get(manifest_path(image.digest, index.name))
            assert child.body == image.manifest


class TestAccept:
    @pytest.mark.parametrize(
        "accept",
        [
            IMAGE.media_type,
            "application/vnd.docker.distribution.manifest.v2+json, */*",
            "application/*;q=0.5",
            f"text/html, {IMAGE.media_type};q=0.1",
        ],
    )
    async def test_a_type_that_is_accepted_is_served(self, served: Served, accept: str) -> None:
        assert (await served[0].get(manifest_path("v1"), Accept=accept)).status == 200

    async def test_several_accept_headers_count_together(self, served: Served) -> None:
        async with RawClient.connected(served[0].address) as client:
            lines = f"Accept: text/html\nAccept: {IMAGE.media_type}\n"
            await client.ask(manifest_path("v1"), headers=lines)
            assert "200 OK" in await client.head()

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    async def test_a_type_that_is_not_accepted_is_not_served(
        self, served: Served, method: str
    ) -> None:
        answer = await served[0].ask(method, manifest_path("v1"), Accept="text/html")
        assert answer.status == 404
        if method == "GET":
            assert answer.code == "MANIFEST_UNKNOWN"

    async def test_what_a_client_accepts_does_not_change_what_is_asked_upstream(
        self, served: Served
    ) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"), Accept="text/html")
        [seen] = fake.counters.seen
        assert IMAGE.media_type in seen.headers["Accept"]
        assert seen.headers["Accept-Encoding"] == "identity"


class TestWrites:
    @pytest.mark.parametrize("method", ["PUT", "POST", "PATCH", "DELETE", "OPTIONS", "PURGE"])
    @pytest.mark.parametrize("path", [manifest_path("v1"), f"/v2/{NAME}/blobs/uploads/", "/v2/"])
    async def test_writes_are_refused(self, served: Served, method: str, path: str) -> None:
        pool, fake = served
        answer = await pool.ask(method, path)
        assert (answer.status, answer.code) == (405, "UNSUPPORTED")
        assert answer.headers["Allow"] == "GET, HEAD"
        assert not fake.counters.seen

    async def test_the_body_of_a_write_is_never_the_next_request(self, served: Served) -> None:
        inner = f"GET {manifest_path('v1')} HTTP/1.1\r\nHost: x\r\n\r\n"
        async with RawClient.connected(served[0].address) as client:
            length = f"Content-Length: {len(inner)}\n"
            await client.ask(manifest_path("v1"), method="PUT", headers=length)
            await client.send(inner.replace("\r\n", "\n"))
            assert await client.ending() == "FIN"
        assert client.received.count(b"HTTP/1.1 ") == 1
        assert b"Connection: close" in client.received
        assert len(served[0].access_log) == 1

    async def test_the_body_of_a_get_is_never_the_next_request(self, served: Served) -> None:
        inner = "GET /v2/smuggled/manifests/v1 HTTP/1.1\r\nHost: x\r\n\r\n"
        async with RawClient.connected(served[0].address) as client:
            length = f"Content-Length: {len(inner)}\n"
            await client.ask("/v2/", headers=length)
            await client.send(inner.replace("\r\n", "\n"))
            await client.ask("/v2/", headers="Connection: close\n")
            assert await client.ending() == "FIN"
        assert client.received.count(b"HTTP/1.1 200") == 2
        assert [line["path"] for line in served[0].access_log] == ["/v2/", "/v2/"]


class TestHeaders:
    async def test_every_answer_carries_the_contract(self, served: Served) -> None:
        pool, _ = served
        ids = set()
        paths = ["/v2/", manifest_path("v1"), blob_path(), "/v2/%", manifest_path("no-such-tag")]
        for path in paths:
            answer = await pool.get(path)
            assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
            ids.add(answer.headers["X-Request-Id"])
            assert "WWW-Authenticate" not in answer.headers
        assert len(ids) == len(paths)
        assert ids == {line["request_id"] for line in pool.access_log}

    async def test_the_server_says_how_long_what_took(self, served: Served) -> None:
        answer = await served[0].get(manifest_path("v1"))
        parts = [part.strip().split(";dur=") for part in answer.headers["Server-Timing"].split(",")]
        assert [name for name, _ in parts] == ["queue", "upstream"]
        assert all(float(value) >= 0 for _, value in parts)

    async def test_time_in_the_queue_is_told_apart_from_the_upstreams(self, tmp_path: Path) -> None:
        capped = {UPSTREAM: {"max_connections": 1}}
        async with pulling(tmp_path, upstreams=capped) as (pool, fake):
            other = make_image("team/other", "v1", layers=[], seed=2)
            fake.push(other)
            with fake.hold(repository="team/other") as hold:
                first = asyncio.create_task(pool.get(manifest_path("v1", "team/other")))
                await hold.arrived()
                second = asyncio.create_task(pool.get(manifest_path("v1")))
                await until(lambda: waiting(pool) == 1)
                await asyncio.sleep(0.002)  # what is measured
            await first
            timing = (await second).headers["Server-Timing"]
            assert float(timing.split("queue;dur=")[1].split(",")[0]) > 0

    async def test_the_upstreams_challenge_is_never_relayed(self, served: Served) -> None:
        pool, fake = served
        challenge = {"WWW-Authenticate": 'Bearer realm="https://auth.example.com/token"'}
        for status in (401, 403, 404, 500):
            fake.script(Fault(Scripted(status, challenge), times=None))
            for path in (manifest_path(f"t{status}"), f"/v2/{NAME}/tags/list"):
                answer = await pool.get(path)
                assert answer.status >= 400
                assert "WWW-Authenticate" not in answer.headers
            fake.clear_script()


class TestListings:
    async def test_tags_are_passed_through(self, served: Served) -> None:
        pool, _ = served
        answer = await pool.get(f"/v2/{NAME}/tags/list")
        assert (answer.status, answer.word) == (200, "miss")
        assert json.loads(answer.body) == {"name": NAME, "tags": ["v1"]}

    async def test_pages_are_followed_on_our_own_paths(self, tmp_path: Path) -> None:
        async with FakeRegistry(page_size=2) as fake:
            for number in range(5):
                fake.retag(NAME, f"v{number}", IMAGE)
            async with running(tmp_path, fake.url) as pool:
                path: str | None = f"/v2/{UPSTREAM}/{NAME}/tags/list?ns="
                found: list[str] = []
                while path is not None:
                    answer = await pool.get(path)
                    found += json.loads(answer.body)["tags"]
                    link = answer.headers.get("Link")
                    path = link and link.partition(">")[0].removeprefix("<")
                    if link is not None:
                        assert link.startswith(f"</v2/{UPSTREAM}/{NAME}/tags/list?")
                        assert link.endswith('>; rel="next"')
                assert found == [f"v{number}" for number in range(5)]

    async def test_the_namespace_stays_in_the_link(self, tmp_path: Path) -> None:
        async with FakeRegistry(page_size=1) as fake:
            for tag in ("a", "b"):
                fake.retag(NAME, tag, IMAGE)
            async with running(tmp_path, fake.url) as pool:
                answer = await pool.get(f"/v2/{NAME}/tags/list?n=1&ns={UPSTREAM}")
                target = urlsplit(answer.headers["Link"].partition(">")[0].removeprefix("<"))
                assert (target.scheme, target.netloc) == ("", "")
                assert parse_qs(target.query)["ns"] == [UPSTREAM]
                assert "ns" not in fake.counters.seen[-1].query
                assert answer.headers["OCI-Namespace"] == UPSTREAM

    async def test_referrers_are_passed_through(self, served: Served) -> None:
        pool, fake = served
        kind = "application/vnd.example.sbom"
        subject = {"mediaType": IMAGE.media_type, "digest": str(IMAGE.digest), "size": 1}
        sbom = {"schemaVersion": 2, "artifactType": kind, "subject": subject}
        digest = fake.put_manifest(NAME, json.dumps(sbom).encode(), IMAGE.media_type)
        path = f"/v2/{NAME}/referrers/{IMAGE.digest}"
        answer = await pool.get(f"{path}?artifactType={kind}")
        assert answer.headers["Content-Type"] == "application/vnd.oci.image.index.v1+json"
        assert answer.headers["OCI-Filters-Applied"] == "artifactType"
        [found] = json.loads(answer.body)["manifests"]
        assert found["digest"] == str(digest)

    async def test_an_upstream_without_referrers_says_so(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Scripted(404), kind="referrers"))
        answer = await pool.get(f"/v2/{NAME}/referrers/{IMAGE.digest}")
        assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")

    async def test_a_page_beyond_all_bounds_is_refused(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Scripted(200, body=bytes((8 << 20) + 1)), kind="tags", times=None))
        answer = await pool.get(f"/v2/{NAME}/tags/list")
        assert (answer.status, answer.code) == (502, "SIZE_INVALID")

    async def test_equal_questions_are_asked_once(self, served: Served) -> None:
        pool, fake = served
        path = f"/v2/{NAME}/tags/list"
        with fake.hold(kind="tags") as hold:
            asked = [asyncio.create_task(pool.get(path)) for _ in range(5)]
            await hold.arrived()
            await until(lambda: pool.proxy.puller.questions == 5)
        answers = await asyncio.gather(*asked)
        assert {answer.status for answer in answers} == {200}
        assert fake.counters.count("tags") == 1


class TestRouting:
    """Two upstreams that have different images under the same names."""

    @pytest.fixture
    async def pair(self, tmp_path: Path) -> AsyncIterator[tuple[Pullpool, dict[str, str]]]:
        hub_image = make_image("library/alpine", "3", layers=[], seed=7)
        team_image = make_image("mirror/alpine", "3", layers=[], seed=8)
        async with FakeRegistry() as hub, FakeRegistry() as team:
            hub.push(hub_image)
            hub.retag("alpine/git", "3", hub_image)
            team.push(team_image)
            upstreams = {
                UPSTREAM: {
                    "url": team.url,
                    "repository_prefix": "mirror/",
                    "aliases": ["reg:5000"],
                },
                "docker.io": {"url": hub.url},
            }
            async with running(
                tmp_path, team.url, upstreams=upstreams, default_upstream=UPSTREAM
            ) as pool:
                digests = {"hub": str(hub_image.digest), "team": str(team_image.digest)}
                yield pool, digests

    @pytest.mark.parametrize(
        ("path", "ns", "expected"),
        [
            ("alpine", None, "team"),
            ("alpine", UPSTREAM, "team"),
            ("alpine", "REG:5000", "team"),
            ("alpine", "", "team"),
            ("alpine", "docker.io", "hub"),
            ("alpine", "index.docker.io", "hub"),
            ("alpine", "registry-1.docker.io", "hub"),
            ("library/alpine", "docker.io", "hub"),
            ("alpine/git", "docker.io", "hub"),
            ("docker.io/alpine", None, "hub"),
            ("docker.io/library/alpine", None, "hub"),
            (f"{UPSTREAM}/alpine", None, "team"),
        ],
    )
    async def test_a_pull_finds_its_upstream(
        self, pair: Any, path: str, ns: str | None, expected: str
    ) -> None:
        pool, digests = pair
        query = "" if ns is None else f"?ns={ns}"
        answer = await pool.get(manifest_path("3", path) + query)
        assert answer.headers["Docker-Content-Digest"] == digests[expected]
        assert answer.headers.get("OCI-Namespace") == (ns or None)

    @pytest.mark.parametrize(
        "ns", ["quay.io", "169.254.169.254", "docker.io.", "docker.io@evil", "%00", "K%E2%84%AA"]
    )
    async def test_a_namespace_that_is_not_configured_is_unknown(self, pair: Any, ns: str) -> None:
        answer = await pair[0].get(manifest_path("3", "alpine") + f"?ns={ns}")
        assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")
        assert "OCI-Namespace" not in answer.headers

    async def test_without_a_default_an_unscoped_pull_is_unknown(self, tmp_path: Path) -> None:
        async with FakeRegistry() as one:
            two = {"a.example.com": {"url": one.url}, "b.example.com": {"url": one.url}}
            async with running(tmp_path, one.url, upstreams=two) as pool:
                answer = await pool.get(manifest_path("v1"))
                assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")
                assert not one.counters.seen


def test_digests_of_the_fixture_differ() -> None:
    assert hashlib.sha512(SHA512.layers[0].data).hexdigest() == SHA512.layers[0].digest.hex
