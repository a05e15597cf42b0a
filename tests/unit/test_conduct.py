"""What an origin's answers change: its breaker, pauses, cap and budget, over real sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from benchmarks.parts import free_port
from proxy.oci.errors import NotFound, Throttled, UpstreamDown, UpstreamUnavailable
from proxy.testing import Answer, Cut, FakeClock, FakeRegistry, Fault, PullQuota, make_image
from proxy.upstream.blame import LATELY
from proxy.upstream.blob import BlobSource
from proxy.upstream.budget import RetryBudget
from proxy.upstream.cap import START
from proxy.upstream.conduct import MAX_PAUSE, WIDENS_FOR, Conduct
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.health import (
    BROKEN_RUN,
    FIRST_SILENT,
    KEPT,
    LATER,
    SEVERAL,
    SILENT_RUN,
    SILENT_SECONDS,
    Breaker,
    State,
)
from proxy.upstream.origin import WORTHWHILE
from proxy.upstream.turns import Ticket, TurnClass
from tests.unit.fake_kit import IMAGE
from tests.unit.upstream_kit import Puller, sample, ticket, until


def holding(registry: FakeRegistry) -> FakeRegistry:
    registry.push(IMAGE)
    return registry


async def manifest(
    puller: Puller, tag: str = "v1", on: Ticket | None = None, of: str = "team/app"
) -> bytes:
    body, _, _ = await puller.client.manifest(of, tag, on or ticket())
    return body


def conduct(puller: Puller) -> Conduct:
    return puller.origin.conduct


def again(reason: str = "upstream_unavailable") -> Ticket:
    """The ticket of another try."""
    retry = ticket()
    retry.retry = reason
    return retry


def spent(puller: Puller) -> int:
    """Places of the retry budget that are taken."""
    return RetryBudget().reserve - conduct(puller).retries.budget.left(puller.clock())


# -- the breaker ---------------------------------------------------------------------------------


async def test_an_outage_is_broken_off_and_over_with_the_first_answer() -> None:
    registry = holding(FakeRegistry(port=free_port()))
    settings = OriginSettings(starts_low=True)
    async with Puller(registry, cap=16, settings=settings) as puller:
        async with registry:
            assert await manifest(puller) == IMAGE.manifest
        before = conduct(puller).cap.limit
        for _ in range(6):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller)
            puller.clock.advance(1.0)
            if conduct(puller).health.is_down:
                break
        assert "connect" in conduct(puller).health.breaker.reason
        assert conduct(puller).cap.limit == 1
        puller.clock.advance(60.0)
        async with registry:
            pulls = await asyncio.gather(*(manifest(puller) for _ in range(8)))
            assert set(pulls) == {IMAGE.manifest}
        assert not conduct(puller).health.is_down
        assert conduct(puller).cap.limit >= min(before, START)  # not what the outage made of it
        assert puller.origin.state().active == 0


async def test_those_in_the_queue_when_it_opens_are_not_sent() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        with registry.hold() as hold:
            first = asyncio.create_task(manifest(puller))
            await hold.arrived()
            queued = [asyncio.create_task(manifest(puller)) for _ in range(5)]
            await until(lambda: sum(puller.origin.state().depth.values()) == 5)
            conduct(puller).health.breaker = Breaker(
                State.OPEN, until=puller.clock() + 60, reason="gone"
            )
            first.cancel()
            outcomes = await asyncio.gather(*queued, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {UpstreamDown}
        assert registry.counters.count("manifest") == 1
        assert puller.origin.state().active == 0


async def test_a_probe_that_is_cancelled_leaves_the_next_one_to_probe() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=2) as puller:
        health = conduct(puller).health
        health.breaker = Breaker(State.OPEN, until=puller.clock(), reason="gone")
        with registry.hold() as hold:
            probe = asyncio.create_task(manifest(puller))
            await hold.arrived()
            waiting = asyncio.create_task(manifest(puller))
            await asyncio.sleep(0)
            assert registry.counters.count("manifest") == 1
            probe.cancel()
            await hold.arrived()
        assert await waiting == IMAGE.manifest
        assert health.breaker.state is State.CLOSED


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 429, 501])
async def test_an_answer_that_a_client_can_bring_about_is_an_answer(status: int) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(status), times=None))
        for _ in range(30):
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the status means
                await manifest(puller)
            puller.clock.advance(1.0)
        assert conduct(puller).health.breaker == Breaker()


async def test_steady_5xx_open_it_but_not_while_others_are_answered() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(503), reference="bad", times=None))
        for number in range(40):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller, "bad", of=f"team/app{number % 4}")
            puller.clock.advance(1.0)
            if number < 25:
                await manifest(puller)
                assert not conduct(puller).health.is_down
            puller.clock.advance(LATELY)  # nobody else has been answered of late
            if conduct(puller).health.is_down:
                break
        assert conduct(puller).health.is_down
        assert number >= 25
        assert conduct(puller).health.breaker.until <= puller.clock() + 4.0


async def test_one_repository_does_not_open_it_nor_hold_the_cap_down() -> None:
    settings = OriginSettings(starts_low=True)
    async with (
        holding(FakeRegistry()) as registry,
        Puller(registry, cap=16, settings=settings) as puller,
    ):
        registry.script(Fault(Answer(500), repository="team/bad", times=None))
        for number in range(60):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller, of="team/bad")
            puller.clock.advance(1.0)
            assert not conduct(puller).health.is_down
            if number % 10 == 9:
                await manifest(puller)
            if number > 10:  # since another was answered between its failures
                assert conduct(puller).cap.limit == START
                assert conduct(puller).cap.ceiling is None
        assert not conduct(puller).is_stressed


async def test_the_cap_stays_low_if_the_repository_that_broke_is_answered_in_the_end() -> None:
    """Then it was an overload: with fewer at once it goes well."""
    settings = OriginSettings(starts_low=True)
    async with (
        holding(FakeRegistry()) as registry,
        Puller(registry, cap=16, settings=settings) as puller,
    ):
        registry.script(Fault(Answer(503), repository="team/app", times=1))
        with pytest.raises(UpstreamUnavailable):
            await manifest(puller)
        puller.clock.advance(1.0)
        await manifest(puller)
        registry.script(Fault(Answer(500), repository="team/bad", times=None))
        for _ in range(3):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller, of="team/bad")
            puller.clock.advance(1.0)
            await manifest(puller)
        assert conduct(puller).cap.limit == START // 2


async def test_an_outage_of_an_origin_that_talks_is_no_reason_to_forget_what_broke_it() -> None:
    settings = OriginSettings(starts_low=True)
    async with (
        holding(FakeRegistry()) as registry,
        Puller(registry, cap=16, settings=settings) as puller,
    ):
        registry.script(Fault(Answer(503), times=None))
        for number in range(30):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller, of=f"team/app{number % 4}")
            puller.clock.advance(1.0)
            if conduct(puller).health.is_down:
                break
        assert conduct(puller).cap.limit == 1
        registry.clear_script()
        puller.clock.advance(10.0)
        await manifest(puller)
        assert not conduct(puller).health.is_down
        assert (conduct(puller).cap.limit, conduct(puller).cap.ceiling) == (1, START)


@pytest.mark.parametrize("status", [403, 404])
async def test_what_is_refused_or_missing_does_not_raise_the_cap(status: int) -> None:
    settings = OriginSettings(starts_low=True)
    async with (
        holding(FakeRegistry()) as registry,
        Puller(registry, cap=16, settings=settings) as puller,
    ):
        registry.script(Fault(Answer(status), reference="none", times=None))

        async def crowd(tag: str) -> None:
            asked = (manifest(puller, tag) for _ in range(100))
            await asyncio.gather(*asked, return_exceptions=True)

        await crowd("none")
        assert conduct(puller).cap.limit == START
        await crowd("v1")
        assert conduct(puller).cap.limit == 16


# -- pauses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "turn_class", "paused"),
    [
        (429, TurnClass.METADATA, {"metadata"}),
        (429, TurnClass.BLOB, {"small", "blob", "segment", "abandoned"}),
        (503, TurnClass.BLOB, set()),
        (500, TurnClass.BLOB, set()),
    ],
)
async def test_retry_after_pauses_what_it_is_about(
    status: int, turn_class: TurnClass, paused: set[str]
) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(status, {"Retry-After": "7"})))
        async with puller.origin.turn(ticket(turn_class)) as turn:
            await turn.request("GET", puller.client.url("team/app", "manifests/v1"))
        assert conduct(puller).details()["paused"] == dict.fromkeys(paused, 7.0)
        puller.clock.advance(7.0)
        assert conduct(puller).details()["paused"] == {}


async def test_a_503_pauses_its_repository_however_many_say_it() -> None:
    """Each speaks of itself: behind some projects of a registry there is another registry."""
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(503, {"Retry-After": "100"}), reference="bad", times=None))
        for number in range(2 * SEVERAL):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller, "bad", of=f"team/lib{number}")
        asked = registry.counters.count("manifest")
        with pytest.raises(Throttled, match="left alone"):
            await manifest(puller, of="team/lib0")
        assert registry.counters.count("manifest") == asked
        assert await manifest(puller) == IMAGE.manifest
        assert conduct(puller).details()["paused"] == {}


async def test_an_origin_all_of_whose_repositories_ask_for_a_pause_gets_it() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(503, {"Retry-After": "100"}), times=None))
        for number in range(KEPT + 5):
            with pytest.raises((UpstreamUnavailable, Throttled)):
                await manifest(puller, of=f"team/lib{number}")
            puller.clock.advance(1.0)
        assert registry.counters.count("manifest") <= KEPT + 1
        asked = registry.counters.count("manifest")
        with pytest.raises(UpstreamDown, match="status 503") as told:
            await manifest(puller)
        assert 90 < (told.value.retry_after or 0) <= 100
        assert registry.counters.count("manifest") == asked
        registry.clear_script()
        puller.clock.advance(100.0)
        assert await manifest(puller) == IMAGE.manifest
        assert not conduct(puller).health.is_down


async def test_repositories_that_fail_together_keep_nobody_else_waiting() -> None:
    """They open the breaker while nobody asks for another one; who does is asked for at once."""
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(500), reference="bad", times=None))
        for number in range(BROKEN_RUN):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller, "bad", of=f"team/lib{number % SEVERAL}")
            puller.clock.advance(1.0)
        health = conduct(puller).health
        health.breaker = replace(health.breaker, until=puller.clock() + 4.0)
        assert health.is_down
        assert await manifest(puller) == IMAGE.manifest
        assert not health.is_down


# -- silence -------------------------------------------------------------------------------------


async def silently(puller: Puller, registry: FakeRegistry, seconds: float, of: str) -> None:
    """A pull that is given up after so many seconds, in which it had no answer."""
    with registry.hold(kind="manifest", repository=of) as hold:
        pull = asyncio.create_task(manifest(puller, of=of))
        await hold.arrived()
        puller.clock.advance(seconds)
        pull.cancel()
        await asyncio.wait([pull])
        assert pull.cancelled()


async def test_requests_that_are_given_up_after_a_long_silence_open_it() -> None:
    settings = OriginSettings(starts_low=True)
    async with (
        holding(FakeRegistry()) as registry,
        Puller(registry, cap=16, settings=settings) as puller,
    ):
        for _ in range(SILENT_RUN):
            assert not conduct(puller).health.is_down
            await silently(puller, registry, SILENT_SECONDS, "team/app")
        breaker = conduct(puller).health.breaker
        assert (breaker.state, breaker.reason) == (State.OPEN, "no answer in 10 s")
        assert (conduct(puller).cap.limit, conduct(puller).cap.ceiling) == (START, None)
        assert not conduct(puller).is_stressed
        with pytest.raises(UpstreamDown, match="no answer in 10 s"):
            await manifest(puller)
        puller.clock.advance(FIRST_SILENT + LATER)
        assert await manifest(puller) == IMAGE.manifest
        assert (breaker.state, conduct(puller).health.is_down) == (State.OPEN, False)
        assert conduct(puller).cap.limit >= START
        assert puller.origin.state().active == 0


async def test_clients_that_leave_early_are_no_evidence_however_many() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        for number in range(30):
            await silently(puller, registry, SILENT_SECONDS - 0.1, f"team/lib{number}")
        assert conduct(puller).health.breaker == Breaker()


async def test_silence_is_none_while_others_are_answered() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        for _ in range(10):
            with registry.hold(kind="manifest", repository="team/bad") as hold:
                pull = asyncio.create_task(manifest(puller, of="team/bad"))
                await hold.arrived()
                puller.clock.advance(1.0)
                await manifest(puller)
                puller.clock.advance(60.0)
                pull.cancel()
                await asyncio.wait([pull])
        assert conduct(puller).health.breaker == Breaker()


async def test_silence_is_none_while_a_body_comes() -> None:
    """An answer that is long under way is one."""
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        for number in range(SILENT_RUN + 1):
            with registry.hold(kind="manifest") as hold:
                pull = asyncio.create_task(manifest(puller))
                await hold.arrived()
                puller.clock.advance(SILENT_SECONDS)
                puller.origin.count_bytes(number % 2)  # every other time nothing comes
                pull.cancel()
                await asyncio.wait([pull])
        assert not conduct(puller).health.is_down


async def test_a_probe_that_stays_silent_opens_it_again_and_one_that_is_left_does_not() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        for _ in range(SILENT_RUN):
            await silently(puller, registry, SILENT_SECONDS, "team/app")
        health = conduct(puller).health
        puller.clock.advance(FIRST_SILENT + LATER)
        await silently(puller, registry, 0.1, "team/app")
        assert health.wants_probe
        puller.clock.advance(LATER)
        await silently(puller, registry, SILENT_SECONDS, "team/app")
        assert health.breaker.state is State.OPEN
        assert health.breaker.openings == 2
        assert puller.origin.state().active == 0


async def test_who_waits_for_a_slot_while_it_is_down_is_told_and_leaves_the_queue() -> None:
    """The slots are held by those who wait for an answer themselves."""
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        health = conduct(puller).health
        health._patience = 0.05
        with registry.hold(kind="manifest") as hold:
            first = asyncio.create_task(manifest(puller))
            await hold.arrived()
            health.breaker = Breaker(State.OPEN, until=puller.clock(), reason="gone")
            with pytest.raises(UpstreamDown):
                await manifest(puller)
            assert sum(puller.origin.state().depth.values()) == 0
        await first


async def test_who_waits_for_a_slot_stays_in_the_queue_when_it_is_back() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        health = conduct(puller).health
        health._patience = 0.05
        with registry.hold(kind="manifest") as hold:
            first = asyncio.create_task(manifest(puller))
            await hold.arrived()
            health.breaker = Breaker(State.OPEN, until=puller.clock(), reason="gone")
            second = asyncio.create_task(manifest(puller))
            await until(lambda: sum(puller.origin.state().depth.values()) == 1)
            health.answered()
            await asyncio.sleep(0.1)
            assert not second.done()
        assert await first == await second


async def test_a_pause_is_bounded_and_a_shorter_one_does_not_end_it() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        answers = [Answer(429, {"Retry-After": seconds}) for seconds in ("3600", "1")]
        registry.script(*(Fault(answer) for answer in answers))
        url = puller.client.url("team/app", "manifests/v1")
        async with puller.origin.turn(ticket(TurnClass.BLOB)) as turn:
            await turn.request("GET", url)
            await turn.request("GET", url)
        assert conduct(puller).details()["paused"]["blob"] == MAX_PAUSE
        label = puller.origin.key.label
        throttled = sample(puller.metrics, "upstream_throttled_seconds_total", upstream=label)
        assert throttled == MAX_PAUSE


async def test_a_short_question_does_not_wait_for_a_long_pause() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(429, {"Retry-After": "100"})))
        with pytest.raises(Throttled):
            await manifest(puller)
        with pytest.raises(Throttled, match="left alone") as told:
            await manifest(puller)
        assert told.value.retry_after == 100.0
        assert registry.counters.count("manifest") == 1
        assert sample(
            puller.metrics, "upstream_throttled_seconds_total", upstream=puller.origin.key.label
        ) == pytest.approx(100.0)


# -- the budget ----------------------------------------------------------------------------------


async def test_a_retry_that_goes_well_costs_no_budget_and_one_that_fails_does() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        await manifest(puller)
        assert spent(puller) == 0
        await manifest(puller, on=again())
        assert spent(puller) == 0
        registry.script(Fault(Answer(500)))
        with pytest.raises(UpstreamUnavailable):
            await manifest(puller, on=again())
        assert spent(puller) == 1
        with pytest.raises(NotFound):
            await manifest(puller, "none", on=again("not_found"))
        assert spent(puller) == 2
        reasons = ("upstream_unavailable", "not_found")
        label = puller.origin.key.label
        counted = [
            sample(puller.metrics, "upstream_retries_total", upstream=label, reason=reason)
            for reason in reasons
        ]
        assert counted == [2, 1]


async def test_a_retry_that_brought_much_before_it_broke_costs_no_budget() -> None:
    """An upstream that cuts every body is resumed as often as that takes."""
    image = make_image("team/app", "v1", layers=[4 * WORTHWHILE], seed=3, tarred=False)
    async with FakeRegistry() as registry, Puller(registry) as puller:
        registry.push(image)
        for cut_at, taken in ((WORTHWHILE + 1, 0), (WORTHWHILE // 2, 1)):
            registry.script(Fault(Cut(cut_at)))
            retry = Ticket(TurnClass.BLOB, ["client"])
            retry.retry = "upstream_unavailable"
            source = BlobSource(puller.client, "team/app", image.layers[0].digest)
            with pytest.raises(UpstreamUnavailable):  # noqa: PT012 - the block is the turn
                async with source.open(0, None, retry) as body:
                    while await body.read():
                        pass
            assert spent(puller) == taken


async def test_retries_for_what_fails_by_itself_are_not_the_others() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(500), repository="team/bad", times=None))
        with pytest.raises(UpstreamUnavailable):
            await manifest(puller, of="team/bad")
        puller.clock.advance(1.0)
        await manifest(puller)
        puller.clock.advance(1.0)
        for _ in range(RetryBudget().reserve):
            with pytest.raises(UpstreamUnavailable):
                await manifest(puller, on=again(), of="team/bad")
        held = asyncio.create_task(manifest(puller, on=again(), of="team/bad"))
        await until(lambda: conduct(puller).details()["retries_held"] == 1)
        assert spent(puller) == 0
        assert await manifest(puller, on=again()) == IMAGE.manifest
        held.cancel()
        await asyncio.wait([held])


async def test_a_retry_that_never_left_costs_no_budget() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        with registry.hold() as hold:
            first = asyncio.create_task(manifest(puller))
            await hold.arrived()
            retry = asyncio.create_task(manifest(puller, on=again()))
            await until(lambda: sum(puller.origin.state().depth.values()) == 1)
            assert spent(puller) == 1
            retry.cancel()
            await asyncio.wait([retry])
            assert spent(puller) == 0
        await first


# -- the quota -----------------------------------------------------------------------------------


async def test_a_head_tells_the_quota_and_does_not_spend_it() -> None:
    registry = FakeRegistry(pulls=PullQuota(2, window=60.0, retry_after=30.0))
    async with holding(registry), Puller(registry, clock=FakeClock()) as puller:
        for _ in range(5):
            await puller.client.head_manifest("team/app", "v1", ticket())
        assert conduct(puller).state().quota == (2, 2)
        await manifest(puller)
        assert conduct(puller).state().quota == (2, 1)
        registry.pulls.spent = 2
        puller.clock.advance(20.0)
        with pytest.raises(Throttled) as told:
            await manifest(puller)
        assert told.value.retry_after == 30.0
        assert conduct(puller).state().quota == (2, 0)
        assert conduct(puller).details()["paused"] == {"metadata": 30.0}


async def test_what_a_trial_has_shown_holds_for_a_while() -> None:
    clock = FakeClock()
    async with FakeRegistry() as registry, Puller(registry, clock=clock) as puller:
        kept = conduct(puller)
        assert kept.widens is None
        for shown in (True, False):
            kept.learn_widening(shown)
            clock.advance(WIDENS_FOR - 1)
            assert kept.widens is shown
            clock.advance(1)
            assert kept.widens is None
