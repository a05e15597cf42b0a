"""Freshness: how long a tag may be believed (DESIGN D13). A digest never expires.

The decision is one pure function over what is known of the tag; ``TagBook`` remembers tags, in
memory with the monotonic clock and in the index with the wall clock, so that a proxy that starts
while its upstream is down can still say what a tag was.

A tag that the upstream refuses, whether it denies it or has it no more, is forgotten, in the index
too: nothing of it stands in for an upstream that fails later on, until the upstream has granted it
again. Answers count in the order in which they were asked for, so that a late one neither revives a
tag nor takes it away again.

An old answer stands in for an upstream that fails (``covers``), but only as far as the image can be
had: podman takes the mirror that answers its manifest, and goes nowhere else for the blobs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from cachetools import LRUCache

from proxy.oci.digest import Digest
from proxy.oci.errors import Overloaded, PullError, UpstreamError
from proxy.pull.asking import PASSING
from proxy.store.marks import Mark, Marks
from proxy.store.store import Store

TagKey = tuple[str, str, str]  # upstream, repository, tag

#: Tags kept in memory; the index has them all.
MAX_TAGS = 65_536


@dataclass(frozen=True, slots=True)
class TagPolicy:
    """D13's settings, in seconds. A check may go on to ``check_deadline`` for the next one's sake
    when whoever asked for it has been answered."""

    ttl: float = 30.0
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 24 * 3600.0
    negative_ttl: float = 10.0
    upstream_timeout: float = 2.0
    check_deadline: float = 20.0
    immutable: Sequence[re.Pattern[str]] = ()

    def is_immutable(self, tag: str) -> bool:
        return any(pattern.fullmatch(tag) for pattern in self.immutable)


@dataclass(frozen=True, slots=True)
class TagEntry:
    """What a tag was when the upstream last confirmed it.

    ``checked``, ``asked`` (when that answer was asked for) and ``failed`` are monotonic (``None``:
    not in this process), ``checked_wall`` is wall-clock time; seconds. ``failure`` is what asking
    failed with since.
    """

    digest: Digest
    checked_wall: float
    checked: float | None = None
    asked: float | None = None
    failed: float | None = None
    failure: PullError | None = None


class Verdict(StrEnum):
    """What to do with a tag that is asked for."""

    FETCH = "fetch"  # nothing is known
    FRESH = "fresh"  # serve it
    BACKGROUND = "background"  # serve it, and ask meanwhile
    CHECK = "check"  # ask first
    STALE = "stale"  # asking failed a moment ago: serve it with a warning


def judge(entry: TagEntry | None, tag: str, now: float, policy: TagPolicy) -> Verdict:
    """Decide by the monotonic time ``now``."""
    if entry is None:
        return Verdict.FETCH
    if policy.is_immutable(tag):
        return Verdict.FRESH
    age = None if entry.checked is None else now - entry.checked
    if age is not None and age < policy.ttl:
        return Verdict.FRESH
    if age is not None and age < policy.ttl + policy.stale_while_revalidate:
        return Verdict.BACKGROUND
    # Also without a ttl: an upstream that hangs must not cost every pull its time-out.
    if entry.failed is not None and now - entry.failed < max(policy.ttl, policy.negative_ttl):
        return Verdict.STALE
    return Verdict.CHECK


def fresh_for(entry: TagEntry | None, tag: str, now: float, policy: TagPolicy) -> float:
    """Seconds for which the entry needs no question, as ``judge`` would say it then."""
    if entry is None:
        return 0.0
    if policy.is_immutable(tag):
        return policy.ttl
    return 0.0 if entry.checked is None else max(0.0, entry.checked + policy.ttl - now)


#: The mark of a name that never changes: a digest's.
_ALWAYS = Mark()


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a reference is without asking anybody, while ``mark`` holds and, by the monotonic
    clock, ``now - checked < ttl``."""

    digest: Digest
    mark: Mark = _ALWAYS
    checked: float = 0.0
    ttl: float = math.inf


def may_be_stale(entry: TagEntry, wall: float, policy: TagPolicy) -> bool:
    """May the entry still stand in for an upstream that fails? By wall clock: it outlives us."""
    return wall - entry.checked_wall <= policy.stale_if_error


class Standing(IntEnum):
    """How much of an image is held that an old answer about its tag would lead to."""

    NOTHING = 0  # its manifest is gone, too old, or not for this repository
    MANIFEST = 1
    WHOLE = 2  # its blobs too


