"""A cap on bytes a second: kept, shared fairly, and without a wait for what is small."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.testing import FakeClock, FakeRegistry
from proxy.throttle import (
    BURST,
    PROMPT_SHARE,
    Allowance,
    Stream,
    TapQueue,
    Throttle,
    Throttles,
)
from tests.unit.proxy_kit import (
    IMAGE,
    NAME,
    UPSTREAM,
    RawClient,
    blob_path,
    manifest_path,
    pulling,
    running,
    until,
)
from tests.unit.upstream_kit import MIB, noise

KIB = 1 << 10


# -- the allowance, pure -----------------------------------------------------------------------


def test_an_allowance_fills_at_its_rate_and_saves_up_little() -> None:
    allowance = Allowance(1000.0, now=0.0)
    assert allowance.level(0.0) == 1000 * BURST
    allowance.take(150, 0.0)
    assert allowance.level(0.0) == pytest.approx(-100)
    assert allowance.level(0.1) == pytest.approx(0)
    assert not allowance.is_full(0.1)
    assert allowance.level(3600.0) == 1000 * BURST
    assert allowance.is_full(3600.0)


def test_an_allowance_does_not_mind_a_clock_that_stands_still_or_goes_back() -> None:
    allowance = Allowance(1000.0, now=10.0)
    allowance.take(100, 10.0)
    assert allowance.level(9.0) == allowance.level(10.0) == pytest.approx(-50)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="above zero"):
        Allowance(0.0, now=0.0)


# -- the order, pure ---------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(50, 300))
def test_greedy_streams_have_equal_shares_whatever_their_pieces(
    pieces: list[int], rounds: int
) -> None:
    """At no time is one further ahead of another than the larger of their pieces."""
    queue, had = TapQueue[int](), [0.0] * len(pieces)
    for stream in range(len(pieces)):
        queue.add(stream, queue.tag(0.0), pieces[stream], prompt=False)
    for _ in range(rounds):
        stream, _ = queue.first()
        queue.pop()
        queue.passed(had[stream], pieces[stream], prompt=False)
        had[stream] += pieces[stream]
        assert max(had) - min(had) <= 2 * max(pieces)
        queue.add(stream, queue.tag(had[stream]), pieces[stream], prompt=False)


def test_one_that_comes_late_has_no_claim_to_what_it_missed() -> None:
    queue = TapQueue[str]()
    queue.passed(5000.0, 100, prompt=False)
    assert queue.tag(0.0) == 5000.0


def test_prompt_ones_go_first_and_first_come_first_served() -> None:
    queue = TapQueue[str]()
    queue.add("bulk", 0.0, 1, prompt=False)
    queue.add("one", 9.0, 1, prompt=True)
    queue.add("two", 9.0, 1, prompt=True)
    order = []
    while queue:
        order.append(queue.first()[0])
        queue.pop()
    assert order == ["one", "two", "bulk"]


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    st.integers(1, 1000),
    st.integers(50, 300),
)
def test_bulk_that_waits_gets_its_share_of_what_greedy_prompt_streams_take(
    pieces: list[int], bulk: int, rounds: int
) -> None:
    """And no more: a manifest waits for one piece of bulk after three times as many bytes."""
    queue, had = TapQueue[int](), [0] * (len(pieces) + 1)
    counts = [*pieces, bulk]
    for stream, count in enumerate(counts):
        queue.add(stream, 0.0, count, prompt=stream < len(pieces))
    for _ in range(rounds):
        stream, ahead = queue.first()
        assert ahead
        queue.pop()
        # It comes again before the next one is looked for, as who wants all there is does.
        queue.add(stream, 0.0, counts[stream], prompt=stream < len(pieces))
        queue.passed(0.0, counts[stream], prompt=stream < len(pieces))
        had[stream] += counts[stream]
        due = sum(had[:-1]) * (1 - PROMPT_SHARE) / PROMPT_SHARE
        assert -bulk - max(pieces) / 3 - 1e-6 <= had[-1] - due <= 1e-6


# -- waiting -----------------------------------------------------------------------------------


class Mover:
    """One stream's task."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.done, self.cancel = task.done, task.cancel


