"""Tokens that come from another origin: no slot is held while they are waited for (D1, D4).

Time is virtual: what would wait for ever meets a deadline that takes no time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from benchmarks.parts import free_port
from proxy.observe.metrics import Metrics
from proxy.oci.errors import Denied, Throttled, Undecided, UpstreamUnavailable
from proxy.testing import Answer, FakeClock, FakeRegistry, Fault, make_image
from proxy.upstream.evidence import SECOND_LOOK
from proxy.upstream.hurry import HASTE, Hurry
from proxy.upstream.origins import Origins
from proxy.upstream.turns import Ticket
from tests.unit.upstream_kit import ROBOT, Puller, ticket, until
from tests.unit.virtual import now, run_virtually

IMAGES = [make_image(f"team/app{n}", "v1", layers=[500], seed=n, tarred=False) for n in range(4)]
SECRET = "secret/app"
#: As long as a client waits for a manifest.
DEADLINE = 20.0


class LoopClock(FakeClock):
    """The loop's time, which is virtual."""

    def __call__(self) -> float:
        return now()


class Pair:
    """Two upstreams, each the other's token service, and a client of each; one slot per origin."""

    def __init__(self, registries: tuple[FakeRegistry, FakeRegistry], *pullers: Puller) -> None:
        self.registries = registries
        self.pullers = pullers

    def everything(self) -> list[Awaitable[bytes]]:
        return [manifest(one, image.name) for one in self.pullers for image in IMAGES]

    def expect_free(self) -> None:
        for puller, registry in zip(self.pullers, self.registries, strict=True):
            assert puller.origin.state().active == 0
            assert registry.counters.peak_sockets <= 1


async def manifest(puller: Puller, name: str) -> bytes:
    body, _, _ = await puller.client.manifest(name, "v1", ticket())
    return body


@contextlib.asynccontextmanager
async def pair(*, token_ttl: float, harbor: bool) -> AsyncIterator[Pair]:
    clock = LoopClock()
    private = {image.name: {ROBOT.username} for image in IMAGES} | {SECRET: {"boss"}}
    one, other = (
        FakeRegistry(
            port=free_port(),
            auth="bearer",
            users={ROBOT.username: ROBOT.password},
            private=private,
            token_ttl=token_ttl,
            harbor=harbor,
            clock=clock,
        )
        for _ in range(2)
    )
    one.token_service, other.token_service = other, one
    origins = Origins(metrics=Metrics(), clock=clock)
    async with one, other:
        pullers = []
        for name, registry in (("one", one), ("other", other)):
            for image in IMAGES:
                registry.push(image)
            registry.push(make_image(SECRET, "v1", layers=[500], seed=9, tarred=False))
            pullers.append(
                Puller(registry, name=name, cap=1, credentials=ROBOT, origins=origins, clock=clock)
            )
        try:
            yield Pair((one, other), *pullers)
        finally:
            await origins.close()


def play(
    scenario: Callable[[Pair], Awaitable[None]], *, token_ttl: float = 300.0, harbor: bool = False
) -> None:
    async def run() -> None:
        async with pair(token_ttl=token_ttl, harbor=harbor) as both, asyncio.timeout(DEADLINE):
            await scenario(both)
            both.expect_free()

    run_virtually(run())


def test_two_upstreams_that_are_each_others_token_service_do_not_wait_for_one_another() -> None:
    async def scenario(both: Pair) -> None:
        for _ in range(2):  # before the first challenge, and after it
            bodies = await asyncio.gather(*both.everything(), *both.everything())
            assert bodies == [image.manifest for image in IMAGES] * 4
        for registry in both.registries:  # nobody asked for what another had asked for
            assert registry.counters.tokens_issued == len(IMAGES)

    play(scenario)


def test_nor_do_they_when_every_token_has_run_out() -> None:
    async def scenario(both: Pair) -> None:
        for _ in range(3):
            bodies = await asyncio.gather(*both.everything())
            assert bodies == [image.manifest for image in IMAGES] * 2
            await asyncio.sleep(3.0)

    play(scenario, token_ttl=2.0)


def test_nor_do_they_when_tokens_are_refused() -> None:
    async def scenario(both: Pair) -> None:
        await asyncio.gather(*both.everything())
        for registry in both.registries:
            registry.tokens.revoke_all()
        bodies = await asyncio.gather(*both.everything())
        assert bodies == [image.manifest for image in IMAGES] * 2

    play(scenario)


