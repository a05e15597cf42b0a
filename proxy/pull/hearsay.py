"""What other nodes of the fleet were told by an upstream, for manifests (DESIGN D13, D16).

A *question* about a tag or a manifest goes through here on its way to the upstream: another node
may have the answer, or be about to get it. ``about`` is one question; inside its block either there
is a ``told``, or it is this node's to ask, and then it says what came by ``tell``. If it says
nothing, because there was none or none that may be told, another node asks.

What is told of a tag is believed no longer than if this node had asked when the other one did. The
bytes of a manifest come from the node that told, and are checked like an upstream's.

Only what the settings share goes through here: the fleet knows nothing of an upstream that is
private to its nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from proxy.fleet.tags import Question, Told, Where
from proxy.oci.digest import Digest

#: Seconds for which it is told where a manifest is. A digest never expires, but nodes do.
DIGEST_TTL = 600.0


class Tags(Protocol):
    """The fleet's answers: ``SharedTags`` is one."""

    async def learn(self, question: Question, ttl: float) -> Told | None: ...

    async def tell(self, question: Question, told: Told, ttl: float) -> None: ...

    async def leave(self, question: Question) -> None: ...


class Word:
    """One question: what was ``told``, if anything."""

    def __init__(self, told: Told | None) -> None:
        self.told = told
        self.found: Told | None = None

    def tell(self, digest: Digest, media_type: str, size: int | None, *, age: float) -> None:
        """The upstream has said this, ``age`` seconds ago."""
        self.found = Told(digest, media_type, size, age=age)


class Alone:
    """Without a fleet: nobody is told anything."""

    @contextlib.asynccontextmanager
    async def about(
        self, question: Question, ttl: float, *, listen: bool = True, has_bytes: bool = False
    ) -> AsyncIterator[Word]:
        yield Word(None)

    async def manifest(self, told: Told) -> bytes | None:
        return None


class Hearsay(Alone):
    """With a fleet.

    ``here`` is where this node's own bytes are; ``fetch`` gets what was told of from another node,
    or None; ``is_shared`` says of an upstream whether the fleet may know of it.
    """

    def __init__(
        self,
        tags: Tags,
        *,
        here: Where,
        fetch: Callable[[Told], Awaitable[bytes | None]],
        is_shared: Callable[[str], bool],
    ) -> None:
        self._tags = tags
        self._here = here
        self._fetch = fetch
        self._is_shared = is_shared

    @contextlib.asynccontextmanager
    async def about(
        self, question: Question, ttl: float, *, listen: bool = True, has_bytes: bool = False
    ) -> AsyncIterator[Word]:
        """Ask the fleet first, unless it is not to be listened to (a refresh). ``has_bytes``: who
        tells will have the manifest, too."""
        if not self._is_shared(question[0]) or ttl <= 0:
            yield Word(None)
            return
        word = Word(await self._tags.learn(question, ttl) if listen else None)
        try:
            yield word
        except Exception:
            await self._tags.leave(question)
            raise
        # A question that is cancelled leaves its claim to end by itself.
        if word.found is not None:
            where = self._here if has_bytes else None
            await self._tags.tell(question, replace(word.found, where=where), ttl)
        elif word.told is None:
            await self._tags.leave(question)

    async def manifest(self, told: Told) -> bytes | None:
        """The bytes that were told of, unverified; None if they are not to be had."""
        if told.where is None or told.where.node == self._here.node:
            return None
        return await self._fetch(told)
