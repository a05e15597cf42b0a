"""Seals: how nodes that share a secret know one another, without ever showing it.

Theory of operation
-------------------
A request carries a *seal*: who asks, whom, when, a nonce, and an HMAC-SHA256 over these and all
that the request says. Who is asked accepts it once:

* the HMAC is right, so somebody with the secret has made it, for exactly this request;
* it is for this node: what was sent to another one is of no use here. A node's id is new each time
  it begins to lead, so neither is what was sent to it in an earlier life;
* its time is at most ``SKEW`` seconds from here, on either side: that is how far clocks may differ;
* its nonce was not seen before.

Nonces are remembered, oldest seal first, for as long as their time could still be accepted, and at
most ``MOST`` of them. What is forgotten raises the *floor*: a seal that is not newer than the
newest one that was forgotten is refused. So nothing is accepted twice, however full the memory is
and wherever the clock jumps; what a flood costs is some of the patience with slow clocks. Only a
seal whose HMAC is right is remembered: strangers cannot fill anything.

The answer's head is sealed as well, over the seal of the request and over what it says. So it is an
answer to this request, from somebody with the secret, and neither a refusal nor the digests of the
pieces can be put in its way; by those digests the body proves itself.

The keys for the two directions are derived from the secret, each for its purpose alone: no seal of
one kind is one of the other, nor what else the fleet signs with its secret. One that is replaced is
understood for a while (``secret.py``). Compared in constant time. Clocks are handed in; nothing
else here has a state but the nonces.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from proxy.fleet.secret import Derived, Secret

#: Seconds that the clocks of two nodes may differ, with the way in between.
SKEW = 30.0
#: Nonces that are remembered, at most.
MOST = 1 << 17
#: Bytes of a secret, at least: what is shorter can be guessed from one seal that was seen.
LEAST_SECRET = 16

_SEAL = re.compile(
    r"v1 from=([0-9a-f]{16}) to=([0-9a-f]{16}) time=(0|[1-9][0-9]{0,15}) "
    r"nonce=([0-9a-f]{32}) mac=([0-9a-f]{64})"
)
_ANSWER = re.compile(r"v1 mac=([0-9a-f]{64})")


class Unsealed(Exception):
    """A seal that is missing, wrong, late, or was seen before; the message is for the log."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a seal is for: of a request its method, path and range; of an answer its status and the
    headers that count. Raises ``ValueError`` for text that would run into the next."""

    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        if any("\n" in part for part in self.parts):
            raise ValueError("what is sealed has no line breaks")


@dataclass(frozen=True, slots=True)
class Seal:
    """The seal of a request. ``time`` in milliseconds since the epoch."""

    taker: str
    giver: str
    time: int
    nonce: str
    mac: str

    @classmethod
    def parse(cls, header: str | None) -> Seal:
        """Raises ``Unsealed``."""
        found = _SEAL.fullmatch(header or "")
        if found is None:
            raise Unsealed("there is no seal" if header is None else "the seal is malformed")
        taker, giver, time, nonce, mac = found.groups()
        return cls(taker, giver, int(time), nonce, mac)

    def __str__(self) -> str:
        return (
            f"v1 from={self.taker} to={self.giver} time={self.time} "
            f"nonce={self.nonce} mac={self.mac}"
        )


class Keys:
    """What the secret is used by, each for one purpose."""

    def __init__(self, secret: bytes) -> None:
        """Raises ``ValueError`` for a secret that is too short."""
        if len(secret) < LEAST_SECRET:
            raise ValueError(f"a fleet's secret has at least {LEAST_SECRET} bytes")
        self._request = _derived(secret, b"pullpool peer request v1")
        self._answer = _derived(secret, b"pullpool peer answer v1")

    def seal(self, taker: str, giver: str, time: float, nonce: str, said: Said) -> Seal:
        """The seal of a request; ``time`` in seconds since the epoch."""
        at = int(time * 1000)
        return Seal(taker, giver, at, nonce, self._mac(taker, giver, at, nonce, said))

    def is_right(self, seal: Seal, said: Said) -> bool:
        """Is it one of a request that says this?"""
        mac = self._mac(seal.taker, seal.giver, seal.time, seal.nonce, said)
        return hmac.compare_digest(mac, seal.mac)

    def _mac(self, taker: str, giver: str, time: int, nonce: str, said: Said) -> str:
        return _signed(self._request, (taker, giver, str(time), nonce, *said.parts))

    def seal_answer(self, asked: Seal, said: Said) -> str:
        """The header of an answer that says this."""
        return f"v1 mac={self.answer_mac(asked, said)}"

    def answer_mac(self, asked: Seal, said: Said) -> str:
        """What the seal of that answer has to be."""
        return _signed(self._answer, (asked.mac, *said.parts))

    def __repr__(self) -> str:
        return "<Keys>"  # and not a word more


class Nonces:
    """Which seals have been accepted."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._seen: set[str] = set()
        self._by_time: list[tuple[int, str]] = []
        self._floor = -1  # the time of the newest seal that was forgotten

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, time: int, nonce: str, oldest: int) -> None:
        """Remember it; those before ``oldest`` are refused by their time. Milliseconds. Raises
        ``Unsealed`` when it was seen before, or may have been."""
        if nonce in self._seen:
            raise Unsealed("the seal was used before")
        if time <= self._floor:
            raise Unsealed("the seal is older than what is remembered")
        self._seen.add(nonce)
        heapq.heappush(self._by_time, (time, nonce))
        while self._by_time[0][0] < oldest or len(self._seen) > self._most:
            at, forgotten = heapq.heappop(self._by_time)
            self._seen.discard(forgotten)
            self._floor = max(self._floor, at)

    def __repr__(self) -> str:
        return f"<Nonces {len(self)} remembered>"


