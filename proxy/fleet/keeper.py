"""What this node has told the fleet that it has, whole: said again in time, and taken back.

An entry in the directory ends by itself, so that of a node that died nothing is left. One that goes
on says it again every third of that time; the entries of one round are spread over it, so that the
directory has no rush. What the store evicts is withdrawn; where that is not heard, whoever asks is
told "not here" and looks elsewhere.

What an earlier process has stored, or a directory that has forgotten it does not know, is announced
(``announcer.py``): that is said here as well.

Only so many are remembered, the latest ones: the directory lists no more than a few nodes for each
blob in any case, and a blob that nobody is told of costs one more fetch from the upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from proxy.fleet.claims import WHOLE, Claims, Terms
from proxy.observe.logs import Logger
from proxy.oci.digest import Digest
from proxy.oci.errors import DirectoryDown

#: Blobs that are remembered.
MOST = 10_000


class Keeper:
    """``async with Keeper(…) as keeper``: keeps its word while the block lasts."""

    def __init__(
        self, claims: Claims, *, log: Logger, terms: Terms | None = None, most: int = MOST
    ) -> None:
        self._claims = claims
        self._log = log
        self._terms = terms or Terms()
        self._most = most
        self._kept: OrderedDict[Digest, str] = OrderedDict()  # and its generation
        self._gone: dict[Digest, None] = {}
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, digest: object) -> bool:
        return digest in self._kept

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._renew(), name="keeper renews"),
            asyncio.create_task(self._withdraw(), name="keeper withdraws"),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def keep(self, digest: Digest, generation: str) -> None:
        """The directory was told that all of it is here."""
        self._kept[digest] = generation
        self._kept.move_to_end(digest)
        self._gone.pop(digest, None)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    async def announce(self, digest: Digest) -> bool:
        """Tell the directory of a blob that is here; false if it is not to be kept. Raises
        ``DirectoryDown``: then a later round says it."""
        if digest not in self._kept:
            if len(self._kept) >= self._most:
                return False
            # Before the call, so that what goes in the middle of it is withdrawn.
            self._kept[digest] = ""
            self._kept.move_to_end(digest, last=False)  # older than what came meanwhile
            self._gone.pop(digest, None)
        return await self._say(digest)

    def gone(self, digests: Sequence[Digest]) -> None:
        """The store has these no more."""
        for digest in digests:
            if self._kept.pop(digest, None) is not None:
                self._gone[digest] = None
                self._news.set()

    async def _renew(self) -> None:
        period = self._terms.whole / 3
        while True:
            names = list(self._kept)
            if not names:
                await asyncio.sleep(period)
            for digest in names:
                await asyncio.sleep(period / len(names))
                await self._say_again(digest)

    async def _say_again(self, digest: Digest) -> None:
        if digest in self._kept:
            with contextlib.suppress(DirectoryDown):  # the next round says it
                await self._say(digest)

    async def _say(self, digest: Digest) -> bool:
        generation = self._kept[digest]
        is_entered = await self._claims.hold(digest, generation, WHOLE)
        if not is_entered and self._kept.get(digest) == generation:
            del self._kept[digest]  # enough others have it, or it is another blob's entry by now
        elif is_entered and digest not in self._kept:
            self._gone[digest] = None  # it went meanwhile: the directory may have heard that first
            self._news.set()
        return is_entered

    async def _withdraw(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._gone:
                digest = next(iter(self._gone))
                try:
                    await self._claims.withdraw(digest)
                except DirectoryDown:
                    self._log.debug("not_withdrawn", digest=str(digest))
                self._gone.pop(digest, None)

    def __repr__(self) -> str:
        return f"<Keeper of {len(self._kept)} blobs, {len(self._gone)} to be withdrawn>"
