"""What an outage costs pulls of what is held (D13) or under way (D8), in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.oci.errors import (
    Denied,
    NotFound,
    PullError,
    QueueFull,
    ShuttingDown,
    Throttled,
    UpstreamBusy,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.pull.sources import BROKEN_SECONDS
from proxy.pull.tags import Standing, covers
from proxy.testing import Answer as Scripted
from proxy.testing import Cut, FakeRegistry, Fault, Hang, make_image, make_index
from proxy.testing.faults import Disconnect
from proxy.upstream.conduct import MAX_PAUSE
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    Answer,
    Pullpool,
    blob_path,
    manifest_path,
    running,
    until,
)
from tests.unit.test_refresh import refresh_one
from tests.unit.virtual import now, run_virtually

TIMEOUT = 2.0
QUOTA = Scripted(429, {"Retry-After": "600"})
FALSE_401 = Scripted(401, {"WWW-Authenticate": ""}, b'{"errors":[{"code":"UNAUTHORIZED"}]}')
Scenario = Callable[[Pullpool, FakeRegistry], Coroutine[Any, Any, None]]


def play(directory: Path, scenario: Scenario, **changes: Any) -> None:
    """A scenario in virtual time."""

    async def run() -> None:
        clock = asyncio.get_running_loop().time
        async with FakeRegistry() as fake:
            fake.push(IMAGE)
            async with running(directory, fake.url, clock=clock, pause=0.3, **changes) as pool:
                await scenario(pool, fake)

    run_virtually(run())


async def pull(pool: Pullpool, *, blobs: int = 3) -> None:
    """The manifest of IMAGE, and so many of its three blobs."""
    assert (await pool.get(manifest_path("v1"))).status == 200
    for blob in IMAGE.blobs[:blobs]:
        assert (await pool.get(blob_path(blob.digest))).status == 200
    await pool.stored()


async def timed(pool: Pullpool, method: str = "GET", path: str = "") -> tuple[Answer, float]:
    """An answer, and how long it took."""
    began = now()
    answer = await pool.ask(method, path or manifest_path("v1"))
    return answer, now() - began


def within(seconds: float) -> Any:
    return pytest.approx(seconds, abs=0.02)


class TestHang:
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_it_costs_a_hundred_clients_two_seconds_once_and_nothing_within_the_ttl(
        self, tmp_path: Path, method: str
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(Hang(), times=None))
            await asyncio.sleep(20)
            answer, took = await timed(pool, method)
            assert (answer.word, took) == ("hit", within(0))  # the ttl is not over

            await asyncio.sleep(11)
            crowd = await asyncio.gather(*(timed(pool, method) for _ in range(100)))
            assert {answer.word for answer, _ in crowd} == {"stale"}
            assert max(took for _, took in crowd) <= TIMEOUT + 0.05
            for _ in range(3):
                answer, took = await timed(pool, method)
                assert (answer.word, took) == ("stale", within(0))  # it is known to be down
                assert answer.headers["Warning"].startswith('299 - "served stale: ')
                await asyncio.sleep(9)
            for blob in IMAGE.blobs:
                answer, took = await timed(pool, method, blob_path(blob.digest))
                assert (answer.status, answer.word, took) == (200, "hit", within(0))
            assert fake.counters.heads == 1

        play(tmp_path, scenario)

    def test_who_asks_while_others_wait_waits_no_longer_than_they(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(Hang(), times=None))
            await asyncio.sleep(31)

            async def later(seconds: float) -> float:
                await asyncio.sleep(seconds)
                return (await timed(pool))[1]

            waits = await asyncio.gather(*(later(seconds / 10) for seconds in range(30)))
            assert max(waits) <= TIMEOUT + 0.05
            assert waits[25:] == [within(0)] * 5

        play(tmp_path, scenario)

    def test_without_a_ttl_it_does_not_cost_every_pull_its_time(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(Hang(), times=None))
            waits = []
            for _ in range(9):
                waits.append((await timed(pool))[1])
                await asyncio.sleep(1)
            assert waits == [within(TIMEOUT), *[within(0)] * 8]

        play(tmp_path, scenario, tags={"ttl": "0s"})

    def test_a_check_that_nobody_waits_for_ends_at_its_deadline(self, tmp_path: Path) -> None:
        """Its socket must not be missing when the upstream comes back."""

        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(Hang(), times=None))
            await asyncio.sleep(31)
            began = now()
            assert (await timed(pool))[0].word == "stale"
            await until(lambda: fake.counters.heads == 1)
            [gate] = pool.proxy.origins.states()
            assert gate.active == 1
            await asyncio.sleep(20 - (now() - began) - 0.1)
            assert pool.proxy.origins.states()[0].active == 1
            await asyncio.sleep(0.2)
            assert pool.proxy.origins.states()[0].active == 0

        play(tmp_path, scenario)

    def test_one_in_the_background_ends_too_and_is_a_failure(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(Hang(), times=None))
            await asyncio.sleep(31)
            answer, took = await timed(pool)
            assert (answer.word, took) == ("stale", within(0))
            await asyncio.sleep(20.1)
            assert pool.proxy.origins.states()[0].active == 0

        play(tmp_path, scenario, tags={"stale_while_revalidate": "60s"})


class TestWhatStandsIn:
    @pytest.mark.parametrize(
        ("error", "least"),
        [
            (UpstreamUnavailable(), Standing.WHOLE),
            (UpstreamTimeout(), Standing.WHOLE),
            (UpstreamBusy(), Standing.MANIFEST),
            (Throttled(600), Standing.MANIFEST),
            (QueueFull(5), Standing.MANIFEST),
            (NotFound("manifest"), None),
            (Denied(), None),
            (ShuttingDown(), None),
            (None, None),
        ],
    )
    def test_by_failure_and_by_what_is_held(
        self, error: PullError | None, least: Standing | None
    ) -> None:
        for standing in Standing:
            assert covers(standing, error) is (least is not None and standing >= least)

    @pytest.mark.parametrize("blobs", [0, 1, 3])
    def test_a_used_up_quota_of_manifests_leaves_the_blobs_that_are_not_held(
        self, tmp_path: Path, blobs: int
    ) -> None:
        """Docker Hub's 429: a manifest that is held leads to its blobs all the same."""

        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool, blobs=blobs)
            fake.script(Fault(QUOTA, kind="manifest", times=None))
            await asyncio.sleep(31)
            for _ in range(2):
                answer, _ = await timed(pool)
                assert (answer.word, answer.body) == ("stale", IMAGE.manifest)
                assert "Warning" in answer.headers
            assert fake.counters.heads == 1  # a quota that is used up is left alone
            for blob in IMAGE.blobs:
                assert (await pool.get(blob_path(blob.digest))).body == blob.data

        play(tmp_path, scenario)

    def test_an_index_none_of_whose_images_is_held_leads_nowhere(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            amd = make_image(NAME, "amd", layers=[10], seed=3)
            fake.push(make_index(NAME, "multi", [amd]))
            await pool.get(manifest_path("multi"))
            fake.script(Fault(QUOTA, kind="manifest", times=None))
            await asyncio.sleep(31)
            assert (await pool.get(manifest_path("multi"))).status == 503
            fake.clear_script()
            await asyncio.sleep(MAX_PAUSE)  # as long as the upstream is left alone for its 429
            assert (await pool.get(manifest_path(amd.digest))).status == 200
            fake.script(Fault(QUOTA, kind="manifest", times=None))
            assert (await pool.get(manifest_path("multi"))).word == "stale"

        play(tmp_path, scenario)

    def test_one_that_hangs_gets_its_time_if_the_old_answer_leads_nowhere(
        self, tmp_path: Path
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool, blobs=1)
            fake.script(Fault(Hang()))
            await asyncio.sleep(31)
            asyncio.get_running_loop().call_later(15, fake.release)
            answer, took = await timed(pool)
            assert (answer.word, took) == ("revalidated", within(15))
            assert fake.counters.heads == 1

        play(tmp_path, scenario)

    def test_an_upstream_that_is_not_there_leads_only_to_what_is_held(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool, blobs=2)
            fake.script(Fault(Scripted(502), times=None))
            await asyncio.sleep(31)
            assert (await pool.get(manifest_path("v1"))).status == 502
            fake.clear_script()
            await pool.get(blob_path(IMAGE.blobs[2].digest))
            await pool.stored()
            fake.script(Fault(Scripted(502), times=None))
            await asyncio.sleep(31)
            assert (await pool.get(manifest_path("v1"))).word == "stale"

        play(tmp_path, scenario)

    @pytest.mark.parametrize("blobs", [1, 3])
    def test_an_overloaded_upstream_costs_what_one_that_hangs_does(
        self, tmp_path: Path, blobs: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool, blobs=blobs)
            fake.script(Fault(FALSE_401, times=None))
            await asyncio.sleep(31)
            answer, took = await timed(pool)
            assert answer.word == "stale"
            assert took <= TIMEOUT + 0.05

        play(tmp_path, scenario, upstreams={UPSTREAM: {"max_connections": 2}})


class TestFlights:
    """A body under way goes on through an outage of its upstream (D8)."""

    @pytest.mark.parametrize("gone", [Scripted(503), Disconnect(reset=True)], ids=["503", "reset"])
    @pytest.mark.parametrize(("flights", "seconds"), [(1, 20), (12, 45)])
    def test_bodies_under_way_survive_it(
        self, tmp_path: Path, gone: Scripted | Disconnect, flights: int, seconds: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            images = [
                make_image(f"team/n{n}", "v1", layers=[400_000], seed=50 + n, tarred=False)
                for n in range(flights)
            ]
            for image in images:
                fake.push(image)
                assert (await pool.get(manifest_path("v1", image.name))).status == 200
                fake.script(Fault(Cut(100_000), reference=image.layers[0].digest))
            fake.script(Fault(gone, times=None))
            asyncio.get_running_loop().call_later(seconds, fake.clear_script)
            layers = [image.layers[0] for image in images]
            answers = await asyncio.gather(
                *(
                    pool.get(blob_path(layer.digest, image.name))
                    for layer, image in zip(layers, images, strict=True)
                )
            )
            assert [answer.body for answer in answers] == [layer.data for layer in layers]

        play(tmp_path, scenario)

    def test_an_answer_without_a_byte_is_one_too(self, tmp_path: Path) -> None:
        """The first body broke at once: its client has a 200, so nobody may be told 503."""

        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            fake.script(Fault(Cut(0), kind="blob"), Fault(Scripted(503), times=None))
            asyncio.get_running_loop().call_later(45, fake.clear_script)
            assert (await pool.get(blob_path())).body == LAYER.data

        play(tmp_path, scenario)

    def test_one_that_was_answered_early_is_one_too(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            fake.script(Fault(FALSE_401, times=None))
            loop = asyncio.get_running_loop()

            def worse() -> None:
                fake.clear_script()
                fake.script(Fault(Scripted(503), times=None))

            loop.call_later(30, worse)
            loop.call_later(75, fake.clear_script)
            answer, took = await timed(pool, path=blob_path())
            assert answer.body == LAYER.data
            assert answer.headers["Warning"].startswith("299")
            assert took == pytest.approx(75, abs=5)

        play(tmp_path, scenario)

    def test_a_blob_that_is_really_broken_ends_its_answer_after_a_while(
        self, tmp_path: Path
    ) -> None:
        """Others are answered, so it is no outage: its clients can go elsewhere."""

        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            fake.script(
                Fault(Cut(100_000), reference=LAYER.digest),
                Fault(Scripted(500), reference=LAYER.digest, times=None),
            )

            async def others() -> None:
                while True:
                    await asyncio.sleep(0.4)
                    await pool.get("/v2/team/app/tags/list")

            busy = asyncio.create_task(others())
            began = now()
            with pytest.raises(aiohttp.ClientPayloadError):
                await pool.get(blob_path())
            assert BROKEN_SECONDS <= now() - began < BROKEN_SECONDS + 5
            busy.cancel()
            await asyncio.wait([busy])

        play(tmp_path, scenario)


REFUSED = {403: Scripted(403, {}, b"{}"), 404: Scripted(404, {}, b"{}")}
FAILING = Scripted(500, {}, b"{}")


class TestRefusals:
    """What the upstream has refused stands in for nothing, until it has granted it again."""

    @pytest.mark.parametrize("status", REFUSED)
    def test_a_refusal_is_heard_when_nobody_waits_for_it_any_more(
        self, tmp_path: Path, status: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(REFUSED[status], kind="manifest", times=None))
            await asyncio.sleep(31)
            with fake.hold(method="HEAD"):
                answer, took = await timed(pool)
                assert (answer.word, took) == ("stale", within(TIMEOUT))  # it is not known yet
                await asyncio.sleep(1)
            await asyncio.sleep(1)
            assert (await timed(pool))[0].status == status
            fake.clear_script()
            fake.script(Fault(FAILING, kind="manifest", times=None))
            await asyncio.sleep(30)
            assert (await timed(pool))[0].status == 502

        play(tmp_path, scenario)

    @pytest.mark.parametrize("status", REFUSED)
    def test_an_upstream_that_fails_later_does_not_bring_it_back(
        self, tmp_path: Path, status: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(REFUSED[status], kind="manifest", times=None))
            await asyncio.sleep(40)
            assert (await timed(pool))[0].status == status
            fake.clear_script()
            fake.script(Fault(FAILING, kind="manifest", times=None))
            for _ in range(4):
                await asyncio.sleep(15)
                assert (await timed(pool))[0].status == 502
            fake.clear_script()
            assert (await timed(pool))[0].body == IMAGE.manifest  # granted again
            fake.script(Fault(FAILING, kind="manifest", times=None))
            await asyncio.sleep(31)
            assert (await timed(pool))[0].word == "stale"

        play(tmp_path, scenario)

    @pytest.mark.parametrize("status", REFUSED)
    def test_a_restart_does_not_bring_it_back(self, tmp_path: Path, status: int) -> None:
        async def refused(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            fake.script(Fault(REFUSED[status], kind="manifest", times=None))
            await asyncio.sleep(31)
            assert (await timed(pool))[0].status == status

        async def restarted(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(FAILING, kind="manifest", times=None))
            assert (await timed(pool))[0].status == 502

        play(tmp_path, refused)
        play(tmp_path, restarted)

    def test_a_refused_refresh_counts_for_who_waits_for_a_check(self, tmp_path: Path) -> None:
        """The check hangs, and is answered out of the cache in vain."""

        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pull(pool)
            await asyncio.sleep(31)
            fake.script(Fault(Hang(), kind="manifest"))
            asking = asyncio.create_task(timed(pool))
            await until(lambda: fake.counters.heads == 1)
            fake.script(Fault(REFUSED[403], kind="manifest", times=None))
            assert "error" in await refresh_one(pool)
            assert (await asking)[0].status == 504

        play(tmp_path, scenario)
