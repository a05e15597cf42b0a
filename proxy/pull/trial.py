"""Do several connections bring a blob faster than one? Whoever fills for a fleet tries it first.

Where each connection has a limit of its own, further turns bring a blob sooner, and all who wait
for it have it sooner. Where it is a line that is the limit they bring nothing, and the order is
lost: they share that line as TCP has it, and one that begins beside others that fill its queue may
get a fiftieth. Then what others need next comes last: of six nodes with lines of 8 MB/s the one
that filled published nothing for 3.2 of 17.3 s because of that, and all others stood still. They
had all after 1.29 to 1.33 times what one alone takes, and have it after 1.14 to 1.16 times since.

A trial goes beside one turn of the lead, which leaves the last quarter of its span for it. Nothing
else may come to this node meanwhile: of a line that many share two have almost twice as much as
one.

* *alone*    the lead's rate is taken, once it has come to go at one
* *beside*   a further turn brings the end of the span, where nobody is waiting for it, for about
             ``SECONDS``; what both bring until one of them has ended is the rate of the two
* *over*     the two were faster, or they were not; or nobody can say (None), as when the further
             turn got no slot, broke, or was over too soon. Then the next turn has another one.

Where a turn brings less than ``LEAST_TURN`` in its time (1 MB/s) nothing is tried: it would last
too long. There one connection brings all.

Pure but for its waits. Its owner cancels it; what it has begun is its owner's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.pull.segments import Segment

MIB = 1 << 20

#: Bytes of a span that are worth a trial, at least.
LEAST = 16 * MIB
#: Bytes of a turn's worth from which on there are trials, and that the lead asks for then.
LEAST_TURN = 2 * MIB
LEAST_LEAD = 8 * MIB
#: The part of the span that the lead leaves for it.
PART = 4
#: Seconds that a turn has to find its rate, and that are looked at after that, at least.
SETTLE = 0.3
LOOK = 0.5
#: Bytes that are looked at, at least: a slow body is taken in by half a megabyte at a time.
LOOK_BYTES = 3 * MIB
#: The same of the two together.
LOOK_BOTH = 0.3
LOOK_BOTH_BYTES = 2 * MIB
#: Seconds for which the further turn is to go, if two are as fast as one.
SECONDS = 0.75
#: Seconds between two looks.
TICK = 0.05
#: Two that are so many times as fast as one are faster. Of a line that is shared with one or two
#: others, of which this node cannot know, they would have 1.33 or 1.5 times as much.
GAIN = 1.6


class Turn(Protocol):
    """A turn that is looked at. ``has_begun``: its answer has come; ``is_over``: no more of it."""

    @property
    def segment(self) -> Segment: ...

    @property
    def has_begun(self) -> bool: ...

    @property
    def is_over(self) -> bool: ...


class Trial(Protocol):
    """How to find out: ``try_two`` is one."""

    async def __call__(
        self, lead: Turn, begin: Callable[[int], Turn | None], /, *, clock: Callable[[], float]
    ) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class Lead:
    """The lead's turn, which is answered."""

    segment: Segment
    ended: Callable[[], bool]
    has_begun: bool = True

    @property
    def is_over(self) -> bool:
        return self.ended()


def left_for_trial(hole: int) -> int:
    """Bytes at the end of a ``hole`` that the lead leaves for a trial; 0: it is not worth one."""
    return hole // PART if hole >= LEAST else 0


def lead_of_trial(hole: int, most: int) -> int:
    """Bytes of a turn of the lead, of ``most`` bytes else, that has a trial beside it."""
    return min(hole - left_for_trial(hole), max(most, LEAST_LEAD))


async def try_two(
    lead: Turn,
    begin: Callable[[int], Turn | None],
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> bool | None:
    """Are two turns faster than the ``lead`` alone? ``begin`` has a further one bring so many
    bytes; None: there is nothing for it, or no slot. ``clock`` is monotonic; times in seconds."""
    alone = await _rate(lead, clock, sleep)
    if alone is None:
        return None
    further = begin(max(LOOK_BOTH_BYTES, int(alone * SECONDS)))
    while further is not None and not (further.has_begun or further.is_over or lead.is_over):
        await sleep(TICK)
    if further is None or not further.has_begun or lead.is_over:
        return None
    end = further.segment.stop
    since, before = clock(), lead.segment.at + further.segment.at
    while not (further.is_over or lead.is_over):
        await sleep(TICK)
    came, took = lead.segment.at + further.segment.at - before, clock() - since
    was_cut = further.is_over and further.segment.at != end
    if was_cut or took < LOOK_BOTH or came < LOOK_BOTH_BYTES:
        return None
    return came >= GAIN * alone * took


async def _rate(
    turn: Turn, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]
) -> float | None:
    """Bytes a second; None: it has ended before anybody could say."""
    began = clock()
    while not turn.is_over and clock() - began < SETTLE:
        await sleep(TICK)
    since, before = clock(), turn.segment.at
    while not turn.is_over:
        await sleep(TICK)
        came, took = turn.segment.at - before, clock() - since
        if took >= LOOK and came >= LOOK_BYTES:
            return came / took
    return None
