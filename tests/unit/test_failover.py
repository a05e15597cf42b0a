"""What clients notice of a main URL that fails while another one is well: nothing. In virtual time,
with a whole proxy over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.testing import Answer as Scripted
from proxy.testing import Cut, Disconnect, FakeRegistry, Fault, Hang, Stall, make_image
from proxy.testing.faults import Action
from proxy.testing.images import FakeImage
from proxy.upstream.hurry import HASTE, WHOLE
from proxy.upstream.mirrored import LONGEST_WAIT, MirroredClient
from proxy.upstream.mirrors import LONGEST_PAUSE
from proxy.upstream.turns import TurnClass
from tests.unit.proxy_kit import (
    UPSTREAM,
    Answer,
    Pullpool,
    blob_path,
    manifest_path,
    running,
    until,
)
from tests.unit.upstream_kit import MIB, Mute, noise, refusing
from tests.unit.virtual import now, run_virtually

#: The header deadline, which clients have 10 s beyond of.
DEADLINE = 20.0
#: What a pull that meets no trouble takes at most.
PROMPT = 0.1
CROWD = [
    make_image(f"team/n{n}", "v1", layers=[1000], seed=100 + n, tarred=False) for n in range(40)
]
PAUSED = Scripted(503, {"Retry-After": "300"})
FAULTS: list[Action] = [
    Hang(),
    Stall(after=10),
    Scripted(500),
    Scripted(503),
    PAUSED,
    Scripted(429, {"Retry-After": "600"}),
    Disconnect(),
    Disconnect(reset=True),
    Cut(after=10),
]

Scenario = Callable[[Pullpool, FakeRegistry, FakeRegistry], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def pulling(
    directory: Path, url: str, second: FakeRegistry, **mine: Any
) -> AsyncIterator[Pullpool]:
    """A proxy whose upstream is at `url`, and well at the URL of `second`."""
    for image in CROWD:
        second.push(image)
    mine = {"url": url, "fallback_urls": [second.url], **mine}
    clock = asyncio.get_running_loop().time
    async with running(directory, "", clock=clock, pause=0.3, upstreams={UPSTREAM: mine}) as pool:
        yield pool


def play(directory: Path, scenario: Scenario, **mine: Any) -> None:
    """A scenario with two URLs that both have everything; none may take more sockets than it may,
    and nothing may be held at the end."""

    async def run() -> None:
        async with FakeRegistry() as first, FakeRegistry() as second:
            for image in CROWD:
                first.push(image)
            async with pulling(directory, first.url, second, **mine) as pool:
                await scenario(pool, first, second)
                first.release()
                second.release()
                await asyncio.sleep(1)
                assert all_free(pool)
                cap = mine.get("max_connections", 16)
                assert first.counters.peak_sockets <= cap
                assert second.counters.peak_sockets <= cap

    run_virtually(run())


def all_free(pool: Pullpool) -> bool:
    return not any(gate.active or sum(gate.depth.values()) for gate in pool.proxy.origins.states())


async def timed(pool: Pullpool, path: str) -> tuple[Answer, float]:
    began = now()
    return await pool.get(path), now() - began


def manifest_of(image: FakeImage) -> str:
    return manifest_path("v1", image.name)


def layer_of(image: FakeImage) -> str:
    return blob_path(image.layers[0].digest, image.name)


async def expect_crowd(pool: Pullpool, kind: str, most: float) -> None:
    """Everybody pulls something else at once, and is served within so many seconds."""
    path = manifest_of if kind == "manifests" else layer_of
    answers = await asyncio.gather(*(timed(pool, path(image)) for image in CROWD))
    for image, (answer, took) in zip(CROWD, answers, strict=True):
        expected = image.manifest if kind == "manifests" else image.layers[0].data
        assert (answer.status, answer.body) == (200, expected)
        assert took <= most


crowds = pytest.mark.parametrize("kind", ["manifests", "blobs"])
caps = pytest.mark.parametrize("cap", [1, 16])

# -- a crowd that finds the main URL bad ---------------------------------------------------------


@crowds
@caps
@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_crowd_is_served_whatever_the_main_url_does(
    tmp_path: Path, fault: Action, cap: int, kind: str
) -> None:
    async def scenario(pool: Pullpool, first: FakeRegistry, _second: FakeRegistry) -> None:
        first.script(Fault(fault, times=None))
        await expect_crowd(pool, kind, HASTE + 1)
        # Who waited there never asked; aiohttp asks once more on its own.
        assert first.counters.requests.total() <= 2 * min(cap, 4)

    play(tmp_path, scenario, max_connections=cap)


@crowds
@caps
def test_a_crowd_is_served_when_the_main_url_hangs_in_tls(
    tmp_path: Path, cap: int, kind: str
) -> None:
    async def run() -> None:
        with Mute() as mute:
            async with FakeRegistry() as second:
                mine = {"max_connections": cap, "connect_timeout": "1h"}
                async with pulling(tmp_path, mute.url, second, **mine) as pool:
                    await expect_crowd(pool, kind, HASTE + 1)
                    assert mute.peak <= cap

    run_virtually(run())


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """A URL at which connections are not refused, and never made."""
    with contextlib.ExitStack() as held:
        server = held.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(2):  # one more than the kernel takes for nobody
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@crowds
@caps
def test_a_crowd_is_served_when_the_main_url_hangs_in_connect(
    tmp_path: Path, cap: int, kind: str
) -> None:
    async def run() -> None:
        with black_hole() as url:
            async with FakeRegistry() as second:
                mine = {"max_connections": cap, "connect_timeout": "1h"}
                async with pulling(tmp_path, url, second, **mine) as pool:
                    await expect_crowd(pool, kind, HASTE + 1)

    run_virtually(run())


@crowds
@caps
def test_a_crowd_is_served_when_the_main_url_refuses(tmp_path: Path, cap: int, kind: str) -> None:
    async def run() -> None:
        with refusing() as url:
            async with (
                FakeRegistry() as second,
                pulling(tmp_path, url, second, max_connections=cap) as pool,
            ):
                await expect_crowd(pool, kind, 1)

    run_virtually(run())


@crowds
@caps
@pytest.mark.parametrize("slots", [1, 64], ids=lambda slots: f"{slots} of tokens")
def test_a_crowd_is_served_when_the_main_urls_token_service_hangs(
    tmp_path: Path, cap: int, kind: str, slots: int
) -> None:
    """Its own queue counts: behind one slot each token would wait for those before it."""

    async def run() -> None:
        async with (
            FakeRegistry() as tokens,
            FakeRegistry(auth="bearer", token_service=tokens) as first,
            FakeRegistry() as second,
        ):
            tokens.script(Fault(Hang(), times=None))
            for image in CROWD:
                first.push(image)
            mine = {"max_connections": cap, "max_redirect_connections": slots}
            async with pulling(tmp_path, first.url, second, **mine) as pool:
                await expect_crowd(pool, kind, HASTE + 1)
                assert tokens.counters.peak_sockets <= slots
                await asyncio.sleep(1)
                assert all_free(pool)

    run_virtually(run())


def test_a_crowd_is_served_when_all_but_the_last_of_three_urls_hang(tmp_path: Path) -> None:
    async def run() -> None:
        async with FakeRegistry() as first, FakeRegistry() as second, FakeRegistry() as third:
            for bad in (first, second):
                bad.script(Fault(Hang(), times=None))
            mine = {"max_connections": 1, "fallback_urls": [second.url, third.url]}
            async with pulling(tmp_path, first.url, third, **mine) as pool:
                await expect_crowd(pool, "manifests", 2 * HASTE + 1)
                # Both are due by now, but nobody tries two.
                await asyncio.sleep(2)
                _, took = await timed(pool, layer_of(CROWD[0]))
                assert took <= HASTE + PROMPT

    run_virtually(run())


@crowds
@caps
@pytest.mark.parametrize("urls", [5, 8])
def test_the_first_crowd_is_served_in_time_when_all_but_the_last_of_many_urls_hang(
    tmp_path: Path, kind: str, cap: int, urls: int
) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            fakes = [await stack.enter_async_context(FakeRegistry()) for _ in range(urls)]
            for bad in fakes[:-1]:
                bad.script(Fault(Hang(), times=None))
            mine = {"max_connections": cap, "fallback_urls": [one.url for one in fakes[1:]]}
            async with pulling(tmp_path, fakes[0].url, fakes[-1], **mine) as pool:
                await expect_crowd(pool, kind, WHOLE + 1)
                other = "blobs" if kind == "manifests" else "manifests"
                await expect_crowd(pool, other, HASTE + 1)  # which hang is known now

    run_virtually(run())


def test_what_waits_behind_a_body_that_has_come_to_a_halt_is_served(tmp_path: Path) -> None:
    """All slots are held by blobs that were well under way; the stall limit's 30 s is too long."""
    data = noise(8 * MIB)

    async def scenario(pool: Pullpool, first: FakeRegistry, second: FakeRegistry) -> None:
        digest, _ = (one.put_blob(CROWD[0].name, data) for one in (first, second))
        first.script(Fault(Stall(after=4 * MIB), kind="blob", times=None))
        pulling_one = asyncio.create_task(timed(pool, blob_path(digest, CROWD[0].name)))
        await first.stalls.arrived()
        await expect_crowd(pool, "manifests", HASTE + 1)
        answer, took = await pulling_one
        assert answer.body == data
        assert took <= HASTE + 1
        [seen] = [one for one in second.counters.seen if "Range" in one.headers]
        assert int(seen.headers["Range"].removeprefix("bytes=").partition("-")[0]) >= 1 * MIB

    play(tmp_path, scenario, max_connections=1)


