"""Cancelled wherever it waits, a flight leaves no task, no file, no lease, no slot behind.

Each test runs its scenario again and again, cancelling one coroutine at its first suspension, then
at its second, and so on until it runs through.
"""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from proxy.oci.errors import ShuttingDown, UpstreamUnavailable
from tests.unit.flight_kit import KIB, Act, Rig, ScriptedSource, Sipper, drink, ended, flying
from tests.unit.store_kit import blob

pytestmark = pytest.mark.one_loop  # sources are scripted: there is no socket

DATA = blob(1, 40 * KIB + 7)
Fills = Coroutine[Any, Any, Any]


class Knife:
    """Cancels what it wraps at its ``at``-th suspension; with ``again`` at every later one too."""

    def __init__(self, at: int, *, again: bool = False) -> None:
        self.at = at
        self.again = again
        self.has_cut = False

    def wrap(self, coroutine: Fills) -> Fills:
        async def wrapped() -> Any:
            return await self._drive(coroutine)

        return wrapped()

    @types.coroutine
    def _drive(self, coroutine: Fills) -> Generator[Any, Any, Any]:
        step: Callable[[], Any] = lambda: coroutine.send(None)  # noqa: E731 -- it is replaced below
        for suspension in count(1):
            try:
                awaited = step()
            except StopIteration as stop:
                return stop.value
            if suspension == self.at or (self.again and suspension > self.at):
                self.has_cut = True
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield awaited
                step = lambda: coroutine.send(None)  # noqa: E731
            except BaseException as thrown:
                step = _thrower(coroutine, thrown)
        return None


def _thrower(coroutine: Fills, error: BaseException) -> Callable[[], Any]:
    return lambda: coroutine.throw(error)


def cut_tasks(knife: Knife, *names: str) -> None:
    """From now on the knife is at the coroutines of these qualified names."""

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        if getattr(coroutine, "__qualname__", "") in names:
            coroutine = knife.wrap(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(make)


def whole(_rig: Rig) -> ScriptedSource:
    return ScriptedSource(DATA, turn_bytes=16 * KIB)


def breaking(_rig: Rig) -> ScriptedSource:
    acts = [Act(breaks=10 * KIB), Act(error=UpstreamUnavailable("reset")), Act(breaks=10 * KIB)]
    return ScriptedSource(DATA, acts=acts)


def without_range(_rig: Rig) -> ScriptedSource:
    return ScriptedSource(DATA, serves_ranges=False, says_size=False, acts=[Act(breaks=9 * KIB)])


SCENARIOS = [whole, breaking, without_range]
ROOMS = [64 << 20, KIB]


async def pull(rig: Rig, source: ScriptedSource, client: str) -> bytes | None:
    try:
        return await rig.pull(source, client)
    except ShuttingDown:
        return None


async def settle(rig: Rig) -> None:
    """Wait until every fill has given everything back."""
    for reader in rig.readers:
        await ended(reader.flight)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_fill_that_is_cancelled_anywhere_leaves_nothing(
    tmp_path: Path,
    scenario: Callable[[Rig], ScriptedSource],
    room: int,
    again: bool,
) -> None:
    for at in count(1):
        knife = Knife(at, again=again)
        async with flying(tmp_path / str(at), max_size=room, window=8 * KIB) as rig:
            cut_tasks(knife, "Flight._run")
            source = scenario(rig)
            got = await asyncio.gather(*[pull(rig, source, name) for name in ("alice", "bob")])
            assert set(got) <= {None, DATA}
            await settle(rig)
            assert source.active == source.waiting == 0
            kept = await rig.kept(source.digest)
            assert kept in (None, DATA)
            asyncio.get_running_loop().set_task_factory(None)
            assert await rig.pull(scenario(rig)) == DATA  # and the next one is served
        if not knife.has_cut:
            assert got == [DATA, DATA]
            assert at > 1, "the knife never came near it"
            return


@pytest.mark.parametrize("on_abandon", ["finish", "cancel"])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_reader_that_is_cancelled_anywhere_takes_nobody_with_it(
    tmp_path: Path, scenario: Callable[[Rig], ScriptedSource], room: int, on_abandon: str
) -> None:
    for at in count(1):
        knife = Knife(at)
        async with flying(
            tmp_path / str(at), max_size=room, window=8 * KIB, far=8 * KIB, on_abandon=on_abandon
        ) as rig:
            source = scenario(rig)
            stays = asyncio.create_task(rig.pull(source, "stays"))
            goes = asyncio.create_task(knife.wrap(rig.pull(source, "goes", 20 * KIB, 39 * KIB)))
            await asyncio.wait([goes, stays])
            assert await stays == DATA
            if not knife.has_cut:
                assert await goes == DATA[20 * KIB : 39 * KIB]
                return
            assert goes.cancelled()


@pytest.mark.parametrize("on_abandon", ["finish", "cancel"])
@pytest.mark.parametrize("room", ROOMS)
async def test_a_lone_reader_that_is_cancelled_anywhere_leaves_nothing(
    tmp_path: Path, room: int, on_abandon: str
) -> None:
    for at in count(1):
        knife = Knife(at)
        async with flying(
            tmp_path / str(at), max_size=room, window=8 * KIB, on_abandon=on_abandon
        ) as rig:
            source = whole(rig)
            goes = asyncio.create_task(knife.wrap(rig.pull(source)))
            await asyncio.gather(goes, return_exceptions=True)
            await settle(rig)
            assert source.active == source.waiting == 0
            if on_abandon == "finish" and room > len(DATA):
                assert await rig.kept(source.digest) == DATA
        if not knife.has_cut:
            return


async def test_readers_who_stop_in_the_middle_of_turns_of_their_own_leave_nothing(
    tmp_path: Path,
) -> None:
    for serves_ranges in (True, False):
        directory = tmp_path / str(serves_ranges)
        async with flying(directory, max_size=KIB, window=8 * KIB, far=8 * KIB) as rig:
            source = ScriptedSource(DATA, serves_ranges=serves_ranges, chunk=KIB)
            stays = rig.join(source, "stays")
            goes = Sipper(rig.join(source, "goes"), 30 * KIB, 39 * KIB)
            assert await goes.sip()
            await goes.leave()
            assert await drink(stays) == DATA


async def test_closing_while_fills_are_everywhere_leaves_nothing(tmp_path: Path) -> None:
    for steps in range(0, 120, 3):
        async with flying(tmp_path / str(steps), max_size=60 * KIB, window=8 * KIB) as rig:
            sources = [
                ScriptedSource(blob(n, 30 * KIB), serves_ranges=n % 2 == 0) for n in range(4)
            ]
            pulls = [
                asyncio.create_task(pull(rig, source, client))
                for source in sources
                for client in ("alice", "bob")
            ]
            for _ in range(steps):
                await asyncio.sleep(0)
            await rig.flights.close()
            await asyncio.gather(*pulls)
            assert not any(source.active for source in sources)
