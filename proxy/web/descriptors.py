"""How many descriptors there are, and which of them are not for clients.

A client is a socket and, while it gets a stored blob, an open file. What serves it needs others:
sockets to upstreams, files that are being filled, the index, the admin listener. If clients took
them all, those who are already here would fail too; so a listener leaves a reserve.

Nothing is counted for that. The kernel gives the lowest number that is free to whatever is opened
(POSIX), so a socket that was accepted as number ``n`` says that at least ``n`` others are open,
whoever opened them.
"""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass

#: What a process has open without any pull: the index, loop, listeners, log, threads at work.
BASE = 64
#: The part of all descriptors that clients leave to files: stored blobs that go out, fills.
FILES = 0.25
#: The most that is kept from clients, whatever the settings want: at a low limit they share.
MOST = 0.5


@dataclass(frozen=True, slots=True)
class Descriptors:
    """``limit`` is how many the process may have open, ``reserve`` how many no client gets."""

    limit: int
    reserve: int = 0

    def are_short(self, lowest: int) -> bool:
        """Is ``lowest``, which was free when it was given, one of the reserve?"""
        return lowest >= self.limit - self.reserve

    def left(self, lowest: int) -> int:
        """How many more clients there is room for, if ``lowest`` is the lowest free one."""
        return max(0, self.limit - self.reserve - lowest)


def for_clients(limit: int, upstream_sockets: int) -> Descriptors:
    """What a listener for clients may use where ``upstream_sockets`` may be open besides."""
    wanted = BASE + upstream_sockets + int(limit * FILES)
    return Descriptors(limit, min(wanted, int(limit * MOST)))


def lowest_free(open_one: int) -> int:
    """The lowest free descriptor. Raises ``OSError`` if there is none; ``open_one`` is any."""
    number = os.dup(open_one)
    os.close(number)
    return number


def raise_limit() -> int:
    """Have as many descriptors as we may; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # then the soft limit has to do
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return current_limit()


def reachable_limit() -> int:
    """How many a start would come to. This process goes on with as many as it had."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return raise_limit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def current_limit() -> int:
    """How many descriptors this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
