"""When a body comes so slowly that another socket is the better bet (fault table, "stalled").

A time-out on silence is not enough: a connection that a middlebox strangles gives a byte now and
then, and lives for ever. So a body is judged by what came in a sliding window: less than ``rate``
bytes a second over ``window`` seconds is a stall.

Only time spent *waiting for the upstream* counts. While we do not read, because the disk, a client
or a byte-rate cap is slow, the window stands still: TCP holds the upstream back then, and whatever
it sent meanwhile is there at once when we read on. Pure: whoever reads tells how long it waited.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

#: Reads closer together than this share of the window are one entry: what is kept is bounded.
GRAIN = 1 / 32


@dataclass(frozen=True, slots=True)
class StallLimit:
    """Slower than ``rate`` bytes a second over ``window`` seconds is a stall."""

    rate: float = 1024.0
    window: float = 30.0

    def __str__(self) -> str:
        return f"less than {self.rate:g} bytes a second came for {self.window:g} s"


class StallMeter:
    """Judges one body: after each wait, ``waited`` seconds long, ``received`` says what came."""

    def __init__(self, limit: StallLimit) -> None:
        self._window = limit.window
        self._enough = limit.rate * limit.window
        self._now = 0.0  # seconds waited in all
        self._sum = 0
        # (waited in all, bytes) of late reads: just as many as make up `_enough`.
        self._reads: deque[tuple[float, int]] = deque()

    def received(self, count: int, waited: float) -> None:
        """``count`` bytes (0: none) after waiting ``waited`` seconds for them."""
        self._now += waited
        if not count:
            return
        reads = self._reads
        if reads and self._now - reads[-1][0] < self._window * GRAIN:
            at, before = reads.pop()
            reads.append((at, before + count))
        else:
            reads.append((self._now, count))
        self._sum += count
        while self._sum - reads[0][1] >= self._enough:
            self._sum -= reads.popleft()[1]

    @property
    def patience(self) -> float:
        """Seconds that may be waited until it is a stall, if nothing comes; not above zero: is one.

        That is when the window has moved past so many reads that the rest is less than enough.
        """
        since = self._reads[0][0] if self._sum >= self._enough else 0.0
        return since + self._window - self._now

    def __repr__(self) -> str:
        return f"<StallMeter {self._sum} bytes, {self.patience:.1f} s left>"