# -- a main URL that stays bad, or comes and goes ------------------------------------------------


# One of each way to fail: no answer, one that asks for a pause, none at all, half of one.
@pytest.mark.parametrize("fault", [Hang(), PAUSED, Disconnect(reset=True), Cut(after=10)], ids=repr)
def test_a_url_that_is_well_again_is_found_by_single_trials_that_fail_nobody(
    tmp_path: Path, fault: Action
) -> None:
    async def scenario(pool: Pullpool, first: FakeRegistry, _second: FakeRegistry) -> None:
        first.script(Fault(fault, times=None))
        assert (await pool.get(manifest_of(CROWD[0]))).status == 200
        pulls = []
        for image in CROWD[1:]:
            for path in (manifest_of(image), layer_of(image)):
                pulls.append(asyncio.create_task(timed(pool, path)))
                await asyncio.sleep(1)
        answers = await asyncio.gather(*pulls)
        assert {answer.status for answer, _ in answers} == {200}
        slow = [took for _, took in answers if took > PROMPT]
        assert max(slow, default=0.0) <= HASTE + 0.5
        assert len(slow) <= 6  # in 78 s, as the pauses between the trials double
        first.clear_script()
        first.release()
        await asyncio.sleep(2 * LONGEST_PAUSE)
        before = Counter(first.counters.requests)
        answer, took = await timed(pool, f"/v2/{CROWD[0].name}/tags/list")
        assert (answer.status, took <= PROMPT) == (200, True)
        assert (first.counters.requests - before).total() == 1
        assert client_of(pool).best(TurnClass.METADATA) == 0

    play(tmp_path, scenario)


