"""How long a start waits for whoever holds the cache directory."""

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.pull.deadlines import Deadlines
from proxy.seat import is_sibling
from proxy.store.lock import CacheDirBusy
from proxy.team.front import Front
from proxy.team.leader import Leader
from proxy.team.roles import Roles
from tests.unit.store_kit import silent


class Opened(Exception):
    """The directory was free at last."""


async def start(directory: Path, *, sibling: bool) -> None:
    """Start without patience where another process needs four looks long to listen, or to go."""
    looks = iter(range(4))

    async def lead(_: AsyncExitStack) -> Leader:
        if next(looks, None) is None:
            raise Opened
        raise CacheDirBusy(directory, 4711)

    roles = Roles(
        Front(Deadlines()),
        lead=lead,
        directory=directory,
        settings="",
        memory=0,
        log=silent(),
        patience=0.0,
        is_sibling=lambda pid: sibling and pid == 4711,
    )
    try:
        await roles.start()
    finally:
        await roles.close()


async def test_a_start_waits_for_another_worker_that_opens_a_large_store(tmp_path: Path) -> None:
    with pytest.raises(Opened):
        await start(tmp_path, sibling=True)


async def test_a_start_does_not_wait_for_a_stranger_that_does_not_listen(tmp_path: Path) -> None:
    with pytest.raises(CacheDirBusy):
        await start(tmp_path, sibling=False)


def test_a_sibling_is_a_process_of_our_parent() -> None:
    assert is_sibling(os.getpid())
    assert not is_sibling(os.getppid())
    assert not is_sibling(1 << 30)
