"""What an upstream said of a tag or a manifest, told once to the whole fleet (DESIGN D16).

Without it a hundred nodes that start one image ask the upstream a hundred times what its tag is.
With it one node asks, and the others take its word for as long as the tag may be believed anyway.

Theory of operation
-------------------
There is one *question* for each (upstream, repository, reference). In the directory it is

* *unknown*  nobody has asked of late. Whoever looks then is the one who asks: a claim that expires
* *asked*    a node asks the upstream; the others look again in a while
* *told*     the answer is there, until it is too old to be believed

``learn`` moves it from unknown to asked, ``tell`` to told, ``leave`` (and the end of the claim: the
node died) back to unknown. All of that is a hint and no lock: two nodes that both ask cost one
request more. So whatever is wrong with the directory, or with who asks, the others ask for
themselves after ``PATIENCE`` seconds at the latest.

Only what the upstream granted is told. Denials, "not there" and failures stay in the node that got
them (it leaves), and so does everything that could authenticate anybody.

Trust: the directory has none. An answer is *sealed* with a key made of the fleet's secret, over the
question and the time, so that who can write to the directory can neither make one up, nor show one
for another tag, nor an old one for longer than it would have been believed. A node that has the
secret can lie; what it says is then an existing digest of whatever it likes (``docs/threats.md``).
Without a secret nothing is told at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from proxy.fleet.script import Argument, Script
from proxy.fleet.secret import Derived, Secret
from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid, DirectoryDown

#: (upstream, repository, reference: a tag or a digest).
Question = tuple[str, str, str]

#: Seconds that a claim to ask holds: an upstream that is slower is asked by the others, too.
CLAIM = 5.0
#: Seconds that an answer is waited for which another node asks for.
PATIENCE = 2.0
#: Seconds between two looks, at first and at most; each as much as half again, by chance.
FIRST_LOOK, LAST_LOOK = 0.05, 0.4
#: Seconds that clocks of two nodes may differ.
SKEW = 30.0
#: Bytes of an answer, at most: more than any of ours has.
MOST = 4096

_LEARN = Script(
    "tag_learn",
    """
local told = redis.call('GET', KEYS[1] .. ':told')
if told then return {'told', told} end
local by = redis.call('GET', KEYS[1] .. ':asked')
if by and by ~= ARGV[1] then return {'asked'} end
redis.call('SET', KEYS[1] .. ':asked', ARGV[1], 'PX', ARGV[2])
return {'ask'}
""",
)
_TELL = Script(
    "tag_tell",
    """
local time = redis.call('TIME')
local at = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[4]
local known = redis.call('GET', KEYS[1] .. ':at')
if not known or known + 0 <= at then
  redis.call('SET', KEYS[1] .. ':told', ARGV[2], 'PX', ARGV[3])
  redis.call('SET', KEYS[1] .. ':at', string.format('%.0f', at), 'PX', ARGV[3])
end
if redis.call('GET', KEYS[1] .. ':asked') == ARGV[1] then redis.call('DEL', KEYS[1] .. ':asked') end
return 1
""",
)
_LEAVE = Script(
    "tag_leave",
    """