class Play:
    """Streams through one throttle, on a clock that goes on as soon as everybody waits.

    Timers are real and short; what they find is decided by the clock alone.
    """

    def __init__(self, rate: float) -> None:
        self.clock = FakeClock()
        self.start = self.clock()
        self.waits: list[float] = []
        self.throttle = Throttle(rate, clock=self.clock, on_wait=self.waits.append)
        self.moved: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def seconds(self) -> float:
        return self.clock() - self.start

    def run(self, name: str, total: int, piece: int, *, prompt: bool = False) -> Mover:
        stream = self.throttle.stream(prompt=prompt)
        task = asyncio.create_task(self._move(stream, name, total, piece))
        self._tasks.append(task)
        return Mover(task)

    async def _move(self, stream: Stream, name: str, total: int, piece: int) -> None:
        while total > 0:
            count = min(piece, total)
            await stream.take(count)
            self.moved[name] += count
            total -= count

    def start_with(self, *movers: Coroutine[None, None, None]) -> None:
        """Others that move bytes."""
        self._tasks += [asyncio.create_task(mover) for mover in movers]

    async def until(self, is_over: Callable[[], bool], step: float = 0.005) -> None:
        while not is_over():
            await asyncio.sleep(0)
            # Looking for oneself is what the timer does as well, only sooner.
            self.throttle._serve()
            if all(task.done() for task in self._tasks) or self.throttle.waiting:
                self.clock.advance(step)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_what_goes_on_is_ended_before_others_of_its_kind_begin() -> None:
    """A piece of a stripe is of no use before it is whole, so two of them do not take turns."""
    play, order = Play(MIB), list[str]()

    async def pieces(name: str) -> None:
        stream = play.throttle.stream(prompt=False)
        for part in range(8):
            await stream.take(play.throttle.piece, goes_on=part % 4 > 0)
            order.append(name)

    play.start_with(pieces("ann"), pieces("bob"))
    await play.until(lambda: len(order) == 16)
    assert order == [name for name in ("ann", "bob") * 2 for _ in range(4)]


@pytest.mark.parametrize("streams", [1, 3, 16])
@pytest.mark.parametrize("rate", [64 * KIB, 10 * MIB, 1000 * MIB])
async def test_the_cap_is_kept_within_a_few_percent(streams: int, rate: int) -> None:
    play = Play(rate)
    for number in range(streams):
        play.run(str(number), 10 * rate, play.throttle.piece)
    await play.until(lambda: play.seconds >= 4.0)
    assert play.moved.total() == pytest.approx(4.0 * rate, rel=0.05)
    # Who came first had what was saved up.
    apart = max(play.moved.values()) - min(play.moved.values())
    assert apart <= BURST * rate + 2 * play.throttle.piece
    await play.stop()


async def test_what_an_idle_throttle_saves_up_is_little() -> None:
    play = Play(MIB)
    play.clock.advance(3600.0)
    play.run("late", 10 * MIB, play.throttle.piece)
    await play.until(lambda: bool(play.throttle.waiting))
    assert play.moved["late"] <= BURST * MIB + 2 * play.throttle.piece
    await play.stop()


async def test_a_manifest_does_not_wait_behind_bulk_and_bulk_pays_for_it() -> None:
    play = Play(MIB)
    for number in range(16):
        play.run(f"bulk {number}", 100 * MIB, play.throttle.piece)
    await play.until(lambda: play.seconds >= 1.0)
    at = play.seconds
    manifest = play.run("manifest", 64 * KIB, play.throttle.piece, prompt=True)
    await manifest.task
    assert play.seconds == at
    await play.until(lambda: play.seconds >= 5.0)
    assert play.moved.total() == pytest.approx(5.0 * MIB, rel=0.05)
    await play.stop()


async def test_a_crowd_of_manifests_keeps_to_the_cap_too() -> None:
    play = Play(MIB)
    for number in range(50):
        play.run(f"manifest {number}", 100 * MIB, play.throttle.piece, prompt=True)
    await play.until(lambda: play.seconds >= 20.0)
    # A second's worth in advance, and no more.
    assert play.moved.total() == pytest.approx(21.0 * MIB, rel=0.05)
    await play.stop()


