"""The repositories that a flight may take its bytes from (DESIGN D8, D12).

Pure bookkeeping. Each source counts its failures since the flight last got a new byte; the one with
the fewest goes next, so that a failing one rotates. A source is *proved* when its upstream gave
bytes through it, *named* when a manifest of its repository names the digest.

How long a source is tried depends on what it failed with, and each kind is counted apart, because
an upstream that breaks down fails in all of them by turns:

* of its *own*: 5xx, resets, silence. A flight that has not begun ends after ``TRIES`` of them. One
  that has goes on until they have also lasted ``BROKEN_SECONDS`` in a row: so long a restart may
  take, and after that its clients do better elsewhere. A row ends where the upstream was known to
  be down or busy, since then it says nothing about this blob.
* *waiting*: it is down and was not asked, it has too much to do, our queue is full. A flight that
  has begun waits for ``WAIT_SECONDS`` without a byte, in which the failures of probes, its own too,
  change nothing; one that has not waits for a busy upstream only.
* *late*: "not found" of what a manifest names, ``LATE_TRIES`` times. Any other "no" is final.

A flight has *begun* when a client of it may have its 200, with or without a byte.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from proxy.oci.digest import Chunk, Digest
from proxy.oci.errors import (
    NotFound,
    Overloaded,
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

#: Failures of its own of each source, without a single new byte, before a flight fails.
TRIES = 6
#: One that has begun also fails no sooner than when they have lasted so long in a row, in seconds.
BROKEN_SECONDS = 60.0
#: The same for a blob that the upstream does not have yet although a manifest names it.
LATE_TRIES = 4
#: Seconds without a new byte in which an upstream that is down or busy is waited for. No kubelet
#: waits longer than 5 minutes; who does (docker) is told in the end.
WAIT_SECONDS = 600.0
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

    ``is_part``: it is the range that was asked for, not a whole body that was skipped into.
    ``is_overdue``: somebody waits for the slot, and the next turn can go on where this one is cut.
    What is borrowed is good until the next call, or the end of the turn; what is read, for ever.
    ``more`` and ``settle``: see ``haul.py``.
    """

    @property
    def total(self) -> int | None: ...

    @property
    def is_part(self) -> bool: ...

    @property
    def is_overdue(self) -> bool: ...

    async def borrow(self) -> Chunk: ...

    def more(self, most: int) -> Chunk: ...

    def settle(self) -> None: ...

    async def read(self) -> bytes: ...

    def learn(self) -> None: ...


class Source(Protocol):
    """One digest through one repository; ``BlobSource`` is one. ``ranged`` turns false when it is
    seen to ignore Range. ``turn_bytes``: what a turn should ask for, by the speed of those before;
    ``knows_rate``: there were some. ``active``: turns under way where its bytes come from, also
    those of others. ``segments``: the most turns at once, ``spare``: how many more of them could
    begin now. ``widens``: do several turns bring more than one? None: nobody has tried of late;
    ``learn_widening``: what a trial has shown. ``distrust``: its ranges were wrong."""

    @property
    def key(self) -> Key: ...

    @property
    def digest(self) -> Digest: ...

    @property
    def ranged(self) -> bool: ...

    @property
    def turn_bytes(self) -> int: ...

    @property
    def active(self) -> int: ...

    @property
    def knows_rate(self) -> bool: ...

    @property
    def segments(self) -> int: ...

    @property
    def spare(self) -> int: ...

    @property
    def ahead(self) -> int: ...

    @property
    def widens(self) -> bool | None: ...

    def learn_widening(self, widens: bool) -> None: ...

    def distrust(self) -> None: ...

    def open(
        self, start: int, length: int | None, ticket: Ticket
    ) -> AbstractAsyncContextManager[TurnBody]: ...


class Verdict(Enum):
    """What a failure of one source means for the flight."""

    TRY_AGAIN = auto()
    REFUSED = auto()  # this source and its readers go
    FAILED = auto()  # nothing is left to try


@dataclass(slots=True)
class Row:
    """Failures in a row of one source: without a new byte between them. Seconds are monotonic."""

    tries: int = 0  # of any kind
    own: int = 0
    late: int = 0
    is_down: bool = False  # the last one was that it was not even asked
    _since: float = 0.0  # the first one
    _own_since: float | None = None  # the first of its own since it was last down or busy

    def count(self, error: PullError, now: float, *, has_begun: bool) -> None:
        """One more. To a flight that has begun the upstream's own 429 is a wait as well."""
        if not self.tries:
            self._since = now
        self.tries += 1
        self.is_down = isinstance(error, UpstreamDown)
        waits = (UpstreamDown, Overloaded) if has_begun else (UpstreamDown, UpstreamBusy, QueueFull)
        if isinstance(error, waits):
            self._own_since = None
        elif isinstance(error, NotFound):
            self.late += 1
        else:
            self.own += 1
            self._own_since = now if self._own_since is None else self._own_since

    def is_over(self, now: float, *, has_begun: bool) -> bool:
        """Has it failed for so long that there is no more hope?"""
        if not self.tries:
            return False
        if now - self._since >= WAIT_SECONDS:
            return True
        if not has_begun:
            return self.own >= TRIES
        lasted = 0.0 if self._own_since is None else now - self._own_since
        return self.own >= TRIES and lasted >= BROKEN_SECONDS


@dataclass(slots=True)
class _Entry:
    source: Source
    row: Row = field(default_factory=Row)


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
        known = self._entries.get(source.key)
        if known is None:
            known = self._entries[source.key] = _Entry(source)
        return known.source

    def find(self, key: Key) -> Source | None:
        """The one that stands for this repository, if there is one."""
        entry = self._entries.get(key)
        return None if entry is None else entry.source

    def next(self) -> Source:
        """The source to ask: the one that failed least. There must be one."""
        return min(self._entries.values(), key=lambda entry: entry.row.tries).source

    def judge(self, source: Source, error: PullError, now: float, *, has_begun: bool) -> Verdict:
        """Count ``error`` as a failure of ``source``, at ``now`` (monotonic seconds).

        ``has_begun``: a client of the flight may have its 200.
        """
        entry = self._entries.get(source.key)
        row = Row() if entry is None else entry.row
        row.count(error, now, has_begun=has_begun)
        if isinstance(error, NotFound):
            is_late = source.key in self._named and row.late < LATE_TRIES
            return Verdict.TRY_AGAIN if is_late else Verdict.REFUSED
        if not isinstance(error, (*PASSING, QueueFull)):
            return Verdict.REFUSED
        if isinstance(error, QueueFull) and not has_begun:
            return Verdict.FAILED  # it sends newcomers away
        return Verdict.FAILED if self._is_hopeless(now, has_begun) else Verdict.TRY_AGAIN

    def _is_hopeless(self, now: float, has_begun: bool) -> bool:
        """Is nothing left to try? A newcomer is told of an upstream that is known to be down."""
        return all(
            entry.row.is_over(now, has_begun=has_begun) or (entry.row.is_down and not has_begun)
            for entry in self._entries.values()
        )

    def tries(self, source: Source) -> int:
        """Failures of ``source`` since the last new byte."""
        entry = self._entries.get(source.key)
        return 0 if entry is None else entry.row.tries

    def went_on(self) -> None:
        """There are new bytes: what failed before them is forgotten."""
        for entry in self._entries.values():
            entry.row = Row()

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