local asked = KEYS[1] .. ':asked'
if redis.call('GET', asked) == ARGV[1] then return redis.call('DEL', asked) end
return 0
""",
)


@dataclass(frozen=True, slots=True)
class Where:
    """A node that has the bytes."""

    node: str
    url: str


@dataclass(frozen=True, slots=True)
class Told:
    """The upstream's answer: the manifest's digest, type and size in bytes, as far as it said them;
    ``where`` its bytes are to be had in the fleet. ``age`` in seconds, when it was learned."""

    digest: Digest
    media_type: str
    size: int | None
    where: Where | None = None
    age: float = 0.0


class Runs(Protocol):
    """What this needs of a ``Directory``."""

    async def run(self, script: Script, tag: str, args: Sequence[Argument] = ()) -> Any: ...


class Sealer:
    """Seals answers, and reads those that are sealed. Wall-clock seconds."""

    def __init__(self, secret: bytes | Secret) -> None:
        self._keys = Derived(secret, _key)

    def seal(self, question: Question, told: Told, now: float) -> bytes:
        content = {
            "digest": str(told.digest),
            "type": told.media_type,
            "size": told.size,
            "where": None if told.where is None else asdict(told.where),
            "at": round(now - told.age, 3),
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        return _mac(self._keys.used, question, text) + text

    def read(self, question: Question, sealed: bytes, now: float, ttl: float) -> Told | None:
        """None for what none of us has sealed, for this question, within ``ttl`` seconds."""
        mac, text = sealed[:32], sealed[32:]
        if len(sealed) > MOST or not self._is_right(question, mac, text):
            return None
        content = json.loads(text)
        age = now - content["at"]
        if not -SKEW <= age <= ttl + SKEW:
            return None
        try:
            digest = Digest.parse(content["digest"])
        except DigestInvalid:
            return None
        where = None if content["where"] is None else Where(**content["where"])
        return Told(digest, content["type"], content["size"], where, max(0.0, age))

    def _is_right(self, question: Question, mac: bytes, text: bytes) -> bool:
        rights = [_mac(key, question, text) for key in self._keys.accepted]
        return any(hmac.compare_digest(mac, right) for right in rights)


def _key(secret: bytes) -> bytes:
    return hmac.digest(secret, b"pullpool: what upstreams said, 1", "sha256")


def _mac(key: bytes, question: Question, text: bytes) -> bytes:
    # The names cannot hold a zero byte, so no two questions look alike.
    asked = "\0".join(question).encode()
    return hmac.digest(key, asked + b"\0\0" + text, "sha256")


class SharedTags:
    """The fleet's answers, as one node sees them. ``wall`` is in seconds; ``chance`` between 0 and
    1."""

    def __init__(
        self,
        directory: Runs,
        *,
        node: str,
        secret: bytes | Secret,
        wall: Callable[[], float],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._directory = directory
        self._node = node
        self._sealer = Sealer(secret)
        self._wall = wall
        self._chance = chance

    async def learn(self, question: Question, ttl: float) -> Told | None:
        """What the upstream said to another node at most ``ttl`` seconds ago. None: ask yourself,
        and then ``tell`` or ``leave``."""
        pause, loop = FIRST_LOOK, asyncio.get_running_loop()
        until = loop.time() + PATIENCE
        while True:
            try:
                reply = await self._run(_LEARN, question, int(CLAIM * 1000))
            except DirectoryDown:
                return None
            match reply:
                case [b"told", bytes(sealed)]:
                    return self._sealer.read(question, sealed, self._wall(), ttl)
                case [b"asked"] if loop.time() < until:
                    await asyncio.sleep(pause * (1 + self._chance() / 2))
                    pause = min(LAST_LOOK, pause * 2)
                case _:
                    return None

    async def tell(self, question: Question, told: Told, ttl: float) -> None:
        """The upstream has said this, ``told.age`` seconds ago. Others may take it from here until
        it is ``ttl`` seconds old, unless another node was answered later."""
        left = int((ttl - told.age) * 1000)
        if left <= 0:
            await self.leave(question)
            return
        sealed = self._sealer.seal(question, told, self._wall())
        try:
            await self._run(_TELL, question, sealed, left, int(told.age * 1000))
        except DirectoryDown:
            return  # the others ask for themselves

    async def leave(self, question: Question) -> None:
        """There is nothing to tell: another one may ask at once."""
        try:
            await self._run(_LEAVE, question)
        except DirectoryDown:
            return  # the claim ends by itself

    async def _run(self, script: Script, question: Question, *args: bytes | int) -> Any:
        name = hashlib.sha256("\0".join(question).encode()).hexdigest()[:32]
        return await self._directory.run(script, f"tag {name}", (self._node, *args))

    def __repr__(self) -> str:
        return f"<SharedTags of {self._node}>"