@pytest.mark.parametrize("bulk", [1, 3])
async def test_bulk_gets_a_quarter_of_what_a_crowd_of_manifests_wants(bulk: int) -> None:
    play = Play(MIB)
    for number in range(5):
        play.run(f"listing {number}", 100 * MIB, play.throttle.piece, prompt=True)
    for number in range(bulk):
        play.run(f"bulk {number}", 100 * MIB, play.throttle.piece)
    await play.until(lambda: play.seconds >= 20.0)
    assert play.moved.total() == pytest.approx(21.0 * MIB, rel=0.05)
    had = sum(count for name, count in play.moved.items() if name.startswith("bulk"))
    assert had == pytest.approx(20.0 * MIB * (1 - PROMPT_SHARE), rel=0.05)
    await play.stop()


async def test_little_is_not_delayed_by_much() -> None:
    """A small blob among large ones waits for a piece of each at most, not for their ends."""
    play = Play(MIB)
    for number in range(8):
        play.run(f"large {number}", 100 * MIB, play.throttle.piece)
    await play.until(lambda: play.seconds >= 2.0)
    at, small = play.seconds, play.run("small", 2 * play.throttle.piece, play.throttle.piece)
    await play.until(small.done)
    assert play.seconds - at <= 2 * 9 * play.throttle.piece / MIB + 0.05
    await play.stop()


async def test_a_waiter_that_leaves_takes_nothing() -> None:
    play = Play(MIB)
    play.run("first", 4 * play.throttle.piece, 4 * play.throttle.piece)
    await asyncio.sleep(0)
    leaving = play.run("leaving", 10 * MIB, 10 * MIB)
    staying = play.run("staying", KIB, KIB)
    await until(lambda: play.throttle.waiting == 2)
    leaving.cancel()
    await asyncio.wait([leaving.task])
    await play.until(staying.done)
    assert play.seconds < 1.0
    assert play.moved["leaving"] == 0


async def test_one_that_leaves_as_its_turn_comes_gives_it_back() -> None:
    play = Play(MIB)
    play.run("first", MIB, MIB)
    await asyncio.sleep(0)
    leaving = play.run("leaving", 10 * MIB, 10 * MIB)
    await until(lambda: play.throttle.waiting == 1)
    play.clock.advance(2.0)
    play.throttle._serve()  # its bytes are taken, its task has not run yet
    assert play.throttle.waiting == 0
    leaving.cancel()
    await asyncio.wait([leaving.task])
    staying = play.run("staying", KIB, KIB)
    await staying.task
    assert play.moved == {"first": MIB, "staying": KIB}


async def test_waits_are_told_and_who_need_not_wait_costs_nothing() -> None:
    play = Play(MIB)
    await play.run("first", KIB, KIB).task
    assert play.waits == []
    assert play.throttle._timer is None
    second = play.run("second", 2 * MIB, MIB)
    await play.until(second.done)
    assert sum(play.waits) == pytest.approx(1.0, rel=0.1)


# -- one for each client -----------------------------------------------------------------------


async def test_each_party_has_a_rate_of_its_own_that_outlives_its_bodies() -> None:
    clock = FakeClock()
    throttles = Throttles(1000.0, clock=clock)
    with throttles.stream("ann", prompt=False) as ann, throttles.stream("bob", prompt=False) as bob:
        assert ann.throttle is not bob.throttle
        await ann.take(500)
    with throttles.stream("ann", prompt=False) as again:
        assert again.throttle is ann.throttle


async def test_parties_that_owe_nothing_are_forgotten() -> None:
    clock = FakeClock()
    throttles = Throttles(1000.0, clock=clock)
    with throttles.stream("here", prompt=False):
        for number in range(1000):
            with throttles.stream(str(number), prompt=False):
                pass
        with throttles.stream("debtor", prompt=False) as debtor:
            await debtor.take(1000)
        for number in range(1000):
            with throttles.stream(str(number), prompt=False):
                pass
        assert len(throttles) <= Throttles.LEAST + 1
        with throttles.stream("debtor", prompt=False) as again:
            assert again.throttle is debtor.throttle


# -- through the whole proxy -------------------------------------------------------------------


