"""`refresh`: a tag is asked for now, whatever is known of it; and who may order that."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.cli.main import cli
from proxy.testing import Answer as Scripted
from proxy.testing import FakeClock, FakeRegistry, Fault, make_image
from proxy.web.orders import refusal
from proxy.web.refresh import MAX_IMAGES
from tests.unit.proxy_kit import (
    IMAGE,
    NAME,
    UPSTREAM,
    Pullpool,
    Served,
    blob_path,
    manifest_path,
    pulling,
    running,
)

NEWER = make_image(NAME, "v1", layers=[100], seed=77, tarred=False)
TAG = f"{NAME}:v1"
JSON = "application/json"


async def order(
    pool: Pullpool, body: Any, *, kind: str = JSON, **headers: str
) -> tuple[int, dict[str, Any]]:
    """POST to the admin listener: status and JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{pool.proxy.admin_url}/api/v1/refresh"
    headers = {"Content-Type": kind, **headers}
    async with pool.session.post(url, data=data, headers=headers) as response:
        text = await response.read()
        return response.status, json.loads(text) if response.content_type == JSON else {}


async def refresh(pool: Pullpool, *images: str) -> list[dict[str, Any]]:
    status, answer = await order(pool, {"images": images})
    assert status == 200
    return list(answer["images"])


async def refresh_one(pool: Pullpool, image: str = TAG) -> dict[str, Any]:
    [result] = await refresh(pool, image)
    return result


