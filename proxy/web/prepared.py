"""Prepared answers: a hit in bytes, with gaps for what differs from one request to the next.

An answer's head is the same bytes each time, but for the request's id and the date; so it is kept
in the two pieces around the id, and ends with the date, which all answers of a second share. The
body is the one that the pull layer keeps in memory, not a copy.

``Table`` holds them by request line. It is bounded in number and in bytes; what was put in or
renewed longest ago goes first, and nothing breaks when something goes: the next request is answered
by the handler, which offers it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from proxy.observe.metrics import Tally
from proxy.pull.at_hand import Hit
from proxy.web.rows import Shape

#: Prepared answers, at most, and bytes that each counts beside its body.
MAX_ENTRIES = 16_384
OVERHEAD = 2048


class Prepared:
    """One answer: ``first``, the id, ``second``, the date with the empty line, ``body``."""

    __slots__ = ("body", "fields", "first", "second", "shapes", "size", "tally")

    def __init__(
        self,
        status: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        tally: Tally,
        fields: Mapping[str, object],
    ) -> None:
        """``headers`` in their order, X-Request-Id among them with any value. ``fields`` are those
        of the log line. Raises ``ValueError`` for a value that cannot stand in a header."""
        lines = [f"{name}: {_checked(value)}\r\n" for name, value in headers.items()]
        at = list(headers).index("X-Request-Id")
        self.first = f"HTTP/1.1 {status}\r\n{''.join(lines[:at])}X-Request-Id: ".encode()
        self.second = f"\r\n{''.join(lines[at + 1 :])}".encode()
        self.body = body
        self.size = len(self.first) + len(self.second) + len(body)
        self.tally = tally
        self.shapes: dict[bool, Shape] = {}  # of its log line, by whether its client has a name
        self.fields = {**fields, "status": int(status[:3]), "bytes": len(body)}


def _checked(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"{value[:100]!r} cannot stand in a header")
    return value


class Entry:
    """What a request line is answered with, for as long as ``hit`` is good.

    ``again`` looks for the hit anew, which counts as a use; ``until`` is when that is due, or the
    name's time is up (``expires``). ``unchanged`` is the 304, where there is one.
    """

    __slots__ = (
        "again",
        "expires",
        "held",
        "hit",
        "linked",
        "named",
        "unchanged",
        "until",
        "whole",
    )

    def __init__(
        self,
        hit: Hit,
        again: Callable[[], Hit | None],
        renew_at: float,
        whole: Prepared,
        unchanged: Prepared | None,
    ) -> None:
        self.again = again
        self.whole = whole
        self.unchanged = unchanged
        self.renew(hit, renew_at)

    def renew(self, hit: Hit, renew_at: float) -> None:
        """The same answer was found again; look anew when it is ``renew_at``."""
        self.hit = hit
        self.held, self.linked, self.named = hit.held, hit.linked, hit.name.mark
        self.expires = hit.name.checked + hit.name.ttl
        self.put_off(renew_at)

    def put_off(self, renew_at: float) -> None:
        """Look anew when it is ``renew_at``, if the name's time is not up before."""
        self.until = min(renew_at, self.expires)

    def is_true(self, now: float) -> bool:
        """Is the hit still true, whether or not it is due?"""
        return now < self.expires and self.held.holds and self.linked.holds and self.named.holds

    def is_good(self, now: float) -> bool:
        """Is the hit still true, and not due to be looked for anew?"""
        return now < self.until and self.held.holds and self.linked.holds and self.named.holds

    @property
    def cost(self) -> int:
        """Bytes of memory, about."""
        return OVERHEAD + len(self.whole.body)


class Table:
    """Entries by request line; ``entries`` is for those who only look."""

    def __init__(self, memory: int) -> None:
        """``memory`` in bytes."""
        self.entries: dict[bytes, Entry] = {}
        self._memory = memory
        self.held = 0

    def __len__(self) -> int:
        return len(self.entries)

    def put(self, line: bytes, entry: Entry) -> None:
        """Enter it as the youngest, unless it is too large by itself."""
        self.drop(line)
        if entry.cost > self._memory:
            return
        self.entries[line] = entry
        self.held += entry.cost
        while self.held > self._memory or len(self.entries) > MAX_ENTRIES:
            self.drop(next(iter(self.entries)))

    def drop(self, line: bytes) -> None:
        entry = self.entries.pop(line, None)
        if entry is not None:
            entry.until = -inf  # for those who have answered with it and may do so again
            self.held -= entry.cost

    def __repr__(self) -> str:
        return f"<Table {len(self.entries)} answers, {self.held}/{self._memory} bytes>"
