"""Several URLs of one upstream: the choice among them, and pulls that go on at the next."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.testing import Answer as Scripted
from proxy.testing import Cut, Disconnect, FakeClock, FakeRegistry, Fault, Hang, Reset
from proxy.testing.faults import Action
from proxy.upstream.mirrors import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    TRIAL,
    Mirrors,
    Standing,
    State,
    choose,
)
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    running,
)
from tests.unit.upstream_kit import MIB, Mute, noise, refusing

TIMES = st.floats(0, 1e6)
STANDINGS = st.builds(Standing, st.integers(0, 50), TIMES, TIMES)

# -- the choice --------------------------------------------------------------------------------


@given(st.lists(STANDINGS, min_size=1, max_size=6), TIMES, st.frozensets(st.integers(0, 5)))
def test_every_url_is_in_the_order_once_ready_ones_first_as_configured_closed_ones_last(
    standings: list[Standing], now: float, closed: frozenset[int]
) -> None:
    order = choose(standings, now, closed)
    assert sorted(order) == list(range(len(standings)))
    is_open = [place for place in order if place not in closed]
    assert list(order[: len(is_open)]) == is_open
    ready = [place for place in is_open if standings[place].is_ready(now)]
    assert is_open[: len(ready)] == sorted(ready)
    for rest in (is_open[len(ready) :], order[len(is_open) :]):
        down = [standings[place].down_until for place in rest]
        assert down == sorted(down)


@given(st.integers(1, 2000))
def test_the_pause_grows_to_its_bound_and_one_answer_ends_it(failures: int) -> None:
    now, standing, pauses = 0.0, Standing(), []
    for _ in range(failures):
        standing = standing.failed(now, now, "broken")
        pauses.append(standing.down_until - now)
        now = standing.down_until
    assert pauses == sorted(pauses)
    assert pauses[0] == FIRST_PAUSE
    assert pauses[-1] <= LONGEST_PAUSE
    assert standing.worked(now).is_ready(now)
    assert not standing.worked(now).failures


def test_a_crowd_that_fails_together_is_one_failure() -> None:
    clock = FakeClock()
    changes: list[tuple[str, str | None]] = []
    mirrors = Mirrors("up", ["a", "b"], clock=clock, on_change=lambda *it: changes.append(it))
    began = [mirrors.begin(0) for _ in range(50)]
    clock.advance(0.5)
    for one in began:
        mirrors.failed(0, one, "reset")
    assert mirrors.order() == (1, 0)
    clock.advance(FIRST_PAUSE)
    assert mirrors.order() == (0, 1)
    mirrors.worked(0, began[0])  # which left before the failure, and says nothing of now
    assert changes == [("a", "reset")]
    mirrors.worked(0, mirrors.begin(0))
    assert changes == [("a", "reset"), ("a", None)]


def test_only_one_request_tries_a_url_that_is_due() -> None:
    clock = FakeClock()
    mirrors = Mirrors("up", ["a", "b"], clock=clock)
    mirrors.failed(0, mirrors.begin(0), "hangs")
    clock.advance(FIRST_PAUSE)
    assert mirrors.order() == (0, 1)
    mirrors.begin(0)
    assert mirrors.order() == (1, 0)
    clock.advance(TRIAL)  # it was cancelled, and said nothing
    assert mirrors.order() == (0, 1)


def test_who_asks_a_url_that_is_down_for_want_of_a_better_one_keeps_nobody_from_it_longer() -> None:
    clock = FakeClock()
    mirrors = Mirrors("up", ["a", "b"], clock=clock)
    for place in (0, 1):
        mirrors.failed(place, mirrors.begin(place), "no network")
    for _ in range(32):
        clock.advance(FIRST_PAUSE / 64)
        for place in (0, 1):
            mirrors.failed(place, mirrors.begin(place), "no network")
    assert not mirrors.is_ready(0)
    clock.advance(FIRST_PAUSE / 2)
    assert mirrors.is_ready(0)
    mirrors.failed(0, mirrors.begin(0), "no network")  # its trial
    clock.advance(FIRST_PAUSE)
    assert not mirrors.is_ready(0)


def test_a_url_that_is_due_is_not_in_use_before_it_has_worked() -> None:
    clock = FakeClock()
    mirrors = Mirrors("up", ["a", "b"], clock=clock)
    mirrors.failed(0, mirrors.begin(0), "refused")
    clock.advance(FIRST_PAUSE)
    assert [one.state for one in mirrors.states()] == [State.DOWN, State.IN_USE]
    mirrors.worked(0, mirrors.begin(0))
    assert [one.state for one in mirrors.states()] == [State.IN_USE, State.STANDBY]


def test_the_states_say_which_is_closed_and_for_how_long() -> None:
    mirrors = Mirrors("up", ["a", "b"], clock=FakeClock())
    first, second = mirrors.states({0: 300.0})
    assert (first.state, first.retry_in, second.state) == (State.DOWN, 300.0, State.IN_USE)


def test_the_states_say_which_is_used_is_used_and_why() -> None:
    clock = FakeClock()
    mirrors = Mirrors("up", ["a", "b", "c"], clock=clock)
    assert [one.state for one in mirrors.states()] == [State.IN_USE, State.STANDBY, State.STANDBY]
    mirrors.failed(0, mirrors.begin(0), "refused")
    first, second, third = mirrors.states()
    assert (first.state, first.cause, first.retry_in) == (State.DOWN, "refused", FIRST_PAUSE)
    assert (second.state, third.state) == (State.IN_USE, State.STANDBY)
    assert repr(mirrors) == "<Mirrors up: a down, b in use, c standby>"


class Choosing(RuleBasedStateMachine):
    """Requests that begin, fail and are answered, late or never, at three URLs."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.mirrors = Mirrors("up", ["a", "b", "c"], clock=self.clock)
        self.under_way: list[tuple[int, float]] = []

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def begins(self) -> None:
        place, *_ = self.mirrors.order()
        self.under_way.append((place, self.mirrors.begin(place)))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        place, began = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        before = self.mirrors.order()
        self.mirrors.failed(place, began, "broken")
        if self.mirrors.order() != before:
            assert self.mirrors.order()[0] != place or self.all_down()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def works(self, data: st.DataObject) -> None:
        place, began = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        self.mirrors.worked(place, began)

    def all_down(self) -> bool:
        return all(one.retry_in or one.state is State.IN_USE for one in self.mirrors.states())

    @invariant()
    def somebody_is_asked(self) -> None:
        order = self.mirrors.order()
        assert sorted(order) == [0, 1, 2]
        states = self.mirrors.states()
        [in_use] = [place for place in order if states[place].state is State.IN_USE]
        # Those before it have failed, and one of them may be about to be tried again.
        assert all(states[place].state is State.DOWN for place in order[: order.index(in_use)])

    @invariant()
    def nobody_is_down_for_ever(self) -> None:
        assert all(one.retry_in <= LONGEST_PAUSE for one in self.mirrors.states())