class TestTag:
    async def test_a_tag_that_moved_is_new_at_once(self, tmp_path: Path) -> None:
        async with pulling(tmp_path, clock=FakeClock()) as (pool, fake):
            await pool.get(manifest_path("v1"))
            fake.retag(NAME, "v1", NEWER)
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
            moved = {"image": TAG, "was": str(IMAGE.digest), "now": str(NEWER.digest)}
            assert await refresh_one(pool) == moved
            assert (await pool.get(manifest_path("v1"))).body == NEWER.manifest
            assert pool.events("tag_refreshed")[0]["tag"] == f"{NAME}:v1"

    async def test_one_that_has_not_moved_costs_a_conditional_head(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        result = await refresh_one(pool)
        assert result["was"] == result["now"] == str(IMAGE.digest)
        assert (fake.counters.seen[-1].method, fake.counters.seen[-1].status) == ("HEAD", 304)
        assert (await pool.get(manifest_path("v1"))).word == "hit"

    async def test_one_that_nobody_has_asked_for_is_learned(self, served: Served) -> None:
        pool, fake = served
        assert (await refresh_one(pool))["was"] is None
        assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
        assert [seen.method for seen in fake.counters.seen] == ["HEAD", "GET"]

    async def test_an_immutable_tag_can_be_asked_for_again(self, tmp_path: Path) -> None:
        async with pulling(tmp_path, tags={"immutable": ["v.*"]}) as (pool, fake):
            await pool.get(manifest_path("v1"))
            fake.retag(NAME, "v1", NEWER)
            await refresh_one(pool)
            assert (await pool.get(manifest_path("v1"))).body == NEWER.manifest

    async def test_an_upstream_that_does_not_say_the_digest_is_asked_for_the_bytes(
        self, served: Served
    ) -> None:
        pool, fake = served
        fake.script(Fault(Scripted(200), method="HEAD"))
        assert (await refresh_one(pool))["now"] == str(IMAGE.digest)

    @pytest.mark.parametrize("status", [403, 404])
    async def test_what_was_refused_may_be_asked_for_again(
        self, tmp_path: Path, status: int
    ) -> None:
        async with pulling(tmp_path, clock=FakeClock()) as (pool, fake):
            fake.script(Fault(Scripted(status), times=3))
            paths = [manifest_path("v1"), manifest_path(IMAGE.digest), blob_path()]
            for path in (*paths, *paths):
                assert (await pool.get(path)).status == status
            assert len(fake.counters.seen) == 3  # each was remembered
            await refresh_one(pool)
            for path in paths:
                assert (await pool.get(path)).status == 200

    async def test_what_another_repository_was_refused_stays_refused(self, tmp_path: Path) -> None:
        async with pulling(tmp_path, clock=FakeClock()) as (pool, fake):
            fake.script(Fault(Scripted(403)))
            other = manifest_path("v1", "team/other")
            assert (await pool.get(other)).status == 403
            await refresh_one(pool)
            fake.retag("team/other", "v1", IMAGE)
            assert (await pool.get(other)).status == 403

    async def test_a_check_under_way_is_not_taken_for_the_answer(self, tmp_path: Path) -> None:
        """It may have been answered before the tag moved; nor does it undo what came later."""
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path("v1"))
            clock.advance(31)
            with fake.hold(method="HEAD") as hold:
                early = asyncio.create_task(pool.get(manifest_path("v1")))
                await hold.arrived()
                clock.advance(1)
                fake.retag(NAME, "v1", NEWER)
                late = asyncio.create_task(refresh_one(pool))
                await hold.arrived(2)
                first, second = list(hold._waiting)  # the later question is answered first
                second.set_result(None)
                assert (await late)["now"] == str(NEWER.digest)
                fake.script(Fault(Scripted(304), method="HEAD"))  # from before the tag moved
                first.set_result(None)
                assert (await early).body == IMAGE.manifest
            assert (await pool.get(manifest_path("v1"))).body == NEWER.manifest
            assert fake.counters.heads == 2

    async def test_while_the_upstream_is_down_the_old_answer_is_not_lost(
        self, tmp_path: Path
    ) -> None:
        async with pulling(tmp_path, clock=FakeClock()) as (pool, fake):
            await pool.get(manifest_path("v1"))
            for blob in IMAGE.blobs:
                await pool.get(blob_path(blob.digest))
            await pool.stored()
            fake.script(Fault(Scripted(500), times=None))
            assert (await refresh_one(pool))["error"]["code"] == "UNAVAILABLE"
            # Within the ttl it would have been a hit: it is not believed without a question.
            assert (await pool.get(manifest_path("v1"))).word == "stale"

    async def test_a_tag_that_is_gone_is_forgotten(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        fake.remove(NAME, "v1")
        assert (await refresh_one(pool))["error"]["code"] == "MANIFEST_UNKNOWN"
        assert (await pool.get(manifest_path("v1"))).status == 404


class TestNames:
    @pytest.mark.parametrize("name", [TAG, f"{UPSTREAM}/{TAG}", f"{UPSTREAM.upper()}/{TAG}"])
    async def test_with_and_without_the_registry(self, served: Served, name: str) -> None:
        assert (await refresh_one(served[0], name))["now"] == str(IMAGE.digest)

    @pytest.mark.parametrize("name", ["alpine", "docker.io/alpine:latest", "library/alpine"])
    async def test_short_names_are_those_of_docker_hub(self, tmp_path: Path, name: str) -> None:
        alpine = make_image("library/alpine", "latest", layers=[10], seed=1)
        async with FakeRegistry() as fake:
            fake.push(alpine)
            hub = {"docker.io": {"url": fake.url, "library": True}}
            async with running(tmp_path, "http://127.0.0.1:1", upstreams=hub) as pool:
                assert (await refresh_one(pool, name))["now"] == str(alpine.digest)

    @pytest.mark.parametrize(
        ("name", "code"),
        [
            ("nowhere.example.com/team/app:v1", "NAME_UNKNOWN"),
            ("Team/app", "NAME_INVALID"),
            ("http://h/demo/app", "NAME_INVALID"),
            (f"{NAME}:-", "MANIFEST_UNKNOWN"),
            (f"{NAME}@{IMAGE.digest}", "UNSUPPORTED"),
            (f"{NAME}@sha256:0", "DIGEST_INVALID"),
        ],
    )
    async def test_what_cannot_be_refreshed_is_said_and_the_others_are(
        self, served: Served, name: str, code: str
    ) -> None:
        wrong, right = await refresh(served[0], name, TAG)
        assert (wrong["image"], wrong["error"]["code"]) == (name, code)
        assert right["now"] == str(IMAGE.digest)


class TestWhoMayOrderIt:
    async def test_only_posts_of_json(self, served: Served) -> None:
        pool, fake = served
        assert (await pool.admin("/api/v1/refresh")).status == 405
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert (await order(pool, {"images": [TAG]}, kind=kind))[0] == 415
        assert not fake.counters.seen

    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "attacker.example.com"},
            {"Host": "attacker.example.com:5051"},
            {"Origin": "http://attacker.example.com"},
            {"Origin": "null"},
        ],
    )
    async def test_no_page_of_somebody_elses(self, served: Served, headers: dict[str, str]) -> None:
        pool, fake = served
        assert (await order(pool, {"images": [TAG]}, **headers))[0] == 403
        assert not fake.counters.seen

    async def test_our_own_pages_may(self, served: Served) -> None:
        pool, _ = served
        assert (await order(pool, {"images": [TAG]}, Origin=pool.proxy.admin_url))[0] == 200

    @pytest.mark.parametrize(
        ("host", "origin", "own", "allowed"),
        [
            ("127.0.0.1:5051", None, "127.0.0.1", True),
            ("10.1.2.3:5051", None, "0.0.0.0", True),
            ("[::1]:5051", "http://[::1]:5051", "::1", True),
            ("[::1]", None, "[::1]", True),
            ("localhost:5051", "http://LOCALHOST:5051", "127.0.0.1", True),
            ("Admin.example.com", None, "admin.EXAMPLE.com", True),
            ("admin.example.com", None, "127.0.0.1", False),
            ("127.0.0.1:5051", "https://127.0.0.1:5051", "127.0.0.1", False),
            ("127.0.0.1:5051", "http://127.0.0.1", "127.0.0.1", False),
            ("localhost:5051", "http://127.0.0.1:5051", "127.0.0.1", False),
            ("127.0.0.1.example.com", None, "127.0.0.1", False),
            ("2130706433", None, "127.0.0.1", False),
            ("[::1", None, "127.0.0.1", False),
            ("", None, "127.0.0.1", False),
            (None, None, "127.0.0.1", False),
        ],
    )
    def test_hosts_that_nobody_else_can_own(
        self, host: str | None, origin: str | None, own: str, allowed: bool
    ) -> None:
        assert (refusal(host, origin, own) is None) is allowed

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"\xff",
            b"[" * 100_000,
            [],
            {},
            {"images": TAG},
            {"images": [1]},
            {"images": []},
            {"images": [TAG] * (MAX_IMAGES + 1)},
        ],
    )
    async def test_what_is_no_order_is_refused(self, served: Served, body: Any) -> None:
        status, answer = await order(served[0], body)
        assert status == 400
        assert answer["error"]

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "x"])
    async def test_bodies_are_not_unpacked(
        self, served: Served, caplog: pytest.LogCaptureFixture, encoding: str
    ) -> None:
        pool, _ = served
        body = b'{"images": ["demo/app"]}'  # none of these
        status, answer = await order(pool, body, **{"Content-Encoding": encoding})
        assert (status, answer) == (400, {"error": "send it without Content-Encoding"})
        assert (await pool.admin("/livez")).status == 200
        assert caplog.records == []


