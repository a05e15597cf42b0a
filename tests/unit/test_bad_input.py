"""Bad input and faults: each gets a clear OCI error and one log line, and nothing of it is kept."""

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from proxy.app import Proxy
from proxy.store.lock import CacheDirUnusable
from proxy.testing import Answer as Scripted
from proxy.testing import (
    Corrupt,
    Cut,
    Disconnect,
    FakeRegistry,
    Fault,
    Hang,
    IgnoreRange,
    Oversize,
    Reset,
    ShortLength,
    WrongContentRange,
)
from proxy.testing.faults import Action
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    Answer,
    Pullpool,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    pulling,
    running,
    settings_for,
)
from tests.unit.upstream_kit import refusing

HEX = "a" * 64


async def told_once(pool: Pullpool, answer: Answer, status: int, code: str) -> None:
    """The client got this error, the log one line, the cache nothing."""
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["Content-Type"] == "application/json"
    assert "WWW-Authenticate" not in answer.headers
    assert len(pool.access_log) == 1
    assert pool.access_log[0]["status"] == status
    assert await pool.stored() == set()


class TestClients:
    @pytest.mark.parametrize(
        ("path", "status", "code"),
        [
            ("/v2/Team/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/a..b/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/-a/manifests/v1", 400, "NAME_INVALID"),
            ("/v2//manifests/v1", 400, "NAME_INVALID"),
            ("/v2/a//b/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/../manifests/v1", 400, "NAME_INVALID"),
            ("/v2/a/../b/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/%2e%2e/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/a/%2e%2e/%2e%2e/etc/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/a%252e/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/a%00/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/a%0d%0aX-Evil:1/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/" + "a" * 256 + "/manifests/v1", 400, "NAME_INVALID"),
            ("/v2/team/app/manifests/.v1", 404, "MANIFEST_UNKNOWN"),
            ("/v2/team/app/manifests/" + "v" * 129, 404, "MANIFEST_UNKNOWN"),
            ("/v2/team/app/manifests/sha256:abc", 400, "DIGEST_INVALID"),
            ("/v2/team/app/blobs/sha256:abc", 400, "DIGEST_INVALID"),
            (f"/v2/team/app/blobs/sha256:{HEX.upper()}", 400, "DIGEST_INVALID"),
            (f"/v2/team/app/blobs/md5:{HEX}", 400, "DIGEST_INVALID"),
            (f"/v2/team/app/blobs/sha512:{HEX}", 400, "DIGEST_INVALID"),
            (f"/v2/team/app/blobs/sha256:{HEX}%00", 400, "DIGEST_INVALID"),
            ("/v2/team/app/blobs/../../../etc/passwd", 404, "UNSUPPORTED"),
            ("/v2/team/app/blobs/..%2f..%2fetc%2fpasswd", 404, "UNSUPPORTED"),
            ("/v2/team/app/referrers/v1", 400, "DIGEST_INVALID"),
            ("/v2/team/app/blobs/uploads/", 404, "UNSUPPORTED"),
            ("/v2/_catalog", 404, "UNSUPPORTED"),
            ("/", 404, "UNSUPPORTED"),
            ("/v1/", 404, "UNSUPPORTED"),
            ("/v2/?" + "&".join(f"q{n}=1" for n in range(40)), 400, "UNSUPPORTED"),
        ],
    )
    async def test_malformed_paths(self, served: Served, path: str, status: int, code: str) -> None:
        pool, fake = served
        async with RawClient.connected(pool.address) as client:
            await client.ask(path, headers="Connection: close\n")
            assert await client.ending() == "FIN"
        head, _, body = client.received.partition(b"\r\n\r\n")
        assert b"X-Evil" not in head
        [error] = json.loads(body)["errors"]
        assert (int(head.split()[1]), error["code"]) == (status, code)
        assert [line["status"] for line in pool.access_log] == [status]
        assert not fake.counters.seen
        assert await pool.stored() == set()

    @pytest.mark.parametrize(
        "text",
        [
            "GARBAGE\n\n",
            "GET /v2/ HTTP/9.9\n\n",
            "GET /v2/ HTTP/1.1\nno colon\n\n",
            "GET /v2/ HTTP/1.1\nHost: a\nContent-Length: x\n\n",
            "GET /v2/ HTTP/1.1\nHost: a\nContent-Length: 1\nContent-Length: 2\n\n",
            "GET /v2/ HTTP/1.1\nHost: a\nContent-Length: 1\nTransfer-Encoding: chunked\n\n",
            "GET /v2/ HTTP/1.1\nHost: a\nX: " + "x" * 20_000 + "\n\n",
            "GET /v2/" + "x" * 20_000 + " HTTP/1.1\nHost: a\n\n",
            "GET /v2/ HTTP/1.1\n" + "".join(f"X{n}: 1\n" for n in range(200)) + "\n",
            "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ],
        ids=lambda text: repr(text[:30]),
    )
    async def test_what_is_not_http_gets_oci_json_and_one_line(
        self, served: Served, text: str
    ) -> None:
        pool, _ = served
        async with RawClient.connected(pool.address) as client:
            await client.send(text)
            assert await client.ending() in ("FIN", "RST")
        head, _, body = client.received.partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        [error] = json.loads(body)["errors"]
        assert error["code"] == "UNSUPPORTED"
        [line] = pool.access_log
        assert (line["status"], line["reason"]) == (400, "request_invalid")
        assert (await pool.get("/v2/")).status == 200

    async def test_a_connect_is_refused(self, served: Served) -> None:
        async with RawClient.connected(served[0].address) as client:
            await client.ask("169.254.169.254:80", method="CONNECT")
            assert "405" in await client.head()

    async def test_an_upgrade_is_not_made(self, served: Served) -> None:
        upgrade = "Connection: Upgrade\nUpgrade: websocket\n"
        async with RawClient.connected(served[0].address) as client:
            await client.ask("/v2/", headers=upgrade)
            assert "200" in await client.head()

    async def test_a_flood_of_pipelined_requests_is_answered_in_pieces(
        self, served: Served
    ) -> None:
        pool, _ = served
        async with RawClient.connected(pool.address) as client:
            flood = asyncio.create_task(
                client.send("GET /v2/ HTTP/1.1\nHost: a\n\n" * 999 + "GET /v2/ HTTP/1.0\n\n")
            )
            assert await client.ending() == "FIN"
            await flood
        assert client.received.count(b" 200 OK") == 1000


BLOB_FAULTS: list[tuple[Action, int, str]] = [
    (Scripted(404), 404, "BLOB_UNKNOWN"),
    (Scripted(403), 403, "DENIED"),
    # Nobody who means a 401 leaves out how to authenticate: too busy, asked again until it is late.
    (Scripted(401), 503, "TOOMANYREQUESTS"),
    (Scripted(429), 503, "TOOMANYREQUESTS"),
    (Scripted(500), 502, "UNAVAILABLE"),
    (Scripted(503), 502, "UNAVAILABLE"),
    (Scripted(418), 502, "UNAVAILABLE"),
    (Scripted(302, {"Location": "ftp://cdn.example.com/blob"}), 502, "UNAVAILABLE"),
    (Scripted(302), 502, "UNAVAILABLE"),
    (Scripted(200, {"Content-Encoding": "gzip"}, b"x"), 502, "UNAVAILABLE"),
    (Disconnect(), 502, "UNAVAILABLE"),
    (Disconnect(reset=True), 502, "UNAVAILABLE"),
]
MANIFEST_FAULTS: list[tuple[Action, int, str]] = [
    *[(fault, status, code.replace("BLOB", "MANIFEST")) for fault, status, code in BLOB_FAULTS],
    (Cut(after=10), 502, "UNAVAILABLE"),
    (Reset(after=10), 502, "UNAVAILABLE"),
    (ShortLength(), 502, "DIGEST_INVALID"),
    (Corrupt(), 502, "DIGEST_INVALID"),
    (Oversize((8 << 20) + 1), 502, "SIZE_INVALID"),
]


class TestUpstream:
    @pytest.mark.parametrize(("fault", "status", "code"), BLOB_FAULTS, ids=repr)
    async def test_faults_of_a_blob(
        self, served: Served, fault: Action, status: int, code: str
    ) -> None:
        pool, fake = served
        fake.script(Fault(fault, times=None))
        await told_once(pool, await pool.get(blob_path()), status, code)

    @pytest.mark.parametrize(("fault", "status", "code"), MANIFEST_FAULTS, ids=repr)
    async def test_faults_of_a_manifest(
        self, served: Served, fault: Action, status: int, code: str
    ) -> None:
        pool, fake = served
        fake.script(Fault(fault, times=None))
        await told_once(pool, await pool.get(manifest_path("v1")), status, code)

    @pytest.mark.parametrize(
        ("fault", "status", "code"),
        [row for row in BLOB_FAULTS if getattr(row[0], "status", 0) != 404],
        ids=repr,
    )
    async def test_faults_of_a_listing(
        self, served: Served, fault: Action, status: int, code: str
    ) -> None:
        pool, fake = served
        fake.script(Fault(fault, times=None))
        await told_once(pool, await pool.get(f"/v2/{NAME}/tags/list"), status, code)

    @pytest.mark.parametrize("path", [manifest_path("v1"), blob_path()])
    async def test_a_head_has_the_status_and_no_body(self, served: Served, path: str) -> None:
        pool, fake = served
        fake.script(Fault(Scripted(500), times=None))
        answer = await pool.head(path)
        assert (answer.status, answer.body) == (502, b"")
        assert len(pool.access_log) == 1

    async def test_an_unknown_repository(self, served: Served) -> None:
        answer = await served[0].get("/v2/no/such/tags/list")
        await told_once(served[0], answer, 404, "NAME_UNKNOWN")

    @pytest.mark.parametrize(
        "fault",
        [ShortLength(by=10), Cut(after=LAYER.size // 2), Corrupt(at=-1)],
        ids=repr,
    )
    async def test_a_body_that_is_never_right_is_never_a_whole_answer(
        self, served: Served, fault: Action
    ) -> None:
        pool, fake = served
        fake.script(Fault(fault, kind="blob", times=None))
        if isinstance(fault, Cut):
            # Each turn ends early, but the next one goes on: in the end it is whole.
            assert (await pool.get(blob_path())).body == LAYER.data
            return
        try:
            answer = await pool.get(blob_path())
        except aiohttp.ClientError:
            pass
        else:
            assert answer.status == 502
        assert len(pool.access_log) == 1
        assert await pool.stored() == set()

    async def test_who_lies_about_ranges_is_asked_for_the_whole(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(WrongContentRange(), kind="blob", times=None))
        assert (await pool.get(blob_path())).body == LAYER.data
        ranges = [seen.headers.get("Range") for seen in fake.counters.seen if seen.kind == "blob"]
        assert ranges[0] is not None
        assert ranges[-1] is None

    async def test_a_body_that_resets_goes_on(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Reset(after=1000), kind="blob", times=2))
        assert (await pool.get(blob_path())).body == LAYER.data

    async def test_an_upstream_that_ignores_range_is_served(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(IgnoreRange(), times=None))
        answer = await pool.get(blob_path(), Range="bytes=5-9")
        assert (answer.status, answer.body) == (206, LAYER.data[5:10])
        assert (await pool.get(blob_path())).body == LAYER.data

    async def test_a_time_out(self, tmp_path: Path) -> None:
        hasty = {UPSTREAM: {"read_timeout": "0.05s"}}
        async with pulling(tmp_path, upstreams=hasty) as (pool, fake):
            fake.script(Fault(Hang(), times=None))
            await told_once(pool, await pool.get(manifest_path("v1")), 504, "UNAVAILABLE")

    async def test_a_time_out_of_a_blob(self, tmp_path: Path) -> None:
        hasty = {UPSTREAM: {"read_timeout": "0.05s"}}
        async with pulling(tmp_path, upstreams=hasty) as (pool, fake):
            fake.script(Fault(Hang(), times=None))
            await told_once(pool, await pool.get(blob_path()), 504, "UNAVAILABLE")

    async def test_nobody_listens(self, tmp_path: Path) -> None:
        with refusing() as url:
            async with running(tmp_path, url) as pool:
                answer = await pool.get(manifest_path("v1"))
                await told_once(pool, answer, 502, "UNAVAILABLE")
                assert "cannot connect" in pool.access_log[0]["error"]

    async def test_a_host_without_an_address(self, tmp_path: Path) -> None:
        async with running(tmp_path, "http://no-such-host.invalid") as pool:
            await told_once(pool, await pool.get(manifest_path("v1")), 502, "UNAVAILABLE")


class TestTls:
    @staticmethod
    def served_by(authority: trustme.CA, name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(context)
        return context

    async def pull(
        self, directory: Path, trusted: trustme.CA, server: ssl.SSLContext
    ) -> tuple[Answer, list[dict[str, Any]]]:
        ca_file = directory / "ca.pem"
        await asyncio.to_thread(trusted.cert_pem.write_to_path, str(ca_file))
        async with FakeRegistry(ssl_context=server, name="localhost") as fake:
            fake.push(IMAGE)
            upstream = {UPSTREAM: {"url": fake.url, "ca_file": str(ca_file)}}
            async with running(directory / "cache", "", upstreams=upstream) as pool:
                answer = await pool.get(manifest_path("v1"))
                if answer.status == 200:
                    assert (await pool.get(blob_path())).body == LAYER.data
                return answer, pool.access_log

    async def test_a_trusted_authority_is_believed(self, tmp_path: Path) -> None:
        ours = trustme.CA()
        answer, _ = await self.pull(tmp_path, ours, self.served_by(ours, "localhost"))
        assert answer.body == IMAGE.manifest

    @pytest.mark.parametrize("name", ["localhost", "elsewhere.example.com"])
    async def test_a_wrong_authority_or_a_wrong_name_is_not(
        self, tmp_path: Path, name: str
    ) -> None:
        ours, theirs = trustme.CA(), trustme.CA()
        signer = theirs if name == "localhost" else ours
        answer, log = await self.pull(tmp_path, ours, self.served_by(signer, name))
        assert (answer.status, answer.code) == (502, "UNAVAILABLE")
        [line] = log
        assert "TLS failed" in line["error"]


class TestTokens:
    async def test_a_realm_on_a_foreign_host_gets_no_credentials(self, tmp_path: Path) -> None:
        robot = {"username": "robot", "password": "s3cret", "access": "shared"}
        async with FakeRegistry(name="127.0.0.1") as fake, FakeRegistry(name="localhost") as thief:
            fake.push(IMAGE)
            realm = f'Bearer realm="{thief.url}/service/token",service="{fake.netloc}"'
            fake.script(Fault(Scripted(401, {"WWW-Authenticate": realm}), times=None))
            async with running(tmp_path, fake.url, upstreams={UPSTREAM: robot}) as pool:
                answer = await pool.get(manifest_path("v1"))
                await told_once(pool, answer, 502, "UNAUTHORIZED")
                assert "auth_realms" in pool.access_log[0]["error"]
            assert not thief.counters.seen

    async def test_wrong_credentials(self, tmp_path: Path) -> None:
        robot = {"username": "robot", "password": "wrong", "access": "shared"}
        async with FakeRegistry(auth="bearer", users={"robot": "right"}) as fake:
            fake.push(IMAGE)
            async with running(tmp_path, fake.url, upstreams={UPSTREAM: robot}) as pool:
                await told_once(pool, await pool.get(manifest_path("v1")), 403, "DENIED")

    async def test_credentials_that_are_not_there(self, tmp_path: Path) -> None:
        missing = {
            "username": "robot",
            "password_file": str(tmp_path / "none"),
            "access": "shared",
        }
        async with FakeRegistry(auth="basic", users={"robot": "right"}) as fake:
            fake.push(IMAGE)
            async with running(tmp_path / "c", fake.url, upstreams={UPSTREAM: missing}) as pool:
                answer = await pool.get(manifest_path("v1"))
                await told_once(pool, answer, 500, "UNKNOWN")
                # The client learns nothing of our files, the log where to look.
                assert str(tmp_path).encode() not in answer.body
                assert str(tmp_path / "none") in pool.access_log[0]["error"]

    async def test_a_token_service_that_fails(self, tmp_path: Path) -> None:
        async with FakeRegistry(auth="bearer") as fake:
            fake.push(IMAGE)
            fake.script(Fault(Scripted(500), kind="token", times=None))
            async with running(tmp_path, fake.url) as pool:
                await told_once(pool, await pool.get(manifest_path("v1")), 502, "UNAVAILABLE")


class TestDisk:
    async def test_a_full_disk_costs_only_the_copy(self, tmp_path: Path) -> None:
        """No file system has an exbibyte to spare."""
        async with pulling(tmp_path, cache={"min_free": 1 << 60}) as (pool, _):
            for _ in range(2):
                assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
                assert (await pool.get(blob_path())).body == LAYER.data
            assert {line["status"] for line in pool.access_log} == {200}
            assert await pool.stored() == set()

    async def test_a_cache_that_is_too_small_serves_through(self, tmp_path: Path) -> None:
        async with pulling(tmp_path, cache={"max_size": 1000}) as (pool, _):
            answer = await pool.get(blob_path())
            assert (answer.status, answer.body) == (200, LAYER.data)
            part = await pool.get(blob_path(), Range="bytes=-5")
            assert (part.status, part.body) == (206, LAYER.data[-5:])
            assert await pool.stored() == set()

    async def test_a_cache_directory_that_cannot_be_written_stops_the_start(
        self, tmp_path: Path
    ) -> None:
        """Even for root: below a file there is no directory."""
        file = tmp_path / "file"
        await asyncio.to_thread(file.write_text, "not a directory")
        with pytest.raises(CacheDirUnusable, match="Not a directory"):
            async with Proxy(settings_for(file / "cache", "http://127.0.0.1:1")):
                pass