TestChoosing = Choosing.TestCase

# -- pulls -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def two(
    tmp_path: Path, clock: FakeClock | None = None, **changes: Any
) -> AsyncIterator[tuple[Pullpool, FakeRegistry, FakeRegistry]]:
    """A proxy whose upstream is at two URLs, both with the image."""
    async with FakeRegistry() as first, FakeRegistry() as second:
        first.push(IMAGE)
        second.push(IMAGE)
        mine = {"url": first.url, "fallback_urls": [second.url], **changes}
        async with running(tmp_path, "", clock=clock, upstreams={UPSTREAM: mine}) as pool:
            yield pool, first, second


async def urls(pool: Pullpool) -> list[tuple[str, str]]:
    status = json.loads((await pool.admin("/api/v1/status")).body)
    return [(one["url"], one["state"]) for one in status["urls"]]


async def test_the_first_is_used_while_it_works(tmp_path: Path) -> None:
    async with two(tmp_path) as (pool, first, second):
        assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
        assert (await pool.get(blob_path())).body == LAYER.data
        assert not second.counters.seen
        assert await urls(pool) == [(first.url, "in use"), (second.url, "standby")]
        assert pool.count("upstream_url_in_use", upstream=UPSTREAM, url=first.url) == 1
        assert pool.count("upstream_url_in_use", upstream=UPSTREAM, url=second.url) == 0


