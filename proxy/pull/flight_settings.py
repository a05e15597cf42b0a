"""What a flight may do: sizes, pauses and patience, with what each of them is for."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy.oci.errors import PullError
from proxy.pull.trial import Trial, try_two

#: Bytes of a window (D14): half of it is one turn, the other half lets readers differ.
WINDOW_BYTES = 16 << 20
#: The least that a segment brings, and of which a request is worth its while (D9).
SEGMENT_BYTES = 2 << 20
#: A turn that has so many still to bring is helped when all is taken: that costs its connection.
LONG_SEGMENT = 8 << 20
#: What nobody waits for yet is written in batches of so many bytes (``may_gather``), or what comes
#: in a few whiles (of so many seconds): each write is a hop to a thread, and reading it again too.
GATHER = 0.01
WHILES = 3
#: A reader this far ahead of the mark takes turns of its own.
FAR = 16 << 20
#: How long, in seconds, a turn without Range is held for readers that do not move (D14).
PATIENCE = 30.0
#: The longest pause that a Retry-After may ask for inside a flight, in seconds.
MAX_PAUSE = 30.0


@dataclass(frozen=True, slots=True)
class FlightSettings:
    """What a flight may do: sizes in bytes; ``patience`` in seconds; ``pause`` gives the seconds to
    wait before try ``n`` (1, 2, …); ``clock`` is monotonic; ``gather``: seconds in which bytes that
    nobody waits for yet may come together; ``stopwatch`` tells how long work takes; ``trial`` finds
    out whether several turns bring more than one."""

    on_abandon: str = "finish"
    window_bytes: int = WINDOW_BYTES
    far: int = FAR
    patience: float = PATIENCE
    pause: Callable[[int], float] = lambda n: random.uniform(0, min(5.0, 0.1 * 2 ** min(n, 16)))
    clock: Callable[[], float] = time.monotonic
    segment_bytes: int = SEGMENT_BYTES
    gather: float = GATHER
    stopwatch: Callable[[], float] = time.monotonic
    long_segment: int = LONG_SEGMENT
    trial: Trial = try_two

    def pause_after(self, tries: int, error: PullError) -> float:
        """Seconds to wait after failure number ``tries``: what was asked for, or our own."""
        return max(min(error.retry_after or 0.0, MAX_PAUSE), self.pause(tries))
