"""What the tests of several processes on one cache share: proxies side by side in one process.

Each has a loop's worth of everything of its own, as processes have; what they share is the cache
directory. That they are not processes changes nothing for flock, which belongs to the open file,
and nothing for the socket.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from proxy.testing import FakeRegistry
from tests.unit.proxy_kit import IMAGE, SHA512, Pullpool, running, until

Pair = tuple[Pullpool, Pullpool, FakeRegistry]


@contextlib.asynccontextmanager
async def pair(
    directory: Path, **changes: Any
) -> AsyncIterator[tuple[Pullpool, Pullpool, FakeRegistry]]:
    """A leader, a follower, and the registry behind them."""
    async with FakeRegistry() as fake:
        fake.push(IMAGE)
        fake.push(SHA512)
        async with (
            running(directory, fake.url, **changes) as leader,
            running(directory, fake.url, **changes) as follower,
        ):
            assert leader.proxy.front.leads
            assert not follower.proxy.front.leads
            yield leader, follower, fake


async def leading(pool: Pullpool) -> None:
    """Wait until this one leads."""
    await until(lambda: pool.proxy.front.leads)


async def calls(leader: Pullpool, count: int) -> None:
    """Wait until so many calls of followers are open at the leader."""
    await until(lambda: open_calls(leader) == count)


def open_calls(leader: Pullpool) -> int:
    return sum(task.get_name().startswith("call ") for task in asyncio.all_tasks())