def client_of(pool: Pullpool) -> MirroredClient:
    [client] = pool.proxy.clients.values()
    return client


@caps
@pytest.mark.parametrize("fault", [Hang(), PAUSED, Scripted(500)], ids=repr)
def test_a_url_that_comes_and_goes_fails_nobody(tmp_path: Path, fault: Action, cap: int) -> None:
    async def scenario(pool: Pullpool, first: FakeRegistry, _second: FakeRegistry) -> None:
        pulls: list[asyncio.Task[tuple[Answer, float]]] = []
        for n, image in enumerate(CROWD):
            if n % 7 == 0:
                first.clear_script()
                first.release()
            elif n % 7 == 3:
                first.script(Fault(fault, times=None))
            paths = (manifest_of(image), layer_of(image))
            pulls.extend(asyncio.create_task(timed(pool, path)) for path in paths)
            await asyncio.sleep(1)
        answers = await asyncio.gather(*pulls)
        assert {answer.status for answer, _ in answers} == {200}
        assert max(took for _, took in answers) <= 2 * HASTE + 1

    play(tmp_path, scenario, max_connections=cap)


def test_blobs_that_wait_at_a_url_leave_it_when_it_asks_for_a_pause(tmp_path: Path) -> None:
    async def scenario(pool: Pullpool, first: FakeRegistry, second: FakeRegistry) -> None:
        held = first.hold(kind="blob")
        pulls = [asyncio.create_task(timed(pool, layer_of(image))) for image in CROWD]
        await held.arrived()
        first.script(Fault(PAUSED, times=None))
        began = now()
        held.release()
        answers = await asyncio.gather(*pulls)
        assert {answer.status for answer, _ in answers} == {200}
        assert now() - began <= 1
        assert second.counters.count("blob") >= len(CROWD) - 2

    play(tmp_path, scenario, max_connections=1)


