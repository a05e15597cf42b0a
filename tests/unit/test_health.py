"""The circuit breaker of an origin: what opens it, who probes, and who waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.oci.errors import UpstreamDown
from proxy.testing import FakeClock
from proxy.upstream.health import (
    BROKEN_RUN,
    BROKEN_SECONDS,
    FIRST,
    FIRST_SILENT,
    KEPT,
    LATER,
    LONGEST,
    LONGEST_BROKEN,
    SEVERAL,
    SILENT_RUN,
    SILENT_SECONDS,
    SLOW,
    UNREACHABLE_RUN,
    UNREACHABLE_SECONDS,
    Breaker,
    Health,
    State,
    Trouble,
)
from tests.unit.upstream_kit import until


def fail(
    breaker: Breaker,
    times: int,
    *,
    every: float,
    trouble: Trouble = Trouble.UNREACHABLE,
    several: int = SEVERAL,
) -> Breaker:
    """So many failures, one each ``every`` seconds from time 0 on, for ``several`` repositories."""
    for number in range(times):
        breaker = breaker.failed(
            number * every, trouble, "refused", chance=1.0, repository=f"r{number % several}"
        )
    return breaker


def test_it_opens_when_nobody_could_connect_for_a_while() -> None:
    assert fail(Breaker(), UNREACHABLE_RUN - 1, every=1.0).state is State.CLOSED
    breaker = fail(Breaker(), UNREACHABLE_RUN, every=1.0)
    assert (breaker.state, breaker.reason) == (State.OPEN, "refused")


def test_a_burst_of_failures_at_once_is_no_outage() -> None:
    """As many connections as a crowd makes are refused in one moment: that is an overload."""
    breaker = fail(Breaker(), 500, every=UNREACHABLE_SECONDS / 1000)
    assert breaker.state is State.CLOSED


def test_it_takes_longer_to_open_on_an_upstream_that_talks() -> None:
    steps = BROKEN_SECONDS / 5
    assert fail(Breaker(), 9, every=steps, trouble=Trouble.BROKEN).state is State.CLOSED
    assert fail(Breaker(), BROKEN_RUN, every=steps, trouble=Trouble.BROKEN).state is State.OPEN


def test_a_repository_or_two_do_not_open_it_however_often_they_fail() -> None:
    few = fail(Breaker(), 1000, every=1.0, trouble=Trouble.BROKEN, several=SEVERAL - 1)
    assert few.state is State.CLOSED
    one_more = few.failed(1000.0, Trouble.BROKEN, "status 500", chance=1.0, repository="other")
    assert one_more.state is State.OPEN


def test_connections_that_fail_are_the_origins_own_whatever_they_are_for() -> None:
    assert fail(Breaker(), UNREACHABLE_RUN, every=1.0, several=1).state is State.OPEN
    few = fail(Breaker(), SEVERAL, every=1.0, several=1)
    mixed = fail(few, BROKEN_RUN, every=1.0, several=1, trouble=Trouble.BROKEN)
    assert mixed.state is State.OPEN


def test_what_a_row_remembers_is_bounded() -> None:
    row = fail(Breaker(), 1000, every=0.0, trouble=Trouble.BROKEN, several=1000)
    assert len(row.repositories) == KEPT


def test_any_answer_begins_the_count_anew() -> None:
    breaker = fail(Breaker(), UNREACHABLE_RUN - 1, every=1.0).answered()
    assert fail(breaker, UNREACHABLE_RUN - 1, every=1.0).state is State.CLOSED


def opened(trouble: Trouble = Trouble.UNREACHABLE) -> Breaker:
    breaker = fail(Breaker(), BROKEN_RUN, every=1.0, trouble=trouble)
    assert breaker.state is State.OPEN
    return breaker


@pytest.mark.parametrize(
    ("trouble", "longest"),
    [(Trouble.UNREACHABLE, LONGEST), (Trouble.BROKEN, LONGEST_BROKEN)],
)
def test_it_stays_open_longer_each_time_the_probe_fails(trouble: Trouble, longest: float) -> None:
    breaker, lasted = opened(trouble), []
    for _ in range(200):
        now = breaker.until
        breaker = breaker.probing().failed(now, trouble, "again", chance=1.0, is_probe=True)
        lasted.append(breaker.until - now)
    assert lasted[:2] == [FIRST * 2, FIRST * 4]
    assert lasted[-1] == longest
    assert lasted == sorted(lasted)


def test_how_long_it_stays_open_is_jittered() -> None:
    now = 100.0
    half = opened().probing()
    ends = [
        half.failed(now, Trouble.UNREACHABLE, "x", chance=c, is_probe=True).until - now
        for c in (0.0, 0.5, 0.999)
    ]
    assert ends == sorted(set(ends))
    assert ends[0] >= ends[-1] / 2


def test_an_answer_closes_it_whoever_got_it() -> None:
    assert opened().answered() == Breaker()
    assert opened().probing().answered() == Breaker()


def test_failures_of_requests_from_before_say_nothing_new() -> None:
    for breaker in (opened(), opened().probing()):
        assert breaker.failed(50.0, Trouble.UNREACHABLE, "late", chance=1.0) is breaker


def test_a_closed_breaker_has_no_probe() -> None:
    with pytest.raises(ValueError, match="open breaker"):
        Breaker().probing()


def silent(times: int, repository: str = "one") -> Breaker:
    """So many requests without a word."""
    breaker = Breaker()
    for number in range(times):
        breaker = breaker.failed(
            20.0 * number, Trouble.SILENT, "no answer", chance=1.0, repository=repository
        )
    return breaker


def test_it_opens_when_nobody_was_answered_for_long_whatever_they_asked_for() -> None:
    assert silent(SILENT_RUN - 1).state is State.CLOSED
    assert silent(SILENT_RUN - 1).answered().run == 0
    breaker = silent(SILENT_RUN)
    assert (breaker.state, breaker.trouble) == (State.OPEN, Trouble.SILENT)
    assert breaker.until == 20.0 * (SILENT_RUN - 1) + FIRST_SILENT


def test_a_row_of_one_repository_says_nothing_of_another() -> None:
    breaker = silent(SILENT_RUN)
    assert breaker.is_about("one")
    assert not breaker.is_about("two")
    assert breaker.is_news("two")
    assert not breaker.is_news("one")


def test_a_row_of_several_is_about_all_but_who_asks_for_another_one_finds_out() -> None:
    breaker = opened(Trouble.BROKEN)
    assert breaker.is_about("another")
    assert breaker.is_news("another")


def test_after_so_many_repositories_nobody_is_news_and_where_none_was_reached() -> None:
    breaker = opened(Trouble.BROKEN)
    for number in range(KEPT):
        assert breaker.is_news("another")
        breaker = breaker.having(f"more{number}") if len(breaker.repositories) < KEPT else breaker
        if len(breaker.repositories) == KEPT:
            break
    assert not breaker.is_news("another")
    assert not opened(Trouble.UNREACHABLE).is_news("another")
    assert not Breaker().is_news("another")


def test_it_stays_open_as_long_as_was_asked_for_only_if_all_ask() -> None:
    few = opened(Trouble.BROKEN)
    assert few.resting(1000.0) is few
    full = replace(few, repositories=frozenset(map(str, range(KEPT))))
    assert full.resting(1000.0).until == 1000.0
    assert full.resting(few.until - 1) is full
    assert full.answered().resting(1000.0) == Breaker()


class BreakerMachine(RuleBasedStateMachine):
    """Requests come, are answered, fail, or are given up, at any time and in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.changes: list[tuple[State, State]] = []
        self.health = Health(
            "hub",
            clock=self.clock,
            on_change=lambda old, new: self.changes.append((old.state, new.state)),
            chance=lambda: 0.5,
        )
        self.sent: dict[int, bool] = {}  # slot: is it the probe
        self.names: dict[int, str] = {}
        self.probe = ""  # what it is for
        self.probe_since = 0.0
        self.slots = iter(range(10_000))
        self.row = 0  # failures since the last answer, of requests that were sent closed

    @rule(seconds=st.floats(0, 90))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(name=st.sampled_from("abcde"))
    def a_request_comes(self, name: str) -> None:
        slot, before = next(self.slots), self.health.breaker
        has_failed, is_news = name in before.repositories, before.is_news(name)
        due = is_news or before.until + LATER * has_failed <= self.clock()
        is_late = self.clock() >= self.probe_since + SLOW
        admitted = self.health.admits(name)
        assert self.health.enter(slot, name) is admitted
        match before.state:
            case State.CLOSED:
                assert admitted
            case State.OPEN:
                assert admitted is due
            case State.HALF_OPEN:
                gives_way = self.probe in before.repositories or (is_late and is_news)
                assert admitted is (gives_way and not has_failed)
        if admitted:
            assert self.health.enter(slot, name), "the same request is asked twice in a turn"
            if before.state is State.HALF_OPEN:
                self.sent = dict.fromkeys(self.sent, False)
            self.sent[slot] = before.state is not State.CLOSED
            self.names[slot] = name
            if self.sent[slot]:
                self.probe, self.probe_since = name, self.clock()

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), trouble=st.sampled_from(list(Trouble)))
    def one_fails(self, data: st.DataObject, trouble: Trouble) -> None:
        slot = data.draw(st.sampled_from(sorted(self.sent)))
        was_probe, before = self.sent.pop(slot), self.health.breaker
        self.health.failed(slot, trouble, "refused", self.names[slot])
        self.health.leave(slot)
        after = self.health.breaker
        if before.state is State.CLOSED:
            self.row += 1
            if after.state is State.OPEN:
                assert self.row >= min(UNREACHABLE_RUN, SILENT_RUN)
        elif was_probe and before.state is State.HALF_OPEN:
            assert after.state is State.OPEN
            assert self.clock() < after.until <= self.clock() + LONGEST
        else:
            assert replace(after, repositories=before.repositories) == before
            assert after.repositories >= before.repositories

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def one_is_answered(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.sent)))
        del self.sent[slot]
        self.health.answered()
        self.health.leave(slot)
        self.row = 0
        assert self.health.breaker == Breaker()

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def one_is_given_up(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.sent)))
        was_probe, before = self.sent.pop(slot), self.health.breaker
        self.health.leave(slot)
        if was_probe and before.state is State.HALF_OPEN:
            assert self.health.wants_probe
        else:
            assert self.health.breaker is before

    @invariant()
    def there_is_a_probe_exactly_while_it_is_half_open(self) -> None:
        if self.health.breaker.state is State.HALF_OPEN:
            assert any(self.sent.values())

    @invariant()
    def it_only_moves_along_its_arrows(self) -> None:
        allowed = {
            (State.CLOSED, State.OPEN),
            (State.OPEN, State.HALF_OPEN),
            (State.OPEN, State.CLOSED),
            (State.HALF_OPEN, State.OPEN),
            (State.HALF_OPEN, State.CLOSED),
        }
        assert set(self.changes) <= allowed

    @invariant()
    def nobody_waits_longer_than_the_longest_time(self) -> None:
        assert 0 <= self.health.retry_in <= LONGEST