@pytest.mark.parametrize(
    "fault", [Scripted(500), Scripted(503), Disconnect(), Disconnect(reset=True)], ids=repr
)
async def test_a_failing_url_costs_nobody_a_pull(tmp_path: Path, fault: Action) -> None:
    clock = FakeClock()
    async with two(tmp_path, clock) as (pool, first, second):
        first.script(Fault(fault, times=None))
        assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
        assert (await pool.get(blob_path())).body == LAYER.data
        assert not pool.events("asked_again")  # the same request went on, without a pause
        assert await urls(pool) == [(first.url, "down"), (second.url, "in use")]
        assert [line["url"] for line in pool.events("url_down")] == [first.url]
        assert pool.count("upstream_failovers_total", upstream=UPSTREAM) >= 1
        assert first.counters.requests.total() <= 2  # aiohttp replays once
        first.clear_script()
        clock.advance(FIRST_PAUSE)
        assert (await pool.get(f"/v2/{IMAGE.name}/tags/list")).status == 200
        assert await urls(pool) == [(first.url, "in use"), (second.url, "standby")]
        assert [line["url"] for line in pool.events("url_up")] == [first.url]


async def test_nobody_there_and_a_name_without_address_are_failures(tmp_path: Path) -> None:
    with refusing() as dead:
        for url in (dead, "http://no-such-host.invalid"):
            async with FakeRegistry() as second:
                second.push(IMAGE)
                mine = {"url": url, "fallback_urls": [second.url]}
                async with running(tmp_path, "", upstreams={UPSTREAM: mine}) as pool:
                    assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest


@pytest.mark.real_seconds
async def test_a_url_that_hangs_is_left_within_the_deadline(tmp_path: Path) -> None:
    """Its read time-out alone is longer than anybody waits; it is asked no second time."""
    async with two(tmp_path, read_timeout="1h") as (pool, first, _):
        first.script(Fault(Hang(), times=None))
        assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
        assert (await pool.get(blob_path())).body == LAYER.data
        assert first.counters.requests.total() == 1


@pytest.mark.real_seconds
async def test_a_tls_handshake_that_hangs_is_left_too(tmp_path: Path) -> None:
    with Mute() as mute:
        async with FakeRegistry() as second:
            second.push(IMAGE)
            mine = {"url": mute.url, "fallback_urls": [second.url], "connect_timeout": "1h"}
            async with running(tmp_path, "", upstreams={UPSTREAM: mine}) as pool:
                assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest


@pytest.mark.parametrize(
    ("status", "expected"), [(404, 404), (403, 403), (400, 502), (429, 503)], ids=str
)
async def test_an_answer_is_an_answer(tmp_path: Path, status: int, expected: int) -> None:
    async with two(tmp_path) as (pool, first, second):
        first.script(Fault(Scripted(status), times=None))
        assert (await pool.get(manifest_path("v1"))).status == expected
        assert not second.counters.seen
        assert (await urls(pool))[0] == (first.url, "in use")