def test_a_short_question_does_not_wait_for_ever_at_a_url_that_is_well(tmp_path: Path) -> None:
    """Behind a body that cannot be cut. It is asked elsewhere in time for its client, and the URL
    stays the one that is used."""

    async def run() -> None:
        data = noise(5 * MIB // 2)  # takes 26 s
        async with FakeRegistry(ranges=False, rate=100_000) as first, FakeRegistry() as second:
            digest = first.put_blob(CROWD[0].name, data)
            async with pulling(tmp_path, first.url, second, max_connections=1) as pool:
                slow = asyncio.create_task(timed(pool, blob_path(digest, CROWD[0].name)))
                await until(lambda: first.counters.count("blob") > 0)
                answer, took = await timed(pool, manifest_of(CROWD[1]))
                assert answer.status == 200
                assert took == pytest.approx(LONGEST_WAIT, abs=1)
                answer, took = await slow
                assert answer.body == data
                assert took > DEADLINE
                assert client_of(pool).mirrors.is_up(0)
                assert second.counters.count("blob") == 0

    run_virtually(run())


# -- no URL is well ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*FAULTS, Scripted(404), Scripted(403)], ids=repr)
def test_with_all_urls_bad_it_is_as_with_one(tmp_path: Path, fault: Action) -> None:
    """Or quicker: another URL is one more try."""

    def outcome(name: str, **mine: Any) -> tuple[int, float, bool]:
        found = []

        async def scenario(pool: Pullpool, first: FakeRegistry, second: FakeRegistry) -> None:
            for one in (first, second):
                one.script(Fault(fault, times=None))
            answer, took = await timed(pool, manifest_of(CROWD[0]))
            found.append((answer.status, took, "Retry-After" in answer.headers))

        play(tmp_path / name, scenario, **mine)
        return found[0]

    alone = outcome("one", fallback_urls=[])
    both = outcome("two")
    assert (both[0], both[2]) == (alone[0], alone[2])
    assert both[1] <= alone[1] + PROMPT


def test_after_an_outage_of_everything_the_main_url_is_soon_used_again(tmp_path: Path) -> None:
    """Pauses double, so that no more than the outage lasted goes by before it is tried."""

    async def scenario(pool: Pullpool, first: FakeRegistry, second: FakeRegistry) -> None:
        began = asyncio.get_running_loop().time()
        for one in (first, second):
            one.script(Fault(Disconnect(), times=None))
        for image in CROWD[:10]:
            assert (await pool.get(manifest_of(image))).status >= 500
            await asyncio.sleep(0.5)
        for one in (first, second):
            one.clear_script()
        await asyncio.sleep(asyncio.get_running_loop().time() - began)
        assert (await pool.get(manifest_of(CROWD[20]))).status == 200
        before = len(second.counters.seen)
        assert (await pool.get(manifest_of(CROWD[21]))).status == 200
        assert len(second.counters.seen) == before

    play(tmp_path, scenario)


# -- cancellation --------------------------------------------------------------------------------


@crowds
@pytest.mark.parametrize("seconds", [0.0, 0.01, HASTE - 0.1, HASTE, HASTE + 0.01])
def test_who_leaves_takes_nothing_along(tmp_path: Path, kind: str, seconds: float) -> None:
    """In the queue, while asking, and in the moment in which everybody moves on."""
    path = manifest_of if kind == "manifests" else layer_of

    async def scenario(pool: Pullpool, first: FakeRegistry, second: FakeRegistry) -> None:
        for one in (first, second):
            one.script(Fault(Hang(), times=None))
        pulls = [asyncio.create_task(pool.get(path(image))) for image in CROWD]
        while not first.counters.requests:  # noqa: ASYNC110 -- of a real socket
            await asyncio.sleep(0)
        await asyncio.sleep(seconds)
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)
        for one in (first, second):
            one.clear_script()
            one.release()
        await asyncio.sleep(60)
        assert all_free(pool)
        await expect_crowd(pool, kind, 2)

    play(tmp_path, scenario, max_connections=2)
