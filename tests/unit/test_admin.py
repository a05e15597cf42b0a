"""The admin listener: health, status and the metrics that the contract names."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.logs import make_logger
from proxy.observe.metrics import Metrics
from proxy.testing import Corrupt, Fault
from proxy.upstream.turns import TurnClass
from proxy.web.admin import Admin
from proxy.web.server import AdminRunner
from proxy.web.watch import LoopWatch
from tests.unit.proxy_kit import (
    LAYER,
    NAME,
    UPSTREAM,
    Pullpool,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    pulling,
    until,
    waiting,
)


async def scrape(pool: Pullpool) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, as a scraper reads it."""
    answer = await pool.admin("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


async def nothing() -> dict[str, object]:
    return {}


class TestHealth:
    async def test_a_running_proxy_is_well(self, served: Served) -> None:
        for path in ("/livez", "/readyz", "/startupz"):
            answer = await served[0].admin(path)
            assert (answer.status, answer.body) == (200, b"ok\n")

    async def test_a_draining_proxy_is_alive_but_not_ready(self, served: Served) -> None:
        pool, _ = served
        pool.proxy.drain()
        assert (await pool.admin("/readyz")).status == 503
        for path in ("/livez", "/startupz"):
            assert (await pool.admin(path)).status == 200
        assert pool.count("draining") == 1

    async def test_the_registry_is_not_on_the_admin_listener_nor_the_reverse(
        self, served: Served
    ) -> None:
        pool, _ = served
        assert (await pool.admin("/v2/")).status == 404
        for path in ("/metrics", "/livez", "/api/v1/status"):
            assert (await pool.get(path)).status == 404

    @pytest.mark.parametrize(
        ("lag", "started", "live", "ready"),
        [(0, True, 200, 200), (31, True, 503, 200), (0, False, 200, 503)],
    )
    async def test_health_follows_the_loop_and_the_start(
        self, lag: float, started: bool, live: int, ready: int
    ) -> None:
        admin = Admin(
            metrics=Metrics(),
            is_started=lambda: started,
            is_draining=lambda: False,
            loop_lag=lambda: lag,
            status=nothing,
            log=make_logger("json", io.StringIO()),
        )
        assert await statuses(admin) == {"/livez": live, "/readyz": ready, "/startupz": ready}


async def statuses(admin: Admin) -> dict[str, int]:
    found = {}
    async with listening(admin) as url, aiohttp.ClientSession() as session:
        for path in ("/livez", "/readyz", "/startupz"):
            async with session.get(url + path) as answer:
                found[path] = answer.status
    return found


@contextlib.asynccontextmanager
async def listening(admin: Admin) -> AsyncIterator[str]:
    runner = AdminRunner(admin.application(), admin.malformed, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        "text",
        [
            "GARBAGE\n\n",
            "GET /livez HTTP/1.1\n\n",
            "GET /livez HTTP/1.1\nHost: a\nContent-Length: x\n\n",
            "GET /livez HTTP/1.1\nHost: a\nX: " + "x" * 20_000 + "\n\n",
            "GET /livez HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\nzzz\n",
            "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ],
        ids=lambda text: repr(text[:30]),
    )
    async def test_what_is_not_http_gets_json_and_one_line(
        self, served: Served, caplog: pytest.LogCaptureFixture, text: str
    ) -> None:
        pool, _ = served
        async with RawClient.connected(pool.proxy.admin_address) as client:
            await client.send(text)
            assert await client.ending() in ("FIN", "RST")
        head, _, body = client.received.partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        assert "not valid HTTP" in json.loads(body)["error"]
        [line] = pool.events("admin_malformed")
        assert (line["level"], line["client"]) == ("info", "127.0.0.1")
        assert caplog.records == []  # what aiohttp says goes past our log

    async def test_a_body_that_never_comes_leaves_no_trace(
        self, served: Served, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool, _ = served
        async with RawClient.connected(pool.proxy.admin_address) as client:
            kind = "Host: localhost\nContent-Type: application/json\n"
            await client.send(f"POST /api/v1/refresh HTTP/1.1\n{kind}Content-Length: 9\n\n{{")
            client.finish()
            assert await client.ending() == "FIN"
        assert caplog.records == []
        assert (await pool.admin("/livez")).status == 200

    async def test_a_defect_of_ours_is_a_500_with_one_line(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken() -> dict[str, object]:
            raise RuntimeError("a defect")

        log = io.StringIO()
        admin = Admin(
            metrics=Metrics(),
            is_started=lambda: True,
            is_draining=lambda: False,
            loop_lag=lambda: 0,
            status=broken,
            log=make_logger("json", log),
        )
        async with listening(admin) as url, aiohttp.ClientSession() as session:
            async with session.get(f"{url}/api/v1/status") as answer:
                assert (answer.status, await answer.json()) == (500, {"error": "internal error"})
            async with session.get(f"{url}/nowhere") as answer:
                assert answer.status == 404
        [line] = map(json.loads, log.getvalue().splitlines())
        assert (line["event"], line["path"]) == ("admin_failed", "/api/v1/status")
        assert "a defect" in line["exception"]
        assert caplog.records == []


class TestLoopWatch:
    async def test_a_loop_that_is_held_up_is_seen_at_once(self) -> None:
        metrics = Metrics()
        async with LoopWatch(metrics) as watch:
            assert watch.lag() == 0
            await asyncio.sleep(0)
            loop = asyncio.get_running_loop()
            busy_until = loop.time() + 0.6  # longer than the watch sleeps
            while loop.time() < busy_until:
                pass
            assert watch.lag() > 0.05
            await until(lambda: gauge(metrics, "event_loop_lag_seconds") > 0.05)


def gauge(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(f"pullpool_{name}") or 0.0


class TestMetrics:
    async def test_the_metrics_of_the_contract_have_the_right_values(self, tmp_path: Path) -> None:
        capped = {UPSTREAM: {"max_connections": 5}}
        async with pulling(tmp_path, upstreams=capped) as (pool, fake):
            gate = fake.netloc
            await pool.get(manifest_path("v1"))
            await pool.get(blob_path())
            await pool.stored()
            await pool.get(blob_path())
            await pool.get(manifest_path("none"))
            found = await scrape(pool)

            def value(name: str, **labels: str) -> float:
                return found["pullpool_" + name, tuple(sorted(labels.items()))]

            assert value("upstream_connections_limit", upstream=gate) == 4
            assert value("upstream_connections", upstream=gate, state="active") == 0
            assert value("upstream_connections", upstream=gate, state="idle") == 1
            for name in TurnClass:
                assert value("queue_depth", upstream=gate, **{"class": name}) == 0
            assert value("queue_limit", upstream=gate) == 10_000
            assert value("queue_wait_seconds_count", upstream=gate, **{"class": "small"}) == 1
            assert value("flights") == 0
            assert value("upstream_requests_total", upstream=gate, code="404") == 1
            assert value("upstream_bytes_total", upstream=gate) >= LAYER.size
            answered = {"method": "GET", "code": "200"}
            assert value("http_requests_total", kind="manifest", cache="miss", **answered) == 1
            assert value("http_requests_total", kind="blob", cache="miss", **answered) == 1
            assert value("http_requests_total", kind="blob", cache="hit", **answered) == 1
            missed = {"method": "GET", "code": "404", "cache": "none"}
            assert value("http_requests_total", kind="manifest", **missed) == 1
            assert value("http_response_bytes_total", cache="hit") == LAYER.size
            assert value("http_request_duration_seconds_count", kind="blob", cache="hit") == 1
            assert value("http_time_to_first_byte_seconds_count", kind="blob", cache="hit") == 1
            assert value("http_requests_inflight") == 0
            assert value("http_connections") == 1
            assert value("http_connections_limit") > 1
            assert value("http_accept_paused") == value("http_accept_pauses_total") == 0
            assert value("store_blobs") == 2
            assert value("store_bytes") > LAYER.size
            assert value("draining") == 0
            assert found["process_open_fds", ()] > 0
            assert found["process_max_fds", ()] > 0

    async def test_the_queue_is_seen_while_it_stands(self, tmp_path: Path) -> None:
        capped = {UPSTREAM: {"max_connections": 1}}
        async with pulling(tmp_path, upstreams=capped) as (pool, fake):
            with fake.hold(kind="tags") as hold:
                first = asyncio.create_task(pool.get(f"/v2/{NAME}/tags/list"))
                await hold.arrived()
                second = asyncio.create_task(pool.get(blob_path()))
                await until(lambda: waiting(pool) == 1)
                found = await scrape(pool)
                labels = (("class", "blob"), ("upstream", fake.netloc))
                assert found["pullpool_queue_depth", labels] == 1
                active = (("state", "active"), ("upstream", fake.netloc))
                assert found["pullpool_upstream_connections", active] == 1
                assert found["pullpool_flights", ()] == 1
                assert found["pullpool_http_requests_inflight", ()] == 2
                status = json.loads((await pool.admin("/api/v1/status")).body)
                assert status["connections"]["open"] == 2
                assert status["queue"][fake.netloc]["blob"] == 1
                [flight] = status["flights"]
                assert flight["digest"] == str(LAYER.digest)
                assert (flight["state"], flight["readers"]) == ("waiting", 1)
            await asyncio.gather(first, second)

    async def test_a_blob_that_was_wrong_is_counted(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Corrupt(), kind="blob"))
        with pytest.raises(aiohttp.ClientError):
            await pool.get(blob_path())
        found = await scrape(pool)
        assert found["pullpool_digest_mismatch_total", (("source", "upstream"),)] == 1
        assert found["pullpool_fill_failures_total", (("reason", "digest_mismatch"),)] == 1


async def test_the_status_tells_what_is_held(served: Served) -> None:
    pool, fake = served
    await pool.get(blob_path())
    await pool.stored()
    status = json.loads((await pool.admin("/api/v1/status")).body)
    assert status["cache"]["blobs"] == 1
    assert status["cache"]["bytes"] == LAYER.size
    [upstream] = status["upstreams"]
    assert upstream["upstream"] == fake.netloc
    assert upstream["reason"] == "at its start"
    assert upstream["limit"] == 4  # the start: nothing has been seen to stand yet
    assert (status["flights"], status["fleet"], status["draining"]) == ([], None, False)