@pytest.mark.parametrize("fault", [Cut(after=8 * MIB), Reset(after=8 * MIB)], ids=repr)
async def test_a_blob_goes_on_at_its_byte_at_the_next_url(tmp_path: Path, fault: Action) -> None:
    """A break may cost 4 MiB: what was not yet taken in."""
    data = noise(16 * MIB)
    async with two(tmp_path, FakeClock(), segments=1) as (pool, first, second):
        digest, _ = (one.put_blob(IMAGE.name, data) for one in (first, second))
        first.script(Fault(fault, kind="blob"))
        assert (await pool.get(blob_path(digest))).body == data
        [seen] = second.counters.seen
        start = int(seen.headers["Range"].removeprefix("bytes=").partition("-")[0])
        assert 4 * MIB <= start <= 8 * MIB
        total = first.counters.bytes_sent + second.counters.bytes_sent
        assert total <= len(data) + 4 * MIB


async def test_when_all_fail_the_client_hears_of_the_last(tmp_path: Path) -> None:
    async with two(tmp_path, FakeClock()) as (pool, first, second):
        for one in (first, second):
            one.script(Fault(Scripted(500), times=None))
        answer = await pool.get(manifest_path("v1"))
        assert (answer.status, answer.code) == (502, "UNAVAILABLE")
        second.clear_script()  # down or not, it is better than an error
        assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest


async def test_a_token_of_one_is_never_shown_to_another(tmp_path: Path) -> None:
    users = {"robot": "s3cret"}
    async with (
        FakeRegistry(auth="bearer", users=users) as first,
        FakeRegistry(auth="bearer", users=users) as second,
    ):
        first.push(IMAGE)
        second.push(IMAGE)
        mine = {
            "url": first.url,
            "fallback_urls": [second.url],
            "username": "robot",
            "password": "s3cret",
        }
        async with running(tmp_path, "", upstreams={UPSTREAM: mine}) as pool:
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
            first.script(Fault(Scripted(500), times=None))
            assert (await pool.get(blob_path())).body == LAYER.data

        def tokens(registry: FakeRegistry) -> set[str]:
            shown = (seen.headers.get("Authorization", "") for seen in registry.counters.seen)
            return {text for text in shown if text.startswith("Bearer")}

        assert tokens(first)
        assert tokens(second)
        assert not tokens(first) & tokens(second)


async def test_a_token_service_beside_each_url_is_reached(tmp_path: Path) -> None:
    """On loopback, so that what was learned of who named it counts for hasty requests too."""
    async with (
        FakeRegistry() as tokens,
        FakeRegistry(auth="bearer", token_service=tokens) as first,
        FakeRegistry() as second,
    ):
        first.push(IMAGE)
        mine = {"url": first.url, "fallback_urls": [second.url]}
        async with running(tmp_path, "", upstreams={UPSTREAM: mine}) as pool:
            first.retag("team/other", "v1", IMAGE)
            for name in (IMAGE.name, "team/other"):  # the second one's token is asked for at once
                answer = await pool.get(manifest_path("v1", name))
                assert answer.body == IMAGE.manifest
            assert not second.counters.seen
            assert tokens.counters.tokens_issued == 2


async def test_every_url_has_a_cap_of_its_own(tmp_path: Path) -> None:
    async with two(tmp_path, FakeClock(), max_connections=2) as (pool, first, second):
        first.script(Fault(Scripted(500), times=None))
        paths = [manifest_path("v1"), *(blob_path(layer.digest) for layer in IMAGE.layers)]
        answers = await asyncio.gather(*(pool.get(path) for path in paths * 5))
        assert {answer.status for answer in answers} == {200}
        assert first.counters.peak_sockets <= 2
        assert second.counters.peak_sockets <= 2


async def test_a_cancelled_pull_leaves_nothing_at_either(tmp_path: Path) -> None:
    async with two(tmp_path) as (pool, first, second):
        first.script(Fault(Scripted(500), times=None))
        second.script(Fault(Hang(), times=None))
        asking = asyncio.create_task(pool.get(manifest_path("v1")))
        await second.stalls.arrived(1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while any(gate.active for gate in pool.proxy.origins.states()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        second.clear_script()
        assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