async def pace(clock: FakeClock, is_over: Callable[[], bool]) -> None:
    """Time passes in small steps until it is over."""
    while not is_over():
        clock.advance(0.01)
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stored", [False, True], ids=["miss", "hit"])
async def test_a_client_gets_no_more_than_its_rate(tmp_path: Path, *, stored: bool) -> None:
    clock = FakeClock()
    async with pulling(tmp_path, clock=clock, client_rate="4MiB/s") as (pool, fake):
        digest = fake.put_blob(NAME, noise(8 * MIB))
        if stored:
            keeping = asyncio.create_task(pool.get(blob_path(digest)))
            await pace(clock, keeping.done)
            await pool.stored()
            clock.advance(60.0)
        before = clock()
        asking = asyncio.create_task(pool.get(blob_path(digest)))
        await pace(clock, asking.done)
        assert asking.result().body == noise(8 * MIB)
        assert clock() - before >= 8 / 4 - 2 * BURST
        assert pool.count("throttled_seconds_total", side="client") > 1.0


async def test_a_client_that_is_held_back_holds_no_slot(tmp_path: Path) -> None:
    """The fill ends at the upstream's pace, and the socket is idle while the client waits."""
    clock = FakeClock()
    async with pulling(tmp_path, clock=clock, client_rate="1MiB/s") as (pool, fake):
        digest = fake.put_blob(NAME, noise(8 * MIB))
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path(digest))
            await client.until(lambda data: len(data) > KIB)
            await pool.stored()
            [gate] = pool.proxy.origins.states()
            assert (gate.active, gate.idle) == (0, 1)
            assert len(client.received) < 4 * MIB
            # And a manifest comes at once, though the clock stands still.
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest


@pytest.mark.parametrize("rate", ["1B/s", "1KiB/s", "63KiB/s"])
async def test_manifests_come_at_once_however_low_the_rate_is(tmp_path: Path, rate: str) -> None:
    clock = FakeClock()
    async with pulling(tmp_path, clock=clock, client_rate=rate) as (pool, _):
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path())
            await client.until(lambda data: len(data) > KIB)  # and the rest of it waits
            pulls = 2 + (48 * KIB) // len(IMAGE.manifest)
            for _ in range(pulls):
                assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
        assert pool.count("throttled_seconds_total", side="client") == 0


async def test_manifests_alone_keep_to_a_rate_too(tmp_path: Path) -> None:
    clock = FakeClock()
    async with pulling(tmp_path, clock=clock, client_rate="1B/s") as (pool, _):
        before, count = clock(), (256 * KIB) // len(IMAGE.manifest)

        async def pull_all() -> None:
            for _ in range(count):
                assert (await pool.get(manifest_path("v1"))).status == 200

        asking = asyncio.create_task(pull_all())
        await pace(clock, asking.done)
        await asking
        assert clock() - before >= 256 / 64 - 1.5  # a second's worth in advance


async def test_an_upstream_gives_no_more_than_its_rate_over_all_its_sockets(tmp_path: Path) -> None:
    clock = FakeClock()
    changes: Mapping[str, object] = {UPSTREAM: {"max_rate": "4MiB/s"}}
    async with pulling(tmp_path, clock=clock, upstreams=changes) as (pool, fake):
        digests = [fake.put_blob(NAME, noise(2 * MIB + n)) for n in range(4)]
        before = clock()
        asking = [asyncio.create_task(pool.get(blob_path(digest))) for digest in digests]
        await pace(clock, lambda: all(task.done() for task in asking))
        assert [task.result().body for task in asking] == [noise(2 * MIB + n) for n in range(4)]
        assert clock() - before >= 8 / 4 - 2 * BURST
        assert pool.count("throttled_seconds_total", side="upstream") > 1.0
        assert pool.count("upstream_stalls_total", upstream=fake.netloc) == 0


async def test_the_storage_behind_redirects_counts_towards_the_rate(tmp_path: Path) -> None:
    clock = FakeClock()
    changes: Mapping[str, object] = {UPSTREAM: {"max_rate": "4MiB/s"}}
    async with FakeRegistry() as cdn, FakeRegistry(redirect_blobs_to=cdn) as fake:
        digest = fake.put_blob(NAME, noise(4 * MIB))
        async with running(tmp_path, fake.url, clock=clock, upstreams=changes) as pool:
            before = clock()
            asking = asyncio.create_task(pool.get(blob_path(digest)))
            await pace(clock, asking.done)
            assert asking.result().body == noise(4 * MIB)
            assert clock() - before >= 4 / 4 - 2 * BURST
