"""An upstream that is overloaded, down or near its quota, seen by clients of a whole proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.parts import free_port
from proxy.testing import (
    Answer,
    FakeClock,
    FakeImage,
    FakeRegistry,
    Fault,
    Misbehaviour,
    Overload,
    PullQuota,
    make_image,
)
from proxy.upstream.budget import RetryBudget
from proxy.upstream.health import BROKEN_RUN, UNREACHABLE_RUN
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    running,
)
from tests.unit.virtual import now, run_virtually

IMAGES = [
    make_image(f"team/app{n}", "v1", layers=[40_000, 3_000], seed=50 + n, tarred=False)
    for n in range(8)
]
ROBOT = {"username": "robot", "password": "s3cr3t"}


@contextlib.asynccontextmanager
async def harbor(
    *kinds: Misbehaviour, requests: int = 3, service_time: float = 0.01
) -> AsyncIterator[FakeRegistry]:
    """A Harbor that breaks in these ways; the robot may pull IMAGES, but not `secret/app`."""
    overload = Overload(requests, dict.fromkeys(kinds, 1.0)) if kinds else None
    private = {image.name: ["robot"] for image in IMAGES} | {"secret/app": ["boss"]}
    async with FakeRegistry(
        auth="bearer",
        harbor=True,
        users={"robot": "s3cr3t", "boss": "pw"},
        private=private,
        overload=overload,
        latency=service_time,
    ) as registry:
        for image in IMAGES:
            registry.push(image)
        registry.push(make_image("secret/app", "v1", layers=[1000], seed=99, tarred=False))
        yield registry


async def pull(pool: Pullpool, image: FakeImage) -> None:
    """The manifest and every blob, at once."""
    answer = await pool.get(manifest_path(image.tag, image.name))
    assert (answer.status, answer.body) == (200, image.manifest)
    blobs = [pool.get(blob_path(blob.digest, image.name)) for blob in image.blobs]
    for blob, got in zip(image.blobs, await asyncio.gather(*blobs), strict=True):
        assert (got.status, got.body) == (200, blob.data)


async def crowd(pool: Pullpool) -> None:
    await asyncio.gather(*(pull(pool, image) for image in IMAGES for _ in range(3)))


async def upstream_state(pool: Pullpool) -> dict[str, Any]:
    answer = await pool.admin("/api/v1/status")
    [upstream] = json.loads(answer.body)["upstreams"]
    return dict(upstream)


# -- overload and denial -------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [[kind] for kind in Misbehaviour] + [list(Misbehaviour)])
async def test_no_way_in_which_harbor_breaks_reaches_a_client(
    tmp_path: Path, kinds: list[Misbehaviour]
) -> None:
    async with (
        harbor(*kinds) as registry,
        running(tmp_path, registry.url, max_connections=16, upstreams={UPSTREAM: ROBOT}) as pool,
    ):
        await crowd(pool)
        assert registry.counters.overloads
        assert {answer["status"] for answer in pool.access_log} == {200}
        state = await upstream_state(pool)
        assert state["limit"] < 16  # it had doubled until it was too much
        assert state["breaker"]["state"] == "closed"


@pytest.mark.parametrize("kind", list(Misbehaviour))
async def test_repositories_that_are_new_to_a_warm_proxy_wait_out_an_overload(
    tmp_path: Path, kind: Misbehaviour
) -> None:
    """Everything breaks for a while, the token service too: no right password is called wrong."""
    async with (
        harbor() as registry,
        running(tmp_path, registry.url, pause=0.05, upstreams={UPSTREAM: ROBOT}) as pool,
    ):
        await pull(pool, IMAGES[0])
        registry.overload = Overload(0, {kind: 1.0})
        asked = [asyncio.create_task(pull(pool, image)) for image in IMAGES[1:]]
        while registry.counters.overloads.total() < 10:
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in asked)
        registry.overload = None
        await asyncio.gather(*asked)
        assert {answer["status"] for answer in pool.access_log} == {200}


async def test_the_good_token_is_kept_while_harbor_hands_out_empty_ones(tmp_path: Path) -> None:
    """Tokens that grant nothing come while good ones are held: the good ones go on being used."""
    async with (
        harbor() as registry,
        running(tmp_path, registry.url, upstreams={UPSTREAM: ROBOT}) as pool,
    ):
        await pull(pool, IMAGES[0])
        issued = registry.counters.tokens_issued
        registry.overload = Overload(0, {Misbehaviour.EMPTY_ACCESS: 1.0})
        listing = await pool.get(f"/v2/{IMAGES[0].name}/tags/list")
        assert listing.status == 200
        assert registry.counters.tokens_issued == issued


@pytest.mark.one_loop
async def test_a_thousand_requests_for_forbidden_names_leave_the_cap_where_it_was(
    tmp_path: Path,
) -> None:
    """With good pulls between them, which see to it that there is evidence of what works."""
    async with (
        harbor(service_time=0.0) as registry,
        running(tmp_path, registry.url, max_connections=8, upstreams={UPSTREAM: ROBOT}) as pool,
    ):
        await crowd(pool)
        before = await upstream_state(pool)
        names = [f"secret/app{n % 7}" if n % 2 else f"nowhere{n}/app" for n in range(1000)]
        paths = [manifest_path(f"v{n}", name) for n, name in enumerate(names)]
        for start in range(0, 1000, 100):
            asked = [pool.get(path) for path in paths[start : start + 100]]
            answers = await asyncio.gather(*asked, pull(pool, IMAGES[start // 100 % 8]))
            assert {a.status for a in answers if a is not None} <= {403, 404}
        after = await upstream_state(pool)
        assert after["limit"] >= before["limit"]
        assert pool.count("upstream_overloads_total", upstream=registry.netloc) == 0
        assert after["breaker"]["state"] == "closed"


@pytest.mark.parametrize("credentials", [ROBOT, {"username": "robot", "password": "wrong"}])
def test_a_denial_reaches_the_client_within_five_seconds_under_load(
    tmp_path: Path, credentials: dict[str, str]
) -> None:
    """A forbidden repository, and a wrong password, while others load the same Harbor."""

    async def run() -> None:
        theirs, ours = ({UPSTREAM: account} for account in (ROBOT, credentials))
        async with (
            harbor(Misbehaviour.EMPTY_CHALLENGE, Misbehaviour.SERVER_ERROR) as registry,
            running(tmp_path / "a", registry.url, clock=now, upstreams=theirs) as busy,
            # With a pause, as in life: six tries in one moment would all meet the same overload.
            running(tmp_path / "b", registry.url, clock=now, pause=0.1, upstreams=ours) as pool,
        ):
            load = asyncio.create_task(crowd(busy))
            began = now()
            answer = await pool.get(manifest_path("v1", "secret/app"))
            assert (answer.status, answer.code) == (403, "DENIED"), answer.body
            assert now() - began < 5.0
            assert "WWW-Authenticate" not in answer.headers
            await load

    run_virtually(run())


async def test_retries_are_no_storm_when_everything_fails(tmp_path: Path) -> None:
    """Forty questions at an upstream that only says 500: a fifth of them again, and the reserve."""
    async with FakeRegistry() as registry:
        registry.script(Fault(Answer(500), times=None))
        budget = RetryBudget(reserve=5, window=3600.0)
        async with running(
            tmp_path, registry.url, budget=lambda: budget, queue={"manifest_deadline": "2s"}
        ) as pool:
            paths = [manifest_path(f"v{n}") for n in range(40)]
            answers = await asyncio.gather(*(pool.get(path) for path in paths))
            assert all(answer.status in (502, 503, 504) for answer in answers)
            label = registry.netloc
            assert registry.counters.count("manifest") <= 40 + 40 / 5 + 5
            assert pool.count("upstream_retries_held_total", upstream=label) > 0
            assert (
                pool.count("upstream_retries_total", upstream=label, reason="upstream_unavailable")
                == 40 / 5 + 5
            )


async def test_a_spent_budget_does_not_fail_a_pull_that_time_serves(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        registry.script(Fault(Answer(500), times=3))
        budgets = lambda: RetryBudget(reserve=1, window=0.5)  # noqa: E731 - a budget per origin
        async with running(tmp_path, registry.url, budget=budgets) as pool:
            assert (await pool.get(manifest_path("v1"))).status == 200
            assert pool.count("upstream_retries_held_total", upstream=registry.netloc) > 0


# -- an upstream that is down --------------------------------------------------------------------


async def open_breaker(pool: Pullpool, clock: FakeClock) -> None:
    """Ask until the breaker has opened."""
    for number in range(max(BROKEN_RUN, UNREACHABLE_RUN)):
        await pool.get(manifest_path(f"nothing{number}"))
        clock.advance(1.0)
        if (await upstream_state(pool))["breaker"]["state"] == "open":
            return
    raise AssertionError("the breaker is closed still")


@pytest.mark.real_seconds
async def test_an_upstream_that_is_down_costs_a_cached_tag_nothing_and_is_probed_once(
    tmp_path: Path,
) -> None:
    clock, port = FakeClock(), free_port()
    async with running(tmp_path, f"http://127.0.0.1:{port}", clock=clock) as pool:
        async with FakeRegistry(port=port) as registry:
            registry.push(IMAGE)
            await pull(pool, IMAGE)
        await open_breaker(pool, clock)
        assert pool.count("upstream_breaker_state", upstream=f"127.0.0.1:{port}", state="open") == 1
        [opened] = pool.events("upstream_breaker")
        assert (opened["state"], opened["was"]) == ("open", "closed")

        # Somebody answers on the port again, but so slowly that waiting for it would be seen.
        async with FakeRegistry(port=port) as registry:
            registry.push(IMAGE)
            with registry.hold() as hold:
                clock.advance(100.0)  # the tag's time is over, and the probe is due
                stale = await pool.get(manifest_path("v1"))
                assert (stale.status, stale.word) == (200, "stale")
                assert "down" in stale.headers["Warning"]
                await hold.arrived()  # the check in the background is the probe
                crowd = [asyncio.create_task(pool.get(manifest_path("v1"))) for _ in range(20)]
                cold = [asyncio.create_task(pool.get(manifest_path(f"v{n}"))) for n in (2, 3)]
                assert {(await task).word for task in crowd} == {"stale"}
                assert len(registry.counters.seen) == 1
            assert {(await task).status for task in cold} == {404}
        assert (await upstream_state(pool))["breaker"]["state"] == "closed"
        assert [event["state"] for event in pool.events("upstream_breaker")] == [
            "open",
            "half_open",
            "closed",
        ]


def test_a_cold_pull_from_an_upstream_that_is_down_fails_fast_and_says_when_to_come_again(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        clock, port = FakeClock(), free_port()
        async with running(tmp_path, f"http://127.0.0.1:{port}", clock=clock) as pool:
            await open_breaker(pool, clock)
            health = pool.proxy.origins._all()[0].conduct.health
            # As after some probes that failed: open for longer than anybody waits.
            health.breaker = replace(health.breaker, until=clock() + 55.0)
            began = now()
            for path in (manifest_path("v1"), blob_path()):
                answer = await pool.get(path)
                assert (answer.status, answer.code) == (503, "UNAVAILABLE")
                assert int(answer.headers["Retry-After"]) > 50
            assert now() - began < 5.0

    run_virtually(run())


async def test_no_request_of_a_client_opens_the_breaker(tmp_path: Path) -> None:
    ahead = 0.0
    async with (
        harbor(service_time=0.0) as registry,
        running(
            tmp_path,
            registry.url,
            clock=lambda: time.monotonic() + ahead,
            upstreams={UPSTREAM: ROBOT},
        ) as pool,
    ):
        for n in range(3 * BROKEN_RUN):
            await pool.get(manifest_path(f"v{n}", "secret/app"))
            await pool.get(manifest_path(f"v{n}", f"nowhere{n}/app"))
            await pool.get(blob_path(LAYER.digest, IMAGES[0].name))
            ahead += 1.0
        assert pool.events("upstream_breaker") == []
        await pull(pool, IMAGES[1])


# -- what an upstream asks for -------------------------------------------------------------------


async def test_a_429_on_manifests_pauses_manifests_only_and_hits_go_on(tmp_path: Path) -> None:
    clock = FakeClock()
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        async with running(tmp_path, registry.url, clock=clock) as pool:
            await pool.get(manifest_path("v1"))
            registry.script(Fault(Answer(429, {"Retry-After": "900"}), kind="manifest"))
            assert (await pool.get(manifest_path("other"))).status in (429, 503)
            asked = registry.counters.count("manifest")
            told = await pool.get(manifest_path("another"))
            assert told.status in (429, 503)
            assert 200 < int(told.headers["Retry-After"]) <= 300  # bounded
            assert registry.counters.count("manifest") == asked
            state = await upstream_state(pool)
            assert set(state["paused"]) == {"metadata"}
            assert (await pool.get(manifest_path("v1"))).word == "hit"
            assert (await pool.get(blob_path())).body == LAYER.data  # a blob, cold
            assert str(LAYER.digest) in await pool.stored()
            assert (await pool.get(blob_path())).word == "hit"
            assert pool.count("upstream_throttled_seconds_total", upstream=registry.netloc) == 300
            clock.advance(300.0)
            assert (await pool.get(manifest_path("another"))).status == 404


async def test_a_429_on_a_blob_pauses_blobs_which_wait_and_arrive(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        async with running(tmp_path, registry.url) as pool:
            await pool.get(manifest_path("v1"))
            registry.script(Fault(Answer(429, {"Retry-After": "1"}), kind="blob"))
            loop = asyncio.get_running_loop()
            began = loop.time()
            blobs = [pool.get(blob_path(layer.digest)) for layer in IMAGE.layers]
            answers = await asyncio.gather(*blobs)
            assert [answer.body for answer in answers] == [layer.data for layer in IMAGE.layers]
            assert loop.time() - began >= 0.9
            assert (await pool.get(manifest_path("none"))).status == 404


# -- a quota -------------------------------------------------------------------------------------


async def test_the_last_pulls_of_a_quota_are_kept_for_cold_images(tmp_path: Path) -> None:
    clock = FakeClock()
    other = make_image("team/other", "v1", layers=[500], seed=77, tarred=False)
    async with FakeRegistry(pulls=PullQuota(20, window=21_600.0)) as registry:
        registry.push(IMAGE)
        registry.push(other)
        async with running(tmp_path, registry.url, clock=clock) as pool:
            await pull(pool, IMAGE)
            await pool.stored()
            label = registry.netloc
            assert pool.count("upstream_ratelimit_limit", upstream=label) == 20
            assert pool.count("upstream_ratelimit_remaining", upstream=label) == 19
            registry.pulls.spent = 19  # others share the account
            newer = make_image(NAME, "v1", layers=[400], seed=78, tarred=False)
            registry.retag(NAME, "v1", newer)
            for _ in range(3):
                clock.advance(60.0)
                stale = await pool.get(manifest_path("v1"))
                assert (stale.status, stale.word) == (200, "stale")
                assert stale.body == IMAGE.manifest
            assert registry.pulls.spent == 19
            assert (await upstream_state(pool))["quota"]["remaining"] == 1
            cold = await pool.get(manifest_path("v1", other.name))
            assert cold.status == 200
            assert registry.pulls.spent == 20
            registry.pulls.spent = 0  # a new window
            clock.advance(60.0)
            fresh = await pool.get(manifest_path("v1"))
            assert (fresh.status, fresh.body) == (200, newer.manifest)


# -- what outlives a restart ---------------------------------------------------------------------


async def test_a_learned_cap_survives_a_restart(tmp_path: Path) -> None:
    wall = FakeClock()
    async with harbor(*Misbehaviour) as registry:
        changes: dict[str, Any] = {"max_connections": 16, "upstreams": {UPSTREAM: ROBOT}}
        async with running(tmp_path, registry.url, wall=wall, **changes) as pool:
            await crowd(pool)
            learned = (await upstream_state(pool))["limit"]
        wall.advance(3600.0)
        async with running(tmp_path, registry.url, wall=wall, **changes) as pool:
            state = await upstream_state(pool)
            assert (state["limit"], state["reason"]) == (learned, "learned before the restart")
        wall.advance(3 * 86_400.0)
        async with running(tmp_path, registry.url, wall=wall, **changes) as pool:
            assert "too old" in (await upstream_state(pool))["reason"]