def test_nor_do_they_while_refusals_are_weighed() -> None:
    """What worked is asked for as evidence, and that comes from the other one as well."""

    async def scenario(both: Pair) -> None:
        await asyncio.gather(*both.everything())
        for _ in range(2):
            asked = [manifest(puller, SECRET) for puller in both.pullers for _ in range(3)]
            refused = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(error) for error in refused} == {Undecided}
            await asyncio.sleep(SECOND_LOOK / 2)
        asked = [manifest(puller, SECRET) for puller in both.pullers for _ in range(3)]
        denied = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(error) for error in denied} == {Denied}

    play(scenario, harbor=True)


def test_who_leaves_at_any_moment_leaves_both_gates_free() -> None:
    async def scenario(both: Pair) -> None:
        for steps in range(0, 150, 3):
            tasks = [asyncio.ensure_future(work) for work in both.everything()]
            for _ in range(steps):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for puller in both.pullers:
                assert puller.origin.state().active == 0
                assert sum(puller.origin.state().depth.values()) == 0
            for registry in both.registries:
                registry.tokens.revoke_all()
        assert len(await asyncio.gather(*both.everything())) == 2 * len(IMAGES)

    play(scenario)


def test_a_token_that_ran_out_in_the_queue_is_not_sent() -> None:
    async def scenario(both: Pair) -> None:
        puller, registry = both.pullers[0], both.registries[0]
        await manifest(puller, IMAGES[0].name)
        refused = sum(seen.status == 401 for seen in registry.counters.seen)
        async with puller.origin.turn(ticket()):
            task = asyncio.create_task(manifest(puller, IMAGES[0].name))
            await until(lambda: sum(puller.origin.state().depth.values()) == 1)
            await asyncio.sleep(2.5)
        assert await task == IMAGES[0].manifest
        assert sum(seen.status == 401 for seen in registry.counters.seen) == refused

    play(scenario, token_ttl=2.0)


def test_who_comes_back_with_a_token_goes_before_those_who_have_not_been_in() -> None:
    async def scenario(both: Pair) -> None:
        puller, registry = both.pullers[0], both.registries[0]
        await manifest(puller, IMAGES[0].name)
        tickets = [ticket(client=f"client{n}") for n in range(5)]
        with both.registries[1].hold(kind="token") as hold:
            registry.tokens.revoke_all()
            both.registries[1].tokens.revoke_all()
            first = asyncio.create_task(puller.client.manifest(IMAGES[0].name, "v1", tickets[0]))
            await hold.arrived()  # it has been refused, and waits for the token
            turns = [asyncio.create_task(occupy(puller, one)) for one in tickets[1:]]
            await asyncio.sleep(0.5)
        await first
        assert sum(task.done() for task in turns) <= 1  # who was in, and nobody else
        assert not tickets[0].urgent
        await asyncio.gather(*turns)

    play(scenario)


async def occupy(puller: Puller, one: Ticket) -> None:
    async with puller.origin.turn(one):
        await asyncio.sleep(1.0)


def test_nobody_asks_for_a_token_for_what_asked_to_be_left_alone() -> None:
    async def scenario(both: Pair) -> None:
        puller, service = both.pullers[0], both.registries[1].counters
        pause = Answer(503, {"Retry-After": "60"})
        both.registries[0].script(Fault(pause, repository=IMAGES[0].name))
        with pytest.raises(UpstreamUnavailable):
            await manifest(puller, IMAGES[0].name)
        await asyncio.sleep(3.0)  # until its token has run out
        issued = service.tokens_issued
        with pytest.raises(Throttled):
            await manifest(puller, IMAGES[0].name)
        assert service.tokens_issued == issued

    play(scenario, token_ttl=2.0)


def test_a_question_in_a_hurry_waits_anew_once_it_has_its_token() -> None:
    """The queue for the slot that it gave back is no failure of its URL."""

    async def scenario(both: Pair) -> None:
        puller = both.pullers[0]
        await manifest(puller, IMAGES[0].name)
        hurry = Hurry("one", lambda _waited: None)
        client = puller.client.within(hurry)
        async with puller.origin.turn(ticket()):

            async def ask() -> bytes:
                async with hurry.bounded():
                    body, _, _ = await client.manifest(IMAGES[1].name, "v1", ticket())
                    return body

            task = asyncio.create_task(ask())
            await asyncio.sleep(2 * HASTE)
            assert not task.done()
        assert await task == IMAGES[1].manifest

    play(scenario)
