"""A clock that moves only when it is told to, so that no test has to wait for time to pass."""

from __future__ import annotations


class FakeClock:
    """Stands in for `time.monotonic` or `time.time`: calling it gives the current seconds."""

    def __init__(self, start: float = 1_000.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move time on. Raises ValueError for a negative step: a clock never runs backwards."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        self._now += seconds

    def __repr__(self) -> str:
        return f"<FakeClock {self._now:.3f}>"
