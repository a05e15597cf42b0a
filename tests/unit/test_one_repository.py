"""What one repository brings about does not reach those who pull from others: a whole proxy.

Time is virtual: the minutes that a client insists for take a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from yarl import URL

from proxy.testing import Answer, FakeRegistry, Fault, Hang, make_image
from proxy.upstream.cap import START
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.health import UNREACHABLE_RUN, State, Trouble
from proxy.upstream.origin import Origin
from tests.unit.proxy_kit import UPSTREAM, Pullpool, manifest_path, running
from tests.unit.virtual import now, run_virtually

BAD = "team/bad"
GOOD = [make_image(f"team/good{n}", "v1", layers=[500], seed=n, tarred=False) for n in range(24)]

Scenario = Callable[[Pullpool, FakeRegistry], Awaitable[None]]


def play(directory: Path, scenario: Scenario) -> None:
    """A proxy in front of a registry that holds GOOD; tries are a third of a second apart."""

    async def run() -> None:
        clock = asyncio.get_running_loop().time
        async with FakeRegistry() as registry:
            for image in GOOD:
                registry.push(image)
            async with running(directory, registry.url, clock=clock, pause=0.3) as pool:
                await scenario(pool, registry)

    run_virtually(run())


def origin_of(pool: Pullpool, registry: FakeRegistry) -> Origin:
    return pool.proxy.origins.add(URL(registry.url), OriginSettings())


@contextlib.asynccontextmanager
async def insisting(pool: Pullpool, *, every: float, clients: int = 1) -> AsyncIterator[None]:
    """Clients that ask for what is broken again and again."""

    async def insist(client: int) -> None:
        for number in range(10_000):
            await pool.get(manifest_path(f"v{client}x{number}", BAD))
            await asyncio.sleep(every)

    tasks = [asyncio.create_task(insist(client)) for client in range(clients)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.mark.parametrize(
    ("every", "clients", "gap"), [(1.0, 1, 7.0), (10.0, 1, 5.0), (1.0, 5, 20.0)]
)
def test_a_client_that_insists_on_what_is_broken_costs_the_others_nothing(
    tmp_path: Path, every: float, clients: int, gap: float
) -> None:
    async def scenario(pool: Pullpool, registry: FakeRegistry) -> None:
        registry.script(Fault(Answer(500), repository=BAD, times=None))
        caps = []
        async with insisting(pool, every=every, clients=clients):
            for image in GOOD:
                await asyncio.sleep(gap)
                began = now()
                answer = await pool.get(manifest_path("v1", image.name))
                assert (answer.status, answer.body) == (200, image.manifest)
                assert now() - began < 0.5
                caps.append(origin_of(pool, registry).conduct.cap.limit)
        assert pool.events("upstream_breaker") == []
        assert set(caps[3:]) == {START}

    play(tmp_path, scenario)


def test_a_pause_that_one_repository_asks_for_is_its_own(tmp_path: Path) -> None:
    async def scenario(pool: Pullpool, registry: FakeRegistry) -> None:
        registry.script(Fault(Answer(503, {"Retry-After": "300"}), repository=BAD, times=None))
        assert (await pool.get(manifest_path("v1", BAD))).status in (502, 503)
        asked = registry.counters.count("manifest")
        for image in GOOD[:3]:
            assert (await pool.get(manifest_path("v1", image.name))).status == 200
        told = await pool.get(manifest_path("v2", BAD))
        assert told.status in (429, 503)
        assert 290 < int(told.headers["Retry-After"]) <= 300
        assert registry.counters.count("manifest") == asked + 3
        await asyncio.sleep(300)
        await pool.get(manifest_path("v2", BAD))
        assert registry.counters.count("manifest") == asked + 4

    play(tmp_path, scenario)


def test_an_origin_that_fails_for_everybody_is_left_alone_and_found_again(tmp_path: Path) -> None:
    """Nobody gives up who comes in its last seconds: who waits for a probe goes on to the next."""

    async def scenario(pool: Pullpool, registry: FakeRegistry) -> None:
        registry.script(Fault(Answer(500), times=None))
        crowd = [
            asyncio.create_task(pool.get(manifest_path("v1", image.name))) for image in GOOD[:8]
        ]
        origin = origin_of(pool, registry)
        await asyncio.wait(crowd)
        while not origin.conduct.health.is_down:
            await pool.get(manifest_path("v1", GOOD[8].name))
        before = registry.counters.count("manifest")
        late = [
            asyncio.create_task(pool.get(manifest_path("v1", image.name))) for image in GOOD[9:17]
        ]
        await asyncio.sleep(2.0)
        # The probes, and one for each repository that nothing was known of.
        assert registry.counters.count("manifest") - before <= len(late) + 4
        registry.clear_script()
        answers = await asyncio.gather(*late)
        assert {answer.status for answer in answers} <= {200, 502, 503}
        assert sum(answer.status == 200 for answer in answers) >= 6
        assert origin.conduct.health.breaker.state is State.CLOSED

    play(tmp_path, scenario)


def test_a_token_service_that_hangs_does_not_keep_an_origin_down_that_is_back(
    tmp_path: Path,
) -> None:
    """A request is the probe when it is sent, not while it waits for a token from elsewhere."""

    async def run() -> None:
        clock = asyncio.get_running_loop().time
        async with (
            FakeRegistry() as tokens,
            FakeRegistry(
                auth="bearer", token_service=tokens, name="localhost", token_ttl=60, clock=clock
            ) as registry,
        ):
            registry.push(GOOD[0])
            realms = {UPSTREAM: {"auth_realms": [f"127.0.0.1:{tokens.port}"]}}
            async with running(tmp_path, registry.url, clock=clock, upstreams=realms) as pool:
                assert (await pool.get(manifest_path("v1", GOOD[0].name))).status == 200
                health = origin_of(pool, registry).conduct.health
                for _ in range(UNREACHABLE_RUN + 1):
                    health.failed(99, Trouble.UNREACHABLE, "refused")
                    await asyncio.sleep(0.3)
                assert health.is_down
                tokens.script(Fault(Hang(), repository="team/other", times=None), Fault(Hang()))
                await asyncio.sleep(1.5)
                first = asyncio.create_task(pool.get(manifest_path("v1", "team/other")))
                await asyncio.sleep(0.5)
                assert health.is_down
                began = now()
                answer = await pool.get(manifest_path("none", GOOD[0].name))
                assert answer.status == 404
                assert now() - began < 0.5
                assert not health.is_down
                first.cancel()
                await asyncio.wait([first])
                tokens.release()

    run_virtually(run())
