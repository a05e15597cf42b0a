"""An upstream that takes connections and says nothing, or fails for a while: what clients notice of
it, through a whole proxy in virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from proxy.pull.asking import PATIENCE
from proxy.testing import Answer as Scripted
from proxy.testing import Disconnect, FakeRegistry, Fault, Hang, make_image
from proxy.upstream.budget import RetryBudget
from proxy.upstream.cap import START
from proxy.upstream.conduct import Conduct
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.health import LONGEST_SILENT, SILENT_RUN, State
from proxy.upstream.health import PATIENCE as PROBE_PATIENCE
from tests.unit.proxy_kit import UPSTREAM, Answer, Pullpool, blob_path, manifest_path, running
from tests.unit.virtual import now, run_virtually

DEADLINE = 20.0
CROWD = [make_image(f"team/n{n}", "v1", layers=[500], seed=n, tarred=False) for n in range(30)]
KNOWN = CROWD[0]

Scenario = Callable[[Pullpool, FakeRegistry], Coroutine[Any, Any, None]]


def play(directory: Path, scenario: Scenario, *, pause: float = 1.0, **changes: Any) -> None:
    """A scenario with a registry that holds CROWD, and the usual retry budget."""

    async def run() -> None:
        clock = asyncio.get_running_loop().time
        async with FakeRegistry() as fake:
            for image in CROWD:
                fake.push(image)
            async with running(
                directory, fake.url, clock=clock, pause=pause, budget=RetryBudget, **changes
            ) as pool:
                await scenario(pool, fake)
                fake.release()
                await asyncio.sleep(61)  # a blob that nobody waits for has its read time-out
                assert not any(gate.active for gate in pool.proxy.origins.states())

    run_virtually(run())


def conduct_of(pool: Pullpool, fake: FakeRegistry) -> Conduct:
    return pool.proxy.origins.add(URL(fake.url), OriginSettings()).conduct


async def timed(pool: Pullpool, path: str) -> tuple[Answer, float]:
    began = now()
    return await pool.get(path), now() - began


def tag(number: int, name: str = "v1") -> str:
    return manifest_path(name, CROWD[number].name)


async def hung(pool: Pullpool, fake: FakeRegistry, *paths: str) -> None:
    """The upstream hangs, and so many find out."""
    fake.script(Fault(Hang(), times=None))
    answers = await asyncio.gather(*(timed(pool, path) for path in paths))
    assert {answer.status for answer, _ in answers} <= {503, 504}
    assert max(took for _, took in answers) <= DEADLINE + 0.1


class TestHang:
    def test_one_crowd_is_enough_to_know_it(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            assert (await pool.get(tag(0))).status == 200
            for blob in KNOWN.blobs:
                assert (await pool.get(blob_path(blob.digest, KNOWN.name))).status == 200
            await asyncio.sleep(31)
            await hung(pool, fake, *(tag(n) for n in range(1, 13)))
            conduct = conduct_of(pool, fake)
            assert conduct.health.is_down
            assert conduct.cap.limit == START
            asked = fake.counters.requests.total()
            answers = [await timed(pool, tag(0)) for _ in range(5)]
            assert {answer.word for answer, _ in answers} == {"stale"}
            assert max(took for _, took in answers) <= 0.05
            assert fake.counters.requests.total() - asked <= 1  # the probe, in the background

        play(tmp_path, scenario)

    def test_a_crowd_that_comes_then_is_told_soon_and_why(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await hung(pool, fake, *(tag(n) for n in range(1, 5)))
            answers = await asyncio.gather(*(timed(pool, tag(n)) for n in range(1, 5)))
            for answer, took in answers:
                assert (answer.status, answer.code) == (503, "UNAVAILABLE")
                assert b"is down (no answer in " in answer.body
                assert int(answer.headers["Retry-After"]) >= 5
                assert took <= PROBE_PATIENCE + 0.1

        play(tmp_path, scenario)

    @pytest.mark.parametrize("cap", [1, 16])
    def test_most_pulls_of_a_long_outage_are_told_soon_whatever_they_are_for(
        self, tmp_path: Path, cap: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            for _ in range(SILENT_RUN):
                await hung(pool, fake, *(tag(n) for n in range(1, 5)))
            pulls = []
            for number in range(120):
                pulls.append(asyncio.create_task(timed(pool, tag(number % 30))))
                await asyncio.sleep(1)
            answers = await asyncio.gather(*pulls)
            assert {answer.status for answer, _ in answers} <= {503, 504}
            slow = [took for _, took in answers if took > PROBE_PATIENCE + 0.1]
            assert max(slow) <= DEADLINE + 0.1
            assert len(slow) <= 30  # probes, one for each repository and then now and then

        play(tmp_path, scenario, upstreams={UPSTREAM: {"max_connections": cap}})

    def test_one_image_that_is_pulled_again_and_again_is_enough(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            for number in range(SILENT_RUN):
                assert not conduct_of(pool, fake).health.is_down
                await hung(pool, fake, tag(0, f"v{number}"))
            answer, took = await timed(pool, tag(0))
            assert answer.status == 503
            assert took <= PROBE_PATIENCE + 0.1

        play(tmp_path, scenario)

    def test_one_repository_that_hangs_keeps_nobody_from_another(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(Hang(), repository=CROWD[0].name, times=None))
            for number in range(SILENT_RUN):
                assert (await pool.get(tag(0, f"v{number}"))).status == 504
            assert conduct_of(pool, fake).health.is_down
            answer, took = await timed(pool, tag(1))
            assert (answer.status, answer.word) == (200, "miss")
            assert took <= 0.05
            assert not conduct_of(pool, fake).health.is_down

        play(tmp_path, scenario)

    def test_several_that_hang_keep_nobody_from_one_that_does_not(self, tmp_path: Path) -> None:
        """Not even while the probe hangs, which is for one more of them."""

        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            for number in range(6):
                fake.script(Fault(Hang(), repository=CROWD[number].name, times=None))
            crowd = [asyncio.create_task(pool.get(tag(n))) for n in range(5)]
            await asyncio.wait(crowd)
            assert conduct_of(pool, fake).health.is_down
            probe = asyncio.create_task(pool.get(tag(5)))
            await asyncio.sleep(0.5)
            assert conduct_of(pool, fake).health.breaker.state is State.HALF_OPEN
            answer, took = await timed(pool, tag(7))
            assert answer.status == 200
            assert took <= 2
            await probe

        play(tmp_path, scenario)

    def test_clients_that_leave_soon_say_nothing_of_it(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(Hang(), times=None))
            for number in range(30):
                pull = asyncio.create_task(pool.get(tag(number)))
                await asyncio.sleep(0.1)
                pull.cancel()
                await asyncio.wait([pull])
            await asyncio.sleep(1)
            assert conduct_of(pool, fake).health.breaker.run == 0
            assert conduct_of(pool, fake).cap.limit == START

        play(tmp_path, scenario)

    def test_it_is_found_when_it_answers_again(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await hung(pool, fake, *(tag(n) for n in range(1, 5)))
            await asyncio.sleep(100)
            await timed(pool, tag(1))  # the probe
            fake.clear_script()
            began = now()
            while (await pool.get(tag(1))).status != 200:  # noqa: ASYNC110 - a client that insists
                await asyncio.sleep(0.5)
            assert now() - began <= LONGEST_SILENT + PROBE_PATIENCE
            answers = await asyncio.gather(*(timed(pool, tag(n)) for n in range(1, 30)))
            assert {answer.status for answer, _ in answers} == {200}
            assert max(took for _, took in answers) <= 1

        play(tmp_path, scenario)

    def test_one_that_has_become_slow_is_found_too(self, tmp_path: Path) -> None:
        """Slower than the first probe waits."""

        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await hung(pool, fake, *(tag(n) for n in range(1, 5)))
            statuses = []
            for _ in range(8):
                pull = asyncio.create_task(pool.get(tag(1)))
                for _ in range(15):
                    await asyncio.sleep(1)
                fake.release()  # what hangs by now is answered after up to 15 s
                statuses.append((await pull).status)
                if statuses[-1] == 200:
                    break
            assert statuses[-1] == 200

        play(tmp_path, scenario)


FAILURES = [Scripted(500, {}, b"{}"), Scripted(503), Disconnect(), Disconnect(reset=True)]


class TestFailing:
    @pytest.mark.parametrize("fault", FAILURES, ids=repr)
    @pytest.mark.parametrize("clients", [1, 30])
    def test_what_ends_after_ten_seconds_is_noticed_by_nobody(
        self, tmp_path: Path, fault: Scripted | Disconnect, clients: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(fault, times=None))
            asyncio.get_running_loop().call_later(10, fake.clear_script)
            answers = await asyncio.gather(*(timed(pool, tag(n)) for n in range(clients)))
            assert {answer.status for answer, _ in answers} == {200}
            assert max(took for _, took in answers) <= DEADLINE

        play(tmp_path, scenario)

    @pytest.mark.parametrize("fault", FAILURES, ids=repr)
    @pytest.mark.parametrize("clients", [1, 30])
    def test_what_stays_is_told_well_before_the_deadline(
        self, tmp_path: Path, fault: Scripted | Disconnect, clients: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(fault, times=None))
            answers = await asyncio.gather(*(timed(pool, tag(n)) for n in range(clients)))
            for answer, took in answers:
                assert answer.status in ((502,) if clients == 1 else (502, 503))
                assert json.loads(answer.body)["errors"][0]["code"] == "UNAVAILABLE"
                assert took <= DEADLINE - 1
            tries = fake.counters.requests.total()
            assert tries <= 60 + clients  # aiohttp's own, and the budget's for 20 s

        play(tmp_path, scenario)

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_a_denial_is_told_at_once(self, tmp_path: Path, status: int) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            headers = {"WWW-Authenticate": 'Basic realm="x"'} if status == 401 else {}
            fake.script(Fault(Scripted(status, headers, b"{}"), times=None))
            answer, took = await timed(pool, tag(0))
            assert answer.status == (404 if status == 404 else 403)
            assert took <= 0.05

        play(tmp_path, scenario)

    def test_who_joins_late_has_time_of_its_own(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(Scripted(500), times=None))
            first = asyncio.create_task(timed(pool, tag(0)))
            await asyncio.sleep(PATIENCE - 2)
            second = asyncio.create_task(timed(pool, tag(0)))
            answer, took = await first
            assert answer.status == 502
            assert PATIENCE - 2 <= took <= PATIENCE + 3
            fake.clear_script()
            answer, took = await second
            assert answer.status == 200
            assert fake.counters.requests.total() < 30

        play(tmp_path, scenario)

    def test_who_joined_and_leaves_ends_nothing_and_who_stays_last_ends_it(
        self, tmp_path: Path
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(Scripted(500), times=None))
            pulls = [asyncio.create_task(pool.get(tag(0))) for _ in range(3)]
            await asyncio.sleep(5)
            for pull in pulls[:2]:
                pull.cancel()
            await asyncio.wait(pulls[:2])
            before = fake.counters.requests.total()
            await asyncio.sleep(3)
            assert fake.counters.requests.total() > before
            pulls[2].cancel()
            await asyncio.wait(pulls)
            await asyncio.sleep(0.1)
            before = fake.counters.requests.total()
            await asyncio.sleep(20)
            assert fake.counters.requests.total() == before

        play(tmp_path, scenario)
