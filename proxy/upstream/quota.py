"""Docker Hub's pull quota: read, and spent slowly once it runs low (DESIGN D6).

Docker Hub counts GETs of manifests per account or address, so many in a window (100 or 200 in six
hours), and says what is left in ``ratelimit-limit: 100;w=21600`` and ``ratelimit-remaining:
20;w=21600``. A HEAD says the same and does not count. Beyond the wall every cold pull fails for
hours, so as it comes near

* pulls are *spaced*: what remains is spread over what is left of the window. A cold pull is slowed
  by that, and at most by ``LONGEST_SPACING``: with pulls left it is never refused, since refusing
  would only be the wall, nearer. A herd queues for its places; whoever would wait longer than
  ``LONGEST_WAIT`` is told when to come again instead of running into its deadline.
* the *last* pulls are kept for what nothing else can stand in for: a tag that is held is served
  stale rather than fetched anew (``pull/manifests.py`` asks ``is_last``).

The window's begin is not told. It is when the count was seen to rise, else when it was first seen,
which errs on the side of a longer rest.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from proxy.oci.errors import Throttled

#: From this share of the limit on pulls are spaced …
LOW_SHARE = 0.2
#: … and from this on they are kept for what cannot be answered otherwise.
LAST_SHARE = 0.05
#: Most seconds between two spaced pulls: one of an image's two manifests waits for it.
LONGEST_SPACING = 5.0
#: Most seconds that a pull waits for its place; the rest of its deadline is for the upstream.
LONGEST_WAIT = 12.0
#: Docker Hub's window, for an answer that names none, in seconds.
USUAL_WINDOW = 21_600.0

_FIELD = re.compile(r"\s*(\d{1,9})\s*(?:;\s*w\s*=\s*(\d{1,9})\s*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Quota:
    """So many pulls in ``window`` seconds, of which ``remaining`` are left; ``began`` is when the
    window began, as far as is known (monotonic seconds)."""

    limit: int
    remaining: int
    window: float
    began: float

    @property
    def is_low(self) -> bool:
        """Is it time to space pulls?"""
        return self.remaining <= self.limit * LOW_SHARE

    @property
    def is_last(self) -> bool:
        """Should pulls be kept for what nothing else can answer?"""
        return self.remaining <= max(1.0, self.limit * LAST_SHARE)

    def rest(self, now: float) -> float:
        """Seconds that are left of the window."""
        return max(0.0, self.began + self.window - now)

    def spacing(self, now: float) -> float:
        """Seconds between two pulls: 0 with plenty left, else what remains is spread over the rest
        of the window. One that has nothing left is as long as its rest."""
        if not self.is_low:
            return 0.0
        return self.rest(now) / max(1, self.remaining)

    def after(self, earlier: Quota | None, now: float) -> Quota:
        """This one, read after ``earlier``: is it the same window?"""
        if earlier is None or earlier.limit != self.limit or earlier.window != self.window:
            return self
        if self.remaining > earlier.remaining or not earlier.rest(now):
            return self
        return replace(self, began=earlier.began)


def read_quota(headers: Mapping[str, str], now: float) -> Quota | None:
    """What an answer says of the quota, as if its window began ``now``; ``None`` if nothing."""
    limit = _FIELD.fullmatch(headers.get("ratelimit-limit", ""))
    remaining = _FIELD.fullmatch(headers.get("ratelimit-remaining", ""))
    if limit is None or remaining is None:
        return None
    window = float(remaining[2] or limit[2] or USUAL_WINDOW)
    return Quota(int(limit[1]), min(int(limit[1]), int(remaining[1])), window, now)


class Pulls:
    """The pulls of one origin: what is left of them, and whose turn to spend one it is.

    ``clock`` is monotonic, in seconds.
    """

    def __init__(self, label: str, *, clock: Callable[[], float]) -> None:
        self.quota: Quota | None = None
        self._label = label
        self._clock = clock
        self._next = float("-inf")  # when the next spaced pull may leave
        self._queue = asyncio.Lock()  # its holder is the next to leave, in the order of arrival
        self._queued = 0

    def heed(self, headers: Mapping[str, str]) -> None:
        """Note what an answer says."""
        now = self._clock()
        read = read_quota(headers, now)
        if read is not None:
            self.quota = read.after(self.quota, now)

    @property
    def is_last(self) -> bool:
        """Should pulls be kept for what nothing else can answer?"""
        quota = self.quota
        return quota is not None and quota.is_last and quota.rest(self._clock()) > 0

    async def place(self) -> None:
        """Wait until one more pull may be spent. Raises ``Throttled``.

        A place is taken when its pull leaves: one that is given up while it waits costs nobody
        anything, and who stands behind it moves up.
        """
        now, spacing = self._clock(), self._spacing()
        wait = self._next - now + self._queued * spacing if spacing else 0.0
        if wait > LONGEST_WAIT:
            raise Throttled(wait, message=f"{self.said}: pulls of it are spaced")
        self._queued += 1
        try:
            async with self._queue:
                if self._spacing() and (wait := self._next - self._clock()) > 0:
                    await asyncio.sleep(wait)
                self._next = self._clock() + self._spacing()
        finally:
            self._queued -= 1

    def _spacing(self) -> float:
        """Seconds from one pull to the next, as things are now."""
        spacing = 0.0 if self.quota is None else self.quota.spacing(self._clock())
        return min(spacing, LONGEST_SPACING)

    @property
    def said(self) -> str:
        """In words, for clients."""
        if self.quota is None:
            return f"{self._label} names no quota"
        return f"{self._label} has {self.quota.remaining} of {self.quota.limit} pulls left"

    def kept(self) -> Throttled:
        """The error for a pull that is not spent, because something else can stand in."""
        rest = 0.0 if self.quota is None else self.quota.spacing(self._clock())
        return Throttled(max(rest, 60.0), message=f"{self.said}, which are kept")

    def __repr__(self) -> str:
        return f"<Pulls {self.said}>"
