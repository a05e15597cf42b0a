"""Who is in the fleet: every node says so every few seconds, and is gone when it says so no more.

Theory of operation. A node *beats*: one script enters what it is and what it bears, with an expiry
by the server's clock, and takes out whom nobody has heard of for that long. So a directory that was
flushed, or started again, knows everybody after one beat, and a node that dies is missed after
``EXPIRY`` without anybody watching it. Beats have jitter, so that nodes that began together drift
apart. A node that ends takes itself out.

The list of all nodes is read more rarely the longer it is, ``EACH`` seconds for each of them: what
a fleet reads in all grows with its size, not with its square. While the directory is down the last
list stands (``as_of`` tells how old it is).

The directory has an *epoch*: a name that the first to beat gives it, and that it keeps as long as
anybody beats. Another one says that it is new, or has forgotten everything.

Keys, all of the tag ``members``: ``:beats``, node ids by the time they expire (milliseconds),
``:nodes``, what each says of itself (JSON), and ``:epoch``. All of them expire as a whole, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from proxy.fleet.directory import Directory
from proxy.fleet.script import Argument, Script
from proxy.observe.metrics import Metrics
from proxy.oci.errors import DirectoryDown

TAG = "members"
#: Seconds between two beats, and after which a node that does not beat is gone.
BEAT, EXPIRY = 3.0, 10.0
#: Seconds for each node of the list between two looks at it; it is read with a beat at most.
EACH = 0.1
#: Characters of what a node says of itself that are read.
MAX_NODE = 2048

# How a script learns the time. Everything it does follows from its arguments and that.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local beats, nodes = KEYS[1] .. ':beats', KEYS[1] .. ':nodes'
"""
_BEAT = Script(
    "members_beat",
    _NOW
    + """
local gone = redis.call('ZRANGEBYSCORE', beats, '-inf', now, 'LIMIT', 0, 1000)
for _, id in ipairs(gone) do
  redis.call('ZREM', beats, id)
  redis.call('HDEL', nodes, id)
end
redis.call('ZADD', beats, now + ARGV[3], ARGV[1])
redis.call('HSET', nodes, ARGV[1], ARGV[2])
redis.call('PEXPIRE', beats, 10 * ARGV[3])
redis.call('PEXPIRE', nodes, 10 * ARGV[3])
local epoch = KEYS[1] .. ':epoch'
redis.call('SET', epoch, ARGV[4], 'NX')
redis.call('PEXPIRE', epoch, 10 * ARGV[3])
return {redis.call('ZCARD', beats), redis.call('GET', epoch)}
""",
)
_LIST = Script(
    "members_list",
    _NOW
    + """
local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', beats, '(' .. now, '+inf')) do
  local node = redis.call('HGET', nodes, id)
  if node then
    found[#found + 1] = id
    found[#found + 1] = node
  end
end
return found
""",
)
_LEAVE = Script(
    "members_leave",
    """
redis.call('ZREM', KEYS[1] .. ':beats', ARGV[1])
redis.call('HDEL', KEYS[1] .. ':nodes', ARGV[1])
return 1
""",
)


@dataclass(frozen=True, slots=True)
class Load:
    """What a node bears: bytes a second that it lends to others, and flights of its own."""

    lending: int = 0
    flights: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """One node; ``id`` is new each time it begins."""

    id: str
    name: str
    zone: str
    url: str
    version: str
    load: Load = Load()

    def said(self) -> str:
        """What it says of itself; its id stands beside it."""
        words = asdict(self)
        del words["id"]
        return json.dumps(words, separators=(",", ":"))

    @classmethod
    def heard(cls, id: str, text: bytes) -> Self | None:
        """What another node said; None when it is nothing that a node says."""
        try:
            words = json.loads(text[:MAX_NODE])
            load = words.pop("load")
            node = cls(id=id, load=Load(int(load["lending"]), int(load["flights"])), **words)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            return None
        texts = (node.name, node.zone, node.url, node.version)
        return node if all(isinstance(text, str) for text in texts) else None


def new_id() -> str:
    """16 hex digits that no other node has."""
    return secrets.token_hex(8)


class Members:
    """``async with Members(…)``: this node is in the fleet while the block lasts."""

    def __init__(
        self,
        directory: Directory,
        node: Node,
        *,
        load: Callable[[], Load] = Load,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
        beat: float = BEAT,
        expiry: float = EXPIRY,
    ) -> None:
        """``load`` is asked at every beat."""
        self.node = node
        self.known: tuple[Node, ...] = (node,)  # as last heard, this one included
        self._directory = directory
        self._load = load
        self._metrics = metrics.fleet
        self._clock = clock
        self._chance = chance or random.Random()
        self._beat = beat
        self._expiry = expiry
        self.count = 1  # of all nodes, at the last beat
        self.epoch = ""  # of the directory, at the last beat
        self._turned = asyncio.Event()
        self._read_at: float | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Members {self.node.name} ({self.node.id}) known={len(self.known)}>"

    @property
    def as_of(self) -> float | None:
        """How many seconds ago the list was read; None: not yet."""
        return None if self._read_at is None else self._clock() - self._read_at

    async def __aenter__(self) -> Self:
        """Begin to beat; that the directory is down is no error."""
        self._task = asyncio.create_task(self._beats(), name="fleet members")
        self._metrics.observe_members(lambda: len(self.known))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()
        with contextlib.suppress(DirectoryDown):  # then it expires
            await self._directory.run(_LEAVE, TAG, [self.node.id])

    async def stop(self) -> None:
        """Beat no more; the others miss this node when it expires."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _beats(self) -> None:
        while True:
            with contextlib.suppress(DirectoryDown):
                await self.beat()
            await asyncio.sleep(self._beat * (0.9 + 0.2 * self._chance.random()))

    async def beat(self) -> None:
        """Say that this node lives, and look who else does when it is time. DirectoryDown."""
        self.node = replace(self.node, load=self._load())
        expiry = round(self._expiry * 1000)
        args: list[Argument] = [self.node.id, self.node.said(), expiry, new_id()]
        count, epoch = await self._directory.run(_BEAT, TAG, args)
        is_new = epoch.decode() != self.epoch
        # Those whom a directory that is new has not heard yet are there all the same.
        self.count = self._directory.nodes = max(count, self.count) if is_new else count
        if is_new:
            self.epoch = epoch.decode()
            self._turned.set()
        age = self.as_of
        if age is None or age >= EACH * self.count:
            await self.look()

    async def turned(self, epoch: str) -> str:
        """Wait until the directory's epoch is another one, and which."""
        while self.epoch in ("", epoch):
            self._turned.clear()
            await self._turned.wait()
        return self.epoch

    async def look(self) -> tuple[Node, ...]:
        """Read who lives now, in the order of their names. DirectoryDown."""
        reply = await self._directory.run(_LIST, TAG)
        ids, texts = reply[::2], reply[1::2]
        heard = (Node.heard(id.decode(), text) for id, text in zip(ids, texts, strict=True))
        others = [node for node in heard if node is not None and node.id != self.node.id]
        self._read_at = self._clock()
        self.known = tuple(sorted([self.node, *others], key=lambda node: (node.name, node.id)))
        return self.known

    def status(self) -> dict[str, Any]:
        """For `/api/v1/status`."""
        age = self.as_of
        return {
            "directory": {
                "url": str(self._directory.place),
                "up": self._directory.is_up,
                "error": self._directory.why_down,
            },
            "node": self.node.id,
            "as_of": None if age is None else round(age, 1),
            "nodes": [asdict(node) for node in self.known],
        }