TestBreakerMachine = BreakerMachine.TestCase


# -- those who wait ------------------------------------------------------------------------------


class Site:
    """A breaker that is open, for ``until`` seconds from now."""

    def __init__(self, until: float, patience: float = 30.0) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time
        self.health = Health(
            "hub", clock=loop.time, on_change=lambda _old, _new: None, patience=patience
        )
        self.health.breaker = Breaker(State.OPEN, until=loop.time() + until, reason="refused")


async def test_nobody_waits_while_it_is_closed() -> None:
    health = Health("hub", clock=FakeClock(), on_change=lambda _old, _new: None)
    await health.passage()
    assert health.enter(1)
    health.answered()
    assert not health.is_down
    assert repr(health) == "<Health hub closed, 0 failures in a row>"


async def test_a_request_is_sent_away_if_the_probe_is_not_due_soon() -> None:
    site = Site(until=3600)
    began = site.now()
    with pytest.raises(UpstreamDown, match=r"hub is down \(refused\)") as told:
        await site.health.passage()
    assert site.now() - began < 3
    assert told.value.status == 503
    assert 3000 < int(told.value.headers["Retry-After"]) <= 3600


async def test_requests_wait_for_a_probe_that_is_due_soon_and_for_its_success() -> None:
    site = Site(until=0.05)
    waiting = [asyncio.create_task(site.health.passage()) for _ in range(20)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [site.health.enter(slot) for slot in range(5)] == [True] + [False] * 4
    late = asyncio.create_task(site.health.passage())
    await asyncio.sleep(0)
    assert not late.done()
    site.health.answered()
    await asyncio.gather(*waiting, late)
    assert site.health.enter(7)


async def test_requests_that_waited_for_a_probe_are_told_when_it_failed() -> None:
    site = Site(until=0.0)
    assert site.health.enter(1)
    waiting = [asyncio.create_task(site.health.passage()) for _ in range(5)]
    await asyncio.sleep(0)
    site.health.failed(1, Trouble.UNREACHABLE, "refused again")
    site.health.leave(1)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {UpstreamDown}


async def test_a_probe_that_takes_too_long_is_not_waited_for() -> None:
    site = Site(until=0.0, patience=0.05)
    assert site.health.enter(1)
    with pytest.raises(UpstreamDown):
        await site.health.passage()


async def test_the_next_request_probes_when_the_probe_is_given_up() -> None:
    site = Site(until=0.0)
    assert site.health.enter(1)
    waiting = asyncio.create_task(site.health.passage())
    await asyncio.sleep(0)
    assert not waiting.done()
    site.health.leave(1)
    await waiting
    assert site.health.enter(2)


async def test_whoever_leaves_while_it_waits_leaves_the_others_alone() -> None:
    site = Site(until=0.0)
    assert site.health.enter(1)
    leaver, stayer = (asyncio.create_task(site.health.passage()) for _ in range(2))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.wait([leaver])
    assert leaver.cancelled()
    site.health.answered()
    await until(stayer.done)
    await stayer


def failing(health: Health, *repositories: str, until: float) -> None:
    """Open it, by a row of failures for these."""
    health.breaker = Breaker(
        State.OPEN, until=until, reason="status 500", repositories=frozenset(repositories)
    )


async def test_a_repository_that_failed_leaves_the_probe_to_one_that_did_not() -> None:
    clock = FakeClock()
    health = Health("hub", clock=clock, on_change=lambda _old, _new: None)
    failing(health, "bad", until=clock())
    assert not health.enter(1, "bad")
    assert health.enter(2, "good")
    failing(health, "bad", until=clock())
    clock.advance(LATER)
    assert health.enter(3, "bad")  # nobody else came


async def test_a_probe_that_hangs_for_a_repository_that_failed_gives_way_to_another() -> None:
    changes: list[State] = []
    clock = FakeClock()
    health = Health("hub", clock=clock, on_change=lambda _old, new: changes.append(new.state))
    failing(health, "bad", "worse", until=clock() - LATER)
    assert health.enter(1, "bad")
    assert not health.enter(2, "worse")
    await health.passage("good")
    assert health.enter(3, "good")
    assert not health.enter(4, "better")  # one such probe is enough
    health.failed(1, Trouble.BROKEN, "late", "bad")
    health.leave(1)
    assert health.breaker.state is State.HALF_OPEN
    health.answered()
    assert changes == [State.HALF_OPEN, State.CLOSED]


async def test_who_waits_for_a_probe_that_got_through_waits_for_the_next_one_when_it_fails() -> (
    None
):
    site = Site(until=0.0)
    failing(site.health, "bad", until=site.now())
    assert site.health.enter(1, "good")
    waiting = asyncio.create_task(site.health.passage("other"))
    await asyncio.sleep(0)
    site.health.failed(1, Trouble.BROKEN, "status 500", "good")
    site.health.leave(1)
    site.health.breaker = replace(site.health.breaker, until=site.now() + 0.05)
    await waiting
    assert site.health.enter(2, "other")


async def test_who_asks_for_what_is_news_is_the_probe_at_once() -> None:
    site = Site(until=3600)
    failing(site.health, "bad", until=site.now() + 3600)
    await site.health.passage("good")
    assert not site.health.enter(1, "bad")
    assert site.health.enter(2, "good")
    assert site.health.breaker.state is State.HALF_OPEN
    site.health.answered()
    assert not site.health.is_down


async def test_a_probe_that_says_nothing_gives_way_to_what_is_news_after_a_while() -> None:
    clock = FakeClock()
    health = Health("hub", clock=clock, on_change=lambda _old, _new: None)
    failing(health, "bad", until=clock() + 3600)
    assert health.enter(1, "good")
    clock.advance(SLOW - 0.1)
    assert not health.enter(2, "better")
    clock.advance(0.1)
    assert not health.enter(2, "bad")
    assert health.enter(2, "better")
    assert "good" in health.breaker.repositories
    health.leave(1)
    assert not health.wants_probe
    health.failed(2, Trouble.SILENT, "no answer", "better")
    assert health.breaker.state is State.OPEN


async def test_each_probe_of_a_silent_origin_has_more_patience_than_the_one_before() -> None:
    clock = FakeClock()
    health = Health("hub", clock=clock, on_change=lambda _old, _new: None)
    health.breaker = silent(SILENT_RUN)
    had = []
    for slot in range(3):
        clock.advance(1000.0)
        assert health.enter(slot, "one")
        assert health.patience(99) is None
        had.append(health.patience(slot))
        health.failed(slot, Trouble.SILENT, "no answer", "one")
        health.leave(slot)
    assert had == [SILENT_SECONDS, 2 * SILENT_SECONDS, 3 * SILENT_SECONDS]
    health.breaker = opened(Trouble.BROKEN)
    clock.advance(1000.0)
    assert health.enter(7, "one")
    assert health.patience(7) is None


async def test_what_was_said_while_one_waited_is_no_silence() -> None:
    clock = FakeClock()
    health = Health("hub", clock=clock, on_change=lambda _old, _new: None)
    sent_at = clock()
    clock.advance(1.0)
    health.failed(1, Trouble.BROKEN, "status 500", "bad")
    clock.advance(SILENT_SECONDS)
    health.was_silent(2, sent_at, "other")
    assert (health.breaker.run, health.breaker.silent) == (2, 0)
    health.was_silent(3, clock() - SILENT_SECONDS + 0.5, "other")
    assert (health.breaker.run, health.breaker.silent) == (3, 1)
    health.answered()
    health.was_silent(4, sent_at, "other")
    assert health.breaker.run == 0
