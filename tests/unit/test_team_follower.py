"""A follower's end of the channel, opposite a bare socket."""

import asyncio
import socket

import pytest

from proxy.oci.digest import Digest
from proxy.pull.asks import Ask
from proxy.team.follower import LeaderGone, Remote
from proxy.upstream.routing import Route, Upstream

UP = Upstream("harbor.example.com", "https://harbor.example.com")
ROUTE = Route(UP, "team/app", "team/app", None)


async def test_a_request_that_finds_the_leader_dead_asks_the_next_one_at_once() -> None:
    """Its own sending is what finds it: the loop has not come to the end of the stream yet."""
    ours, leaders = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    remote = Remote(ours)
    leaders.close()
    ask = Ask(ROUTE, "10.0.0.1", asyncio.get_running_loop().time())
    with pytest.raises(LeaderGone):
        await remote.blob(ask, Digest.of(b"x"), None, head=False)
    assert await remote.lost()
    assert "0 calls" in repr(remote)