def covers(standing: Standing, error: PullError | None) -> bool:
    """May the old answer stand in for this failure? "No" and "not there" are answers, no failures.

    An upstream that says "too much" is there, so blobs that are not held can be waited for (Docker
    Hub's quota is one of manifests, and blobs do not count); of any other one nobody knows.
    """
    if not isinstance(error, UpstreamError):
        return False
    if not isinstance(error, PASSING) and error.status < 500:
        return False
    if isinstance(error, Overloaded):
        return standing >= Standing.MANIFEST
    return standing is Standing.WHOLE


class TagBook:
    """Remembers tags."""

    def __init__(
        self, store: Store, *, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self._store = store
        self._clock = clock
        self._wall = wall
        self._memory: LRUCache[TagKey, TagEntry] = LRUCache(MAX_TAGS)
        self._refused: LRUCache[TagKey, float] = LRUCache(MAX_TAGS)  # when that was asked
        self._marks: Marks[TagKey] = Marks()
        #: Told of every tag that is not what it was, or may not be: others may believe it still.
        self.on_doubt: Callable[[TagKey], None] = lambda _: None

    def known(self, key: TagKey) -> TagEntry | None:
        """What is in memory."""
        return self._memory.get(key)

    def fresh(self, key: TagKey, policy: TagPolicy) -> Fresh | None:
        """What the tag is if that is known from memory alone, and fresh."""
        entry = self._memory.get(key)
        if entry is None or judge(entry, key[2], self._clock(), policy) is not Verdict.FRESH:
            return None
        mark = self._marks.of(key)
        if entry.checked is None or policy.is_immutable(key[2]):
            return Fresh(entry.digest, mark)
        return Fresh(entry.digest, mark, entry.checked, policy.ttl)

    def _keep(self, key: TagKey, entry: TagEntry) -> None:
        self._memory[key] = entry
        self._marks.withdraw(key)

    async def get(self, key: TagKey) -> TagEntry | None:
        entry = self._memory.get(key)
        if entry is not None:
            return entry
        row = await self._store.tag(*key)
        if row is None or key in self._refused:  # read before the refusal got to the index
            return None
        # Another request may have put a newer one meanwhile.
        return self._memory.setdefault(key, TagEntry(row.digest, row.checked_at))

    async def confirm(
        self, key: TagKey, digest: Digest, *, asked: float | None = None, age: float = 0.0
    ) -> None:
        """The upstream said ``age`` seconds ago that the tag is ``digest``, ``asked`` at that
        monotonic time (then, by default). An answer that was asked for before the one that is known
        says nothing.
        """
        now, wall = self._clock() - age, self._wall() - age
        asked, known = now if asked is None else asked, self._memory.get(key)
        if known is not None and known.asked is not None and known.asked > asked:
            return
        if self._refused.get(key, asked) > asked:
            return
        self._refused.pop(key, None)
        if known is not None and known.digest != digest:
            self.on_doubt(key)
        self._keep(key, TagEntry(digest, wall, checked=now, asked=asked))
        await self._store.put_tag(*key, digest, wall)

    def failed(self, key: TagKey, failure: PullError) -> None:
        """The upstream could not be asked: do not ask again for a while."""
        entry = self._memory.get(key)
        if entry is not None:
            self._keep(key, replace(entry, failed=self._clock(), failure=failure.bare()))

    def doubt(self, key: TagKey) -> None:
        """Ask the upstream before this tag is believed again."""
        self.on_doubt(key)
        entry = self._memory.get(key)
        if entry is not None:
            self._keep(key, replace(entry, checked=None, failed=None, failure=None))

    async def refuse(self, key: TagKey, *, asked: float) -> bool:
        """The upstream denies the tag, or does not have it (any more), ``asked`` at that monotonic
        time. False if it has been confirmed since: then the refusal says nothing."""
        known = self._memory.get(key)
        if known is not None and known.asked is not None and known.asked > asked:
            return False
        self._refused[key] = max(asked, self._refused.get(key, asked))
        self._memory.pop(key, None)
        self._marks.withdraw(key)
        self.on_doubt(key)
        await self._store.drop_tag(*key)
        return True

    def is_usable(self, entry: TagEntry, policy: TagPolicy) -> bool:
        return may_be_stale(entry, self._wall(), policy)