async def command(*words: str) -> Result:
    """`pullpool refresh …`, in a thread: it is a program of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cli, ["refresh", *words])


class TestCommand:
    async def test_it_prints_what_each_tag_was_and_is(self, served: Served) -> None:
        pool, fake = served
        admin = f"--admin={pool.proxy.admin_address}"
        await pool.get(manifest_path("v1"))
        fake.retag(NAME, "v2", IMAGE)
        fake.retag(NAME, "v1", NEWER)
        result = await command(admin, TAG, f"{UPSTREAM}/{NAME}:v2")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.splitlines() == [
            f"{TAG}: {IMAGE.digest} -> {NEWER.digest}",
            f"{UPSTREAM}/{NAME}:v2: unknown -> {IMAGE.digest}",
        ]
        again = await command(admin, TAG)
        assert again.stdout == f"{TAG}: {NEWER.digest} (unchanged)\n"

    async def test_one_that_fails_is_told_and_the_exit_code_is_1(self, served: Served) -> None:
        admin = f"--admin={served[0].proxy.admin_address}"
        result = await command(admin, TAG, f"{NAME}:gone")
        assert result.exit_code == 1
        assert result.stdout == f"{TAG}: unknown -> {IMAGE.digest}\n"
        assert result.stderr.startswith(f"{NAME}:gone: MANIFEST_UNKNOWN: ")

    async def test_too_many_at_once_are_refused_with_the_servers_words(
        self, served: Served
    ) -> None:
        result = await command(f"--admin={served[0].proxy.admin_address}", *([TAG] * 101))
        assert result.exit_code == 1
        assert "the server answered 400: name 1 to 100 images" in result.stderr

    async def test_a_server_that_is_not_there_or_is_another_one(self, served: Served) -> None:
        pool, _ = served
        for admin, words in [("127.0.0.1:1", "refused"), (str(pool.address), "cannot refresh")]:
            result = await command(f"--admin={admin}", TAG)
            assert result.exit_code == 1
            assert words in result.stderr

    async def test_it_wants_an_image(self) -> None:
        assert (await command()).exit_code == 2
