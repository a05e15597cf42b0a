"""For every test: which event loops it runs on, what it must not do there, what it must not leave.

Unit tests that are coroutines run twice: on asyncio's own loop in debug mode, which finds what was
never awaited and what is called from the wrong thread, and on the loop that serves, uvloop with
aiofastnet, whose transports behave otherwise at the edges. Whatever of ours blocks either loop is
an error (blockbuster), and so is a task or an unheard exception that outlives its test.

What Hypothesis tries is the same each time, so that a change fails by what it changed and not by
what somebody else's luck has found. To look for more: ``tests/run --hypothesis-profile hunt``.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import settings
from pytest_asyncio import is_async_test
from xdist.scheduler import LoadScopeScheduling

from proxy.loop import loop_factory
from tests.unit.proxy_kit import Served, pulling
from tests.unit.redis_kit import Cluster, Server, apart, redis_cluster, redis_server

settings.register_profile("hunt", print_blob=True, deadline=None)
settings.register_profile("same", derandomize=True, print_blob=True, deadline=None)
settings.load_profile("same")  # pytest's option comes later, and wins

UNIT = Path(__file__).parent / "unit"
ONCE = ("one_loop", "real_seconds")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def debugged_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    return loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, LoopFactory]:
    """The loops that a test runs on; both for unit tests, the first alone for the others. Tests
    that wait for what takes real seconds (leases that end), that look at processes with loops of
    their own, or that have no socket, run on the loop that serves alone: twice says no more."""
    if not item.path.is_relative_to(UNIT):
        return {"asyncio": asyncio.new_event_loop}
    if any(map(item.get_closest_marker, ONCE)):
        return {"uvloop": loop_factory(fast_transport=True)}
    return {"asyncio": debugged_loop, "uvloop": loop_factory(fast_transport=True)}


class _Together(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Tests go wherever there is time, but for those with real parts: all of them go to one
    process, one after the other, because some of them look at the whole machine."""

    def _split_scope(self, nodeid: str) -> str:
        return "real parts" if nodeid.startswith("tests/integration/") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Together:
    return _Together(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Guards for the coroutines among the unit tests; the others would only pay for a loop."""
    for item in items:
        if is_async_test(item) and item.path.is_relative_to(UNIT):
            # In front, so that they are set up first and look around last.
            item.fixturenames[:0] = ["nothing_blocks", "nothing_is_left"]


@pytest.fixture
def nothing_blocks() -> Iterator[None]:
    """Calls of ours that block the loop raise; the fake registry may read what it likes."""
    with blockbuster_ctx(scanned_modules=["proxy"], excluded_modules=["proxy.testing"]):
        yield


@pytest.fixture
async def nothing_is_left() -> AsyncIterator[None]:
    """No task outlives the test, and no exception goes unheard."""
    loop, unheard = asyncio.get_running_loop(), list[str]()
    loop.set_exception_handler(
        lambda _, context: unheard.append(f"{context['message']}: {context.get('exception')!r}")
    )
    before = asyncio.all_tasks()
    yield
    # A transport that was aborted, a task that was cancelled: they end within some turns.
    for _ in range(20):
        await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    gc.collect()  # what was never retrieved is only said when it is collected
    gc.freeze()  # what is left is there to stay: looking through it after each test takes longer
    await asyncio.sleep(0)
    assert not left, f"tasks outlive the test: {left}"
    assert not unheard, f"errors that nobody waited for: {unheard}"


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For tests that only put keys into it, one after the other: they begin with ``flush``."""
    with apart(redis_server(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The same, of several servers."""
    with apart(redis_cluster(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A whole proxy on free ports with an empty cache, in front of a fake registry."""
    async with pulling(tmp_path / "cache") as pair:
        yield pair
