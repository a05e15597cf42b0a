"""Orders: what one node is told to do, and others are to do with it (DESIGN D16, D19).

An order names nodes and holds a document that only the pull layer reads. The node that gives it
enters it in the directory, and again and again while it wants it done; every node looks at the list
of orders that there are, which is short, and reads those that it has not read. Beside an order
stands what each node reports of it. ``pull/giving_orders.py`` gives, ``pull/taking_orders.py``
takes.

Trust: the directory has none. Orders and reports are *sealed* with a key made of the fleet's
secret, over what they are, of which order and node, and the time. Who can write to the directory
can show an old one again for ``LIFE`` and a little; an order is taken once, so that does nothing.
Names of images are in it as they are: it can read those of orders that are under way.

A node is known here by its *place*: what it is called and where it is reached. Its id is another
each time it leads; its place is not, and so an order outlives a restart of whoever is to do it.

Keys: of the tag ``orders`` ``:live`` (order ids by the time they expire), ``:marks`` (which of an
order's words stands there) and ``:sealed``; of the tag ``order ID`` ``:reports``, by place.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, Self

from proxy.fleet.script import Argument, Script
from proxy.fleet.secret import Derived, Secret

if TYPE_CHECKING:  # it needs the extra
    from proxy.fleet.members import Node

TAG = "orders"
#: Seconds that an order stands without being given again, and a report without being made again.
LIFE = 60.0
#: Seconds that clocks of two nodes may differ.
SKEW = 30.0
#: Orders at a time, at most.
MOST_ORDERS = 100
#: Bytes of an order and of a report, at most: a hundred images for thousands of nodes.
MOST, MOST_REPORT = 1 << 20, 64 << 10

_WANTED = re.compile(r"all|[1-9][0-9]{0,4}|zone=[!-~]{1,100}", re.ASCII)
_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)

_PURGE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local live, marks, sealed = KEYS[1] .. ':live', KEYS[1] .. ':marks', KEYS[1] .. ':sealed'
for _, id in ipairs(redis.call('ZRANGEBYSCORE', live, '-inf', now, 'LIMIT', 0, 1000)) do
  redis.call('ZREM', live, id)
  redis.call('HDEL', marks, id)
  redis.call('HDEL', sealed, id)
end
"""
_GIVE = Script(
    "order_give",
    _PURGE
    + """
local is_new = not redis.call('ZSCORE', live, ARGV[1])
if is_new and redis.call('ZCARD', live) >= tonumber(ARGV[5]) then return 0 end
-- A late "do" of a giver that was cancelled must not undo its "cancel".
if ARGV[2] == 'do' and redis.call('HGET', marks, ARGV[1]) == 'cancel' then return 1 end
redis.call('ZADD', live, now + ARGV[4], ARGV[1])
redis.call('HSET', marks, ARGV[1], ARGV[2])
redis.call('HSET', sealed, ARGV[1], ARGV[3])
for _, key in ipairs({live, marks, sealed}) do redis.call('PEXPIRE', key, 2 * ARGV[4]) end
return 1
""",
)
_LIST = Script(
    "order_list",
    _PURGE
    + """
local found = {}
for _, id in ipairs(redis.call('ZRANGE', live, 0, ARGV[1] - 1)) do
  found[#found + 1] = id
  found[#found + 1] = redis.call('HGET', marks, id) or ''
end
return found
""",
)
_READ = Script(
    "order_read",
    """
local text = redis.call('HGET', KEYS[1] .. ':sealed', ARGV[1])
if text and #text <= tonumber(ARGV[2]) then return text end
return ''
""",
)
_END = Script(
    "order_end",
    """
redis.call('ZREM', KEYS[1] .. ':live', ARGV[1])
redis.call('HDEL', KEYS[1] .. ':marks', ARGV[1])
redis.call('HDEL', KEYS[1] .. ':sealed', ARGV[1])
return 1
""",
)
_REPORT = Script(
    "order_report",
    """
redis.call('HSET', KEYS[1] .. ':reports', ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1] .. ':reports', ARGV[3])
return 1
""",
)
_REPORTS = Script(
    "order_reports",
    """
local found, most = {}, tonumber(ARGV[1])
for i = 2, #ARGV do
  local text = redis.call('HGET', KEYS[1] .. ':reports', ARGV[i])
  if text and #text <= most then
    found[#found + 1] = ARGV[i]
    found[#found + 1] = text
  end
end
return found
""",
)


def place_of(node: Node) -> str:
    """What a node is known by in orders: 16 hex digits, the same after a restart."""
    return hashlib.sha256(f"{node.name}\0{node.url}".encode()).hexdigest()[:16]


def check_wanted(text: str) -> str:
    """``all``, a number of nodes, or ``zone=Z``. Raises ValueError."""
    if not _WANTED.fullmatch(text):
        raise ValueError('nodes are "all", a number such as "3", or "zone=NAME"')
    return text


def chosen(nodes: Iterable[Node], wanted: str, image: str) -> list[Node]:
    """Which of ``nodes`` are to have this image.

    So many nodes of all are those with the highest hash with the image (rendezvous): the same ones
    for the same image, other ones for others, and when one goes only its images find another.
    """
    if wanted == "all":
        return list(nodes)
    if wanted.startswith("zone="):
        return [node for node in nodes if node.zone == wanted.removeprefix("zone=")]
    ranked = sorted(nodes, key=lambda node: (_weight(node, image), node.id), reverse=True)
    return ranked[: int(wanted)]