class Sealer:
    """One node's end: seals what it asks, and looks at what it is asked.

    ``wall`` is seconds since the epoch, of a clock that all nodes share about.
    """

    def __init__(
        self,
        secret: bytes | Secret,
        node: str,
        *,
        wall: Callable[[], float],
        nonce: Callable[[], str] = lambda: secrets.token_hex(16),
        skew: float = SKEW,
        most: int = MOST,
    ) -> None:
        """``node`` is this node's id. Raises ``ValueError`` for a secret that is too short."""
        if most < 1:
            raise ValueError("who remembers no nonce accepts everything again")
        self.node = node
        self._keys = Derived(secret, Keys)
        self._wall = wall
        self._nonce = nonce
        self._skew = skew
        self._nonces = Nonces(most)

    def seal(self, giver: str, said: Said) -> Seal:
        """For a request to ``giver``, a node's id."""
        return self._keys.used.seal(self.node, giver, self._wall(), self._nonce(), said)

    def accept(self, header: str | None, said: Said) -> Seal:
        """The seal of a request to this node, accepted this once. Raises ``Unsealed``."""
        seal = Seal.parse(header)
        if not any(keys.is_right(seal, said) for keys in self._keys.accepted):
            raise Unsealed("the seal is wrong: another secret, or another request")
        if seal.giver != self.node:
            raise Unsealed(f"the seal is for node {seal.giver}, this is {self.node}")
        now = self._wall()
        behind = now - seal.time / 1000
        if abs(behind) > self._skew:
            words = "behind" if behind > 0 else "ahead of"
            raise Unsealed(f"the clock of node {seal.taker} is {abs(behind):.1f} s {words} ours")
        self._nonces.note(seal.time, seal.nonce, int((now - self._skew) * 1000))
        return seal

    def seal_answer(self, asked: Seal, said: Said) -> str:
        """For the answer to a request that was accepted."""
        return self._keys.used.seal_answer(asked, said)

    def check_answer(self, asked: Seal, header: str | None, said: Said) -> None:
        """Raises ``Unsealed`` for what is no answer to this request."""
        found = _answer_mac(header)
        rights = [keys.answer_mac(asked, said) for keys in self._keys.accepted]
        if not any(hmac.compare_digest(found, right) for right in rights):
            raise Unsealed("the seal of the answer is wrong")

    def __repr__(self) -> str:
        return f"<Sealer of node {self.node}, {self._nonces!r}>"


def _answer_mac(header: str | None) -> str:
    found = _ANSWER.fullmatch(header or "")
    if found is None:
        raise Unsealed("the answer has no seal")
    return found[1]


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return hmac.digest(secret, purpose, hashlib.sha256)


def _signed(key: bytes, parts: tuple[str, ...]) -> str:
    return hmac.new(key, "\n".join(parts).encode(), hashlib.sha256).hexdigest()


def request_said(
    method: str,
    path: str,
    rank: str | None,
    range_header: str | None,
    stripe_hash: str | None = None,
) -> Said:
    """What the seal of a request is for; headers as they are written."""
    return Said((method, path, rank or "", range_header or "", stripe_hash or ""))


def answer_said(
    status: int,
    *,
    length: str | None,
    content_range: str | None,
    pieces: str | None,
    retry_after: str | None,
) -> Said:
    """What the seal of an answer is for; headers as they are written."""
    return Said((str(status), length or "", content_range or "", pieces or "", retry_after or ""))
