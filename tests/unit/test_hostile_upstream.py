"""An upstream that means harm: a 502 in OCI JSON, one log line, nothing kept, and little memory.

Memory is measured at the other end: what the upstream could send before its socket was closed is
all that could be held of it, kernel buffers included.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from proxy.testing import Answer as Scripted
from proxy.testing import FakeRegistry, Fault, Raw
from proxy.testing.faults import Action
from proxy.testing.forward import ForwardProxy
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    Answer,
    Pullpool,
    Served,
    blob_path,
    manifest_path,
    pulling,
    running,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
LINES = b"X-Filler: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n" * 100
#: What one try may take in: our bounds are some KiB to 8 MiB (a manifest), the rest is what both
#: kernels hold on loopback.
BOUND = 24 << 20

HEADS: dict[str, Action] = {
    "endless headers": Raw(OK, LINES),
    "a header line without end": Raw(OK + b"X-Filler: ", b"x" * 4096),
    "a header name without end": Raw(OK, b"x" * 4096),
    "a status line without end": Raw(b"HTTP/1.1 200 ", b"OK" * 2048),
    "endless interim answers": Raw(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless early hints": Raw(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100),
    "a protocol switch": Raw(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", b"x" * 4096
    ),
    "no HTTP at all": Raw(b"<html>hello</html>"),
    "HTTP/0.9 without end": Raw(b"", b"<html>" * 500),
    "another protocol": Raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a TLS alert": Raw(b"\x15\x03\x03\x00\x02\x02\x28"),
    "two lengths": Raw(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"),
    "a length below zero": Raw(OK + b"Content-Length: -5\r\n\r\nhello"),
    "a length that is no number": Raw(OK + b"Content-Length: 0x5\r\n\r\nhello"),
    "chunks and a length": Raw(
        OK + b"Content-Length: 5\r\n" + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"
    ),
    "a NUL in a header": Raw(OK + b"X-Filler: a\0b\r\nContent-Length: 0\r\n\r\n"),
    "a status of nine digits": Raw(b"HTTP/1.1 200000000 OK\r\nContent-Length: 0\r\n\r\n"),
    "a redirect to itself": Scripted(302, {"Location": "?again"}),
    "a redirect to the cloud's metadata": Scripted(302, {"Location": "http://169.254.169.254/x"}),
    "the same in one number": Scripted(302, {"Location": "http://2852039166/x"}),
    "the same within IPv6": Scripted(302, {"Location": "http://[::ffff:169.254.169.254]/x"}),
    "a redirect to a link-local address": Scripted(302, {"Location": "http://[fe80::1]/x"}),
    "a redirect to nowhere": Scripted(302, {"Location": "http://0.0.0.0:1/x"}),
    "a redirect to a multicast group": Scripted(302, {"Location": "http://224.0.0.1/x"}),
    "a redirect to a file": Scripted(302, {"Location": "file:///etc/passwd"}),
    "a redirect that never ends": Raw(b"HTTP/1.1 302 Found\r\nLocation: ", b"x" * 4096),
    "a redirect with a body without end": Raw(
        b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n" + CHUNKED, CHUNK
    ),
    "a failure without end": Raw(b"HTTP/1.1 500 Oops\r\n" + CHUNKED, CHUNK),
    "gzip": Scripted(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b" + b"x" * 100),
    "an encoding nobody knows": Scripted(200, {"Content-Encoding": "x, y"}, b"x"),
}
BODIES: dict[str, Action] = {
    "chunks without end": Raw(OK + CHUNKED, CHUNK),
    "a body without length or end": Raw(b"HTTP/1.0 200 OK\r\n\r\n", b"x" * 65536),
    "a length that is too long": Raw(OK + b"Content-Length: 1000\r\n\r\nhello"),
    "a length that is too short": Raw(OK + b"Content-Length: 5\r\n\r\n" + IMAGE.manifest),
    "garbage for chunks": Raw(OK + CHUNKED + b"zz\r\nhello\r\n"),
    "a chunk size without end": Raw(OK + CHUNKED, b"0" * 4096),
    "a chunk size beyond every number": Raw(OK + CHUNKED + b"f" * 40 + b"\r\nx"),
    "a chunk extension without end": Raw(OK + CHUNKED + b"1;", b"x" * 4096),
    "trailers without end": Raw(OK + CHUNKED + b"1\r\nx\r\n0\r\n", LINES),
    "a trailer line without end": Raw(OK + CHUNKED + b"1\r\nx\r\n0\r\nX-Filler: ", b"x" * 4096),
    "chunks that end early": Raw(OK + CHUNKED + b"5\r\nhello\r\n"),
}


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with pulling(tmp_path) as pair:
        yield pair


async def expect_refused(pool: Pullpool, fake: FakeRegistry, answer: Answer) -> None:
    assert answer.status == 502, answer
    assert answer.code in ("UNAVAILABLE", "SIZE_INVALID", "DIGEST_INVALID", "UNAUTHORIZED")
    assert "WWW-Authenticate" not in answer.headers
    assert [line["status"] for line in pool.access_log] == [502]
    assert pool.access_log[0]["error"]
    assert not pool.events("unheard_error")
    assert await pool.stored() == set()
    await settled(fake)
    assert fake.counters.raw_bytes <= BOUND * len(fake.counters.seen)


async def settled(fake: FakeRegistry) -> None:
    """Until the other end has seen every abandoned socket go."""
    while fake.counters.sockets_now > 1:  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("name", [*HEADS, *BODIES])
async def test_a_manifest(served: Served, name: str) -> None:
    pool, fake = served
    fake.script(Fault((HEADS | BODIES)[name], times=None))
    await expect_refused(pool, fake, await pool.get(manifest_path("v1")))
    fake.clear_script()
    assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest


@pytest.mark.parametrize("name", HEADS)
async def test_a_blob(served: Served, name: str) -> None:
    pool, fake = served
    fake.script(Fault(HEADS[name], times=None))
    await expect_refused(pool, fake, await pool.get(blob_path()))
    fake.clear_script()
    assert (await pool.get(blob_path())).body == LAYER.data


@pytest.mark.one_loop  # read as a manifest is, and that is looked at on both
@pytest.mark.parametrize(
    "name", [n for n in [*HEADS, *BODIES] if n != "a length that is too short"]
)
async def test_a_listing(served: Served, name: str) -> None:
    pool, fake = served
    fake.script(Fault((HEADS | BODIES)[name], times=None))
    await expect_refused(pool, fake, await pool.get(f"/v2/{NAME}/tags/list"))


@pytest.mark.parametrize(
    "name",
    [
        "endless headers",
        "a header line without end",
        "endless interim answers",
        "no HTTP at all",
        "a failure without end",
        "chunks without end",
        "a body without length or end",
        "a length that is too long",
        "garbage for chunks",
        "trailers without end",
    ],
)
async def test_a_token(tmp_path: Path, name: str) -> None:
    async with FakeRegistry(auth="bearer") as fake:
        fake.push(IMAGE)
        fake.script(Fault((HEADS | BODIES)[name], kind="token", times=None))
        async with running(tmp_path, fake.url) as pool:
            await expect_refused(pool, fake, await pool.get(manifest_path("v1")))


@pytest.mark.parametrize("status", [401, 403, 404, 429])
async def test_a_refusal_without_end_is_a_refusal(served: Served, status: int) -> None:
    pool, fake = served
    head = f"HTTP/1.1 {status} No\r\nWWW-Authenticate: Basic realm=x\r\n".encode()
    fake.script(Fault(Raw(head + CHUNKED, CHUNK), times=None))
    answer = await pool.get(manifest_path("v1"))
    assert answer.status in (403, 404, 503)
    assert answer.code in ("DENIED", "MANIFEST_UNKNOWN", "TOOMANYREQUESTS")
    assert len(pool.access_log) == 1
    await settled(fake)
    assert fake.counters.raw_bytes <= 3 * BOUND


POISON = OK + b"Content-Type: application/json\r\nContent-Length: 6\r\n\r\npoison"


@pytest.mark.parametrize("late", [False, True], ids=["with the body", "while idle"])
async def test_bytes_after_an_answer_are_not_the_next_answer(served: Served, late: bool) -> None:
    pool, fake = served
    listing = b'{"name":"team/app","tags":["v1"]}'
    whole = OK + b"Content-Length: %d\r\n\r\n" % len(listing) + listing
    raw = Raw(whole, ends=False, late=POISON) if late else Raw(whole + POISON, ends=False)
    fake.script(Fault(raw))
    path = f"/v2/{NAME}/tags/list"
    assert (await pool.get(path)).body == listing
    if late:
        await asyncio.sleep(0.1)  # an idle time in which the poison comes: there is no event for it
    assert b"poison" not in (await pool.get(path)).body
    assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest


async def test_many_answers_without_a_body_do_not_wear_a_socket_out(served: Served) -> None:
    """Their heads are more together than one answer may have beside its body."""
    pool, fake = served
    long = {"X-Filler": "x" * 8000, "Docker-Content-Digest": str(LAYER.digest)}
    fake.script(Fault(Scripted(200, long), kind="tags", times=None))
    for _ in range(300):
        assert (await pool.get(f"/v2/{NAME}/tags/list")).status == 200
    assert fake.counters.accepted == 1


async def test_answers_to_nobody_on_an_idle_socket_are_not_kept(served: Served) -> None:
    pool, fake = served
    whole = OK + b"Content-Length: 2\r\n\r\n{}"
    bodies = b"".join(
        OK + b"Content-Length: %d\r\n\r\n" % n + b"x" * n for n in (0, 1, 2, 0, 3) * 10
    )
    fake.script(Fault(Raw(whole, late=bodies, forever=bodies)))
    assert (await pool.get(f"/v2/{NAME}/tags/list")).body == b"{}"
    while not fake.counters.raw_bytes:  # noqa: ASYNC110 - counted when we have closed the socket
        await asyncio.sleep(0.001)
    assert fake.counters.raw_bytes <= BOUND
    assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest


async def test_an_answer_before_the_question_is_not_believed(tmp_path: Path) -> None:
    async with FakeRegistry(greeting=POISON) as fake:
        fake.push(IMAGE)
        async with running(tmp_path, fake.url) as pool:
            answer = await pool.get(f"/v2/{NAME}/tags/list")
            assert b"poison" not in answer.body
            await expect_refused(pool, fake, answer)


async def test_a_head_that_trickles_has_its_time_and_no_more(tmp_path: Path) -> None:
    hasty = {UPSTREAM: {"read_timeout": "0.2s"}}
    soon = {"manifest_deadline": "3s"}
    async with pulling(tmp_path, upstreams=hasty, queue=soon) as (pool, fake):
        fake.script(Fault(Raw(OK, b"X: y\r\n", pause=0.05), times=None))
        answer = await pool.get(manifest_path("v1"))
        assert (answer.status, answer.code) == (504, "UNAVAILABLE")


async def test_a_blob_of_another_range_is_not_taken_for_the_one_asked(served: Served) -> None:
    pool, fake = served
    wrong = f"HTTP/1.1 206 Partial\r\nContent-Range: bytes 5-9/{LAYER.size}\r\n".encode()
    fake.script(Fault(Raw(wrong + b"Content-Length: 5\r\n\r\nhello"), times=None))
    await expect_refused(pool, fake, await pool.get(blob_path()))


@pytest.mark.parametrize("name", ["chunks without end", "a body without length or end"])
async def test_a_blob_without_end_ends_at_the_size_that_is_known(served: Served, name: str) -> None:
    pool, fake = served
    assert (await pool.get(manifest_path("v1"))).status == 200
    fake.script(Fault(BODIES[name], times=None))
    with contextlib.suppress(aiohttp.ClientError):
        assert (await pool.get(blob_path())).status == 502
    assert len(pool.access_log) == 2
    assert str(LAYER.digest) not in await pool.stored()
    await settled(fake)
    assert fake.counters.raw_bytes <= 6 * BOUND


@pytest.mark.parametrize("near", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
async def test_a_public_upstream_does_not_lead_to_this_machine(tmp_path: Path, near: str) -> None:
    async with (
        FakeRegistry(name="harbor.invalid") as fake,
        FakeRegistry() as inside,
        ForwardProxy(names={"harbor.invalid": "127.0.0.1"}) as proxy,
    ):
        location = f"http://{near}:{inside.port}{blob_path()}"
        fake.script(Fault(Scripted(307, {"Location": location}), times=None))
        inside.push(IMAGE)
        mine = {"url": fake.url, "proxy": proxy.url}
        async with running(tmp_path / "a", "", upstreams={UPSTREAM: mine}) as pool:
            answer = await pool.get(blob_path())
            await expect_refused(pool, fake, answer)
            assert "redirect_hosts" in pool.access_log[0]["error"]
        assert not inside.counters.seen
        listed = mine | {"redirect_hosts": [f"{near}:{inside.port}"]}
        if ":" not in near:
            async with running(tmp_path / "b", "", upstreams={UPSTREAM: listed}) as pool:
                assert (await pool.get(blob_path())).body == LAYER.data


async def test_a_token_service_is_not_where_nobody_but_the_operator_leads(tmp_path: Path) -> None:
    """The host is the upstream's own, so the realm's rule lets it pass; its address does not."""
    robot = {"username": "robot", "password": "s3cret", "access": "shared"}
    async with FakeRegistry(name="0.0.0.0") as fake, FakeRegistry(name="0.0.0.0") as thief:
        realm = f'Bearer realm="{thief.url}/service/token",service="x"'
        fake.script(Fault(Scripted(401, {"WWW-Authenticate": realm}), times=None))
        async with running(tmp_path, fake.url, upstreams={UPSTREAM: robot}) as pool:
            await expect_refused(pool, fake, await pool.get(manifest_path("v1")))
            assert "redirect_hosts" in pool.access_log[0]["error"]
        assert not thief.counters.seen
