"""Virtual time, and a directory in it that does one call after the other."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
LATENCY = 0.001
#: Seconds of the directory's one processor for a call, in a crowd, as `fleet_directory` found them.
SERVICE = {
    "look": 0.000314,
    "fill": 0.000126,
    "publish": 0.000150,
    "take": 0.000390,
    "settle": 0.000075,
    "hold": 0.000075,
}


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        call.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    raise AssertionError("it suspends")


class Time:
    """A heap of what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._number = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + seconds, self._number, what, args))

    def run(self) -> None:
        while self._heap:
            self.now, _, what, args = heapq.heappop(self._heap)
            what(*args)


class Directory:
    """A server that does one call after the other, in the order in which they came."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self._free_at = 0.0
        self.calls: Counter[str] = Counter()
        self.by_second: Counter[int] = Counter()
        self.longest_wait = 0.0
        self.busy = 0.0

    def ask(self, name: str, call: Coroutine[Any, Any, T], then: Callable[[T], None]) -> None:
        """Make the call when it is its turn there, and tell what it returned."""
        self.calls[name] += 1
        self._time.after(LATENCY / 2, self._came, name, call, then)

    def _came(self, name: str, call: Coroutine[Any, Any, T], then: Callable[[T], None]) -> None:
        now, service = self._time.now, SERVICE[name]
        begin = max(now, self._free_at)
        self._free_at = begin + service
        self.busy += service
        self.longest_wait = max(self.longest_wait, begin - now)
        self.by_second[int(begin)] += 1
        self._time.after(self._free_at - now, self._done, call, then)

    def _done(self, call: Coroutine[Any, Any, T], then: Callable[[T], None]) -> None:
        self._time.after(LATENCY / 2, then, at_once(call))
