"""What the tests of leases share: the script with a clock and a server of the test's own, against
a real redis-server."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import redis

from proxy.fleet.lease_call import Call, CapNews, Granted, reserve_of
from proxy.fleet.lease_script import BODY, KEYS, SCRIPT
from proxy.fleet.leases import Asks
from proxy.fleet.ledger import Terms
from proxy.fleet.script import root_of

#: The script's prologue, where the test says what time it is and which server answers.
PROLOGUE = "local wall, server = tonumber(ARGV[2]), ARGV[3]\n"

_labels = itertools.count()


class Desk:
    """One origin's leases in a real server, at a time that the test decides."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._script = client.register_script(PROLOGUE + BODY)
        self.root = root_of(f"origin test-{next(_labels)}")
        self.keys = [f"{self.root}:{name}" for name in KEYS]
        self.wall = 1_700_000_000.0
        self.server = "one"
        self._epochs = itertools.count()

    def call(self, call: Call, terms: Terms) -> Granted | None:
        args: list[str | int] = [call.encoded(terms), round(self.wall * 1000), self.server]
        return Granted.decoded(self._script(keys=[self.root], args=args))

    def flush(self) -> None:
        self._client.delete(*self.keys)

    def replace(self, state: list[bytes | None] | None = None) -> None:
        """Another server takes over, with nothing, or with what ``state`` was once."""
        self.flush()
        self.server = f"server {next(self._epochs)}"
        for key, value in zip(self.keys, state or [], strict=False):
            if value is not None:
                self._client.restore(key, 0, value)

    def state(self) -> list[bytes | None]:
        return [self._client.dump(key) for key in self.keys]


def plain_call(node: str, seq: int, *, cap: int, held: int = 0, want: int = 0, **more: int) -> Call:
    """A call about leases only."""
    news = CapNews(limit=cap)
    metadata = more.get("metadata", 0)
    reserve = more.get("reserve", reserve_of(cap))
    return Call(node, seq, cap, reserve, held, want, metadata, news)


async def settle(directory: Asks, label: str, cap: int, limit: int | None = None) -> None:
    """Be done with the first epoch of an origin, in which nothing is granted."""
    brief = replace(Terms(), lease=0.004, margin=0.002, hold=0.004, lag=0.0)
    for seq in range(1, 20):
        call = replace(plain_call("nobody", seq, cap=cap), news=CapNews(limit=limit or cap))
        text = await directory.run(SCRIPT, f"origin {label}", [call.encoded(brief)])
        granted = Granted.decoded(text)
        if granted is not None and not granted.calm:
            break
        await asyncio.sleep(0.002)
    call = replace(plain_call("nobody", 99, cap=cap), leaves=True)
    await directory.run(SCRIPT, f"origin {label}", [call.encoded(brief)])