def _weight(node: Node, image: str) -> bytes:
    return hashlib.sha256(f"{image}\0{place_of(node)}".encode()).digest()


class Word(StrEnum):
    """What is said of an order; the mark by which it is seen whether that has been read."""

    DO = "do"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class FleetOrder:
    """What is to be done, and which images of it by whom: by place, None for all of them."""

    id: str
    word: Word
    nodes: Mapping[str, tuple[int, ...] | None]
    work: Mapping[str, Any]

    def content(self) -> dict[str, Any]:
        return {"word": self.word.value, "nodes": dict(self.nodes), "work": dict(self.work)}

    @classmethod
    def read(cls, id: str, content: Mapping[str, Any]) -> Self:
        """What ``content`` wrote. Raises ``KeyError``, ``TypeError``, ``ValueError``."""
        nodes = {
            str(place): None if images is None else tuple(map(int, images))
            for place, images in dict(content["nodes"]).items()
        }
        return cls(id, Word(content["word"]), nodes, dict(content["work"]))


class Seal:
    """Seals words and reads those that are sealed. Wall-clock seconds."""

    def __init__(self, secret: bytes | Secret) -> None:
        self._keys = Derived(secret, _key)

    def seal(self, about: Sequence[str], content: Mapping[str, Any], now: float) -> bytes:
        words = {"at": round(now, 3), **content}
        text = json.dumps(words, separators=(",", ":")).encode()
        return _mac(self._keys.used, about, text) + text

    def read(self, about: Sequence[str], sealed: bytes, now: float) -> dict[str, Any] | None:
        """None for what nobody of us has sealed, about this, of late."""
        mac, text = sealed[:32], sealed[32:]
        rights = [_mac(key, about, text) for key in self._keys.accepted]
        if not any(hmac.compare_digest(mac, right) for right in rights):
            return None
        words: dict[str, Any] = json.loads(text)
        return words if -SKEW <= now - words["at"] <= LIFE + SKEW else None


def _key(secret: bytes) -> bytes:
    return hmac.digest(secret, b"pullpool: orders to nodes, 1", "sha256")


def _mac(key: bytes, about: Sequence[str], text: bytes) -> bytes:
    # What it is about has no zero byte, so no two look alike.
    return hmac.digest(key, "\0".join(about).encode() + b"\0\0" + text, "sha256")


class Runs(Protocol):
    """What this needs of a ``Directory``."""

    async def run(self, script: Script, tag: str, args: Sequence[Argument] = ()) -> Any: ...


class OrderBook:
    """The fleet's orders, as one node sees them. All methods raise ``DirectoryDown``; what is not
    sealed by a node of this fleet is not there. ``wall`` is in seconds since the epoch."""

    def __init__(
        self, directory: Runs, *, secret: bytes | Secret, wall: Callable[[], float]
    ) -> None:
        self._directory = directory
        self._seal = Seal(secret)
        self._wall = wall

    async def give(self, order: FleetOrder) -> bool:
        """Enter it, or enter it again; False: there are too many already."""
        sealed = self._seal.seal(("order", order.id), order.content(), self._wall())
        args = (order.id, order.word.value, sealed, round(LIFE * 1000), MOST_ORDERS)
        return bool(await self._directory.run(_GIVE, TAG, args))

    async def end(self, id: str) -> None:
        """Nobody needs it any more."""
        await self._directory.run(_END, TAG, (id,))

    async def live(self) -> dict[str, str]:
        """Which orders there are, and each one's mark; nothing of it is proved."""
        reply = await self._directory.run(_LIST, TAG, (MOST_ORDERS,))
        texts = [item.decode(errors="replace") for item in reply]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return {id: mark for id, mark in pairs if _ID.fullmatch(id)}

    async def read(self, id: str) -> FleetOrder | None:
        """An order; None for one that none of us has given, or that is old."""
        sealed = await self._directory.run(_READ, TAG, (id, MOST))
        content = self._seal.read(("order", id), sealed, self._wall())
        try:
            return None if content is None else FleetOrder.read(id, content)
        except (KeyError, TypeError, ValueError):  # of a node of another version
            return None

    async def report(self, id: str, place: str, content: Mapping[str, Any]) -> None:
        """How far the node of this place is."""
        sealed = self._seal.seal(("report", id, place), content, self._wall())
        await self._directory.run(_REPORT, f"order {id}", (place, sealed, round(LIFE * 1000)))

    async def reports(self, id: str, places: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What these nodes have reported, by place; ``at`` is when, by their clocks."""
        reply = await self._directory.run(_REPORTS, f"order {id}", (MOST_REPORT, *places))
        found = {}
        for raw, sealed in zip(reply[::2], reply[1::2], strict=True):
            place = raw.decode()
            content = self._seal.read(("report", id, place), sealed, self._wall())
            if content is not None:
                found[place] = content
        return found

    def __repr__(self) -> str:
        return f"<OrderBook on {self._directory!r}>"
