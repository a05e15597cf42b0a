"""One line per request, whichever way it ends, with nothing secret in it."""

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.config import HostPort
from proxy.observe.logs import make_logger
from proxy.observe.metrics import Metrics
from proxy.pull.asks import BlobAnswer, CacheWord, ManifestAnswer
from proxy.testing import Answer as Scripted
from proxy.testing import FakeRegistry, Fault, Hang
from proxy.upstream.routing import Routes, Upstream
from proxy.web.access import AccessLog
from proxy.web.registry import Registry
from proxy.web.server import RegistryServer
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    running,
    until,
)


async def test_a_line_says_what_happened(served: Served) -> None:
    pool, _ = served
    answer = await pool.get(blob_path(), User_Agent="containerd/2.1.0")
    [line] = pool.access_log
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert line["level"] == "info"
    expected = {
        "client": "127.0.0.1",
        "method": "GET",
        "path": blob_path(),
        "status": 200,
        "bytes": LAYER.size,
        "cache": "miss",
        "upstream": UPSTREAM,
        "repository": NAME,
        "agent": "containerd/2.1.0",
    }
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["first_byte_ms"] <= line["ms"]
    assert line["queue_ms"] >= 0


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/v2/", 200, None),
        ("GET", "/v2/Bad/manifests/v1", 400, "name_invalid"),
        ("GET", "/nothing", 404, "endpoint_unknown"),
        ("PUT", "/v2/", 405, "method_not_allowed"),
        ("GET", manifest_path("none"), 404, "not_found"),
        ("HEAD", manifest_path("none"), 404, "not_found"),
        ("GET", f"/v2/{NAME}/manifests/v1?ns=unknown", 404, "name_unknown"),
    ],
)
async def test_every_refusal_is_one_line_with_its_reason(
    served: Served, method: str, path: str, status: int, reason: str | None
) -> None:
    pool, _ = served
    await pool.ask(method, path)
    [line] = pool.access_log
    assert (line["status"], line.get("reason"), line["path"]) == (status, reason, path)


async def test_a_failure_of_the_upstream_is_a_warning(served: Served) -> None:
    pool, fake = served
    fake.script(Fault(Scripted(500), times=None))
    await pool.get(manifest_path("v1"))
    [line] = pool.access_log
    assert (line["level"], line["status"]) == ("warning", 502)
    assert "500" in line["error"]


async def test_a_client_that_leaves_while_it_waits_is_one_line(served: Served) -> None:
    pool, fake = served
    fake.script(Fault(Hang(), times=None))
    async with RawClient.connected(pool.address) as client:
        await client.ask(manifest_path("v1"))
        await fake.stalls.arrived()
    await until(lambda: bool(pool.access_log))
    [line] = pool.access_log
    assert (line["status"], line["bytes"]) == (499, 0)
    labels = {"kind": "manifest", "method": "GET", "code": "499", "cache": "none"}
    assert pool.count("http_requests_total", **labels) == 1


class Broken:
    """A pull layer with a defect, before the answer or in the middle of it."""

    async def manifest(self, *_: object, **__: object) -> ManifestAnswer:
        raise ZeroDivisionError

    async def blob(self, *_: object, **__: object) -> BlobAnswer:
        async def pieces() -> AsyncGenerator[bytes, None]:
            yield b"the beginning"
            raise ZeroDivisionError

        return BlobAnswer(LAYER.digest, 100, None, CacheWord.MISS, pieces(), lambda: None)


@contextlib.asynccontextmanager
async def broken() -> AsyncIterator[tuple[HostPort, io.StringIO]]:
    """A registry listener in front of `Broken`, and its log."""
    log, metrics = io.StringIO(), Metrics()
    puller: Any = Broken()
    registry = Registry(
        puller=puller,
        routes=Routes([Upstream(UPSTREAM, "http://127.0.0.1:1")], UPSTREAM),
        metrics=metrics,
        access_log=AccessLog(make_logger("json", log), metrics, time.monotonic),
        clock=time.monotonic,
    )
    server = RegistryServer(registry, registry.malformed)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield HostPort("127.0.0.1", runner.addresses[0][1]), log
    finally:
        await runner.cleanup()
        await registry.idle()


async def test_a_defect_of_ours_is_json_for_the_client_and_a_trace_for_the_log() -> None:
    async with broken() as (address, log), RawClient.connected(address) as client:
        await client.ask(manifest_path("v1"), headers="Connection: close\n")
        assert await client.ending() == "FIN"
        assert "500 Internal Server Error" in await client.head()
        [error] = json.loads(client.body)["errors"]
        assert (error["code"], error["message"]) == ("UNKNOWN", "internal error")
        [line] = map(json.loads, log.getvalue().splitlines())
        assert (line["level"], line["status"]) == ("error", 500)
        assert "ZeroDivisionError" in line["exception"]


async def test_a_defect_in_the_middle_of_a_body_breaks_it_off() -> None:
    async with broken() as (address, log), RawClient.connected(address) as client:
        await client.ask(blob_path())
        assert await client.ending() == "RST"
        assert client.received.count(b"HTTP/1.1 ") <= 1
        [line] = map(json.loads, log.getvalue().splitlines())
        assert "ZeroDivisionError" in line["exception"]


async def test_a_crowd_is_a_line_each(served: Served) -> None:
    pool, _ = served
    await asyncio.gather(*(pool.get(blob_path()) for _ in range(25)))
    assert len({line["request_id"] for line in pool.access_log}) == 25


async def test_control_characters_and_long_text_do_not_get_through(served: Served) -> None:
    pool, _ = served
    await pool.get("/v2/" + "a" * 2000 + "/tags/list", User_Agent="x" * 2000)
    async with RawClient.connected(pool.address) as client:
        await client.ask("/v2/\x7fevil", headers="User-Agent: \x1b[31m\n")
        await client.head()
    assert all(len(line["path"]) <= 512 and len(line["agent"]) <= 512 for line in pool.access_log)


async def test_no_secret_reaches_the_log(tmp_path: Path) -> None:
    password = "pa55-of-the-robot"
    robot = {"username": "robot", "password": password, "access": "shared"}
    theirs = base64.b64encode(b"client:its-own-secret").decode()
    async with FakeRegistry(auth="bearer", users={"robot": password}) as fake:
        fake.push(IMAGE)
        async with running(tmp_path, fake.url, upstreams={UPSTREAM: robot}) as pool:
            fake.script(Fault(Scripted(500), kind="blob", times=2))
            paths = [manifest_path("v1"), blob_path(), manifest_path("none")]
            for path in paths:
                await pool.get(path, Authorization=f"Basic {theirs}")
            text = pool.log
            assert len(pool.access_log) == 3
            tokens = [seen.headers.get("Authorization", "-none-") for seen in fake.counters.seen]
    for secret in (password, theirs, *(token.split()[-1] for token in tokens)):
        assert secret not in text
    # And what clients send of their own never goes upstream.
    assert not any(theirs in token for token in tokens)
