"""Rights that were taken away are denied, and overloads at the same time are not: a whole proxy.

Time is virtual.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from yarl import URL

from proxy.testing import FakeRegistry, Misbehaviour, Overload, make_image
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.origin import Origin
from tests.unit.proxy_kit import UPSTREAM, Pullpool, blob_path, manifest_path, running
from tests.unit.virtual import now, run_virtually

IMAGES = [make_image(f"team/app{n}", "v1", layers=[9000], seed=n, tarred=False) for n in range(9)]
KNOWN = IMAGES[0]
SECRET = [f"secret/app{number}" for number in range(12)]
ROBOT = {"username": "robot", "password": "s3cr3t"}
#: Seconds that a token lives.
TTL = 60.0
#: Within so many seconds a denial is due.
DUE = 5.0


class Setting:
    """A proxy that knows one repository of a Harbor, which was then revoked."""

    def __init__(self, pool: Pullpool, registry: FakeRegistry) -> None:
        self.pool = pool
        self.registry = registry

    async def status(self, name: str, tag: str = "v1") -> int:
        return (await self.pool.get(manifest_path(tag, name))).status

    async def denial(self, name: str, tag: str = "v1") -> float:
        """Seconds until this is denied."""
        began = now()
        answer = await self.pool.get(manifest_path(tag, name))
        assert (answer.status, answer.code) == (403, "DENIED"), answer.body
        return now() - began

    @property
    def origin(self) -> Origin:
        return self.pool.proxy.origins.add(URL(self.registry.url), OriginSettings())

    @property
    def overloads(self) -> float:
        return self.pool.count("upstream_overloads_total", upstream=self.label)

    @property
    def label(self) -> str:
        return self.registry.netloc


Scenario = Callable[[Setting], Awaitable[None]]


def play(directory: Path, scenario: Scenario, *, rate: int | None = None) -> None:
    async def run() -> None:
        clock = asyncio.get_running_loop().time
        private = {image.name: ["robot"] for image in IMAGES}
        private |= {name: ["boss"] for name in SECRET}
        async with FakeRegistry(
            auth="bearer",
            harbor=True,
            users={"robot": "s3cr3t"},
            private=private,
            token_ttl=TTL,
            latency=0.02,
            rate=rate,
            clock=clock,
        ) as registry:
            for image in IMAGES:
                registry.push(image)
            registry.push(make_image(SECRET[0], "v1", layers=[9], seed=99, tarred=False))
            upstreams = {UPSTREAM: ROBOT}
            async with running(
                directory, registry.url, clock=clock, pause=0.3, upstreams=upstreams
            ) as pool:
                setting = Setting(pool, registry)
                assert await setting.status(KNOWN.name) == 200
                private[KNOWN.name] = ["boss"]
                await scenario(setting)

    run_virtually(run())


def test_when_the_only_repository_that_worked_is_revoked_others_are_denied_in_time(
    tmp_path: Path,
) -> None:
    async def scenario(setting: Setting) -> None:
        limit = setting.origin.conduct.cap.limit
        for name in SECRET[:4]:  # the old token of the known one is good still
            assert await setting.denial(name) < DUE
            assert await setting.status(KNOWN.name, f"none-after-{name[-1]}") == 404
        await asyncio.sleep(TTL)
        assert await setting.denial(KNOWN.name, "v2") < DUE
        assert await setting.denial(SECRET[5]) < DUE
        assert setting.overloads == 0
        assert setting.origin.conduct.cap.limit == limit

    play(tmp_path, scenario)


def test_and_so_is_the_revoked_one_if_it_is_asked_for_first(tmp_path: Path) -> None:
    async def scenario(setting: Setting) -> None:
        await asyncio.sleep(TTL)
        assert await setting.denial(KNOWN.name, "v2") < DUE
        assert await setting.denial(SECRET[0]) < DUE
        assert setting.overloads == 0

    play(tmp_path, scenario)


def test_and_so_are_many_at_once_and_the_cap_is_what_it_was(tmp_path: Path) -> None:
    async def scenario(setting: Setting) -> None:
        limit = setting.origin.conduct.cap.limit
        assert max(await asyncio.gather(*(setting.denial(name) for name in SECRET))) < DUE
        assert setting.origin.conduct.cap.limit == limit

    play(tmp_path, scenario)


def test_a_denial_does_not_wait_for_the_retry_budget(tmp_path: Path) -> None:
    """Looking again at what was refused is no retry of something that failed."""

    async def scenario(setting: Setting) -> None:
        budget = setting.origin.conduct.retries.budget
        while budget.left(now()):
            budget.spend(now())
        assert await setting.denial(SECRET[0]) < DUE
        assert setting.pool.count("upstream_retries_held_total", upstream=setting.label) == 0

    play(tmp_path, scenario)


def test_what_others_may_pull_is_not_denied_by_an_overload_at_the_same_time(
    tmp_path: Path,
) -> None:
    """Nothing shows it but tokens that grant nothing, as a revoked right does."""

    async def scenario(setting: Setting) -> None:
        setting.registry.overload = Overload(2, {Misbehaviour.EMPTY_ACCESS: 1.0})
        forbidden = [setting.status(SECRET[0], f"v{number}") for number in range(4)]
        rightful = [setting.status(image.name) for image in IMAGES[1:] for _ in range(3)]
        answers = await asyncio.gather(*forbidden, *rightful)
        assert set(answers[:4]) == {403}
        assert set(answers[4:]) == {200}
        assert setting.overloads > 0

    play(tmp_path, scenario)


def test_nor_by_one_that_our_own_long_transfers_make(tmp_path: Path) -> None:
    """They fill the places that there are, under tokens of before: no new token is good while they
    last, and only fewer of them at once would show it."""

    async def scenario(setting: Setting) -> None:
        known = setting.registry.put_patterns(KNOWN.name, 24 << 20, 6)
        blobs = [setting.pool.get(blob_path(digest, KNOWN.name)) for digest in known]
        transfers = [asyncio.ensure_future(blob) for blob in blobs]
        await asyncio.sleep(0.5)
        setting.registry.overload = Overload(2, {Misbehaviour.EMPTY_ACCESS: 1.0})
        asked = [asyncio.create_task(setting.status(image.name)) for image in IMAGES[1:4]]
        assert set(await asyncio.gather(*asked)) == {200}
        assert not all(transfer.done() for transfer in transfers)
        for transfer in transfers:
            transfer.cancel()
        await asyncio.wait(transfers)

    play(tmp_path, scenario, rate=1 << 20)


def test_nor_by_one_of_everything_for_as_long_as_it_shows_in_another_way_too(
    tmp_path: Path,
) -> None:
    async def scenario(setting: Setting) -> None:
        kinds: dict[str, float] = {
            Misbehaviour.EMPTY_ACCESS: 1.0,
            Misbehaviour.EMPTY_CHALLENGE: 1.0,
        }
        asked = asyncio.create_task(setting.status(IMAGES[1].name))
        for _ in range(5):  # every other second there is nothing to see but empty tokens
            setting.registry.overload = Overload(0, kinds)
            await asyncio.sleep(1.0)
            setting.registry.overload = Overload(0, {Misbehaviour.EMPTY_ACCESS: 1.0})
            await asyncio.sleep(2.0)
            assert not asked.done()
        setting.registry.overload = None
        assert await asked == 200

    play(tmp_path, scenario)
