"""Claims on the fleet's directory: the rules of `claims.py` as scripts, one atomic step each.

All keys of a blob share its hash tag. Times are milliseconds of the server's clock.

    blob        hash    gen, size, filler, until (its lease), news (when it last published)
    hashes, by  string  32 bytes of hash and 16 of node id for each published stripe
    banned      zset    node -> until
    nodes       hash    node -> its record, for all that have or receive anything
    whole       zset    those of them that have the whole blob -> until
    full        zset    those of them that lend as much as they may -> when the first of it ends
    zone:Z      set     those of them that are in the zone
    at:N:Z      zset    those that can be asked for stripe N, in zone Z or ('*') in any -> place

A record is a MessagePack array: name, zone and url; until; whether it has the whole blob; its mask
of stripes (the lowest eight in the first byte); of which generation; what it receives (stripe,
until, rank, token, ...); what it lends (stripe, until, token, ...); when it was last entered into
all the queues of what it has.

Who has ended is taken out when somebody comes across it; each key ends by itself some time after
its last member does. Nothing is counted up and down, so nothing can drift.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from proxy.fleet.claims import WHOLE, Giver, Grant, Holding, Outcome, Taken, Terms, View, Wish
from proxy.fleet.claims_scripts import (
    DROP,
    FILL,
    GIVE_BACK,
    HOLD,
    LOOK,
    PUBLISH,
    SETTLE,
    TAKE,
    WITHDRAW,
)
from proxy.fleet.script import Argument, Script
from proxy.oci.digest import Digest

#: Nodes that keep other records, or stripes or pieces of another length, have other keys: they do
#: not meet.
VERSION = 3
HASH, NODE = 32, 16
_WHOLE_MASK = b"*"


class Runs(Protocol):
    """What is wanted of a `Directory`."""

    async def run(self, script: Script, tag: str, args: Sequence[Argument] = ()) -> Any: ...


class RedisClaims:
    """One node's access to the directory of stripes.

    `ahead`: milliseconds that the scripts add to the server's clock; tests let time pass by it.
    """

    def __init__(
        self,
        directory: Runs,
        giver: Giver,
        *,
        terms: Terms | None = None,
        ahead: Callable[[], int] = int,
    ) -> None:
        self._directory = directory
        self._giver = giver
        self._terms = terms or Terms()
        self._ahead = ahead

    def __repr__(self) -> str:
        return f"<RedisClaims of {self._giver.name} by {self._directory!r}>"

    async def _run(self, script: Script, digest: Digest, *args: Argument) -> Any:
        """Every script gets: time ahead, own node, its details, its zone, and the terms."""
        giver, terms = self._giver, self._terms
        seconds = (
            terms.filler,
            terms.doubted,
            terms.grant,
            terms.part,
            terms.whole,
            terms.stuck,
            terms.ban,
        )
        return await self._directory.run(
            script,
            f"{VERSION}:{digest}",
            [
                self._ahead(),
                giver.node,
                "\0".join((giver.name, giver.zone, giver.url)),
                giver.zone,
                *(int(1000 * each) for each in seconds),
                terms.most,
                terms.each,
                terms.filler_most,
                terms.filler_each,
                terms.wholes,
                terms.sample // 3,
                secrets.token_hex(8),
                *args,
            ],
        )

    async def look(self, digest: Digest, known: int = 0) -> View:
        return _view(await self._run(LOOK, digest, known), known)

    async def fill(self, digest: Digest, size: int | None) -> str | None:
        filler = await self._run(FILL, digest, "" if size is None else size)
        return filler.decode() or None

    async def publish(
        self,
        digest: Digest,
        size: int,
        first: int,
        hashes: Sequence[bytes],
        by: Sequence[str] = (),
    ) -> int | None:
        names = "".join(by or [self._giver.node] * len(hashes))
        count = await self._run(PUBLISH, digest, size, first, b"".join(hashes), names)
        return None if count < 0 else int(count)

    async def settle(self, digest: Digest) -> None:
        await self._run(SETTLE, digest)

    async def take(
        self,
        digest: Digest,
        wishes: Sequence[Wish],
        room: int,
        known: int = 0,
        avoid: Collection[str] = (),
        ended: Sequence[tuple[Grant, Outcome]] = (),
    ) -> Taken:
        said: list[Argument] = [known, room, len(ended)]
        for grant, outcome in ended:
            said += _ended(grant, outcome)
        said += [len(avoid), *avoid]
        for wish in wishes:
            said += [wish.stripe, wish.limit, int(wish.is_urgent)]
        granted, missing, seen = await self._run(TAKE, digest, *said)
        view = _view(seen, known)
        grants = tuple(
            Grant(digest, view.generation, stripe, _giver(node, who), rank, token.decode())
            for stripe, node, who, rank, token in granted
        )
        return Taken(grants, frozenset(missing), view)

    async def give_back(self, grant: Grant, outcome: Outcome) -> None:
        await self._run(GIVE_BACK, grant.digest, *_ended(grant, outcome))

    async def hold(
        self, digest: Digest, generation: str, have: int, grants: Sequence[Grant] = ()
    ) -> bool:
        said: list[Argument] = []
        for grant in grants:
            said += [grant.stripe, grant.rank, grant.giver.node, grant.token]
        return bool(await self._run(HOLD, digest, generation, _mask(have), *said))

    async def withdraw(self, digest: Digest) -> None:
        await self._run(WITHDRAW, digest)

    async def drop(self, digest: Digest, generation: str) -> None:
        await self._run(DROP, digest, generation)


def _ended(grant: Grant, outcome: Outcome) -> list[Argument]:
    word = outcome.value if outcome in (Outcome.DONE, Outcome.DIED) else ""
    return [grant.generation, grant.giver.node, grant.stripe, grant.token, word]


def _mask(have: int) -> bytes:
    """The lowest eight stripes in the first byte."""
    return _WHOLE_MASK if have == WHOLE else have.to_bytes(-(-have.bit_length() // 8), "little")


def _have(is_whole: int, mask: bytes) -> int:
    return WHOLE if is_whole else int.from_bytes(mask, "little")


def _giver(node: bytes, who: bytes) -> Giver:
    name, zone, url = who.decode().split("\0")
    return Giver(node.decode(), name, zone, url)


def _view(reply: Any, known: int) -> View:
    generation, size, hashes, by, filler, nodes, holdings = reply
    return View(
        generation.decode(),
        int(size) if size else None,
        known,
        tuple(hashes[at : at + HASH] for at in range(0, len(hashes), HASH)),
        tuple(by[at : at + NODE].decode() for at in range(0, len(by), NODE)),
        filler.decode() or None,
        tuple(
            Holding(
                _giver(node, who),
                _have(is_whole, mask),
                dict(zip(ranks[::2], ranks[1::2], strict=True)),
                lending,
            )
            for node, who, is_whole, mask, lending, ranks in holdings
        ),
        nodes,
    )
