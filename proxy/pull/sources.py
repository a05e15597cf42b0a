"""The repositories that a flight may take its bytes from (DESIGN D8, D12).

Pure bookkeeping. Each source counts its failures since the flight last got a new byte; the one with
the fewest goes next, so that a failing one rotates. A source is *proved* when its upstream gave
bytes through it, *named* when a manifest of its repository names the digest.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from proxy.oci.digest import Digest
from proxy.oci.errors import (
    NotFound,
    PullError,
    QueueFull,
    Throttled,
    TokenServiceFailed,
    UpstreamBusy,
    UpstreamDown,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.upstream.turns import Ticket

#: (upstream, repository): what permission and denial are keyed by (D12).
Key = tuple[str, str]

#: Failures of each source without a single new byte before a flight fails.
TRIES = 6
#: The same for a blob that the upstream does not have yet although a manifest names it.
LATE_TRIES = 4
#: The same for an upstream that is too busy: with pauses of up to 5 s a matter of minutes.
BUSY_TRIES = 64
#: What is worth another try at the same source.
PASSING: tuple[type[PullError], ...] = (
    UpstreamUnavailable,
    UpstreamTimeout,
    UpstreamBusy,
    Throttled,
    TokenServiceFailed,
)


class TurnBody(Protocol):
    """The bytes of one turn; ``total`` is the whole blob's size if the source said it.

    ``is_overdue``: somebody waits for the slot, and the next turn can go on where this one is cut.
    """

    @property
    def total(self) -> int | None: ...

    @property
    def is_overdue(self) -> bool: ...

    async def read(self) -> bytes: ...

    def learn(self) -> None: ...


class Source(Protocol):
    """One digest through one repository; ``BlobSource`` is one. ``ranged`` turns false when it is
    seen to ignore Range."""

    @property
    def key(self) -> Key: ...

    @property
    def digest(self) -> Digest: ...

    @property
    def ranged(self) -> bool: ...

    @property
    def turn_bytes(self) -> int: ...

    @property
    def ahead(self) -> int: ...

    def open(
        self, start: int, length: int | None, ticket: Ticket
    ) -> AbstractAsyncContextManager[TurnBody]: ...


class Verdict(Enum):
    """What a failure of one source means for the flight."""

    TRY_AGAIN = auto()
    REFUSED = auto()  # this source and its readers go
    FAILED = auto()  # nothing is left to try


@dataclass(slots=True)
class _Entry:
    source: Source
    tries: int = 0


class Sources:
    """A flight's sources, in the order in which their first readers came."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._named: set[Key] = set()
        self._proved: set[Key] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    @property
    def proved(self) -> Collection[Key]:
        """The repositories that have shown to have the blob."""
        return self._proved

    def add(self, source: Source, *, named: bool) -> Source:
        """Ask ``source`` too; returns the one that stands for its repository here."""
        if named:
            self._named.add(source.key)
        return self._entries.setdefault(source.key, _Entry(source)).source

    def next(self) -> Source:
        """The source to ask: the one that failed least. There must be one."""
        return min(self._entries.values(), key=lambda entry: entry.tries).source

    def judge(self, source: Source, error: PullError, *, has_begun: bool) -> Verdict:
        """Count ``error`` as a failure of ``source``. ``has_begun``: the flight holds bytes."""
        entry = self._entries.get(source.key)
        tries = TRIES
        if entry is not None:
            tries = entry.tries = entry.tries + 1
        if isinstance(error, NotFound) and source.key in self._named and tries < LATE_TRIES:
            return Verdict.TRY_AGAIN  # not missing but late (eventual consistency)
        if isinstance(error, UpstreamBusy) and tries < BUSY_TRIES:
            return Verdict.TRY_AGAIN  # the readers' deadlines are what ends the wait
        if isinstance(error, UpstreamDown):
            # It was not even asked. One that has begun waits; a newcomer is told, unless another
            # source may help.
            is_alone = all(entry.tries for entry in self._entries.values())
            waits = has_begun and tries < BUSY_TRIES
            return Verdict.TRY_AGAIN if waits or not is_alone else Verdict.FAILED
        # A full queue sends newcomers away; a flight that has begun waits.
        if isinstance(error, PASSING) or (isinstance(error, QueueFull) and has_begun):
            exhausted = all(entry.tries >= TRIES for entry in self._entries.values())
            return Verdict.FAILED if exhausted else Verdict.TRY_AGAIN
        return Verdict.FAILED if isinstance(error, QueueFull) else Verdict.REFUSED

    def tries(self, source: Source) -> int:
        """Failures of ``source`` since the last new byte."""
        entry = self._entries.get(source.key)
        return 0 if entry is None else entry.tries

    def went_on(self) -> None:
        """There are new bytes: what failed before them is forgotten."""
        for entry in self._entries.values():
            entry.tries = 0

    def drop(self, source: Source) -> None:
        """The upstream refuses ``source``: it is neither asked nor permitted any more."""
        self._entries.pop(source.key, None)
        self._proved.discard(source.key)
        self._named.discard(source.key)

    def prove(self, source: Source) -> None:
        """The upstream has given bytes through ``source``."""
        self._proved.add(source.key)

    def __repr__(self) -> str:
        return f"<Sources {len(self)}, {len(self._proved)} proved>"
